"""How times are taken, on devices that are made up: their clock moves only when something runs on them."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from rankopt import timing
from rankopt.timing import Effort, each, measured

EFFORT = Effort(seconds=0.01, rounds=9, error=0.01, longest=3, repeats=1, warmup=0.5)


class Device:
    """A clock in seconds, and what was run in which blocks."""

    def __init__(self) -> None:
        self.now = 0.0
        self.blocks: list[tuple[str, int]] = []
        self.warm = 0  # how many of the blocks were run to warm up
        self.spread = 0.0

    def runs(self, name: str, time: Callable[[], float]) -> timing.Timed:
        """Something that takes `time()` milliseconds a run."""

        def timed(n: int) -> Sequence[float]:
            self.blocks.append((name, n))
            times = [time() for _ in range(n)]
            self.now += sum(times) / 1000
            return times

        return timed

    def rounds(self) -> list[list[str]]:
        """The names of the blocks after warm-up, two blocks (the uncounted run and the counted ones) a subject."""
        names = [name for name, _ in self.blocks[self.warm :]]
        counts = [n for _, n in self.blocks[self.warm :]]
        assert counts[::2] == [1] * (len(counts) // 2), "each block begins with a run that is not counted"
        assert names[::2] == names[1::2]
        subjects = len(set(names))
        turns = names[::2]
        return [turns[i : i + subjects] for i in range(0, len(turns), subjects)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    clock = SimpleNamespace(perf_counter=lambda: made.now, perf_counter_ns=lambda: int(made.now * 1e9))
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(timing, "OthersLoad", lambda: attempt(made))
    return made


def attempt(device: Device) -> Callable[[], float]:
    """In place of the load by others, which is read when an attempt is warm and when it is over."""
    device.warm = len(device.blocks)
    return lambda: 0.0


def test_single_calls_are_timed(device: Device) -> None:
    def call() -> None:
        device.now += 0.002

    assert each(call)(3) == pytest.approx([2.0, 2.0, 2.0], abs=1e-3)
    assert each(call)(0) == []


def test_blocks_are_interleaved_in_alternating_order(device: Device) -> None:
    subjects = [device.runs(name, lambda t=t: t) for name, t in (("a", 1.0), ("b", 0.5), ("c", 2.0))]
    found = measured(subjects, {"device": "made up"}, EFFORT)
    assert device.rounds() == [["a", "b", "c"] if n % 2 == 0 else ["c", "b", "a"] for n in range(9)]
    assert [m.value for m in found] == [1.0, 0.5, 2.0]
    assert [m.kept for m in found] == [1.0, 0.5, 2.0]
    assert all(m.conditions == {"device": "made up"} and m.repeats == 0 and m.error == 0 for m in found)


def test_blocks_fill_the_time_that_is_given(device: Device) -> None:
    measured([device.runs("a", lambda: 0.1)], {}, Effort(seconds=0.9, rounds=9))
    assert device.blocks[-1] == ("a", 1000)
    measured([device.runs("slow", lambda: 5000.0)], {}, Effort(seconds=0.9, rounds=9))
    assert device.blocks[-1] == ("slow", 2)
    measured([device.runs("quick", lambda: 1e-6)], {}, Effort(seconds=0.9, rounds=9))
    assert device.blocks[-1] == ("quick", 2000)


def test_a_drift_cancels_in_the_ratios(device: Device) -> None:
    def drifting(base: float) -> Callable[[], float]:
        return lambda: base * (1 + 3 * device.now)

    fixed, other = measured([device.runs("a", drifting(1.0)), device.runs("b", drifting(0.7))], {}, EFFORT)
    assert other.kept == pytest.approx(0.7, rel=0.02)
    assert other.kept_error is not None
    assert other.kept_error < fixed.error / 3


def test_more_rounds_are_taken_until_it_is_sure(device: Device) -> None:
    rng = random.Random(0)

    def unsure() -> float:
        return 1.0 + rng.uniform(-0.04, 0.04)

    def rounds(error: float) -> int:
        device.blocks.clear()
        effort = Effort(seconds=0.02, rounds=9, error=error, longest=3, repeats=0)
        measured([device.runs("a", lambda: 1.0), device.runs("b", unsure)], {}, effort)
        return len(device.rounds())

    assert rounds(error=1.0) == 9
    assert rounds(error=1e-9) == 27
    assert 9 < rounds(error=0.012) < 27


def test_what_is_noisy_is_measured_again_and_the_calmest_counts(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, spreads = random.Random(0), iter([1.0, 0.0])

    def begins() -> Callable[[], float]:
        device.spread = next(spreads)
        return lambda: 0.0

    monkeypatch.setattr(timing, "OthersLoad", begins)
    run = device.runs("a", lambda: 1.0 + device.spread * rng.random())
    (found,) = measured([run], {}, EFFORT)
    assert (found.repeats, found.value, found.spread) == (1, 1.0, 0.0)


def test_what_stays_noisy_says_how_often_it_was_tried(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([3.0, 1.0, 2.0, 9.0])
    monkeypatch.setattr(timing, "OthersLoad", lambda: lambda: next(loads))
    (found,) = measured([device.runs("a", lambda: 1.0)], {}, Effort(seconds=0.01, repeats=2))
    assert (found.others, found.repeats) == (1.0, 2)
    assert next(loads) == 9.0


def test_warming_up_goes_on_while_it_gets_faster(device: Device) -> None:
    times = iter([50.0, 30.0, 10.0, 5.0])
    measured([device.runs("a", lambda: next(times, 1.0))], {}, EFFORT)
    (found,) = measured([device.runs("b", lambda: 1.0)], {}, EFFORT)
    assert found.value == 1.0
    times = iter([50.0, 30.0, 10.0, 5.0])
    (found,) = measured([device.runs("c", lambda: next(times, 1.0))], {}, EFFORT)
    assert (found.value, found.spread) == (1.0, 0.0)


def test_nothing_to_measure() -> None:
    assert measured([], {}, EFFORT) == []


def test_the_garbage_collector_is_off_meanwhile_and_on_again_after_an_error(device: Device) -> None:
    states = []

    def fails(n: int) -> Sequence[float]:
        states.append(gc.isenabled())
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        measured([fails], {}, EFFORT)
    assert states == [False]
    assert gc.isenabled()
