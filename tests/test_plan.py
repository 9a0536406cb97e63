import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankopt.errors import PlanError
from rankopt.plan import DENSE, Fingerprint, LayerChoice, Plan

texts = st.text(max_size=12)
choices = st.builds(LayerChoice, texts, st.dictionaries(texts, st.integers(1, 2**31 - 1), max_size=3))
fingerprints = st.none() | st.builds(Fingerprint, texts, texts)
plans = st.builds(
    Plan, st.dictionaries(texts, choices, max_size=5), fingerprints, st.dictionaries(texts, texts, max_size=3)
)


@given(plans)
def test_json_round_trip(plan: Plan) -> None:
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.digest == plan.digest
    assert hash(back) == hash(plan)
    short = Plan.from_dict(json.loads(json.dumps(plan.to_dict(short=True))))
    assert short == plan
    assert short.digest == plan.digest


def test_studies_hold_choices_as_texts() -> None:
    plan = Plan({"a": LayerChoice("tucker2", {"rank_out": 3, "rank_in": 2}), "b": DENSE})
    assert plan.to_dict(short=True)["layers"] == {"a": "tucker2(rank_out=3, rank_in=2)", "b": "dense"}
    odd = Plan({"a": LayerChoice("svd(rank=3)"), "b": LayerChoice("svd", {"r=1, s": 2})})  # would be read as others
    assert Plan.from_dict(odd.to_dict(short=True)) == odd


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda x: st.lists(x) | st.dictionaries(texts, x))
)
def test_any_json_is_read_or_refused(data: object) -> None:
    message = ""
    try:
        Plan.from_json(json.dumps(data))
    except PlanError as error:
        message = error.message
    assert "\n" not in message


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    message = "plan"
    try:
        Plan.from_json(text)
    except PlanError as error:
        message = error.message
    assert message.startswith("plan")


def _with(layers: str, head: str = '"schema": 1, ') -> str:
    return "{" + head + '"layers": ' + layers + "}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (_with('{"a": {"method": "svd", "ranks": {"rank": 3}}, "a": {"method": "dense"}}'), "'a' stands there twice"),
        (_with("{}", '"schema": 1, "schema": 1, '), "stands there twice"),
        (_with('{"a": {"method": "svd", "ranks": {"rank": 3, "rank": 4}}}'), "stands there twice"),
        (_with('{"a": {"method": "svd", "ranks": {"rank": NaN}}}'), "NaN"),
        (_with('{"a": {"method": "svd", "ranks": {"rank": Infinity}}}'), "Infinity"),
        (_with('{"a": {"method": "svd", "ranks": {"rank": 1' + "0" * 5000 + "}}}"), "digits"),
        (_with('{"a": {"method": "svd", "ranks": {"rank": 1' + "0" * 50 + "}}}"), "layers.a"),
        (_with('{"a": {"method": "svd", "ranks": {"rank": true}}}'), "layers.a"),
        (_with('{"a": {"method": "svd", "ranks": {"rank": 3.0}}}'), "layers.a"),
        (_with('{"a": {"method": "svd", "ranks": {"rank": "3"}}}'), "layers.a"),
        (_with('{"a": {"method": "svd", "ranks": {"rank": 0}}}'), "from 1, got 0"),
        (_with('{"a": {"method": "svd", "ranks": {"rank": -4}}}'), "got -4"),
        (_with('{"a": {"method": "svd", "ranks": null}}'), "layers.a.ranks"),
        (_with('{"a": {"method": "svd", "ranks": [3]}}'), "layers.a.ranks"),
        (_with('{"a": {"method": 3}}'), "layers.a"),
        (_with('{"a": {"ranks": {}}}'), "layers.a"),
        (_with('{"a": {"method": "svd", "rank": {}}}'), "layers.a"),
        (_with('{"a": "svd"}'), "layers.a"),
        (_with("[]"), "layers must be"),
        (_with("null"), "layers must be"),
        ('{"schema": 1}', "layers must be"),
        (_with("{}", '"schema": 3, '), "schema must be 1 or 2, got 3"),
        (_with("{}", '"schema": true, '), "schema must be 1"),
        (_with("{}", '"schema": "1", '), "schema must be 1"),
        (_with("{}", ""), "schema must be 1"),
        (_with("{}", '"schema": 1, "extra": 0, '), "unknown key 'extra'"),
        (_with("{}", '"schema": 1, "fingerprint": {"architecture": "x"}, '), "fingerprint"),
        (_with("{}", '"schema": 1, "fingerprint": {"architecture": "x", "weights": 3}, '), "fingerprint"),
        (_with("{}", '"schema": 1, "fingerprint": {"architecture": "x", "weights": "' + "y" * 200 + '"}, '), "short"),
        (_with("{}", '"schema": 1, "skipped": ["a"], '), "skipped"),
        (_with("{}", '"schema": 1, "skipped": {"a": 1}, '), "skipped"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        (_with('{"a": "svd(rank=0)"}', '"schema": 2, '), "layers.a: svd: rank must be a whole number from 1"),
        (_with('{"a": "svd(rank=1, rank=2)"}', '"schema": 2, '), "layers.a: 'svd(rank=1, rank=2)' names a rank twice"),
        (_with('{"a": "svd(rank=1"}', '"schema": 2, '), "layers.a: 'svd(rank=1' is no choice such as"),
        (_with('{"a": "svd", "b": 3}', '"schema": 2, '), "layers.b must be"),
        (_with('{"a": "svd(rank=1)"}'), "layers.a must be"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "needs an object, got list"),
        ("null", "needs an object, got NoneType"),
    ],
)
def test_hostile_json(text: str, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text, "p.json")
    assert says in caught.value.message
    assert caught.value.message.startswith("p.json")
    assert len(caught.value.message) < 400


def test_too_large() -> None:
    with pytest.raises(PlanError, match="larger than 64 MiB"):
        Plan.from_json(" " * (64 * 2**20 + 1))


def test_load(tmp_path: Path) -> None:
    plan = Plan({"a": LayerChoice("svd", {"rank": 3})}, Fingerprint("x", "y"), {"b": "why"})
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.load(tmp_path) == Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(PlanError, match="can't be read"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not a text file"):
        Plan.load(tmp_path / "binary")


def test_digest_is_of_the_decisions() -> None:
    a = Plan({"a": LayerChoice("tucker2", {"rank_out": 3, "rank_in": 2}), "b": DENSE})
    b = Plan({"a": LayerChoice("tucker2", {"rank_in": 2, "rank_out": 3})}, Fingerprint("x", "y"))
    assert a.digest == b.digest != Plan({"a": LayerChoice("tucker2", {"rank_in": 3, "rank_out": 2})}).digest
    assert len(a.digest) == 12


def test_reading_a_plan() -> None:
    plan = Plan({"a": LayerChoice("svd", {"rank": 3}), "b": DENSE, "c": LayerChoice("svd", {"rank": 1})})
    assert plan["a"].ranks == {"rank": 3}
    assert plan["not there"] == DENSE
    assert list(plan) == ["a", "b", "c"]
    assert list(plan.changed()) == ["a", "c"]
    assert plan.methods() == {"svd": 2, "dense": 1}
    assert str(plan["a"]) == "svd(rank=3)"
    assert str(DENSE) == "dense"


@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "3", None, 2**31])
def test_ranks_are_positive_whole_numbers(rank: object) -> None:
    with pytest.raises(PlanError, match="svd: rank must be a whole number"):
        LayerChoice("svd", {"rank": rank})  # type: ignore[dict-item]


def test_equal_choices_hash_alike() -> None:
    assert hash(LayerChoice("t", {"a": 1, "b": 2})) == hash(LayerChoice("t", {"b": 2, "a": 1}))
