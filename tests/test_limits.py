import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankopt.errors import LimitError
from rankopt.limits import measured_key, parse_limit


@pytest.mark.parametrize(
    ("text", "quantity", "value", "relative", "target"),
    [
        ("macs<=50%", "macs", 0.5, "dense", None),
        ("params <= 0.25x", "params", 0.25, "dense", None),
        ("macs<=1.5G", "macs", 1.5e9, None, None),
        ("macs<=300", "macs", 300.0, None, None),
        ("latency<=4ms", "latency", 4.0, None, None),
        ("latency@onnxruntime<=4000us", "latency", 4.0, None, "onnxruntime"),
        ("latency_p95@cuda.fp16 <= .5s", "latency_p95", 500.0, None, "cuda.fp16"),
        ("memory<=1GiB", "memory", 1024.0, None, None),
        ("memory<=512KiB", "memory", 0.5, None, None),
        ("accuracy>=-0.5", "accuracy", -0.5, "change", None),
        ("accuracy>=+1", "accuracy", 1.0, "change", None),
        ("accuracy>=90.5", "accuracy", 90.5, None, None),
        ("kl<=1e-2", "kl", 0.01, None, None),
    ],
)
def test_reads(text: str, quantity: str, value: float, relative: str | None, target: str | None) -> None:
    limit = parse_limit(text)
    assert (limit.quantity, limit.relative, limit.target) == (quantity, relative, target)
    assert limit.value == pytest.approx(value)
    assert str(limit) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "macs",
        "macs<50%",
        "macs==50%",
        "macs>=50%",
        "accuracy<=90",
        "speed<=3ms",
        "latency<=4",
        "latency<=4 min",
        "macs<=50ms",
        "macs<=nan",
        "macs<=1e999",
        "macs<=0%",
        "macs<=-5%",
        "latency<=-1ms",
        "macs@cuda<=50%",
        "accuracy>=-5%",
        "accuracy>=50%",
        "kl<=5%",
        "macs<=50% and params<=50%",
        "macs<=50%\nparams<=1K",
        "latency@<=4ms",
        "MACS<=50%",
        "macs<=1_000",
        None,
        3,
    ],
)
def test_refuses_and_repeats_what_was_typed(text: object) -> None:
    with pytest.raises(LimitError) as caught:
        parse_limit(text)  # type: ignore[arg-type]
    assert repr(text) in str(caught.value)
    assert "\n" not in caught.value.message


def test_bound_and_violation() -> None:
    dense = {"macs": 200.0, "accuracy": 91.0, "latency_ms@cuda": 8.0}
    half = parse_limit("macs<=50%")
    assert half.bound(dense) == 100
    assert half.violation({"macs": 100.0}, dense) == 0
    assert half.violation({"macs": 150.0}, dense) == pytest.approx(0.5)
    assert half.violation({"macs": 50.0}, dense) == pytest.approx(-0.5)
    change = parse_limit("accuracy>=-0.5")
    assert change.bound(dense) == pytest.approx(90.5)
    assert change.violation({"accuracy": 90.0}, dense) > 0
    assert change.violation({"accuracy": 92.0}, dense) < 0
    assert parse_limit("latency@cuda<=0.5x").bound(dense) == 4
    assert parse_limit("accuracy>=90").bound({}) == 90


def test_unknown_values_violate_and_unknown_dense_raises() -> None:
    limit = parse_limit("macs<=50%")
    assert limit.violation({}, {"macs": 1.0}) == math.inf
    assert limit.violation({"macs": math.nan}, {"macs": 1.0}) == math.inf
    with pytest.raises(LimitError, match="latency@cuda is not known"):
        parse_limit("latency@cuda<=50%").bound({"latency": 3.0})


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    value, message = 0.0, ""
    try:
        value = parse_limit(text).value
    except LimitError as error:
        message = error.message
    assert math.isfinite(value)
    assert "\n" not in message


@given(
    st.sampled_from([("latency", "<=", {"ms": 1, "us": 1e-3, "s": 1e3}), ("memory", "<=", {"MiB": 1, "GiB": 1024})]),
    st.floats(1e-6, 1e6),
    st.data(),
)
def test_units_scale(entry: tuple[str, str, dict[str, float]], number: float, data: st.DataObject) -> None:
    quantity, op, units = entry
    unit = data.draw(st.sampled_from(sorted(units)))
    spaces = data.draw(st.sampled_from(["", " ", "  "]))
    limit = parse_limit(f"{quantity}{spaces}{op}{spaces}{number!r}{spaces}{unit}")
    assert limit.value == pytest.approx(number * units[unit])
    assert limit.violation({measured_key(quantity): limit.value}, {}) <= 0
