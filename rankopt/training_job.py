"""`TrainingJob`: a study's finalists, trained to so many steps and measured; it may be sent to another process.

What one process has trained is on disk: a model before its training and its checkpoints, in a folder for each finalist.
So another one can go on with it, on another node too, as long as both see the folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.divergence import Divergence
from rankopt.errors import InputError
from rankopt.evaluate import Evaluator
from rankopt.plan import Plan
from rankopt.recover import Recovered, Training, recover
from rankopt.recovery_options import RecoveryOptions
from rankopt.result import Progress
from rankopt.surgery import structure
from rankopt.tensor_file import read_tensors, write_tensors

START = "start.safetensors"


def _untold(progress: Progress) -> None:
    """Nobody hears it."""


@dataclass(frozen=True)
class Trainer:
    """What models of one study are trained and measured with.

    Attributes:
        teacher: the model whose outputs are learned.
        data: training data, see `TrainingData`.
        judge: measures beside the teacher, on validation data.
        function: the user's own training, in place of the loop.
        progress: told now and then; stays behind when this is sent elsewhere.
    """

    teacher: nn.Module
    data: Any
    options: RecoveryOptions
    divergence: Divergence
    judge: Evaluator
    seed: int
    function: Training | None = None
    progress: Callable[[Progress], None] = _untold

    def trained(self, model: nn.Module, plan: Plan, folder: Path | None, until: int | None = None) -> Recovered:
        """A model that a plan made, fine-tuned up to `until` steps of all; `folder` keeps its checkpoints."""
        return recover(
            model,
            self.teacher,
            self.data,
            options=self.options,
            plan=plan,
            divergence=self.divergence,
            checkpoints=folder,
            until=until,
            judge=self._badness,
            train=self.function,
            seed=self.seed,
            progress=self.progress,
        )

    def _badness(self, module: nn.Module) -> float:
        quality = self.judge.quality(module)
        return -quality["accuracy"] if "accuracy" in quality else quality["kl"]


@dataclass
class TrainingJob:
    """What `halving.halve` calls: brings a finalist to so many steps, and measures it.

    Args:
        trainer: trains.
        dense: the model that the plans are of.
        plans, known: of every finalist: its plan, and what is known of it besides its quality.
        folders: of every finalist, for its start and its checkpoints.

    Attributes:
        latest: the models that were trained in this process.
    """

    trainer: Trainer
    dense: nn.Module
    plans: Mapping[str, Plan]
    known: Mapping[str, Mapping[str, float]]
    folders: Mapping[str, Path]
    latest: dict[str, Recovered] = field(default_factory=dict)

    def __call__(self, name: str, steps: int) -> dict[str, float]:
        """Train one up to `steps` of all; raises `TrainingError` where it does not stay finite."""
        model = self.trainer.trained(self.start(name), self.plans[name], self.folders[name], until=steps)
        self.latest[name] = model
        return self.values(name, self.trainer.judge.quality(model.model))

    def values(self, name: str, quality: Mapping[str, float]) -> dict[str, float]:
        """All that is known of one, with this quality."""
        return {**self.known[name], **self.trainer.judge.costs(self.plans[name]), **quality}

    def prepare(self, name: str, build: Callable[[], nn.Module]) -> None:
        """Keep the model before its training, if it is not kept yet: a refit and a short recovery take their time."""
        kept = self.folders[name] / START
        if not kept.is_file():
            built = build()
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(kept.with_suffix(".part"), built)
            kept.with_suffix(".part").replace(kept)

    def start(self, name: str) -> nn.Module:
        """The model before its training, as `prepare` kept it; raises `InputError` where that is not seen."""
        kept = self.folders[name] / START
        if not kept.is_file():
            raise InputError(
                f"checkpoints {kept.parent}: {START} is not there; nodes that train need a folder that all of them see,"
                " give one by --checkpoints"
            )
        model = structure(self.dense, self.plans[name])
        read_tensors(kept, model)
        return model.eval()

    def travelling(self) -> TrainingJob:
        """The same for another process: tells no progress, and holds no models."""
        trainer = replace(self.trainer, judge=self.trainer.judge.travelling(), progress=_untold)
        other = copy.copy(self)
        other.trainer, other.latest = trainer, {}
        return other
