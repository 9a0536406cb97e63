"""Everything that a search measures on its targets, on two that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from made_up import MadeUp, Small, groups_of

from rankopt.devices import Devices
from rankopt.errors import InputError, LimitError
from rankopt.layers import find_layers
from rankopt.limits import parse_limit
from rankopt.measurement import Measurement
from rankopt.plan import Plan
from rankopt.surgery import apply
from rankopt.targets.target import Subject
from rankopt.timing import Effort

torch.manual_seed(0)
MODEL = Small().eval()
EXAMPLE = torch.zeros(1, 3, 16, 16)
LAYERS = find_layers(MODEL, EXAMPLE)
GROUPS = groups_of(LAYERS)
PLAN = Plan({g.name: g.choices[3] for g in GROUPS})
PARAMS = float(sum(p.numel() for p in MODEL.parameters()))


def devices(*targets: MadeUp, prepared: bool = True, **options: Any) -> Devices:
    given = targets or (MadeUp(), MadeUp(label="pi", mac=3.0, call=0.1))
    found = Devices(given, MODEL, LAYERS, (EXAMPLE,), cache=False, **options)
    if prepared:
        found.prepare(GROUPS)
    return found


def test_two_targets_of_one_label_are_refused() -> None:
    with pytest.raises(InputError, match="targets: two are called 'made-up'; give one of them another label"):
        devices(MadeUp(), MadeUp(threads=2))
    assert devices(MadeUp(), MadeUp(label="b"), prepared=False).labels == ["made-up", "b"]


def test_without_targets_there_is_nothing() -> None:
    found = Devices([], MODEL, LAYERS, (EXAMPLE,), memory=True)
    assert not found
    assert found.dense == {}
    assert found.conditions == {}
    assert found.predicted(PLAN) == {}
    assert found.measured(PLAN) == {}
    assert found.bounds([parse_limit("macs<=50%")], PARAMS) == {}
    assert found.report() == []


def test_a_target_that_is_not_there_says_so() -> None:
    class Gone(MadeUp):
        def conditions(self) -> dict[str, str]:
            raise InputError("target made-up: the device is not connected; plug it in")

    with pytest.raises(InputError, match="the device is not connected; plug it in"):
        devices(Gone())


def test_the_first_target_needs_no_label() -> None:
    found = devices(memory=True)
    assert set(found.dense) == {
        *(f"{key}{at}" for key in ("latency_ms", "latency_p95_ms", "latency_kept", "latency_spread")
          for at in ("", "@made-up", "@pi")),
        "peak_memory_mib", "memory_kept",
    }  # fmt: skip
    measured = found.measured(PLAN)
    assert set(measured) == set(found.dense)
    for values in (found.dense, measured, found.predicted(PLAN)):
        for key, value in values.items():
            if key.endswith("@made-up"):
                assert values[key.removesuffix("@made-up")] == value
    assert measured["latency_ms"] != measured["latency_ms@pi"]
    assert measured["latency_kept@pi"] == pytest.approx(measured["latency_ms@pi"] / found.dense["latency_ms@pi"])
    assert measured["memory_kept"] == measured["peak_memory_mib"] / found.dense["peak_memory_mib"]
    assert found.named(None).label == "made-up"
    assert found.named("pi").label == "pi"
    with pytest.raises(LimitError, match=r"limit 'x': no target is called 'gpu'; there are made-up, pi"):
        found.named("gpu", "x")


def test_predictions_and_costs_are_there_for_every_target() -> None:
    found = devices()
    predicted = found.predicted(PLAN)
    for label in found.labels:
        key = f"latency_ms@{label}"
        parts = [found.costs(g)[key][g.choices.index(PLAN[g.name])] for g in GROUPS]
        assert sum(parts) + found.fixed[key] == pytest.approx(predicted[f"latency_predicted_ms@{label}"])
        assert predicted[f"latency_predicted_ms@{label}"] == pytest.approx(found.measured(PLAN)[key], rel=0.01)
        assert found.totals[key] == found.dense[key]


def test_nothing_is_predicted_of_what_was_not_prepared() -> None:
    found = devices(prepared=False)
    assert found.predicted(PLAN) == {}
    assert not found.exceeds(PLAN, parse_limit("latency<=1%"))
    assert found.measured(PLAN)["latency_ms"] > 0


def bounds(found: Devices, *limits: str) -> dict[str, float]:
    return found.bounds([parse_limit(text) for text in limits], PARAMS)


def test_limits_become_bounds() -> None:
    found = devices(MadeUp(), MadeUp(label="pi", mac=3.0), memory=True)
    dense = found.dense
    assert bounds(found, "macs<=50%", "kl<=1") == {}
    assert bounds(found, "latency<=0.6x") == {"latency_ms@made-up": 0.6 * dense["latency_ms"]}
    assert bounds(found, "latency@pi<=2ms", "latency<=0.6x", "latency<=0.1ms") == {
        "latency_ms@pi": 2.0,
        "latency_ms@made-up": 0.1,
    }
    assert bounds(found, "latency<=0.1ms", "latency<=0.6x") == {"latency_ms@made-up": 0.1}
    less = bounds(found, "memory<=95%")["params"]
    assert less == pytest.approx(PARAMS - 0.05 * dense["peak_memory_mib"] * 2**20 / 4)
    assert bounds(found, f"memory<={dense['peak_memory_mib']}MiB")["params"] == pytest.approx(PARAMS)


def test_a_percentile_is_bounded_by_its_share_of_the_median() -> None:
    class Tailed(MadeUp):
        def told(self, time: float, first: float, other: bool) -> Measurement:
            return replace(super().told(time, first, other), p95=1.5 * time)

    found = devices(Tailed())
    assert found.dense["latency_p95_ms"] == pytest.approx(1.5 * found.dense["latency_ms"])
    key = "latency_ms@made-up"
    assert bounds(found, "latency_p95<=3ms") == {key: pytest.approx(2.0)}
    assert bounds(found, "latency_p95<=0.6x") == {key: pytest.approx(0.6 * found.dense["latency_ms"])}
    assert bounds(found, "latency_p95<=3ms", "latency<=1.9ms") == {key: pytest.approx(1.9)}
    assert found.predicted(PLAN)["latency_p95_predicted_ms"] == pytest.approx(
        1.5 * found.predicted(PLAN)["latency_predicted_ms"]
    )


def test_how_far_predictions_are_off_near_a_bound() -> None:
    found = devices(MadeUp())
    (latency,) = found.latencies
    key, dense = "latency_ms@made-up", found.dense["latency_ms"]
    plans = [Plan({g.name: g.choices[n] for g in GROUPS}) for n in range(1, 9)]
    latency._probes.clear()
    took = {}
    for plan in plans:
        took[plan.digest] = 1.07 * latency.predict(plan) / dense
        latency.recall(plan, took[plan.digest], 1.3 * took[plan.digest])
    bound = 1.07 * latency.predict(plans[4])
    found.bounds([parse_limit(f"latency<={bound}ms")], PARAMS)
    assert found.ratio(key, bound) == pytest.approx(1.07, rel=0.01)
    assert found.ratio(key, 10 * dense) == 1.0
    # The same bound, meant for the 95th percentile, whose plans are those near it in their 95th percentile.
    tail = 1.3 * bound
    found.bounds([parse_limit(f"latency_p95<={tail}ms")], PARAMS)
    assert found.ratio(key, tail) == pytest.approx(1.07 * 1.3, rel=0.01)


def test_what_exceeds_a_limit_for_certain() -> None:
    found = devices(MadeUp())
    predicted = found.predicted(PLAN)["latency_predicted_ms"]
    assert found.exceeds(PLAN, parse_limit(f"latency<={0.8 * predicted}ms"))
    assert not found.exceeds(PLAN, parse_limit(f"latency<={1.01 * predicted}ms"))
    assert not found.exceeds(PLAN, parse_limit("latency_p95<=1us"))  # measured, not predicted
    assert not found.exceeds(PLAN, parse_limit("macs<=1"))
    found.latencies[0].error = None
    assert not found.exceeds(PLAN, parse_limit(f"latency<={0.95 * predicted}ms"))


class Slowed(MadeUp):
    """Slower from some moment on: ratios stay, times do not."""

    def told(self, time: float, first: float, other: bool) -> Measurement:
        pace = 2.0 if len(self.asked) > 3 else 1.0
        found = super().told(time, first, other)
        return replace(found, value=pace * found.value, p95=pace * found.p95)


@pytest.mark.parametrize(
    ("limits", "factor", "p95_factor"),
    [
        ([], 1, 1),
        (["latency<=0.6x"], 1, 1),
        (["latency<=4ms"], 2, 1),
        (["latency@made-up<=4ms", "latency_p95<=4ms"], 2, 2),
        (["latency<=4ms", "latency<=0.6x"], 2, 1),
        (["latency@pi<=4ms"], 1, 1),
    ],
)
def test_the_winner_is_told_in_its_own_time_where_the_limit_is_one(
    limits: list[str], factor: float, p95_factor: float
) -> None:
    found = devices(Slowed(), MadeUp(label="pi"), prepared=False)
    parsed = [parse_limit(text) for text in limits]
    first = found.measured(PLAN, None, parsed)
    found.measured(Plan({"b": GROUPS[1].choices[1]}))
    again = found.measured(PLAN, apply(MODEL, PLAN), parsed)
    assert again["latency_kept"] == pytest.approx(first["latency_kept"])
    assert again["latency_ms"] == pytest.approx(factor * first["latency_ms"])
    assert again["latency_ms@made-up"] == again["latency_ms"]
    assert again["latency_p95_ms"] == pytest.approx(p95_factor * first["latency_p95_ms"])


def test_of_both_kinds_of_limits_the_longer_time_counts() -> None:
    """A machine that became faster must not make a plan keep its share of dense."""

    class Faster(Slowed):
        def told(self, time: float, first: float, other: bool) -> Measurement:
            return replace(super().told(time, first, other), value=time / 2 if len(self.asked) > 3 else time)

    found = devices(Faster(), prepared=False)
    limits = [parse_limit("latency<=4ms"), parse_limit("latency<=0.6x")]
    first = found.measured(PLAN)
    found.measured(Plan({"b": GROUPS[1].choices[1]}))
    assert found.measured(PLAN, apply(MODEL, PLAN), limits)["latency_ms"] == pytest.approx(first["latency_ms"])
    assert found.measured(PLAN, apply(MODEL, PLAN), limits[:1])["latency_ms"] < first["latency_ms"]


def test_a_study_keeps_its_pace() -> None:
    found = devices(MadeUp(), MadeUp(label="pi"), prepared=False)
    begun = {"latency_ms@made-up": 10.0, "latency_p95_ms@made-up": 12.0, "latency_ms": 10.0, "macs": 3.0}
    pi = found.dense["latency_ms@pi"]
    found.keep_pace(begun)
    assert found.dense["latency_ms"] == found.dense["latency_ms@made-up"] == found.totals["latency_ms@made-up"] == 10.0
    assert found.dense["latency_p95_ms"] == 12.0
    assert found.dense["latency_ms@pi"] == pi
    measured = found.measured(PLAN)
    assert measured["latency_ms"] == pytest.approx(10 * measured["latency_kept"])
    assert bounds(found, "latency<=0.5x") == {"latency_ms@made-up": 5.0}
    found.keep_pace({})
    assert found.dense["latency_ms"] == 10.0


def test_what_a_study_measured_before_is_learned() -> None:
    one, two = devices(MadeUp()), devices(MadeUp())
    plans = [Plan({g.name: g.choices[n] for g in GROUPS}) for n in range(1, 5)]
    values = [{**one.measured(p)} for p in plans]
    for plan, found in zip(plans, values, strict=True):
        two.recall(plan, {**found, "latency_p95_ms@made-up": None})
    two.recall(plans[0], {"kl": 0.1})  # was not measured on the device
    for found in (one, two):
        found.refit()
    assert [p.digest for p, *_ in one.latencies[0].measured_plans()] == [
        p.digest for p, *_ in two.latencies[0].measured_plans()
    ]
    assert np.array([one.costs(g)["latency_ms@made-up"][1] for g in GROUPS]) == pytest.approx(
        np.array([two.costs(g)["latency_ms@made-up"][1] for g in GROUPS])
    )


class Noisy(MadeUp):
    """Every plan is noisy, the later the more."""

    def measure(self, subjects: Sequence[Subject], effort: Effort = Effort()) -> list[Measurement]:
        return [
            replace(m, high=m.value * (1.2 + 0.1 * n), repeats=1) if n else m
            for n, m in enumerate(super().measure(subjects, effort))
        ]


def test_the_report_says_how_good_predictions_are_and_what_was_noisy() -> None:
    found = devices(MadeUp(), Noisy(label="pi"))
    found.measured(PLAN)
    found.measured(Plan({"b": GROUPS[1].choices[1]}))
    lines = found.report()
    assert lines[0].startswith("predicted latency on made-up: off by median 0.")
    assert lines[0].endswith("plans left out of the fit")
    assert lines[1].startswith("predicted latency on pi: off by median ")
    assert lines[2].startswith("a plan on pi: 2 measurements were noisy; the worst noisy: ")
    assert "after 1 repeats" in lines[2]
    assert len(lines) == 3


def test_the_report_says_when_predictions_are_bad_or_not_known() -> None:
    found = devices(MadeUp())
    error = found.latencies[0].error
    assert error is not None
    found.latencies[0].error = replace(error, median=0.2)
    (line,) = found.report()
    assert "off by median 20.0%" in line
    assert line.endswith("over 10% in spite of all that was measured: go by measured latencies only")
    found.latencies[0].error = None
    assert found.report() == ["predicted latency on made-up: how far it is off is not known, after too few plans"]


def test_plans_can_be_measured_side_by_side() -> None:
    found = devices()
    plans = [Plan({g.name: g.choices[n] for g in GROUPS}) for n in range(1, 5)]
    found.measure_all(plans)
    asked = [len(la.target.asked) for la in found.latencies]  # type: ignore[attr-defined]
    for plan in plans:
        found.measured(plan)
    assert asked == [len(la.target.asked) for la in found.latencies]  # type: ignore[attr-defined]
