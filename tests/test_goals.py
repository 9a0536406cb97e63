"""What a search may strive for, with and without a target."""

from __future__ import annotations

from typing import Any

import pytest

from rankopt.errors import InputError, LimitError
from rankopt.goals import checked_limit, checked_objectives
from rankopt.limits import parse_limit


@pytest.mark.parametrize(
    ("metric", "labels", "expected"),
    [
        (None, [], ("kl", "macs")),
        ("accuracy", [], ("accuracy", "macs")),
        (len, [], ("accuracy", "macs")),
        (None, ["torch"], ("kl", "latency")),
        ("accuracy", ["torch", "pi"], ("accuracy", "latency")),
    ],
)
def test_defaults(metric: Any, labels: list[str], expected: tuple[str, ...]) -> None:
    assert checked_objectives(None, metric, labels) == expected
    assert checked_objectives([], metric, labels) == expected


@pytest.mark.parametrize(
    "given",
    [
        ["kl", "latency"],
        ["accuracy", "latency_p95"],
        ["kl", "latency@pi", "latency@torch"],
        ["kl", "latency_p95@pi"],
        ["accuracy", "kl", "macs", "params", "memory"],
    ],
)
def test_what_is_measured_can_be_striven_for(given: list[str]) -> None:
    assert checked_objectives(given, "accuracy", ["torch", "pi"]) == tuple(given)


@pytest.mark.parametrize(
    ("given", "metric", "labels", "says"),
    [
        (["kl", "latency"], None, [], "objectives: latency is not measured without a target"),
        (["kl", "latency@pi"], None, [], "objectives: latency@pi is not measured without a target"),
        (["kl", "memory"], None, [], "objectives: memory is not measured without a target"),
        (["kl", "latency@gpu"], None, ["torch", "pi"], "latency@pi, latency_p95@torch"),
        (["kl", "latency@gpu"], None, ["torch"], "got 'latency@gpu'"),
        (["accuracy", "latency"], None, ["torch"], "got 'accuracy'"),
        (["latency"], None, ["torch"], "accuracy or kl is among them or has a limit, got latency"),
        (["kl", "latency", "latency"], None, ["torch"], "each stands once"),
        ("kl", None, ["torch"], "needs a list out of kl, "),
        (["kl", "memory@torch"], None, ["torch"], "got 'memory@torch'"),
        (["kl", "macs@torch"], None, ["torch"], "got 'macs@torch'"),
        (["kl", 3], None, [], "got 3"),
    ],
)
def test_what_is_not_is_refused(given: Any, metric: Any, labels: list[str], says: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_objectives(given, metric, labels)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "metric", "labels", "says"),
    [
        ("latency<=4ms", None, [], "limit 'latency<=4ms': latency is not measured without a target"),
        ("latency_p95<=50%", None, [], "latency_p95 is not measured without a target"),
        ("latency@pi<=4ms", None, [], "latency is not measured without a target"),
        ("memory<=4MiB", None, [], "memory is not measured without a target"),
        ("latency@gpu<=4ms", None, ["torch", "pi"], "no target is called 'gpu'; there are torch, pi"),
        ("accuracy>=-1", None, ["torch"], "accuracy needs a metric other than kl"),
    ],
)
def test_limits_that_can_not_be_checked(limit: str, metric: Any, labels: list[str], says: str) -> None:
    with pytest.raises(LimitError) as caught:
        checked_limit(parse_limit(limit), metric, labels)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "limit", ["latency<=4ms", "latency@pi<=0.5x", "latency_p95@torch<=3ms", "memory<=64MiB", "macs<=50%", "kl<=1"]
)
def test_limits_that_can(limit: str) -> None:
    parsed = parse_limit(limit)
    assert checked_limit(parsed, None, ["torch", "pi"]) is parsed


def test_quality_may_be_a_limit_alone() -> None:
    """Minimize latency with accuracy kept."""
    limit = [parse_limit("accuracy>=-0.5")]
    assert checked_objectives(["latency"], "accuracy", ["torch"], limit) == ("latency",)
    with pytest.raises(InputError, match="accuracy or kl is among them or has a limit"):
        checked_objectives(["latency"], "accuracy", ["torch"], [parse_limit("macs<=50%")])
