"""Plans that a study starts with: where they come from, that they are measured first and once, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import CODE, STUDY
from test_space import GROUPS, cost, made
from test_strategies import NAMES, Run, setting
from test_study import DENSE, FACTS, LIMITS, measure

import rankopt
from rankopt import ledger, study
from rankopt.candidates import Group
from rankopt.cli import main
from rankopt.errors import InputError, PlanError
from rankopt.layers import find_layers
from rankopt.plan import LayerChoice, Plan
from rankopt.plan_file import write_plan
from rankopt.plan_sources import plans_named
from rankopt.result import Entry
from rankopt.strategies import strategy_for
from rankopt.strategies.strategy import Setting, Standing
from rankopt.study_file import load_study

# the loop, over made-up layers ----------------------------------------------------------------------------------------


def plan_of(*picks: int) -> Plan:
    """The given choice of the first layers, the rest dense."""
    space = made()
    dense = [g.choices.index(LayerChoice("dense")) for g in GROUPS]
    return space.plan([*picks, *dense[len(picks) :]])


CHEAP = made({"macs": 0.6}).plan([int(g.macs.argmin()) for g in GROUPS])
OTHER = made({"macs": 0.6}).plan([int(g.macs.argsort()[1]) for g in GROUPS])
TOO_DEAR = plan_of(3)


def run(url: str, start: list[Plan], trials: int = 12, evaluate: Any = measure, by: str = "auto") -> list[Any]:
    opened = ledger.open_study(ledger.open_storage(url), "s", ("kl", "macs"), FACTS, DENSE, LIMITS)
    given = Setting(made({"macs": 0.6}), ("kl", "macs"), LIMITS, DENSE, trials, start=start)
    study.run(opened, given, evaluate, by=by)
    trials = opened.get_trials(deepcopy=False)
    return [t for t in trials if t.state.is_finished() and t.user_attrs.get("reason") != "interrupted"]


def digests(trials: list[Any]) -> list[str]:
    return [Plan.from_dict(t.user_attrs["plan"]).digest for t in trials]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "s.db")


def test_they_are_measured_first_count_and_stand_in_the_ledger(url: str) -> None:
    trials = run(url, [CHEAP, TOO_DEAR, OTHER])
    assert len(trials) == 12
    assert digests(trials)[:3] == [CHEAP.digest, TOO_DEAR.digest, OTHER.digest]
    assert [t.user_attrs["proposal"]["by"] for t in trials].count("start") == 3
    assert trials[0].values == [measure(CHEAP).measurements[q] for q in ("kl", "macs")]
    assert trials[1].user_attrs["reason"] == "stopped at the limit macs<=60%"
    assert digests(ledger_plans(url)) == digests(trials)[:3]
    assert ledger.proposed(ledger.open_storage(url), "none of that name", "start") == []


def ledger_plans(url: str) -> list[Any]:
    found = ledger.proposed(ledger.open_storage(url), "s", "start")
    return [type("T", (), {"user_attrs": {"plan": plan.to_dict()}}) for plan in found]


def test_none_is_measured_twice_when_the_study_goes_on(url: str) -> None:
    asked: list[str] = []

    def once(plan: Plan, *args: Any) -> Any:
        asked.append(plan.digest)
        return measure(plan, *args)

    run(url, [CHEAP], 1, once)
    trials = run(url, [CHEAP, OTHER], 12, once)
    assert digests(trials)[:2] == [CHEAP.digest, OTHER.digest]
    assert len(asked) == len(set(asked)) == len(set(digests(trials)))
    assert digests(run(url, [CHEAP, OTHER], 12, once)) == digests(trials)


def test_one_that_failed_is_not_tried_again(url: str) -> None:
    def refuses(plan: Plan, *args: Any) -> Any:
        if plan.digest == CHEAP.digest:
            raise PlanError("no")
        return measure(plan, *args)

    run(url, [CHEAP], 3, refuses)
    assert digests(run(url, [CHEAP], 6, refuses)).count(CHEAP.digest) == 1


@pytest.mark.parametrize("at", [0, 1, 2, 7])
def test_after_an_interruption_the_same_follows(tmp_path: Path, at: int) -> None:
    whole = run(str(tmp_path / "whole.log"), [CHEAP, OTHER], 14)
    left = [at]

    def stops(plan: Plan, *args: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return measure(plan, *args)

    parts = str(tmp_path / "parts.log")
    with pytest.raises(KeyboardInterrupt):
        run(parts, [CHEAP, OTHER], 14, stops)
    assert digests(run(parts, [CHEAP, OTHER], 14)) == digests(whole)


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_is_what_the_strategy_does_with_the_trials_that_are_left(name: str) -> None:
    given = setting({"macs": 0.7}, 22)
    started = Run(name, given)
    started.strategy = strategy_for(name, replace(given, start=[CHEAP, OTHER]))
    found = started.go(22).history
    assert [p.by for p, _ in found[:3]] == ["start", "start", name if name != "mixed" else "correct"]
    first = 20 // 3  # solved plans
    alone = Run(name, setting({"macs": 0.7}, 20)).go(first).digests
    if name not in ("plain", "mixed", "relinearize"):  # those look at what was measured from the beginning
        assert started.digests[2 : 2 + first] == alone
    if name in ("mixed", "relinearize"):
        assert set(alone) & set(started.digests)


def test_more_plans_than_trials(url: str) -> None:
    assert digests(run(url, [CHEAP, OTHER], 1)) == [CHEAP.digest]


def test_a_plan_that_is_known_is_not_proposed() -> None:
    given = replace(setting({"macs": 0.7}, 12), start=[CHEAP])
    known = [Entry(0, CHEAP, measure(CHEAP).measurements, True)]
    assert strategy_for("correct", given).propose(Standing(1, known)).by == "correct"
    under_way = Standing(1, [], frozenset({CHEAP.digest}))
    assert strategy_for("correct", given).propose(under_way).by == "correct"


def test_a_plan_is_of_a_space_only_with_all_its_layers() -> None:
    space = made()
    (tied,) = (g for g in GROUPS if len(g.layers) == 2)
    same = {la.name: tied.choices[3] for la in tied.layers}
    assert space.picks(Plan(same)) is not None
    assert space.picks(Plan({tied.layers[0].name: tied.choices[3]})) is None
    assert space.picks(Plan({tied.layers[0].name: tied.choices[3], tied.layers[1].name: tied.choices[4]})) is None
    assert space.picks(Plan({"elsewhere": tied.choices[3]})) is None
    assert space.picks(Plan({"elsewhere": LayerChoice("dense")})) is not None
    picked = space.picks(Plan(same))
    assert picked is not None
    assert cost(space.plan(picked.tolist()), "macs") == pytest.approx(space.cost(Plan(same)))


# a search of a model --------------------------------------------------------------------------------------------------


def net(seed: int = 0, width: int = 32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(12, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU(),
        torch.nn.Linear(width, 4),
    ).eval()  # fmt: skip


DATA = torch.randn(120, 12, generator=torch.Generator().manual_seed(1))
SPACE = {"methods": ["svd"], "keep": [0.25, 0.5, 0.75]}
OFF_THE_GRID = Plan({"2": LayerChoice("svd", {"rank": 7}), "0": LayerChoice("svd", {"rank": 3})})


def searched(start: Any, space: Any = SPACE, **options: Any) -> rankopt.Result:
    given = {"limits": ["macs<=80%"], "trials": 5, "space": space, "calibration": DATA, **options}
    return rankopt.search(net(), DATA[:1], start=start, **given)


def test_ranks_beside_the_grid_become_candidates() -> None:
    result = searched([OFF_THE_GRID])
    first = result.entries[0]
    assert first.plan.changed() == OFF_THE_GRID.changed()
    small = rankopt.apply(net(), OFF_THE_GRID)
    assert first.measurements["params"] == sum(p.numel() for p in small.parameters())
    space = first._owner.space
    assert space.picks(first.plan) is not None
    assert space.predicted(first.plan) > 0
    plain = searched([])
    assert plain.entries[0]._owner.space.picks(OFF_THE_GRID) is None


def test_choices_that_the_space_does_not_offer_are_measured_and_no_more() -> None:
    space = {**SPACE, "rules": [{"match": "0", "dense": True}, {"match": "2", "methods": ["tucker2"]}]}
    result = searched([OFF_THE_GRID], space={**space, "rules": space["rules"][:1]})
    first = result.entries[0]
    assert first.plan.changed() == OFF_THE_GRID.changed()
    assert first._owner.space.picks(first.plan) is None
    assert float(first.measurements["kl"] or 0) > 0
    assert first.build()(DATA).shape == (120, 4)


def test_other_weights_of_the_same_architecture_will_do(tmp_path: Path) -> None:
    other = net(1)
    plan = replace(OFF_THE_GRID, fingerprint=rankopt.layers.fingerprint(other, find_layers(other, DATA[:1])))
    write_plan(plan, tmp_path / "p.yaml")
    first = searched([tmp_path / "p.yaml"], trials=1).entries[0]
    assert first.plan.changed() == OFF_THE_GRID.changed()
    assert first.plan.fingerprint != plan.fingerprint
    first.save(tmp_path / "m")  # a plan of this model, which loads
    assert torch.equal(rankopt.load(tmp_path / "m", net())(DATA), first.build()(DATA))


def test_what_does_not_fit_is_refused_with_one_line(tmp_path: Path) -> None:
    wide = net(0, 40)
    of_wide = replace(OFF_THE_GRID, fingerprint=rankopt.layers.fingerprint(wide, find_layers(wide, DATA[:1])))
    for plan, said in (
        (of_wide, r"start: plan 1: made for another architecture"),
        (Plan({"nine": LayerChoice("svd", {"rank": 2})}), "start: plan 1: 'nine': the model has no"),
        (Plan({"2": LayerChoice("svd", {"rank": 99})}), "start: plan 1: 2: svd needs"),
        (Plan({"2": LayerChoice("magic", {"rank": 9})}), "magic"),
    ):
        with pytest.raises(PlanError, match=said) as caught:
            searched([plan])
        assert "\n" not in caught.value.message
    for given in (3, [3], {"a": 1}, [None]):
        with pytest.raises(InputError, match="start: needs a list of plans"):
            searched(given)
    with pytest.raises(PlanError, match="nowhere"):
        searched(tmp_path / "nowhere.json")


def test_resumed_without_them_they_are_as_much_part_of_it(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    searched([OFF_THE_GRID], storage=url, trials=3)
    again = searched([], storage=url, trials=8)
    assert again.entries[0].plan.digest == OFF_THE_GRID.digest
    assert again.entries[0]._owner.space.picks(OFF_THE_GRID) is not None


# study files and the command line -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    return tmp_path


def test_a_study_starts_with_what_another_one_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(folder / "tiny.yaml"), "--out", str(folder / "m"), "--quiet"]) == 0
    assert main(["export", str(folder / "tiny.yaml"), "--trial", "1", "--out", str(folder / "p.yaml"), "-q"]) == 0
    old = ledger.read_result(load_study(folder / "tiny.yaml").storage_url, "tiny")
    wanted = {
        "p.yaml": old.entries[1].plan.digest,
        "m": old.best().plan.digest,
        "tiny.yaml": old.best().plan.digest,
        "tiny.yaml:0": old.entries[0].plan.digest,
    }
    for name, digest in wanted.items():
        ((_, plan),) = plans_named([name], folder, load_study).items()
        assert plan.digest == digest
    front = plans_named(["tiny.yaml:front"], folder, load_study)
    assert {p.digest for p in front.values()} == {e.plan.digest for e in old.front}
    (folder / "next.yaml").write_text(yaml.safe_dump({**STUDY, "seed": 5, "start": list(wanted)}))
    capsys.readouterr()
    assert main(["search", str(folder / "next.yaml"), "--json"]) == 0
    json.loads(capsys.readouterr().out)
    new = ledger.read_result(load_study(folder / "next.yaml").storage_url, "next")
    first = list(dict.fromkeys(wanted.values()))
    assert [e.plan.digest for e in new.entries[: len(first)]] == first
    assert len(new.entries) <= STUDY["trials"]  # type: ignore[operator]
    # on the command line, from the current folder, in place of the file's
    args = ["search", str(folder / "next.yaml"), "--storage", str(folder / "other.db"), "--quiet"]
    assert main([*args, "--start", str(folder / "p.yaml")]) == 0
    other = ledger.read_result(f"sqlite:///{folder}/other.db", "next")
    assert other.entries[0].plan.digest == wanted["p.yaml"]


def test_what_names_no_plan_is_one_line_before_anything_is_searched(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.json").write_text("{")
    (folder / "text.yaml").write_text("a: 1")
    (folder / "wide.yaml").write_text(
        yaml.safe_dump({"schema": 1, "layers": {"9": {"method": "svd", "ranks": {"rank": 1}}}})
    )
    cases = {
        "none.json": "none.json: can't be read: No such file",
        "none.yaml": "none.yaml",
        "bad.json": "bad.json: not valid JSON",
        "text.yaml": "unknown key 'a'",
        "wide.yaml": "wide.yaml: '9': the model has no",
        "wide.yaml:3": "is no study",
        "tiny.yaml": "nothing was searched yet",
        ".": "manifest",
    }
    for name, said in cases.items():
        assert main(["search", str(folder / "tiny.yaml"), "--start", str(folder / name)]) == 2, name
        err = capsys.readouterr().err
        assert said in err, (name, err)
        assert len([line for line in err.splitlines() if line.startswith("rankopt: error: ")]) == 1
        assert not (folder / "runs" / "tiny.db").exists()
    assert main(["search", str(folder / "tiny.yaml"), "--quiet", "--trials", "2"]) == 0
    assert main(["search", str(folder / "tiny.yaml"), "--start", f"{folder}/tiny.yaml:77"]) == 2
    assert "has no finished trial '77'" in capsys.readouterr().err
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**STUDY, "start": [3]}))
    assert main(["search", str(folder / "tiny.yaml")]) == 2
    assert "start.0" in capsys.readouterr().err


def test_groups_keep_their_choices_in_order() -> None:
    """Optuna refuses a trial whose parameter offers other methods than before, or in another order."""
    with_start, without = (searched(start).entries[0]._owner.groups for start in ([OFF_THE_GRID], []))
    one: Group
    for one, two in zip(with_start, without, strict=True):
        assert one.choices[: len(two.choices)] == two.choices
        assert {c.method for c in one.choices} == {c.method for c in two.choices}
