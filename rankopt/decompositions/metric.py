"""`Metric`: what an error in one layer's weight costs at its output, so that truncation spends ranks where data are.

With P the second moment of the input patches and G that of the output gradients, a weight error D (out × patch) costs
``trace(G D P Dᵀ)``. Without statistics both are the identity, which is the plain Frobenius norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGE = 1e-6


@dataclass(frozen=True)
class Metric:
    """Second moments of one layer, each with the groups in front; None stands for the identity.

    Attributes:
        patch: (groups, in·kernel, in·kernel), the index of a patch running as in ``weight.flatten(2)``.
        channel: (groups, in, in), used where the patch moment is too large to hold.
        diagonal: (groups, in), where different inputs never come together: how often the rows of a table are looked up.
        gradient: (groups, out, out), second moment of the loss's gradient at the output.
        turned: (groups, out, out), second moment of what an output head that holds the same weight is given, since it
            reads the weight from this side.
    """

    patch: Tensor | None = None
    channel: Tensor | None = None
    gradient: Tensor | None = None
    diagonal: Tensor | None = None
    turned: Tensor | None = None

    @property
    def side(self) -> Tensor | None:
        """(groups, out, out): what an error costs by its output channel; None where all cost the same."""
        known = [m for m in (self.gradient, self.turned) if m is not None]
        if len(known) < 2:
            return known[0] if known else None
        return torch.stack([m / m.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-300) for m in known]).mean(0)

    @property
    def known(self) -> bool:
        """Whether there are input statistics at all."""
        return self.patch is not None or self.channel is not None or self.diagonal is not None

    def over_modes(self, shape: tuple[int, ...], keep: tuple[int, ...]) -> Tensor | None:
        """The moment of some of the patch modes, averaged over the diagonal of the others.

        Args:
            shape: the patch's modes (in, *kernel).
            keep: which of them stay, in order; 0 is the channel.

        Returns:
            (groups, n, n) with n the product of the kept modes, or None without statistics.
        """
        if self.patch is None:
            if self.diagonal is not None and 0 in keep:
                return torch.diag_embed(self.diagonal)
            if self.channel is None or 0 not in keep:
                return None
            rest = math.prod(shape[m] for m in keep if m != 0)
            eye = torch.eye(rest, dtype=self.channel.dtype, device=self.channel.device)
            return torch.stack([torch.kron(c.contiguous(), eye) for c in self.channel])
        groups, modes = self.patch.shape[0], len(shape)
        left, right = list(range(1, modes + 1)), list(range(modes + 1, 2 * modes + 1))
        for m in range(modes):
            if m not in keep:
                right[m] = left[m]  # the same index on both sides: the diagonal, summed
        out = [0, *(left[m] for m in keep), *(right[m] for m in keep)]
        moment = torch.einsum(self.patch.reshape(groups, *shape, *shape), [0, *left, *right], out)
        n = math.prod(shape[m] for m in keep)
        return moment.reshape(groups, n, n) * (n / math.prod(shape))

    def weighted(self, weight: Tensor) -> Tensor:
        """The rows of a weight (groups, out, in, *kernel) times the input's second moment: (groups, out, in·kernel)."""
        flat = weight.flatten(2)
        if self.patch is not None:
            return flat @ self.patch.to(flat)
        if self.channel is not None:
            by_channel = weight.reshape(*weight.shape[:3], -1)
            return torch.einsum("goik,gij->gojk", by_channel, self.channel.to(flat)).flatten(2)
        if self.diagonal is not None:
            return flat * self.diagonal.to(flat)[:, None]
        return flat

    def output_moment(self, weight: Tensor) -> Tensor:
        """(groups, out, out): second moment of the output (bias apart) for a weight (groups, out, in, *kernel)."""
        return self.weighted(weight) @ weight.flatten(2).mT

    def error(self, difference: Tensor) -> Tensor:
        """Mean squared output error (summed over output channels) that a weight difference causes; a scalar."""
        return torch.einsum("goo->", self.output_moment(difference))

    def without_gradient(self) -> Metric:
        """The same input statistics alone."""
        return Metric(self.patch, self.channel, diagonal=self.diagonal, turned=self.turned)


def root(moment: Tensor | None, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a batch of moments and its inverse, both (groups, size, size), in `like`'s dtype.

    A small ridge (1e-6 of the mean eigenvalue) keeps directions that the data never visit invertible. The roots are
    scaled so that the mean eigenvalue is 1; a scale changes no truncation. None gives the identity.
    """
    if moment is None:
        eye = torch.eye(size, dtype=like.dtype, device=like.device).expand(like.shape[0], size, size)
        return eye, eye
    m = moment.to(like)
    scale = m.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    m = m / torch.where(scale > 0, scale, torch.ones_like(scale))
    values, vectors = torch.linalg.eigh((m + m.mT) / 2)
    values = values.clamp_min(0) + _RIDGE
    half = values.sqrt()[:, None, :]
    return (vectors * half) @ vectors.mT, (vectors / half) @ vectors.mT
