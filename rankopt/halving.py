"""`halve`: successive halving over finalists, in rungs of optimizer steps, for any number of objectives.

All finalists are trained to the first rung; the better part goes on to the next, until the last rung is the whole
training (Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", 2016).
Better is decided by dominance in all objectives (`pareto.ranked`). Who would not reach the front even with the largest
gain that any finalist has made since before its training is stopped at once.

What trains is not known here: `train(name, steps)` brings one finalist to so many steps in all and measures it, and an
`Executor` carries out all calls of a rung, one after the other or anywhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rankopt.errors import ArtifactError, InputError, RankoptError, StudyMismatchError, TrainingError
from rankopt.pareto import ranked
from rankopt.result import minimized

Values = Mapping[str, float]
Train = Callable[[str, int], Values]
Outcome = tuple[str, Values | None, str]  # name, values, or None and the reason
Executor = Callable[[Train, Sequence[tuple[str, int]]], Iterator[Outcome]]
FILE = "halving.json"


@dataclass(frozen=True)
class Rung:
    """So many steps in all, for so many finalists."""

    steps: int
    finalists: int


@dataclass
class Halving:
    """What was measured, and who went how far.

    Attributes:
        rungs: the plan.
        measured: name → steps → values; 0 steps are before training.
        stopped: name → (steps, why it went no further).
        winners: who was trained to the end, the best first.
    """

    rungs: Sequence[Rung]
    measured: dict[str, dict[int, dict[str, float]]]
    stopped: dict[str, tuple[int, str]] = field(default_factory=dict)
    winners: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Optimizer steps that were taken."""
        return sum(max(values) for values in self.measured.values())

    @property
    def all_steps(self) -> int:
        """Steps that giving every finalist the whole training would have taken."""
        return len(self.measured) * self.rungs[-1].steps

    def last(self, name: str) -> dict[str, float]:
        """The values of a finalist after all the steps that it had."""
        return self.measured[name][max(self.measured[name])]


def plan_rungs(finalists: int, steps: int, eta: float = 3.0) -> list[Rung]:
    """Rungs so that each has about 1/eta of the finalists and eta times the steps of the one before.

    Nine finalists and eta 3: 9 to a ninth of the steps, 3 to a third, 1 to the end: together 0.26 of nine times all.
    """
    if finalists < 1 or steps < 1 or not eta > 1:
        raise InputError(f"halving: needs finalists and steps from 1 and eta above 1, got {finalists}, {steps}, {eta}")
    counts = [finalists]
    while counts[-1] > 1:
        counts.append(min(max(1, round(counts[-1] / eta)), counts[-1] - 1))
    found: list[Rung] = []
    for number, count in enumerate(counts):
        own = max(1, round(steps / eta ** (len(counts) - 1 - number)))
        if not found or own > found[-1].steps:
            found.append(Rung(own, count))
    return found


def one_by_one(train: Train, tasks: Sequence[tuple[str, int]]) -> Iterator[Outcome]:
    """The executor of this process; a training that does not stay finite is an outcome, other faults are raised."""
    for name, steps in tasks:
        try:
            yield name, train(name, steps), ""
        except TrainingError as error:
            yield name, None, error.message


def halve(
    finalists: Mapping[str, Values],
    train: Train,
    objectives: Sequence[str],
    rungs: Sequence[Rung],
    *,
    best: Callable[[Mapping[str, Values]], str] | None = None,
    executor: Executor = one_by_one,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Halving:
    """Train finalists rung by rung.

    Args:
        finalists: name → what was measured before training.
        train: brings a finalist to so many steps in all, and measures it.
        objectives: quantities; accuracy is maximized, all others minimized.
        rungs: from `plan_rungs`.
        best: which of those that were trained so far is wanted most, under limits, say; it is always promoted, before
            what dominance says of the others.
        executor: carries out the trainings of a rung.
        folder: where every measurement is kept as soon as it is known; calling again goes on there.
        progress: told what happens.

    Raises:
        TrainingError: no finalist stayed finite.
        StudyMismatchError: the folder holds the halving of other finalists, objectives or rungs.
    """
    if not finalists:
        raise InputError("halving: there are no finalists")
    file = None if folder is None else folder / FILE
    begun = {
        "finalists": {name: dict(values) for name, values in finalists.items()},
        "objectives": list(objectives),
        "rungs": [[rung.steps, rung.finalists] for rung in rungs],
    }
    known = _read(file, begun)
    result = Halving(rungs, {name: {0: dict(values)} for name, values in finalists.items()})
    running = list(finalists)
    for number, rung in enumerate(rungs):
        tasks = [(name, rung.steps) for name in running if not _known(known, name, rung.steps)]
        for name, values, reason in executor(train, tasks):
            entry = known.setdefault(name, {})
            entry[str(rung.steps)] = {"failed": reason} if values is None else {k: float(v) for k, v in values.items()}
            _write(file, begun, known)
            progress(f"{name}: {rung.steps} steps: {reason or _shown(entry[str(rung.steps)], objectives)}")
        for name in list(running):
            entry = known[name][str(rung.steps)]
            if "failed" in entry:
                result.stopped[name] = (rung.steps, str(entry["failed"]))
                running.remove(name)
            else:
                result.measured[name][rung.steps] = entry
        if not running:
            raise TrainingError(f"halving: no finalist stayed finite: {next(iter(result.stopped.values()))[1]}")
        points = np.array([minimized(result.measured[name][rung.steps], objectives) for name in running])
        order = [running[i] for i in ranked(points)]
        if best is not None:
            first = best({name: result.measured[name][rung.steps] for name in running})
            order = [first, *(name for name in order if name != first)]
        if number == len(rungs) - 1:
            result.winners = order
            break
        kept = order[: rungs[number + 1].finalists]
        for name in order[len(kept) :]:
            result.stopped[name] = (rung.steps, "others are better")
        for name in hopeless(result, kept, objectives):
            result.stopped[name] = (rung.steps, "can't reach the front")
            kept.remove(name)
        for name in running:
            if name in result.stopped:
                progress(f"{name}: stopped after {rung.steps} steps: {result.stopped[name][1]}")
        running = kept
    return result


def hopeless(result: Halving, names: Sequence[str], objectives: Sequence[str]) -> list[str]:
    """Those of `names` that another one of them would dominate as it is, even if they gained as much as any has so far.

    The gain is that since before training, the largest of all finalists, objective by objective.
    """
    now = {name: np.array(minimized(result.last(name), objectives)) for name in names}
    gains = [
        np.array(minimized(values[0], objectives)) - np.array(minimized(values[max(values)], objectives))
        for values in result.measured.values()
    ]
    gain = np.maximum(np.nan_to_num(np.array(gains), nan=0.0, posinf=np.inf).max(axis=0), 0.0)
    found = []
    for name in names:
        hoped = now[name] - gain
        if any((now[other] <= hoped).all() and (now[other] < hoped).any() for other in names if other != name):
            found.append(name)
    return found


def _known(known: Mapping[str, Any], name: str, steps: int) -> bool:
    return str(steps) in known.get(name, {})


def _shown(values: Mapping[str, float], objectives: Sequence[str]) -> str:
    return ", ".join(f"{key} {values[key]:.5g}" for key in dict.fromkeys([*objectives, "accuracy"]) if key in values)


def _read(file: Path | None, begun: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if file is None or not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        then, measured = data["begun with"], dict(data["measured"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{file}: is damaged: {type(error).__name__}; remove it to begin again") from None
    for key in ("objectives", "rungs"):
        if then.get(key) != begun[key]:
            raise StudyMismatchError(
                f"{file}: was begun with other {key} ({then.get(key)}, now {begun[key]}); give another folder"
            )
    if list(then.get("finalists", {})) != list(begun["finalists"]):
        raise StudyMismatchError(f"{file}: was begun with other finalists; give another folder")
    return measured


def _write(file: Path | None, begun: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if file is None:
        return
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"begun with": begun, "measured": known}, indent=1) + "\n", encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise RankoptError(f"{file}: can't be written: {error.strerror or error}") from error
