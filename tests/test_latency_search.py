"""Searches under limits on latency and memory, from a model to the winner, on devices that are made up.

The device's formula is known, so that what comes out can be compared with the best there is.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from made_up import MadeUp, Small, groups_of
from test_space import seeds
from torch import Tensor, nn

import rankopt
from rankopt.batches import as_batches
from rankopt.cli import main
from rankopt.errors import ConditionsError, InfeasibleError, InputError, LimitError, StudyMismatchError
from rankopt.layers import find_layers
from rankopt.limits import parse_limit
from rankopt.measurement import Measurement
from rankopt.plan import LayerChoice, Plan
from rankopt.result import Entry, Progress, Result, told
from rankopt.search import Search
from rankopt.space import SearchSpace
from rankopt.surgery import structure
from rankopt.tables import front_row
from rankopt.targets.target import Subject
from rankopt.worth import worth as worthwhile

EXAMPLE = torch.zeros(1, 3, 8, 8)
SPACE: dict[str, Any] = {"methods": ["svd", "spatial_svd"], "keep": {"levels": 6}}
DEVICE = {"call": 0.01, "extra": 0.03, "weight": 2.0}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = torch.relu(layer(x))
        return self.fc(x.mean((2, 3)))


def data(n: int = 120, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    return x + x.roll(1, 2) + 0.5, torch.randint(0, 5, (n,), generator=generator)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.fc.weight.mul_(20)
    return net.eval()


def prepared(
    model: nn.Module, target: Any = None, limits: Sequence[str] = ("latency<=0.6x",), **options: Any
) -> Search:
    given: dict[str, Any] = {"trials": 12, "space": SPACE, "cache": False, **options}
    targets = target if isinstance(target, list) else [target or MadeUp(**DEVICE)]
    calibration = as_batches([data()])
    parsed = [parse_limit(text) for text in limits]
    return Search(model, EXAMPLE, calibration=calibration, limits=parsed, targets=targets, **given)


def find(model: nn.Module, target: Any = None, limits: Sequence[str] = ("latency<=0.6x",), **options: Any) -> Result:
    return prepared(model, target, limits, **options).run()


def truth(model: nn.Module, plan: Plan, **device: Any) -> float:
    """Milliseconds by the formula."""
    module = structure(model, Plan(plan.layers)).requires_grad_(False)
    return MadeUp(**{**DEVICE, **device}).time(Subject(module, (EXAMPLE,), {}, "plan"))


def value(entry: Entry, key: str) -> float:
    found = entry.measurements[key]
    assert found is not None
    return float(found)


# limits --------------------------------------------------------------------------------------------------------------


def test_a_share_of_dense_is_kept_and_used(model: nn.Module) -> None:
    result = find(model, trials=24)
    best, dense = result.best(), truth(model, Plan({}))
    assert truth(model, best.plan) <= 0.6 * dense
    assert value(best, "latency_ms") == pytest.approx(truth(model, best.plan))
    assert value(best, "latency_kept") > 0.5
    assert value(best, "latency_kept@made-up") == value(best, "latency_kept")
    assert result.objectives == ("kl", "latency")
    assert result.dense["latency_ms"] == pytest.approx(dense)
    assert best.notes["confirmed"] == 1
    again = best.build()
    assert MadeUp(**DEVICE).time(Subject(again.requires_grad_(False), (EXAMPLE,), {}, "plan")) <= 0.6 * dense
    for entry in result.entries:
        took = entry.measurements.get("latency_ms")
        if took is not None:
            assert took == pytest.approx(truth(model, entry.plan))
            assert entry.feasible == (took <= 0.6 * dense)
    kept = [value(e, "kl") for e in result.entries if e.feasible]
    assert value(best, "kl") == min(kept)


@pytest.mark.parametrize("limit", ["latency<=0.18ms", "latency@made-up<=180us", "latency_p95<=0.18ms"])
def test_a_time_is_kept(model: nn.Module, limit: str) -> None:
    best = find(model, limits=[limit]).best()
    assert 0.15 < truth(model, best.plan) <= 0.18


def test_two_devices_at_once(model: nn.Module) -> None:
    """The second one hardly cares for arithmetic, and pays for every call."""
    other: dict[str, Any] = {"mac": 0.3, "call": 0.03, "extra": 0.0, "weight": 0.0}
    targets = [MadeUp(**DEVICE), MadeUp(label="pi", **other)]
    dense, pi = truth(model, Plan({})), truth(model, Plan({}), **other)
    for share, limits in (
        (0.98, ["latency<=0.8x", "latency@pi<=0.98x"]),
        (1.02, ["latency<=0.6x", "latency@pi<=1.02x"]),
    ):
        result = find(model, targets, limits, trials=16)
        best = result.best()
        assert truth(model, best.plan) <= parse_limit(limits[0]).value * dense
        assert truth(model, best.plan, **other) <= share * pi
        assert value(best, "latency_kept@pi") == pytest.approx(truth(model, best.plan, **other) / pi)
        assert "latency@pi" not in result.objectives
    single = find(model, limits=["latency<=0.8x"], trials=16).best()
    assert value(single, "kl") <= value(best, "kl") * 1.001 or truth(model, single.plan, **other) > 0.98 * pi


def test_a_relative_and_an_absolute_limit_together(model: nn.Module) -> None:
    dense = truth(model, Plan({}))
    best = find(model, limits=["latency<=0.9x", f"latency<={0.7 * dense}ms", "macs<=80%"]).best()
    assert truth(model, best.plan) <= 0.7 * dense
    assert value(best, "macs_kept") <= 0.8


class Tailed(MadeUp):
    """Compressed models have a longer tail than dense."""

    tail: float = 1.25


def test_a_limit_on_the_percentile_is_kept_though_tails_differ(model: nn.Module) -> None:
    result = find(model, Tailed(**DEVICE), ["latency_p95<=0.7x"], trials=24)
    best = result.best()
    assert value(best, "latency_p95_ms") <= 0.7 * result.dense["latency_p95_ms"]
    assert value(best, "latency_p95_ms") == pytest.approx(1.25 * truth(model, best.plan))
    assert value(best, "latency_p95_ms") > 0.6 * result.dense["latency_p95_ms"]  # learned while it went


def test_memory_is_limited_and_measured(model: nn.Module) -> None:
    dense = 10 + 4 * sum(p.numel() for p in model.parameters()) / 2**20
    bound = dense - 0.004
    target = MadeUp(**DEVICE)
    best = find(model, target, [f"memory<={bound}MiB"]).best()
    assert value(best, "peak_memory_mib") <= bound
    assert value(best, "memory_kept") == pytest.approx(value(best, "peak_memory_mib") / dense)
    assert value(best, "params") < sum(p.numel() for p in model.parameters()) - 0.0039 * 2**20 / 4


def test_memory_is_an_objective(model: nn.Module) -> None:
    result = find(model, limits=[], objectives=["kl", "memory"], trials=10)
    assert not result.failed
    assert len(result.front) > 3
    front = [(value(e, "kl"), value(e, "peak_memory_mib")) for e in result.front]
    assert front == sorted(front)
    assert [b for _, b in front] == sorted((b for _, b in front), reverse=True)


def test_memory_that_is_not_in_the_weights_does_not_rule_out_every_plan(model: nn.Module) -> None:
    """Activations and work space shrink too, which only measuring shows."""

    class Halved(MadeUp):
        def peak_memory(self, subject: Subject) -> Measurement:
            found = super().peak_memory(subject)
            return found if "dense" in subject.key else replace(found, value=found.value / 2)

    best = find(model, Halved(**DEVICE), ["memory<=60%"], trials=6).best()
    assert value(best, "memory_kept") <= 0.6


def test_latency_among_the_objectives_with_other_limits(model: nn.Module) -> None:
    targets = [MadeUp(**DEVICE), MadeUp(label="pi", mac=0.3, call=0.03)]
    result = find(model, targets, ["macs<=60%"], objectives=["kl", "latency@pi", "macs"])
    points = [tuple(value(e, k) for k in ("kl", "latency_ms@pi", "macs")) for e in result.front]
    for a in points:
        assert not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in points)
    assert all(value(e, "macs_kept") <= 0.6 for e in result.front)


def test_unknown_labels_are_refused_before_anything_is_measured(model: nn.Module) -> None:
    target = MadeUp()
    with pytest.raises(LimitError, match="no target is called 'pi'; there are made-up"):
        find(model, target, ["latency@pi<=4ms"])
    with pytest.raises(InputError, match="got 'latency@pi'"):
        find(model, target, objectives=["kl", "latency@pi"])
    with pytest.raises(InputError, match="two are called 'made-up'"):
        find(model, [target, MadeUp(mac=2.0)])
    assert target.asked == []


# the best there is ---------------------------------------------------------------------------------------------------


TINY: dict[str, Any] = {
    "methods": ["svd"],
    "keep": [0.3, 0.5, 0.7, 0.9],
    "rules": [{"match": "fc", "dense": True}],
}


@pytest.fixture(scope="module")
def oracle(model: nn.Module) -> list[tuple[Plan, float, float]]:
    """Every plan of the tiny space, its time by the formula, and its kl."""
    search = prepared(model, limits=["latency<=0.6x"], space=TINY)
    names = [g.name for g in search.groups]
    found = []
    for choices in itertools.product(*(g.choices for g in search.groups)):
        plan = Plan(dict(zip(names, choices, strict=True)))
        quality = search.measure(search.build(plan))
        found.append((plan, truth(model, plan), quality["kl"]))
    return found


@pytest.mark.parametrize("share", [0.45, 0.6, 0.75, 0.9, 1.0])
def test_against_every_plan(model: nn.Module, oracle: list[tuple[Plan, float, float]], share: float) -> None:
    dense = truth(model, Plan({}))
    possible = [kl for _, time, kl in oracle if time <= share * dense]
    if not possible:
        with pytest.raises(InfeasibleError, match="latency@made-up"):
            find(model, limits=[f"latency<={share}x"], space=TINY)
        return
    best = find(model, limits=[f"latency<={share}x"], space=TINY, trials=30).best()
    assert truth(model, best.plan) <= share * dense * (1 + 1e-9)
    assert value(best, "kl") <= min(possible) * 1.25 + 1e-4
    assert value(best, "kl") >= min(possible) - 1e-6


def test_dense_is_a_candidate(model: nn.Module) -> None:
    """Where every call costs so much that no decomposition is faster."""
    target = MadeUp(call=1.0)
    result = find(model, target, [])
    assert result.best().plan.changed() == {}
    assert value(result.best(), "latency_kept") == 1.0
    assert result.best(["latency<=1x"]).plan.changed() == {}
    kept = find(model, target, ["latency<=1x"], space={**SPACE, "allow_dense": False}).best()
    assert kept.plan.changed() == {}
    with pytest.raises(InfeasibleError) as caught:
        find(model, target, ["latency<=0.9x"])
    assert str(caught.value).startswith("no plan of this search space keeps the limits; the least is latency@made-up ")
    assert " ms, predicted)" in str(caught.value)
    assert caught.value.reachable["latency_ms@made-up"] == pytest.approx(
        truth(model, Plan({}), call=1.0, extra=0.0, weight=0.0), rel=0.02
    )


def test_the_result_is_not_slower_than_dense(model: nn.Module) -> None:
    """Also where MACs are striven for, and the fewest MACs are slow."""
    result = find(model, MadeUp(call=1.0), ["kl<=1"], objectives=["kl", "macs"])
    assert result.best().plan.changed() == {}
    forced = find(model, MadeUp(call=1.0), ["macs<=50%"], objectives=["kl", "macs"]).best()
    assert value(forced, "latency_kept") > 1  # dense does not keep the limit


def test_the_dense_winner_can_be_saved(model: nn.Module, tmp_path: Path) -> None:
    best = find(model, MadeUp(call=1.0), []).best()
    told = best.save(tmp_path / "dense")
    assert told["validation"]["latency_kept"] == 1.0
    loaded = rankopt.load(tmp_path / "dense", model)
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))


# the winner ----------------------------------------------------------------------------------------------------------


class Deceiving(MadeUp):
    """The first built plans come out slower than their structure, the later ones do not."""

    built: int = 2
    slower: float = 1.3

    def time(self, subject: Subject) -> float:
        time = super().time(subject)
        if not all(p.requires_grad for p in subject.module.parameters()) or "dense" in subject.key:
            return time
        seen = self._built_so_far
        if subject.key not in seen:
            seen.append(subject.key)
        return time if seen.index(subject.key) < self.built else time / self.slower

    @property
    def _built_so_far(self) -> list[str]:
        return self.__dict__.setdefault("seen", [])


def test_a_winner_that_is_slower_when_measured_again_is_not_handed_out(model: nn.Module) -> None:
    target = Deceiving(**DEVICE)
    result = find(model, target, trials=24)
    best = result.best()
    dense = result.dense["latency_ms"]
    confirmed = [e for e in result.entries if "confirmed" in e.notes]
    assert len(confirmed) == 3
    broken = [e for e in confirmed if not e.feasible]
    assert len(broken) == 2
    assert all(value(e, "latency_ms") > 0.6 * dense for e in broken)
    assert all(value(e, "kl") <= value(best, "kl") for e in broken)
    assert best in confirmed
    assert value(best, "latency_ms") <= 0.6 * dense
    assert all(e not in result.front for e in broken)


class Scattered(MadeUp):
    """The sessions of a built plan differ: in turns 1.5 % faster than it is, as it is, 1.5 % slower, and so on."""

    def time(self, subject: Subject) -> float:
        time = super().time(subject)
        if not all(p.requires_grad for p in subject.module.parameters()) or "dense" in subject.key:
            return time
        sessions = self.__dict__.setdefault("sessions", {})
        sessions.setdefault(subject.key, []).append(time * (0.985, 1.0, 1.015)[len(sessions.get(subject.key, [])) % 3])
        return float(sessions[subject.key][-1])


@pytest.mark.parametrize("over", [0.99, 0.995, 1.0, 1.01, 1.03, 1.2])
@pytest.mark.parametrize("kind", ["x", "ms"])
def test_a_winner_close_to_its_limit_keeps_it_in_its_slowest_session(model: nn.Module, kind: str, over: float) -> None:
    dense = truth(model, Plan({}))
    plain = find(model, limits=["latency<=0.6x"]).best()
    bound = over * truth(model, plain.plan)  # so that this plan would be chosen, if it kept the limit
    target = Scattered(**DEVICE)
    limit = f"latency<={bound:.9f}ms" if kind == "ms" else f"latency<={bound / dense:.9f}x"
    best = find(model, target, [limit]).best()
    handed = truth(model, best.plan)
    (taken,) = [
        times for times in target.__dict__["sessions"].values() if times[0] == pytest.approx(0.985 * handed, rel=1e-6)
    ]
    assert max(taken) <= bound * (1 + 1e-9)
    assert value(best, "latency_ms") == pytest.approx(max(taken))
    assert len(taken) == (3 if taken[0] > 0.98 * bound else 1)
    for times in target.__dict__["sessions"].values():  # no more of those that broke the limit than it takes to see it
        assert all(t <= bound * (1 + 1e-9) for t in times[:-1])


def test_when_none_keeps_it_the_closest_is_told(model: nn.Module) -> None:
    target = MadeUp(slower=1.8, **DEVICE)
    result = find(model, target, ["latency<=0.6x", "macs<=70%"])
    assert not any(e.feasible and value(e, "latency_kept") > 0.5 for e in result.entries if e.trial >= 0)
    if not any(e.feasible for e in result.entries):
        with pytest.raises(InfeasibleError) as caught:
            result.best()
        reached = min(value(e, "latency_kept") for e in result.entries if e.measurements.get("latency_kept"))
        assert f"latency<=0.6x (reached: {reached:.1%} of dense)" in str(caught.value)
    with pytest.raises(InfeasibleError, match=r"latency<=1us \(reached: 0\.\d+ ms\)"):
        result.best(["latency<=1us"])


def test_a_bound_that_only_seems_out_of_reach_is_tried(model: nn.Module) -> None:
    """A little below what is predicted to be the least."""
    with pytest.raises(InfeasibleError) as caught:
        find(model, limits=["latency<=1%"])
    least = caught.value.reachable["latency_ms@made-up"] / truth(model, Plan({}))
    result = find(model, limits=[f"latency<={0.98 * least}x"], trials=4)
    assert len([e for e in result.entries if e.trial >= 0]) > 0
    assert not result.failed or all("failed" not in why for why in result.failed.values())
    with pytest.raises(InfeasibleError, match="reached: "):
        result.best()


# going on ------------------------------------------------------------------------------------------------------------


class Counting:
    """A metric that counts the plans it sees."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, 0
        self.x = data(40, 5)[0]

    def __call__(self, module: nn.Module, batches: Any = None) -> float:
        self.seen += module is not self.model
        with torch.no_grad():
            return -float((module(self.x) - self.model(self.x)).square().mean())


def test_going_on_measures_nothing_twice(model: nn.Module, tmp_path: Path) -> None:
    url, cache = str(tmp_path / "s.db"), tmp_path / "cache"
    first, second = MadeUp(**DEVICE), MadeUp(**DEVICE)
    one = find(model, first, storage=url, cache=cache, trials=10)
    again = find(model, second, storage=url, cache=cache, trials=10)
    assert second.asked == []
    assert [(e.plan, e.measurements, e.feasible) for e in again.entries] == [
        (e.plan, e.measurements, e.feasible) for e in one.entries
    ]
    assert again.best().plan == one.best().plan
    more = find(model, MadeUp(**DEVICE), storage=url, cache=cache, trials=14)
    assert len(more.entries) >= len(one.entries)


def test_an_interruption_changes_nothing(model: nn.Module, tmp_path: Path) -> None:
    """The corrections that were learned before it are learned again."""
    whole = find(model, Tailed(**DEVICE), ["latency_p95<=0.7x"], storage=str(tmp_path / "w.db"), trials=14)
    url = str(tmp_path / "s.db")

    def stop(progress: Progress) -> None:
        if progress.total and progress.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(model, Tailed(**DEVICE), ["latency_p95<=0.7x"], storage=url, trials=14).run(stop)
    parts = find(model, Tailed(**DEVICE), ["latency_p95<=0.7x"], storage=url, trials=14)
    assert [e.plan.digest for e in parts.entries] == [e.plan.digest for e in whole.entries]
    for a, b in zip(parts.entries, whole.entries, strict=True):
        assert a.measurements == pytest.approx(b.measurements)


def test_a_study_goes_on_at_its_own_pace(model: nn.Module, tmp_path: Path) -> None:
    """Without tables dense is measured anew; times stay comparable all the same."""
    url = str(tmp_path / "s.db")
    one = find(model, storage=url, trials=6)

    class Paced(MadeUp):
        def told(self, time: float, first: float, other: bool) -> Measurement:
            found = super().told(time, first, other)
            return replace(found, value=1.5 * found.value, p95=1.5 * found.p95)

    more = find(model, Paced(**DEVICE), storage=url, trials=14)
    assert more.dense["latency_ms"] == one.dense["latency_ms"]
    for entry in more.entries:
        if entry.measurements.get("latency_ms") is not None:
            assert value(entry, "latency_ms") == pytest.approx(truth(model, entry.plan))
    assert value(more.best(), "latency_kept") <= 0.6


def test_other_conditions_are_refused(model: nn.Module, tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    find(model, storage=url, trials=2)
    with pytest.raises(ConditionsError) as caught:
        find(model, MadeUp(threads=2, **DEVICE), storage=url, trials=4)
    assert "target made-up: measured with another threads (1, now 2)" in str(caught.value)
    for target in ([MadeUp(label="pi", **DEVICE)], [MadeUp(**DEVICE), MadeUp(label="pi")]):
        with pytest.raises(StudyMismatchError, match="another targets"):
            find(model, target, storage=url, trials=4)
    with pytest.raises(StudyMismatchError, match="another objectives"):
        find(model, [], [], storage=url, trials=4)
    assert find(model, storage=url, limits=["latency<=0.8x"], trials=4).best()  # limits may change


def test_retargeting_measures_only_latency(model: nn.Module, tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    metric = Counting(model)
    options: dict[str, Any] = {"storage": url, "trials": 10, "metric": metric, "objectives": ["accuracy", "latency"]}
    options["precision"] = "float32"  # else the winner's quality is measured once more
    one = find(model, limits=["latency<=0.8x"], **options)
    before = metric.seen
    assert before >= 3
    pi = MadeUp(label="pi", mac=0.3, call=0.03)
    two = find(model, pi, ["latency<=1.1x"], name="study on pi", retargeted=True, **options)
    new = [e for e in two.entries if e.trial >= 0 and not e.notes.get("inherited")]
    assert metric.seen == before + len(new)  # trials that the earlier study spent on plans it knew
    before = metric.seen
    old = {e.plan.digest: e for e in one.entries}
    inherited = [e for e in two.entries if e.notes.get("inherited")]
    assert len(inherited) >= 2
    for entry in inherited:
        assert value(entry, "kl") == old[entry.plan.digest].measurements["kl"]
        assert value(entry, "accuracy") == old[entry.plan.digest].measurements["accuracy"]
        assert value(entry, "latency_ms@pi") == pytest.approx(
            truth(model, entry.plan, mac=0.3, call=0.03, extra=0.0, weight=0.0)
        )
        assert "latency_ms@made-up" not in entry.measurements
    assert pi.counted("plan") > len(inherited)
    asked = len(pi.asked)
    again = find(model, pi, ["latency<=1.1x"], name="study on pi", retargeted=True, **options)
    assert metric.seen == before
    assert [e.plan.digest for e in again.entries] == [e.plan.digest for e in two.entries]
    layers = [key for key in pi.asked[asked:] if key.startswith("layer")]
    assert layers  # the table is not kept here, trials are
    more = find(model, pi, ["latency<=1.1x"], name="study on pi", retargeted=True, **{**options, "trials": 16})
    assert metric.seen - before == len(more.entries) - len(two.entries)


def test_retargeting_passes_over_plans_that_the_device_can_not_run(model: nn.Module, tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    plans = {e.plan.digest for e in find(model, storage=url, trials=6).entries if e.plan.changed()}
    target = MadeUp(label="pi", **DEVICE)
    options: dict[str, Any] = {"storage": url, "cache": tmp_path / "c", "name": "s on pi", "retargeted": True}
    search = prepared(model, target, ["latency<=1x"], trials=len(plans), **options)
    assert search.space  # the table is filled while the device still works
    known = {plan.digest for plan, *_ in search.devices.latencies[0].measured_plans()}  # to fit the prediction
    target._refuses = True
    result = search.run()
    assert list(result.failed.values()) == ["target pi: can't run it"] * len(plans - known)
    assert result.best().plan.changed() == {}
    again = prepared(model, target, ["latency<=1x"], trials=len(plans) + 1, **options).run()
    assert len(again.failed) <= len(plans) + 1  # those that failed are not tried again


# plans of one's own --------------------------------------------------------------------------------------------------


def test_a_plan_of_ones_own_needs_no_table(model: nn.Module, tmp_path: Path) -> None:
    target = MadeUp(**DEVICE)
    search = prepared(model, target)
    plan = Plan({"b": LayerChoice("tucker2", {"rank_out": 4, "rank_in": 4}), "fc": LayerChoice("svd", {"rank": 2})})
    entry = search.evaluate(plan)
    assert value(entry, "latency_ms") == pytest.approx(truth(model, plan))
    assert entry.feasible == (value(entry, "latency_kept") <= 0.6)
    assert "latency_predicted_ms" not in entry.measurements
    assert target.counted("layer") == 0
    assert target.counted("plan") == 2
    told = entry.save(tmp_path / "o")
    assert target.counted("plan") == 2
    assert told["validation"]["latency_ms"] == entry.measurements["latency_ms"]
    stored = json.loads((tmp_path / "o" / "measurements.json").read_text())
    assert stored["conditions"] == {"made-up": {"target": "made-up", "threads": "1", "runtime": "none"}}
    _ = search.space
    later = search.evaluate(plan)  # tucker2 is in no group
    assert "latency_predicted_ms" not in later.measurements
    own = search.evaluate(Plan({"b": LayerChoice("svd", {"rank": 5})}))
    assert value(own, "latency_predicted_ms") == pytest.approx(value(own, "latency_ms"), rel=0.1)
    assert search.run().best()


def test_an_entry_is_saved_without_measuring_latency_again(model: nn.Module, tmp_path: Path) -> None:
    target = MadeUp(**DEVICE)
    best = find(model, target, trials=6).best()
    asked = len(target.asked)
    best.save(tmp_path / "o")
    assert len(target.asked) == asked
    card = (tmp_path / "o" / "README.md").read_text()
    assert "latency" in card


def test_what_the_user_is_told(model: nn.Module) -> None:
    told: list[Progress] = []
    search = prepared(model, trials=4)
    search.run(told.append)
    texts = [p.text for p in told if p.text]
    assert any(t.startswith("timing 4 dense layers on made-up") for t in texts)
    assert any(t.startswith("timing whole plans on made-up") for t in texts)
    assert any(t.endswith("again, as it is handed over") for t in texts)
    assert search.notes()[0].startswith("predicted latency on made-up: off by median ")
    numbers = [p for p in told if p.total]
    assert [p.done for p in numbers] == [1, 2, 3, 4]


def test_one_call(model: nn.Module) -> None:
    target = MadeUp(**DEVICE)
    result = rankopt.search(
        model,
        EXAMPLE,
        calibration=[data()],
        target=target,
        limits=["latency<=0.6x"],
        trials=4,
        space=SPACE,
        cache=False,
    )
    assert value(result.best(), "latency_kept") <= 0.6
    text = "replay:ms_per_mmac=1.0,ms_per_module=0.01,label=pi"
    several = rankopt.search(
        model, EXAMPLE, calibration=[data()], target=[target, text], limits=["latency@pi<=0.9x"], trials=4, space=SPACE,
        cache=False,
    )  # fmt: skip
    assert value(several.best(), "latency_kept@pi") <= 0.9
    assert several.objectives == ("kl", "latency")


# the parts -----------------------------------------------------------------------------------------------------------


def entry(**values: float) -> Entry:
    return Entry(0, Plan({}), values, True)


@pytest.mark.parametrize(
    ("objectives", "limits", "known", "others", "worth"),
    [
        (["kl", "latency"], [], {"latency_predicted_ms": 2.0}, [], True),
        (["kl", "latency"], [], {"latency_predicted_ms": 2.0}, [entry(kl=0.5, latency_ms=1.8)], False),
        (["kl", "latency"], [], {"latency_predicted_ms": 2.0}, [entry(kl=1.5, latency_ms=1.8)], True),
        (["kl", "latency"], [], {"latency_predicted_ms": 2.0}, [entry(kl=0.5, latency_ms=1.95)], True),  # in doubt
        (["kl", "latency"], [], {"latency_predicted_ms": 2.0}, [entry(kl=0.5)], True),  # was not measured itself
        (["kl", "latency@pi"], [], {"latency_predicted_ms@pi": 2.0}, [entry(kl=0.5, **{"latency_ms@pi": 1.0})], False),
        (["kl", "latency@pi"], [], {"latency_predicted_ms@pi": 2.0}, [entry(kl=0.5, latency_ms=1.0)], True),
        (["kl", "latency_p95"], [], {"latency_p95_predicted_ms": 2.0}, [entry(kl=0.5, latency_p95_ms=1.0)], False),
        # what can't be predicted has to be measured
        (["kl", "memory"], [], {"latency_predicted_ms": 2.0}, [entry(kl=0.5, peak_memory_mib=1.0)], True),
        (["kl", "macs"], ["memory<=3MiB"], {}, [entry(kl=0.5, macs=1.0, peak_memory_mib=9.0)], True),
        (["kl", "latency"], [], {}, [entry(kl=0.5, latency_ms=1.8)], True),
        # a rival has to keep what this plan keeps
        (["kl", "latency"], ["macs<=60%"], {"latency_predicted_ms": 2.0}, [entry(kl=0.5, latency_ms=1, macs=7)], True),
        (["kl", "latency"], ["macs<=60%"], {"latency_predicted_ms": 2.0}, [entry(kl=0.5, latency_ms=1, macs=6)], False),
        # one that breaks a limit on latency is a rival all the same: this one breaks it more
        (["kl", "macs"], ["latency<=1ms"], {"latency_predicted_ms": 2}, [entry(kl=0.5, macs=5, latency_ms=1.5)], False),
        (["kl", "macs"], ["latency<=1ms"], {"latency_predicted_ms": 2}, [entry(kl=0.5, macs=6, latency_ms=1.5)], True),
    ],
)
def test_what_is_worth_measuring(
    objectives: list[str], limits: list[str], known: dict[str, float], others: list[Entry], worth: bool
) -> None:
    mine = {"kl": 1.0, "macs": 5.0, **known}
    assert worthwhile(mine, others, objectives, [parse_limit(t) for t in limits], {"macs": 10.0}) == worth


def made_up_space(bound: float) -> SearchSpace:
    groups = groups_of(find_layers(Small(), torch.zeros(1, 3, 16, 16)))
    costs = [{"latency_ms@pi": 0.1 + g.macs / 1e6} for g in groups]
    totals = {q: float(sum(getattr(g, q)[0] for g in groups)) for q in ("macs", "params")}
    dense = 0.5 + sum(float(c["latency_ms@pi"][0]) for c in costs)
    return SearchSpace(
        groups, {"macs": 0.0, "params": 0.0, "latency_ms@pi": 0.5}, {**totals, "latency_ms@pi": dense},
        {"latency_ms@pi": bound * dense}, "latency_ms@pi", costs=costs,
    )  # fmt: skip


def predicted(space: SearchSpace, plan: Plan) -> float:
    """Milliseconds, as a share of dense."""
    parts = [c["latency_ms@pi"][g.choices.index(plan[g.name])] for g, c in zip(space.groups, space._costs, strict=True)]
    return float(0.5 + sum(parts)) / space.totals["latency_ms@pi"]


def test_proposals_keep_a_predicted_limit_and_follow_what_was_learned() -> None:
    space = made_up_space(0.7)
    (seed,) = seeds(space, 1)
    assert 0.65 < predicted(space, space.plan_of(seed)) <= 0.7 + 1e-9
    space.update(space.fixed, space._costs, {"latency_ms@pi": 1.1})
    assert 0.58 < predicted(space, space.plan_of(seed)) <= 0.7 / 1.1 + 1e-9
    assert space.share({"latency_predicted_ms@pi": 0.3 * space.totals["latency_ms@pi"]}) == pytest.approx(0.3)
    assert space.share({}) == 1.0


def test_when_all_come_out_too_slow_the_fastest_is_proposed() -> None:
    """A ratio that was learned may put the limit out of reach; that is no failure of the trial."""
    space = made_up_space(0.5)
    least = (0.5 + sum(float(c["latency_ms@pi"].min()) for c in space._costs)) / space.totals["latency_ms@pi"]
    space.update(space.fixed, space._costs, {"latency_ms@pi": 10.0})
    for seed in seeds(space, 3):
        assert predicted(space, space.plan_of(seed)) == pytest.approx(least)


def test_what_is_out_of_reach_is_told_in_the_words_of_limits() -> None:
    with pytest.raises(InfeasibleError) as caught:
        made_up_space(0.01)
    text = str(caught.value)
    assert text.startswith("no plan of this search space keeps the limits; the least is latency@pi ")
    assert text.endswith(" ms, predicted)")
    assert "% of dense (" in text


def test_every_target_is_shown_once() -> None:
    keys = ["latency_ms@a", "latency_ms@pi", "latency_predicted_ms@a", "latency_spread", "latency_ms", "kl"]
    assert [k for k in keys if told(k, keys)] == ["latency_ms@pi", "latency_ms", "kl"]
    row = front_row(entry(**{"latency_ms@a": 1.0, "latency_ms@pi": 2.0, "latency_ms": 1.0, "peak_memory_mib": 3.0}))
    assert (row["latency_ms"], row["latency_ms@pi"], row["peak_memory_mib"]) == (1.0, 2.0, 3.0)
    assert "latency_ms@a" not in row


# the command line ----------------------------------------------------------------------------------------------------


CODE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * 36, 4)).eval()

def data():
    x = torch.randn(90, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model()(x).argmax(1)
    return {"calibration": (x[:40], y[:40]), "validation": (x[40:], y[40:])}
"""
STUDY = {
    "model": "code.py:model",
    "data": "code.py:data",
    "space": {"methods": ["svd", "spatial_svd"], "keep": {"levels": 4}},
    "target": {"name": "replay", "ms_per_mmac": 10.0, "ms_per_module": 0.01},
    "limits": ["latency<=0.7x"],
    "cache": "cache",
    "trials": 6,
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    return tmp_path / "tiny.yaml"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(a) for a in args])
        text = capsys.readouterr()
        return code, text.out, text.err

    return call


def test_the_command_line_searches_and_exports(
    study: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = run("search", study, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["best"]["latency_kept"] <= 0.7
    assert found["notes"][0].startswith("predicted latency on replay: ")
    assert found["dense"]["latency_ms@replay"] == found["dense"]["latency_ms"]
    assert list((tmp_path / "cache").glob("*.jsonl"))
    code, out, err = run("search", study)
    assert code == 0, err
    assert "ms kept" in out
    assert "predicted latency on replay: " in out
    code, out, err = run("front", study)
    assert code == 0, err
    assert "ms kept" in out
    assert "predicted latency on replay: off by median " in out
    code, out, err = run("export", study, "--out", tmp_path / "o")
    assert code == 0, err
    assert "latency_kept" in out
    code, out, err = run("apply", tmp_path / "o", "--study", study, "--out", tmp_path / "again", "--json")
    assert code == 0, err
    assert json.loads(out)["validation"]["latency_kept"] == pytest.approx(found["best"]["latency_kept"])
    code, out, err = run("front", study, "--limit", "latency<=1%", "--json")
    assert code == 0, err
    assert not any(row["feasible"] for row in json.loads(out))


def test_the_command_line_retargets(study: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert run("search", study)[0] == 0
    pi = "replay:ms_per_mmac=1.0,ms_per_module=0.05,label=pi"
    code, out, err = run("search", study, "--target", pi, "--limit", "latency<=1.2x", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert "latency_ms@pi" in found["dense"]
    assert "latency_ms@replay" not in found["dense"]
    code, out, err = run("front", study, "--target", pi, "--limit", "latency<=1.2x", "--json")
    assert code == 0, err
    mine = {row["trial"]: row["kl"] for row in json.loads(out)}
    code, out, err = run("front", study, "--json")
    theirs = {row["kl"] for row in json.loads(out)}
    assert theirs & set(mine.values())  # quality was taken over
    code, out, err = run(
        "export", study, "--target", pi, "--limit", "latency<=1.2x", "--out", tmp_path / "pi", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["validation"]["latency_kept@pi"] <= 1.2
    conditions = json.loads((tmp_path / "pi" / "measurements.json").read_text())["conditions"]
    assert conditions["pi"]["ms_per_module"] == "0.05"
    code, out, err = run("front", study, "--target", "replay:ms_per_mmac=1.0,label=other")
    assert (code, out) == (2, "")
    assert "study tiny on other: not in " in err


def test_a_dense_winner_on_the_command_line(
    study: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    slow = "replay:ms_per_module=1.0,label=slow"
    code, out, err = run("search", study, "--target", slow, "--limit", "latency<=1x")
    assert code == 0, err
    assert "best: the dense model, nothing within the limits beats it; write it with" in out
    assert "trial -1" not in out
    code, out, err = run(
        "search", study, "--target", slow, "--limit", "latency<=1x", "--out", tmp_path / "o", "--force"
    )
    assert code == 0, err
    assert "saved the dense model to " in out
    code, out, err = run("search", study, "--target", slow, "--limit", "latency<=0.5x")
    assert (code, out) == (2, "")
    assert "no plan of this search space keeps the limits; the least is latency@slow " in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", "replay"], "target replay: "),
        (["--target", "replai:ms_per_mmac=1.0"], "did you mean 'replay'?"),
        (["--target", "replay:ms_per_mac=1.0"], "unknown key 'ms_per_mac'"),
        (["--target", "replay:ms_per_mmac"], "options are written NAME:KEY=VALUE"),
        (["--target", "replay:table=none.jsonl"], "none.jsonl: can't be read"),
        (["--limit", "latency@pi<=1ms"], "no target is called 'pi'; there are replay"),
        (["--limit", "latency<=1"], "unit 'none' is not one of ms, us, s, %, x"),
    ],
)
def test_faults_are_one_line(
    study: Path, run: Callable[..., tuple[int, str, str]], options: list[str], says: str
) -> None:
    code, out, err = run("search", study, *options)
    assert (code, out) == (2, "")
    assert says in err
    assert err.strip().splitlines()[-1].startswith("rankopt: error: ")


def test_two_targets_in_a_study_file(study: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    spec = {**STUDY, "target": [STUDY["target"], {"name": "replay", "ms_per_module": 0.1, "label": "pi"}]}
    study.write_text(yaml.safe_dump({**spec, "limits": ["latency<=0.8x", "latency@pi<=1.3x"]}))
    code, out, err = run("search", study, "--json")
    assert code == 0, err
    best: Mapping[str, Any] = json.loads(out)["best"]
    assert best["latency_kept"] <= 0.8
    assert best["latency_kept@pi"] <= 1.3
    code, out, err = run("front", study)
    assert code == 0, err
    assert "ms@pi" in out
