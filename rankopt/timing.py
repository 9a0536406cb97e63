"""`measured`: how times are taken, whatever runs them. Interleaved, after warm-up, until they are sure enough.

What is compared is run in turns, a short block each, so that a drift of the machine hits all alike and cancels in the
ratios. A block's first call is not counted: the caches still hold what ran before.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from rankopt.machine import OthersLoad
from rankopt.measurement import Measurement

Timed = Callable[[int], Sequence[float]]  # runs so many times, returns what each took in milliseconds


@dataclass(frozen=True)
class Effort:
    """How long a measurement may take.

    Attributes:
        seconds: for every subject, warm-up excluded.
        rounds: how many blocks they are spread over; at least 6 for a confidence interval.
        error: the half-width of the 95 % confidence interval of the ratio (or of the median, for the reference) above
            which a subject gets more rounds.
        longest: at most so many times `rounds`.
        repeats: how often a noisy measurement is taken again.
        warmup: seconds after which a subject counts as warm at the first run that is no faster than those before.
    """

    seconds: float = 0.3
    rounds: int = 9
    error: float = 0.01
    longest: int = 3
    repeats: int = 1
    warmup: float = 0.5


def each(call: Callable[[], object]) -> Timed:
    """Time single calls of a function that returns when its work is done."""

    def timed(n: int) -> list[float]:
        clock, out = time.perf_counter_ns, []
        for _ in range(n):
            start = clock()
            call()
            out.append((clock() - start) / 1e6)
        return out

    return timed


def measured(runs: Sequence[Timed], conditions: Mapping[str, str], effort: Effort = Effort()) -> list[Measurement]:
    """Measure all of them; the first is the reference of the others' ratios (and of its own, 1).

    A noisy result is measured again, at most `effort.repeats` times; the calmest attempt counts and says how often it
    was repeated.
    """
    if not runs:
        return []
    best = _attempt(runs, conditions, effort)
    for repeat in range(1, effort.repeats + 1):
        if not any(m.noisy for m in best):
            break
        again = _attempt(runs, conditions, effort)
        calmer = max(map(_unrest, again)) < max(map(_unrest, best))
        best = [replace(m, repeats=repeat) for m in (again if calmer else best)]
    return best


def _attempt(runs: Sequence[Timed], conditions: Mapping[str, str], effort: Effort) -> list[Measurement]:
    with _undisturbed():
        blocks = [_warm(run, effort) for run in runs]
        load = OthersLoad()
        rounds: list[list[Sequence[float]]] = [[] for _ in runs]
        order = list(range(len(runs)))
        for number in range(effort.rounds * effort.longest):
            for i in order if number % 2 == 0 else reversed(order):
                runs[i](1)
                rounds[i].append(runs[i](blocks[i]))
            if number + 1 >= effort.rounds and _sure(rounds, effort):
                break
        others = load()
    return [Measurement.of(r, conditions, rounds[0], others=others) for r in rounds]


def _sure(rounds: Sequence[Sequence[Sequence[float]]], effort: Effort) -> bool:
    found = [Measurement.of(r, {}, rounds[0]) for r in rounds]
    return found[0].error <= effort.error and all((m.kept_error or 0) <= effort.error for m in found)


def _unrest(found: Measurement) -> float:
    return found.spread + found.others


def _warm(run: Timed, effort: Effort) -> int:
    """Run until it no longer gets faster; returns how many runs a block has."""
    start, best, calm = time.perf_counter(), float("inf"), 0
    n = 1
    while calm < 2:
        middle = float(np.median(run(n)))
        calm = calm + 1 if middle > 0.98 * best else 0
        best = min(best, middle)
        n = min(64, max(1, int(2.0 / max(best, 1e-6))))  # blocks of 2 ms
        if time.perf_counter() - start > effort.warmup and calm:
            break
    return max(2, min(2000, int(1000 * effort.seconds / effort.rounds / max(best, 1e-6))))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the garbage collector, which would stop some runs and not others."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
