"""`Turned`: a linear layer used from its outputs to its inputs, for the head that is tied to an embedding."""

from __future__ import annotations

from torch import Tensor, nn


class Turned(nn.Module):
    """x ↦ x W for a weight W (out, in) that another layer holds too: input (..., out), output (..., in)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x @ self.weight

    def extra_repr(self) -> str:
        """Shown by print."""
        return "×".join(map(str, self.weight.shape))
