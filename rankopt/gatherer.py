"""`Gatherer`: the seam for what calibration keeps of one layer while data run through the model, and its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.block_samples import BlockSamples
from rankopt.decompositions.metric import Metric
from rankopt.fisher import GradientSamples
from rankopt.kinds import kind_named
from rankopt.layer_spec import LayerSpec


@dataclass(frozen=True)
class CalibrationOptions:
    """How much is gathered.

    Attributes:
        fisher_samples: samples of which gradients are taken (the first ones).
        draws: labels for each of them: the likeliest one, and others drawn among the rest.
        temperature: of the distribution that they are drawn from. Above 1, samples that the model knows by heart (its
            training data) still say which changes matter: their plain gradients vanish, their errors later don't.
        rows_each: output positions that a layer's moment is made of, for every row of it, but 8,192 in all at least;
            they are spread evenly over the samples, neighbours in an image being much alike.
        max_rows: positions in all, at most (None: all there are, whatever `rows_each` says).
        max_patch: the largest patch (in/groups · kernel) whose full moment is held; above, the channels' alone.
        piece: samples that run through the model at once.
        layer_bytes: memory for one layer's gradients; fewer samples are kept where they don't fit.
        seed: for positions and labels.
    """

    fisher_samples: int = 256
    draws: int = 4
    temperature: float = 2.0
    rows_each: int = 64
    max_rows: int | None = 2**17
    max_patch: int = 5120
    piece: int = 32
    layer_bytes: int = 192 * 2**20
    seed: int = 0


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments (`metric`) and gradients (`fisher`) of a layer; calls of it where its weight predicts nothing."""

    metric: Metric
    fisher: GradientSamples | BlockSamples


@dataclass
class Seen:
    """One call of a layer while gradients are taken.

    Attributes:
        role: which of the gatherer's taps was called.
        kept: what the gatherer keeps of it.
        gradients: of the output, one a draw, filled in by the backward passes.
    """

    role: str
    kept: Any
    gradients: list[Tensor] = field(default_factory=list)


class Gatherer(ABC):
    """Running sums of one layer.

    Args:
        layer, options: what of, and how much.
        samples: how many there will be in all.
    """

    def __init__(self, layer: LayerSpec, options: CalibrationOptions, samples: int) -> None:
        self.layer, self.options, self.total = layer, options, samples
        self.calls: list[Seen] = []
        self.held = 0
        self.generator = torch.Generator().manual_seed(options.seed)

    def taps(self, modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
        """The modules that are looked at, each with the role that it has here."""
        return [("", kind_named(self.layer).tap(modules[self.layer.name]))]

    def alone(self, role: str, x: Tensor) -> None:  # noqa: B027
        """Told once what the module is given when the model is run on a single sample."""

    @abstractmethod
    def look(self, role: str, x: Tensor) -> None:
        """See the input of one call."""

    @abstractmethod
    def keep(self, role: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """What is kept of a call whose output's gradients are taken: copies, since modules may work in place."""

    def close_piece(self, samples: int) -> None:
        """Turn the calls of one piece into samples, and forget them."""
        calls, self.calls = self.calls, []
        if calls and all(len(c.gradients) == len(calls[0].gradients) > 0 for c in calls):
            self.take(calls, samples)

    @abstractmethod
    def take(self, calls: list[Seen], samples: int) -> None:
        """Keep the gradients of a piece in which every call has as many of them as there were draws."""

    @abstractmethod
    def finish(self) -> LayerStatistics:
        """Means of the sums."""

    def _room(self, samples: int, each: int) -> int:
        """How many of a piece's samples are kept when one takes so many bytes; at least one of the first piece."""
        room = max(self.options.layer_bytes - self.held, 0) // each
        take = min(samples, room) if self.held else max(1, min(samples, room))
        self.held += take * each
        return take
