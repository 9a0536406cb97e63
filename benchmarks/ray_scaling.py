"""How trials on Ray's workers scale: two workers against one where trials compute, many where they sleep; the overhead.

::

    python benchmarks/ray_scaling.py --record

Trials that compute are of the study of the handwritten digits, with a few steps of training so that they take seconds,
on one thread each; their rates are taken in the middle of a run, from when every worker has ended a trial until the
last trials are handed out, in several runs by turns. Trials that sleep are of a ResNet-20, which has plans enough for
all to differ: they ask the study for plans and tell it what comes out like any other, but their workers only wait.
Their efficiency is what they sleep over the mean time in which as many trials end as there are workers, from when as
many have ended: by then all workers are there. How long that takes is stated besides. Plans that had been measured are
not carried out again and don't count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import headed, write_record
from networks import network

from rankopt import ledger
from rankopt.batches import Batch
from rankopt.evaluate import Evaluation, Evaluator
from rankopt.executors.executor import Executor
from rankopt.executors.local import Local
from rankopt.executors.ray_tune import RayTune
from rankopt.limits import Limit
from rankopt.loop import Loop
from rankopt.plan import Plan
from rankopt.running import facts_of, setting_of
from rankopt.search import Search
from rankopt.storages import open_storage
from rankopt.study_arguments import arguments
from rankopt.study_file import load_study

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "studies" / "records" / "ray_scaling.md"


@dataclass(frozen=True)
class Sleeper:
    """What a worker does instead of judging: it loads no torch."""

    seconds: float
    device: str = "cpu"

    def judge(self, plan: Plan) -> dict[str, float]:
        """Any kl that differs from plan to plan."""
        time.sleep(self.seconds)
        return {"kl": 1e-3 + int(plan.digest[:6], 16) / 2**24, "bn": 0.0}


class Sleeping:
    """An evaluation whose quality is waited for and made up."""

    devices: Any = None
    device = "cpu"

    def __init__(self, real: Evaluator, seconds: float) -> None:
        self.real, self.sleeper = real, Sleeper(seconds)
        self.ended: list[float] = []  # when trials came back from their workers

    def early(self, plan: Plan, limits: Sequence[Limit]) -> Evaluation | None:
        """Costs decide as ever."""
        return self.real.early(plan, limits)

    def to_measure(self, *given: Any) -> bool:
        """There is no device."""
        return False

    def travelling(self) -> Sleeper:
        """To the workers."""
        return self.sleeper

    def __call__(
        self,
        plan: Plan,
        limits: Sequence[Limit] = (),
        worth: Callable[[Mapping[str, float]], bool] = lambda known: True,
        known: Mapping[str, float] | None = None,
    ) -> Evaluation:
        """In this process, or the rest of it."""
        self.ended.append(time.perf_counter())
        return self.real(plan, limits, worth, self.sleeper.judge(plan) if known is None else known)


def prepared(trials: int, steps: int) -> Search:
    """The digits study with a short training in every trial."""
    file = load_study(ROOT / "studies" / "digits.yaml")
    given = arguments(file, trials=trials) | {"recovery": steps or None, "storage": None, "strategy": "correct"}
    search = Search(**given)
    search.evaluator.use(search.devices)
    return search


def asleep(trials: int) -> Search:
    """A study of a network with so many plans that hardly one comes twice; nothing depends on its random weights."""
    model, example = network("resnet20")
    images = torch.randn(16, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    search = Search(
        model, example, calibration=[Batch((images,))], metric=None, objectives=("kl", "macs"), trials=trials,
        strategy="correct", refit=None, threads=1,
    )  # fmt: skip
    search.evaluator.use(search.devices)
    return search


@dataclass(frozen=True)
class Run:
    """When trials ended, in seconds from the beginning of the run."""

    ended: Sequence[float]
    workers: int
    mib: float = 0.0  # of all worker processes together

    @property
    def rate(self) -> float:
        """Trials a second in the middle of the run."""
        first, last = self.workers - 1, len(self.ended) - self.workers
        return (last - first) / (self.ended[last] - self.ended[first])


def timed(search: Search, evaluate: Any, executor: Executor, workers: int) -> Run:
    """Carry out the search's trials."""
    opened = ledger.open_study(
        open_storage(None), "s", search.objectives, facts_of(search), search.evaluator.dense, search.limits
    )
    loop = Loop(opened, setting_of(search), search.strategy)
    ended: list[float] = []
    most = 0.0

    def told() -> None:
        nonlocal most
        ended.append(time.perf_counter() - begun)
        if len(ended) == 2 * workers:  # once: it takes a second of this process
            most = worker_mib()

    with executor.ready():
        begun = time.perf_counter()
        executor.run(loop, evaluate, told)
    loop.close()
    failed = [t.user_attrs["reason"] for t in opened.get_trials(deepcopy=False) if t.state.name == "FAIL"]
    assert not failed, failed[0]
    return Run(ended, workers, most)


def worker_mib() -> float:
    """Memory of Ray's workers that no other process shares."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::" in " ".join(process.cmdline()):
                total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=24, help="that compute")
    parser.add_argument("--steps", type=int, default=120, help="of training in each of them")
    parser.add_argument("--turns", type=int, default=3, help="of one worker and two")
    parser.add_argument("--sleepers", type=int, default=64, help="workers whose trials sleep")
    parser.add_argument("--seconds", type=float, default=10.0, help="that they sleep")
    parser.add_argument("--rounds", type=int, default=10, help="trials of a sleeping worker")
    parser.add_argument("--quick", action="store_true", help="a few seconds of each, to see that it runs")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.trials, options.steps, options.sleepers, options.seconds, options.rounds = 6, 10, 3, 0.5, 4
        options.turns = 1
    torch.set_num_threads(1)
    search = prepared(options.trials, options.steps)
    local = timed(search, search.evaluator, Local(), 1)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.turns):
        for n in rates:
            rates[n].append(timed(search, search.evaluator, RayTune(n), n).rate)
    ratios = sorted(two / one for one, two in zip(rates[1], rates[2], strict=True))
    one, two = (statistics.median(rates[n]) for n in rates)
    computing = [
        f"| this process | {60 * local.rate:.1f} | {local.rate / one:.2f} |",
        f"| 1 worker | {60 * one:.1f} | 1.00 |",
        f"| 2 workers | {60 * two:.1f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
    ]

    brief = prepared(40, 0)
    here = timed(brief, Sleeping(brief.evaluator, 0.0), Local(), 1)
    there = timed(brief, Sleeping(brief.evaluator, 0.0), RayTune(1), 1)
    overhead = 1000 * (1 / there.rate - 1 / here.rate)

    many = asleep(options.sleepers * options.rounds)
    sleeping = Sleeping(many.evaluator, options.seconds)
    run = timed(many, sleeping, RayTune(options.sleepers), options.sleepers)
    back = sleeping.ended
    there_s = back[options.sleepers - 1] - back[0]
    steady = back[options.sleepers :]
    turns = [later - earlier for earlier, later in zip(steady, steady[options.sleepers :], strict=False)]
    turn = statistics.mean(turns)
    start = run.ended[-1] - (back[-1] - back[0]) - options.seconds
    lines = headed(
        "Trials on Ray's workers",
        "Two workers against one where trials compute, on one thread each, and many workers whose trials sleep.",
        runtimes=("ray",),
    )
    lines += [
        f"{options.trials} trials of the digits study with {options.steps} steps of training in each, medians of "
        f"{options.turns} runs by turns (and the least and most):",
        "",
        "| where | trials/min | against one worker |",
        "|---|---|---|",
        *computing,
        "",
        f"{options.sleepers} workers whose trials sleep {options.seconds:g} s, {len(back)} of them: as many end in "
        f"{turn:.2f} s as there are workers, an efficiency of {100 * options.seconds / turn:.1f} %. Before that it "
        f"takes {start:.0f} s until the first of them sleeps, and {there_s:.0f} s from when the first has slept until "
        f"as many have as there are workers; their processes start on these cores. All together takes "
        f"{run.ended[-1]:.0f} s, and {run.mib:.0f} MiB.",
        "",
        f"A trial that takes no time takes {1000 / here.rate:.0f} ms in this process and {1000 / there.rate:.0f} ms on "
        f"a worker: Ray adds {overhead:.0f} ms.",
    ]
    write_record(lines, RECORD if options.record else None)


if __name__ == "__main__":
    main()
