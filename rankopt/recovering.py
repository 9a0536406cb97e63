"""What is recovered, and what comes of it: a saved model, or the finalists of a study by successive halving.

`recover` is given what it trains; here it is built, trained, measured beside the dense model and written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rankopt import artifact
from rankopt.errors import InfeasibleError, InputError
from rankopt.evaluate import Evaluator
from rankopt.factors import Factors
from rankopt.halving import Executor, Halving, Rung, halve, one_by_one, plan_rungs
from rankopt.limits import Limit
from rankopt.pareto import ranked
from rankopt.plan import Plan
from rankopt.recover import Recovered
from rankopt.recovery_options import RecoveryOptions
from rankopt.result import Entry, Progress, Result, minimized
from rankopt.search import Search
from rankopt.training_job import Trainer, TrainingJob

if TYPE_CHECKING:
    from rankopt.study_file import StudyFile

_DEVICE = ("latency", "peak_memory", "memory")
Tell = Callable[[Progress], None]


@dataclass
class Recovery:
    """A study's model, data and metric, to train compressed models and to measure them.

    Args:
        file: the study.
        steps: in place of its ``recovery.final_steps``.
        dense: in place of the study's model: what plans are of. The teacher stays the study's.
        storage: of the study, where its plans are built.
        seed: in place of the study's.
    """

    file: StudyFile
    steps: int | None = None
    storage: str | None = None
    seed: int | None = None
    dense: nn.Module | None = None
    progress: Tell = lambda p: None
    search: Search = field(init=False)
    options: RecoveryOptions = field(init=False)

    def __post_init__(self) -> None:
        self.file.splits()  # once, for all that is made of the file
        quiet = self.file.model_copy(update={"target": [], "limits": [], "objectives": []})
        self.search = Search.from_study(quiet, storage=self.storage, seed=self.seed, model=self.dense)
        steps = self.file.recovery.final_steps if self.steps is None else self.steps
        self.options = self.file.recovery.model_copy(update={"steps": steps})
        self.search.progress = self.progress
        self.train = self.file.training_data()
        self.train = self.search.calibration if self.train is None else self.train
        self.teacher = self.search.model.eval() if self.dense is None else self.file.build_model().eval()
        run = self.search
        self.judge = Evaluator(
            self.teacher, run.layers, Factors(self.teacher), run.cost, run.validation, run.divergence, metric=run.metric
        )
        self.trainer = Trainer(
            self.teacher, self.train, self.options, run.divergence, self.judge, run.seed,
            self.file.training_function(), self.progress,
        )  # fmt: skip

    def measure(self, module: nn.Module) -> dict[str, dict[str, float]]:
        """kl and accuracy on validation, and on test data where there are any."""
        found = {"validation": self.judge.quality(module)}
        if self.search.tests is not None:
            found["test"] = self.judge.quality(module, self.search.tests)
        return found

    def trained(self, model: nn.Module, plan: Plan, folder: Path | None) -> Recovered:
        """A model that a plan made, fine-tuned to the end."""
        return self.trainer.trained(model, plan, folder)

    def written(
        self, out: Path, before: Mapping[str, Any], recovered: Recovered, plan: Plan, device: Mapping[str, Any],
        force: bool, more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Save a recovered model, load it back and measure that; all measurements, before and after."""
        costs = self.judge.costs(plan)
        dense = self.measure(self.teacher)
        after = self.measure(recovered.model)
        training = {
            "steps": recovered.steps, "seconds": recovered.seconds, "precision": recovered.precision,
            "went_back": recovered.backs, "bn": recovered.bn, "losses": [list(pair) for pair in recovered.losses],
        }  # fmt: skip
        own = {"dense": {**self.judge.dense, **_of(device, "dense")}}
        own["compressed"] = {**costs, **after["validation"], **_of(device, "compressed")}
        own |= {f"{name}_test": m["test"] for name, m in (("dense", dense), ("compressed", after)) if "test" in m}
        own |= {k: v for k, v in device.items() if k in ("conditions", "notes")}
        own |= {
            "before_recovery": {**before["validation"]},
            "recovery": {k: v for k, v in training.items() if k != "losses"},
        }
        artifact.save(out, recovered.model, plan, measurements=own, source=self.search.source, force=force)
        loaded = self.measure(artifact.load(out, self.teacher))
        found = {"dense": dense, "before": dict(before), "after": loaded, "costs": costs, "training": training}
        return found | dict(more or {})


def recover_saved(
    recovery: Recovery, directory: Path, out: Path, checkpoints: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Fine-tune a saved model and write the result; a killed run goes on where it stopped.

    Checkpoints lie beside `out` unless a folder is given, and go when the model is written.
    """
    plan = Plan.load(directory)
    model = artifact.load(directory, recovery.teacher)
    before = recovery.measure(model)
    folder = checkpoints or beside(out)
    recovered = recovery.trained(model, plan, folder)
    known = artifact.read_measurements(directory)
    written = recovery.written(out, before, recovered, plan, known, force)
    if checkpoints is None:
        shutil.rmtree(folder, ignore_errors=True)
    return written


def recover_study(
    recovery: Recovery,
    result: Result,
    out: Path,
    count: int,
    limits: Sequence[Limit] | None = None,
    eta: float = 3.0,
    checkpoints: Path | None = None,
    force: bool = False,
    rungs: Sequence[Rung] | None = None,
    executor: Executor = one_by_one,
) -> tuple[dict[str, Any], Halving]:
    """Successive halving over the `count` best plans of a study; the winner is written.

    The rungs follow from `eta` unless they are given; a killed run goes on where it stopped.
    """
    if recovery.options.steps < 1:
        raise InputError("recovery: needs at least 1 step; set recovery.final_steps, or give --steps")
    chosen = finalists(result, count, limits)
    names = {f"trial {entry.trial}": entry for entry in chosen}
    folder = checkpoints or beside(out)
    weights = recovery.search.fingerprint.weights[:6]
    folders = {
        name: folder.resolve() / f"{name.replace(' ', '-')}-{entry.plan.digest}-{weights}"
        for name, entry in names.items()
    }
    plans = {name: entry.plan for name, entry in names.items()}
    known = {name: {k: v for k, v in entry.measurements.items() if v is not None} for name, entry in names.items()}
    job = TrainingJob(recovery.trainer, recovery.search.model, plans, known, folders)

    def tell(text: str) -> None:
        recovery.progress(Progress(0, 0, 0.0, text=text))

    def built(name: str) -> nn.Module:
        tell(f"building {name}")
        return recovery.search.build(plans[name], bn=bool(names[name].notes.get("bn", 0)))

    before = {}
    for name in names:
        job.prepare(name, partial(built, name))
        before[name] = recovery.measure(job.start(name))
    values_before = {name: job.values(name, found["validation"]) for name, found in before.items()}
    rungs = rungs or plan_rungs(len(names), recovery.options.steps, eta)
    halving = halve(
        values_before,
        job,
        result.objectives,
        rungs,
        best=lambda measured: _best(measured, names, result, limits),
        executor=executor,
        folder=folder,
        progress=tell,
    )
    winner = halving.winners[0]
    if winner not in job.latest or job.latest[winner].steps < rungs[-1].steps:  # measured before a kill, or elsewhere
        job(winner, rungs[-1].steps)
    entry = names[winner]
    device: dict[str, Any] = {"compressed": {k: v for k, v in entry.measurements.items() if k.startswith(_DEVICE)}}
    device |= {"dense": dict(result.dense), "conditions": dict(result.conditions), "notes": list(result.notes)}
    more = {"winner": entry.trial, "plan": entry.plan.digest}
    written = recovery.written(out, before[winner], job.latest[winner], entry.plan, device, force, more)
    if checkpoints is None:
        shutil.rmtree(folder, ignore_errors=True)
    return written, halving


def finalists(result: Result, count: int, limits: Sequence[Limit] | None = None) -> list[Entry]:
    """The best plans within the limits: the very best one, then by dominance in all objectives.

    Raises `InfeasibleError` when none keeps the limits.
    """
    best = result.best(limits)
    wanted = result.limits if limits is None else limits
    pool = []
    for entry in result.entries:
        values = {k: v for k, v in entry.measurements.items() if v is not None}
        kept = "kl" in values and all(li.violation(values, result.dense) <= 0 for li in wanted)
        if entry.trial >= 0 and kept and entry.plan.changed() and entry.plan.digest != best.plan.digest:
            pool.append(entry)
    first = [best] if best.plan.changed() else []
    if not first and not pool:
        raise InputError("recover: within the limits there is only the dense model; allow less")
    points = [minimized(e.measurements, result.objectives) for e in pool]
    order = [int(i) for i in ranked(points)] if pool else []
    return [*first, *(pool[i] for i in order)][:count]


def beside(out: Path) -> Path:
    """Where checkpoints lie while nothing else is said."""
    out = out.resolve()
    return out.with_name(f"{out.name}.recovery")


def _best(
    measured: Mapping[str, Mapping[str, float]],
    names: Mapping[str, Entry],
    result: Result,
    limits: Sequence[Limit] | None,
) -> str:
    """The best of these as `Result.best` has it; where none keeps a limit on quality yet, without that limit."""
    entries = [Entry(names[n].trial, names[n].plan, values, True) for n, values in measured.items()]
    wanted = tuple(result.limits if limits is None else limits)
    for kept in (wanted, tuple(li for li in wanted if li.quantity not in ("accuracy", "kl"))):
        with suppress(InfeasibleError):
            return f"trial {Result(entries, result.objectives, kept, result.dense).best().trial}"
    return next(iter(measured))


def _of(device: Mapping[str, Any], which: str) -> dict[str, Any]:
    values = device.get(which) or {}
    return {k: v for k, v in values.items() if k.startswith(_DEVICE) and v is not None}
