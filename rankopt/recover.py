"""`recover`: the one training loop. A compressed model is trained towards the dense one, labels, or both.

It can be killed at any time and goes on from its last checkpoint to the same weights, on one thread bit for bit: the
checkpoint holds weights, the optimizer's state, the moving average, the generators' states and the place in the data.
A step whose loss, gradients or weights are not finite sends it back to the last checkpoint, with half the rate.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankopt import training_folder as checkpoint
from rankopt.batches import Batch
from rankopt.bn import has_batch_norm, recalibrate
from rankopt.callables import load_callable
from rankopt.chains import chains, decomposed
from rankopt.divergence import Divergence
from rankopt.errors import DataError, InputError, RankoptError, StudyMismatchError, TrainingError
from rankopt.layers import call_model, inference
from rankopt.nest import mapped
from rankopt.optimization import MovingAverage, Steps, put, tensors_of
from rankopt.plan import Plan
from rankopt.precision import Precision
from rankopt.randomness import Randomness
from rankopt.recovery_options import RecoveryOptions
from rankopt.result import Progress
from rankopt.training_data import TrainingData
from rankopt.training_loss import TrainingLoss, watched_layers
from rankopt.training_precision import by_hardware, by_timing
from rankopt.training_state import TrainingState, begun_with, difference
from rankopt.yaml_file import parse

_BACK = 4  # how often a training may go back before it is given up
_BN_BATCHES = 16
_FREE = ("bn", "checkpoint", "function", "final_steps", "device")  # may change between a checkpoint and going on
Training = Callable[[nn.Module, nn.Module | None, Any, int], nn.Module | None]


@dataclass(frozen=True)
class Recovered:
    """A trained model and how it went.

    Attributes:
        model: in eval mode, on the device it came from; the moving average where there is one.
        steps: how many optimizer steps it has.
        seconds: that it took, with what earlier calls and other processes did for the same checkpoints.
        precision: what it ran in, e.g. "bfloat16, channels-last".
        timed: seconds of a training step in everything that was tried for that.
        losses: (step, mean loss since the one before).
        backs: how often it went back because something was not finite.
        bn: whether batch norm was recalibrated.
    """

    model: nn.Module
    steps: int
    seconds: float = 0.0
    precision: str = "float32"
    timed: Mapping[str, float] = field(default_factory=dict)
    losses: Sequence[tuple[int, float]] = ()
    backs: int = 0
    bn: bool = False


def recover(
    model: nn.Module,
    dense: nn.Module | None,
    batches: Any,
    *,
    options: RecoveryOptions | Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    divergence: Divergence | None = None,
    checkpoints: str | Path | None = None,
    until: int | None = None,
    judge: Callable[[nn.Module], float] | None = None,
    train: Training | None = None,
    seed: int = 0,
    timing: bool = True,
    progress: Callable[[Progress], None] = lambda p: None,
    **changes: Any,
) -> Recovered:
    """Fine-tune a compressed model, or train one from the beginning.

    Args:
        model: what is trained; it is not changed.
        dense: the model it was made from: the teacher, and what tells which layers are decomposed. None: only labels
            are learned, and no layer counts as decomposed. With ``distill=0`` it is not run.
        batches: training data, see `TrainingData`; labels are optional where there is a dense model.
        options: see `RecoveryOptions`; further keywords replace single ones: ``steps=1000, lr=0.01``.
        plan: needed for ``decay_on="product"`` and ``orthogonality``.
        divergence: what the outputs are; the default is read off an output.
        checkpoints: a folder. When it holds a checkpoint of the same training, that goes on.
        until: stop after so many of the steps; the schedule is that of all of them. With `checkpoints` the next call
            goes on.
        judge: tells how bad a model is, for ``bn="auto"``; without it auto is off.
        train: a training of your own instead of this loop (else ``options.function``, from the current folder):
            ``train(model, dense, batches, steps)`` changes the model it is given, or returns one.
        seed: of everything that is random; the caller's generators stay as they are.
        timing: whether "auto" for precision and memory format is decided by timing, or else by the hardware.
        progress: told now and then.

    Raises:
        InputError: something given does not fit.
        StudyMismatchError: the checkpoints are those of another training.
        TrainingError: it does not stay finite.
    """
    chosen = read_options(options, changes)
    if not isinstance(model, nn.Module):
        raise InputError(f"recover: needs a torch.nn.Module, got {type(model).__name__}")
    start, result = time.perf_counter(), copy.deepcopy(model).eval()
    steps = chosen.steps if until is None else min(until, chosen.steps)
    if train is None and chosen.function is not None:
        train = load_callable(chosen.function, Path(), "recovery: function: ")
    found: dict[str, Any] = {}
    if train is not None:
        result = _by_user(train, result, dense, batches, steps)
        if chosen.bn == "off" or not has_batch_norm(result):
            return Recovered(result, steps, time.perf_counter() - start)
    data = TrainingData(batches, chosen.batch, seed)
    if train is None and steps > 0:
        device = _device(chosen.device, model)
        teacher = dense if dense is None or _device_of(dense) == device else copy.deepcopy(dense).to(device)
        folder = None if checkpoints is None else Path(checkpoints)
        run = _Run(copy.deepcopy(model).to(device), teacher, data, chosen, plan, divergence, folder, seed, progress)
        run.begin(timing)
        run.go(steps)
        put(run.values(), result)
        state, start = run.state, min(start, run.start)
        found = {"precision": str(run.precision), "timed": run.timed, "losses": state.losses, "backs": state.backs}
    bn = _recalibrated(result, data, chosen.bn, judge)
    return Recovered(result, steps, time.perf_counter() - start, bn=bn, **found)


def read_options(
    options: RecoveryOptions | Mapping[str, Any] | None = None, changes: Mapping[str, Any] | None = None
) -> RecoveryOptions:
    """Options with changes; raises `StudyFileError` naming the one that is wrong."""
    given = options.model_dump() if isinstance(options, RecoveryOptions) else dict(options or {})
    return parse(RecoveryOptions, {**given, **(changes or {})}, "recovery: ")


class _Run:
    """The loop, and where it stands."""

    def __init__(
        self, model: nn.Module, dense: nn.Module | None, data: TrainingData, options: RecoveryOptions,
        plan: Plan | None, divergence: Divergence | None, folder: Path | None, seed: int,
        progress: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        self.options, self.folder, self.progress = options, folder, progress
        self.device = _device_of(model)
        names = decomposed(dense, model) if dense is not None else []
        needed = options.orthogonality > 0 or options.decay_on == "product"
        if needed and (plan is None or dense is None):
            raise InputError("recovery: decay_on: product and orthogonality need the plan and the dense model")
        found = chains(dense, model, plan) if needed and plan is not None and dense is not None else []
        watched: list[str] = []
        if options.features > 0 and dense is not None:
            watched = watched_layers(model, dense, options.feature_layers, names)
        if divergence is None:
            divergence = _divergence(model, dense, data.some(1)[0].to(self.device))
        self.loss = TrainingLoss(options, dense, divergence, watched, found)
        self.steps = Steps.of(model, names, found, options)
        average = MovingAverage(model, options.ema) if options.ema > 0 else None
        random = Randomness(seed, gpu=self.device.type == "cuda")
        self.state = TrainingState(model, self.steps.optimizer, average, random, data)
        self.precision = Precision()
        self.timed: dict[str, float] = {}
        self.start = time.perf_counter()
        self._kept: tuple[dict[str, Tensor], dict[str, Any]] = ({}, {})
        fixed = {key: value for key, value in options.model_dump().items() if key not in _FREE}
        self._begun = {"options": fixed, **begun_with(model), "seed": seed}

    def begin(self, timing: bool) -> None:
        """Take up the last checkpoint, or choose the precision and keep the first one."""
        stored = checkpoint.latest(self.folder) if self.folder is not None else None
        model = self.state.model
        if stored is None:
            if timing:
                batch = self.state.data.some(1)[0].to(self.device)
                with Randomness(0, gpu=True).inside():
                    self.precision, self.timed = by_timing(
                        self.options, model, self.device, lambda m, p: self._gradients(m, batch, p)
                    )
            else:
                self.precision = by_hardware(self.options, model, self.device)
            self.precision.module_(model)
            self._keep()
            return
        tensors, facts = stored
        other = difference(facts["begun with"], self._begun)
        if other is not None:
            raise StudyMismatchError(
                f"checkpoints {self.folder}: were begun with another {other[0]} ({other[1]}, now {other[2]}); give"
                " another folder"
            )
        self.precision, self.timed = Precision(*facts["precision"]), dict(facts["timed"])
        self.start -= float(facts.get("seconds", 0.0))
        self.precision.module_(model)
        self.state.restore(tensors, facts)
        self._kept = stored

    def go(self, until: int) -> None:
        """Train up to this step."""
        state, every = self.state, max(1, self.options.steps // 50)
        start, began = time.perf_counter(), state.step
        with state.random.inside():
            while state.step < until:
                loss = self._one()
                last = state.step == until
                keep = loss is not None and (last or state.step % self.options.checkpoint == 0)
                if loss is None or (keep and not state.finite()):
                    self._go_back()
                    continue
                if state.noted(loss, every, last):
                    seconds = time.perf_counter() - start
                    left = seconds / max(state.step - began, 1) * (until - state.step)
                    text = f"step {state.step}/{until} · loss {state.losses[-1][1]:.4f} · {left:.0f} s left"
                    self.progress(Progress(0, 0, seconds, text=text))
                if keep:
                    self._keep()

    def values(self) -> dict[str, Tensor]:
        """Parameters and buffers as they are handed over: the moving average where there is one."""
        average = self.state.average
        return tensors_of(self.state.model) if average is None else average.values

    def _one(self) -> float | None:
        """One step: its loss, or None where something was not finite."""
        state = self.state
        loss = self._gradients(state.model, state.data.next().to(self.device), self.precision)
        if not math.isfinite(loss) or not self.steps.take(state.step, self.options.steps, state.scale):
            return None
        if state.average is not None:
            state.average.update(state.model, state.step)
        state.step += 1
        return loss

    def _gradients(self, model: nn.Module, batch: Batch, precision: Precision) -> float:
        """Forward and, from a finite loss, backward."""
        args, kwargs = mapped((batch.args, batch.kwargs), precision.placed)
        model.train()
        model.zero_grad(set_to_none=True)
        with precision.on(self.device.type):
            loss = self.loss(model, Batch(args, kwargs, batch.labels))
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()
        return value

    def _keep(self) -> None:
        """Write a checkpoint; keep one in memory where there is no folder."""
        tensors, facts = self.state.captured()
        facts |= {"begun with": self._begun, "timed": self.timed, "seconds": time.perf_counter() - self.start}
        facts |= {"precision": [self.precision.bfloat16, self.precision.channels_last]}
        if self.folder is None:
            self._kept = checkpoint.copied(tensors), facts
        else:
            checkpoint.write(self.folder, self.state.step, tensors, facts)

    def _go_back(self) -> None:
        """Go back to the last checkpoint with half the rate."""
        state = self.state
        failed, backs, scale = state.step, state.backs + 1, state.scale / 2
        stored = self._kept if self.folder is None else checkpoint.latest(self.folder)
        assert stored is not None
        state.restore(*stored)
        if backs >= _BACK:
            raise TrainingError(
                f"recovery: loss, gradients or weights were not finite {backs} times, the last time after step {failed}"
                f" at {2 * scale:g} times the rate; take a smaller lr than {self.options.lr:g}, or look at the data"
            )
        state.backs, state.scale = backs, scale
        text = f"not finite after step {failed}: back to step {state.step} with {scale:g} times the rate"
        self.progress(Progress(0, 0, 0.0, text=text))


def _divergence(model: nn.Module, dense: nn.Module | None, batch: Batch) -> Divergence:
    """What outputs are, from those of the dense model; without one, the variance of numbers is that of the labels."""
    teacher = model if dense is None else dense
    with inference(teacher):
        found = Divergence.of(call_model(teacher, batch.args, batch.kwargs, "train"))
    if dense is None and found.kind == "regression" and isinstance(batch.labels, Tensor) and len(batch) > 1:
        return replace(found, variance=max(float(batch.labels.float().var(correction=0)), 1e-12))
    return found


def _recalibrated(model: nn.Module, data: TrainingData, bn: str, judge: Callable[[nn.Module], float] | None) -> bool:
    """Recalibrate batch norm, or, for auto, do it where it is judged to be better; whether it was done."""
    if bn == "off" or not has_batch_norm(model) or (bn == "auto" and judge is None):
        return False
    device = _device_of(model)
    batches = [b.to(device) for b in data.some(_BN_BATCHES)]
    if bn == "on" or judge is None:
        recalibrate(model, batches)
        return True
    before, values = judge(model), {name: value.clone() for name, value in tensors_of(model).items()}
    recalibrate(model, batches)
    if judge(model) < before:
        return True
    put(values, model)
    return False


def _by_user(train: Training, model: nn.Module, dense: nn.Module | None, batches: Any, steps: int) -> nn.Module:
    """The user's own training; what it gives must be the same architecture with finite values."""
    expected = {name: value.shape for name, value in tensors_of(model).items()}
    try:
        given = train(model, dense, batches, steps)
    except RankoptError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"recovery.function: raised {type(error).__name__}: {first}") from error
    trained = model if given is None else given
    if not isinstance(trained, nn.Module):
        raise DataError(f"recovery.function: must return a torch.nn.Module or None, got {type(trained).__name__}")
    values = tensors_of(trained)
    if {name: value.shape for name, value in values.items()} != expected:
        raise DataError("recovery.function: returned a model with other parameters than the one it was given")
    if not all(bool(torch.isfinite(v).all()) for v in values.values() if v.is_floating_point()):
        raise TrainingError("recovery.function: returned weights that are NaN or infinite")
    return trained.eval()


def _device_of(model: nn.Module) -> torch.device:
    return next((value.device for value in tensors_of(model).values()), torch.device("cpu"))


def _device(name: str, model: nn.Module) -> torch.device:
    """The device of a training; raises `InputError` where there is no such one."""
    if name == "auto":
        return torch.device("cuda") if torch.cuda.is_available() else _device_of(model)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"recovery.device: {name!r} can't be used here: {first}") from None
    return device
