"""`AttentionMethod`: what all ways to write a self-attention layer have in common, in terms of its sizes alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.attention_moments import Moments
from rankopt.attention_styles import Projections, Shape
from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.distill_block import DistillOptions, Example


@dataclass(frozen=True)
class Known:
    """What is known of a layer besides its weights.

    Attributes:
        moments: of tokens and attended values.
        tokens: of the example input.
        examples: inputs and outputs of the dense layer, to distill on (none: nothing is trained).
        distillation: how.
    """

    moments: Moments
    tokens: int
    examples: Sequence[Example] = ()
    distillation: DistillOptions = DistillOptions()


class AttentionMethod(ABC):
    """A way to write a self-attention layer.

    Attributes:
        name: the name used in plans and search spaces.
        sliceable: whether one preparation serves every rank.
        exact: whether full rank gives back the original layer.
        needs_recovery: whether it equals attention at no rank and has to be trained.
    """

    name: str
    sliceable: bool = True
    exact: bool = True
    needs_recovery: bool = False

    def why_not_of(self, shape: Shape, masking: str, tokens: int) -> str | None:
        """Why it does not fit a layer of these sizes, called with this masking on so many tokens, or None."""
        return None

    @abstractmethod
    def rank_names_of(self, shape: Shape) -> tuple[str, ...]:
        """The names of its ranks."""

    @abstractmethod
    def bounds_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """The largest useful value of every rank."""

    @abstractmethod
    def params_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """Parameters of the core; arrays of ranks give an array."""

    @abstractmethod
    def macs_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """Multiply-accumulates on one sample of so many tokens; arrays of ranks give an array."""

    @abstractmethod
    def core(self, shape: Shape, tokens: int, ranks: Mapping[str, int], **where: Any) -> nn.Module:
        """The module at these ranks, its values of no meaning; `where`: dtype and device."""

    @abstractmethod
    def prepare(self, shape: Shape, dense: Projections, known: Known) -> Factors:
        """What is prepared once for all ranks."""

    @abstractmethod
    def weights_of(self, shape: Shape, factors: Factors, ranks: Mapping[str, int], known: Known) -> list[Tensor]:
        """The core's parameters at these ranks, in the order of ``core(...).parameters()``."""

    @abstractmethod
    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """What these ranks lose; only its order counts."""


def filled(core: nn.Module, weights: Sequence[Tensor]) -> nn.Module:
    """Copy weights into the parameters of a core, in order."""
    with torch.no_grad():
        for parameter, weight in zip(core.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return core
