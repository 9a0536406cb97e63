"""`Slopes`: the learnable activation between two stages of a chain, which begins as the identity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Slopes(nn.Module):
    """x where it is positive, else a slope times x, one slope a channel (PReLU; He et al., "Delving Deep into
    Rectifiers", 2015). All slopes begin at 1, so that nothing changes, bit for bit.

    Other than in `nn.PReLU` the channels of a linear layer are the last dimension, and inputs need no batch: as in the
    layers between which it stands.

    Args:
        channels: how many.
        dims: spatial dimensions behind the channels; 0 for linear layers.
        like: gives dtype and device.
    """

    def __init__(self, channels: int, dims: int, like: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels) if like is None else like.new_ones(channels))
        self.dims = dims

    @property
    def moved(self) -> int:
        """How many slopes are no longer 1."""
        return int((self.weight != 1).sum())

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) for linear layers, else (batch, channels, *size) or the same without the batch."""
        slopes = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)  # autocast
        if self.dims == 0 and x.dim() != 2:
            return torch.where(x > 0, x, slopes * x)
        if self.dims == 0 or x.dim() == self.dims + 2:
            return F.prelu(x, slopes)
        return F.prelu(x.unsqueeze(0), slopes).squeeze(0)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{len(self.weight)}"
