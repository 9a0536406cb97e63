"""Layers that mix tokens by factorizing them, in the place of attention: `NmfMixing`, `PnmfMixing`, `NtfMixing`.

The construction is the hamburger of Geng et al. ("Is attention better than matrix decomposition?", 2021): a linear
layer and a ReLU, a few steps of an iteration that finds a low-rank, non-negative approximation of what comes out, and a
linear layer on the approximation. All tokens of a sample are one matrix (or tensor), so every output depends on all of
them, at a cost linear in their number.

Padded tokens enter with rows of zeros, which multiplicative updates keep at zero, so they change nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.nn.multiplicative import (
    iterate,
    macs_of_nmf_step,
    macs_of_ntf_step,
    macs_of_pnmf_start,
    macs_of_pnmf_step,
    nmf_step,
    ntf_step,
    ntf_sum,
    pnmf_start,
    pnmf_step,
)


class FactorMixing(nn.Module, ABC):
    """What the three have in common.

    Args:
        inward: (..., in) → (..., width); a ReLU follows.
        outward: (..., width) → (..., out).
        rank: components.
        steps: iterations.
        start: where the iteration begins, a parameter of any sign; what is used is its softplus.
        one_step: gradients come from the last iteration alone, see `iterate`; `start` then receives none, unless it
            enters otherwise.
    """

    def __init__(
        self, inward: nn.Module, outward: nn.Module, rank: int, steps: int, start: Tensor, one_step: bool = True
    ) -> None:
        super().__init__()
        self.inward, self.outward = inward, outward
        self.start = nn.Parameter(start)
        self.rank, self.steps, self.one_step = rank, steps, one_step

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(batch, tokens, in) → (batch, tokens, out); `keep` (batch, tokens) is False at padding."""
        width = F.relu(self.inward(x))
        shown = width.new_ones(width.shape[:2]) if keep is None else keep.to(width.dtype)
        shown = shown.unsqueeze(-1)
        if torch.is_autocast_enabled(width.device.type):  # updates divide sums by sums: half precision is too coarse
            with torch.autocast(width.device.type, enabled=False):
                return self.outward(self.mixed((width * shown).float(), shown.float()))
        half = width.dtype in (torch.float16, torch.bfloat16)
        work = torch.float32 if half else width.dtype
        return self.outward(self.mixed((width * shown).to(work), shown.to(work)).to(width.dtype))

    @abstractmethod
    def mixed(self, x: Tensor, shown: Tensor) -> Tensor:
        """The approximation of x (batch, tokens, width), of the same shape; `shown` (batch, tokens, 1) is 0 or 1."""

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"rank={self.rank}, steps={self.steps}, one_step={self.one_step}"


class NmfMixing(FactorMixing):
    """Tokens as X (tokens × width) ≈ codes · basis; `start` is the basis, (rank, width)."""

    def mixed(self, x: Tensor, shown: Tensor) -> Tensor:
        """The product of the factors that the last step leaves."""
        codes = shown.expand(*shown.shape[:-1], self.rank)
        basis = F.softplus(self.start).to(x.dtype).expand(x.shape[0], -1, -1)
        codes, basis = iterate(nmf_step, x, (codes, basis), self.steps, self.one_step)
        return codes @ basis


class PnmfMixing(FactorMixing):
    """Tokens as X ≈ W Wᵀ X with W (tokens × rank); `start` (width, rank) gives the W to begin with, softmax(X · start).

    The products with X carry gradients past the iteration, so here one step reaches the layers before through X too.
    """

    def mixed(self, x: Tensor, shown: Tensor) -> Tensor:
        """The projection of x."""
        w = torch.softmax(x @ self.start.to(x.dtype), -1) * shown
        (w,) = iterate(pnmf_step, x, pnmf_start(x, w), self.steps, self.one_step)
        return w @ (w.transpose(-2, -1) @ x)


class NtfMixing(FactorMixing):
    """Tokens as a tensor, a sum of `rank` non-negative outer products.

    Args:
        modes: (heads, width / heads) for (tokens, heads, channels), or (height, width, channels) for images, whose
            tokens are the points of that grid, row by row.
        start: (sum of the sizes of all modes but the tokens, rank), the factors behind each other.
    """

    def __init__(
        self,
        inward: nn.Module,
        outward: nn.Module,
        rank: int,
        steps: int,
        start: Tensor,
        modes: tuple[int, ...],
        one_step: bool = True,
    ) -> None:
        super().__init__(inward, outward, rank, steps, start, one_step)
        self.modes = modes

    def mixed(self, x: Tensor, shown: Tensor) -> Tensor:
        """The sum of the outer products that the last step leaves."""
        factors = [f.expand(x.shape[0], -1, -1) for f in F.softplus(self.start).to(x.dtype).split(self.modes)]
        if len(self.modes) == 2:
            tensor = x.unflatten(-1, self.modes)
            factors = [shown.expand(*shown.shape[:-1], self.rank), *factors]
        else:
            tensor = x.unflatten(1, self.modes[:2])
        a, b, c = iterate(ntf_step, tensor, tuple(factors), self.steps, self.one_step)
        fitted = ntf_sum(a, b, c)
        return fitted.flatten(2) if len(self.modes) == 2 else fitted.flatten(1, 2)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{super().extra_repr()}, modes={self.modes}"


def macs_of_nmf(tokens: int, width: int, rank: int, steps: int) -> int:
    """Multiply-accumulates of `NmfMixing` on one sample, between its two linear layers."""
    return steps * macs_of_nmf_step(tokens, width, rank) + tokens * width * rank


def macs_of_pnmf(tokens: int, width: int, rank: int, steps: int) -> int:
    """Multiply-accumulates of `PnmfMixing` on one sample, between its two linear layers."""
    begun = tokens * width * rank + macs_of_pnmf_start(tokens, width, rank)
    return begun + steps * macs_of_pnmf_step(tokens, width, rank) + 2 * tokens * width * rank


def macs_of_ntf(modes: tuple[int, int, int], rank: int, steps: int) -> int:
    """Multiply-accumulates of `NtfMixing` on one sample whose tensor has these modes, between its linear layers."""
    i, j, k = modes
    return steps * macs_of_ntf_step(i, j, k, rank) + i * j * k * rank
