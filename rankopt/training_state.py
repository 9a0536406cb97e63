"""`TrainingState`: all that a training needs to go on as if it had not stopped, as tensors and plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.optimization import MovingAverage, put, tensors_of
from rankopt.randomness import Randomness
from rankopt.training_data import TrainingData


@dataclass
class TrainingState:
    """A training at some step.

    Attributes:
        model, optimizer, average, random, data: what changes while it is trained.
        step: steps that were taken.
        scale: factor of the learning rate, 1 unless it had to go back.
        backs: how often it went back.
        losses: (step, mean loss since the one before).
        pending: sum of the losses since the last of them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None
    random: Randomness
    data: TrainingData
    step: int = 0
    scale: float = 1.0
    backs: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    pending: float = 0.0

    def captured(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, which are not copied, and JSON values."""
        tensors = {f"model.{name}": value for name, value in tensors_of(self.model).items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.values.items()}
        state = self.optimizer.state_dict()["state"]
        tensors |= {f"optimizer.{n}.{k}": v for n, s in state.items() for k, v in s.items() if isinstance(v, Tensor)}
        tensors |= {f"random.{name}": value for name, value in self.random.tensors().items()}
        facts: dict[str, Any] = {"step": self.step, "scale": self.scale, "backs": self.backs, "pending": self.pending}
        facts |= {"losses": [list(pair) for pair in self.losses]}
        return tensors, facts | {"epoch": self.data.epoch, "position": self.data.position}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Become what was captured; the objects stay the same ones and are filled."""
        put(_below("model.", tensors), self.model)
        if self.average is not None:
            for name, value in _below("average.", tensors).items():
                self.average.values[name].copy_(value)
        placed = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _below("optimizer.", tensors).items():
            number, _, name = key.partition(".")
            like = placed[int(number)]
            own = torch.empty_like(like).copy_(value) if value.shape == like.shape else value.clone()
            state.setdefault(int(number), {})[name] = own.detach()
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step, self.scale, self.backs = facts["step"], facts["scale"], facts["backs"]
        self.losses = [(int(step), float(loss)) for step, loss in facts["losses"]]
        self.pending = facts["pending"]
        self.data.go_to(facts["epoch"], facts["position"])
        self.random.restore(_below("random.", tensors))

    def finite(self) -> bool:
        """Whether all parameters and buffers are."""
        values = [v for v in tensors_of(self.model).values() if v.is_floating_point()]
        return all(bool(torch.isfinite(value).all()) for value in values)

    def noted(self, loss: float, every: int, last: bool) -> bool:
        """Count a loss in; whether a mean was added to `losses`."""
        self.pending += loss
        if not (self.step % every == 0 or last):
            return False
        since = self.step - (self.losses[-1][0] if self.losses else 0)
        self.losses.append((self.step, self.pending / max(since, 1)))
        self.pending = 0.0
        return True


def begun_with(model: nn.Module) -> dict[str, Any]:
    """What tells a model from another one: shapes, and how large its weights are."""
    total = math.fsum(p.detach().double().square().sum().item() for p in model.parameters())
    shapes = {name: list(value.shape) for name, value in tensors_of(model).items()}
    return {"shapes": shapes, "size of the weights": math.sqrt(total)}


def difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first of these facts that differs, and its values; numbers may differ by 0.1 %, as repeated refits do."""
    for key, value in now.items():
        old = begun.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            name = next((k for k in [*value, *old] if value.get(k) != old.get(k)), None)
            if name is not None:
                return f"{key}: {name}", old.get(name), value.get(name)
        elif isinstance(value, float) and isinstance(old, float) and math.isclose(old, value, rel_tol=1e-3):
            continue
        elif old != value:
            return key, old, value
    return None


def _below(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
