"""`Chain`: the stages that stand in the place of a layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Told(NamedTuple):
    """What a layer's weight tells those who only ask for its dtype or device."""

    dtype: torch.dtype
    device: torch.device


class Chain(nn.Sequential):
    """Stages, one after the other.

    Models of transformers ask a layer for ``weight.dtype`` before they call it, so a chain can say that; there is no
    weight to compute with.
    """

    @property
    def weight(self) -> Told:
        """The dtype and device of the layer that was replaced."""
        first = next(self.parameters())
        return Told(first.dtype, first.device)
