"""`tensor_ring`: three modes in, kernel, out, closed to a ring by `rank_1`.

W[o, i, k] ≈ Σ_abc G3[o; a, c] G2[c, b, k] G1[a, b; i] with a < rank_1, b < rank_2, c < rank_3 (Zhao et al., "Tensor
Ring Decomposition", 2016; Wang et al., "Wide Compression: Tensor Ring Nets", 2018). As a chain: pointwise to
rank_1 × rank_2 channels; one convolution rank_2 → rank_3 that all rank_1 blocks of channels share; pointwise from
rank_1 × rank_3 to the outputs. With rank_1 = 1 it is `tucker2`.

The fit starts from TensorLy's TR-SVD (where it is defined) and from the open train with the rest of the ring near zero,
and goes on with alternating least squares. TensorLy's own ALS starts from random numbers only and forms the design
matrix of the middle core, (out·in) × (rank_2·rank_3), which is too large for a wide layer; here the middle core is
improved by conjugate gradients, which need Gram matrices only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankopt.decompositions.chained import ChainDecomposition, Stage
from rankopt.decompositions.decomposition import Factors, Ranks, channels_and_kernel
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import leading, mode_gram, mode_products, mode_roots, tail, tensorly
from rankopt.layer_spec import LayerSpec

_SWEEPS = 20
_CG_STEPS = 8
_RIDGE = 1e-9
# Multiply-accumulates that a fit may spend on a group: a few seconds on one thread.
_BUDGET = 3e10

# In (a, b, in), middle (c, b, kernel), out (out, a, c).
Ring = tuple[Tensor, Tensor, Tensor]


class TensorRing(ChainDecomposition):
    """Pointwise, a convolution shared by rank_1 blocks of channels, pointwise."""

    name = "tensor_ring"
    sliceable = False
    exact = False

    def why_not(self, layer: LayerSpec) -> str | None:
        """Needs a kernel, and channels on both sides."""
        return channels_and_kernel(layer)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """The ring's bond out–in, the bond in–kernel, the bond kernel–out."""
        return ("rank_1", "rank_2", "rank_3")

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The train's for rank_2 and rank_3; for the ring's bond the root of the smaller side of channels."""
        _, o, i, *k = layer.group_shape
        size = math.prod(k)
        return {"rank_1": math.isqrt(min(o, i)), "rank_2": min(i, o * size), "rank_3": min(o, i * size)}

    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """in → rank_1·rank_2 → rank_1·rank_3 → out."""
        _, o, i, *_ = layer.group_shape
        a, b, c = (ranks[n] for n in self.rank_names(layer))
        return [Stage(i, a * b), Stage(b, c, tuple(range(layer.dims)), copies=a), Stage(a * c, o)]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """The whitened tensor (groups, out, in, kernel), what undoes the whitening, the spectra of the unfoldings."""
        roots = mode_roots(metric, weight.double())
        white = mode_products(weight.double().flatten(3), [half for half, _ in roots])
        spectra = {f"energy_{n}": leading(mode_gram(white, n), white.shape[n + 1])[1] for n in range(3)}
        return {"white": white, **spectra, **{f"undo_{n}": inverse.to(weight) for n, (_, inverse) in enumerate(roots)}}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The fit, for every group."""
        a, b, c = (ranks[n] for n in self.rank_names(layer))
        rings = [_fit(t, (a, b, c)) for t in factors["white"]]
        first, middle, last = (torch.stack(cores).to(factors["undo_0"]) for cores in zip(*rings, strict=True))
        return [
            torch.einsum("gabi,gji->gabj", first, factors["undo_1"]).flatten(1, 2),
            middle.reshape(-1, c, b, *layer.kernel_size),
            torch.einsum("goac,gpo->gpac", last, factors["undo_0"]).flatten(2),
        ]

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """Around the ring."""
        first, middle, last = weights
        c, b = middle.shape[1:3]
        first = first.reshape(first.shape[0], -1, b, first.shape[2])
        last = last.reshape(*last.shape[:2], -1, c)
        return torch.einsum("goac,gcb...,gabi->goi...", last, middle, first)

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the middle stage and the first one's outputs."""
        c, b = weights[1].shape[1:3]
        return {"rank_1": weights[0].shape[1] // b, "rank_2": b, "rank_3": c}

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Every unfolding's tail at the product of its two bonds; a ring can't keep more of that unfolding."""
        a, b, c = (ranks[f"rank_{n}"] for n in (1, 2, 3))
        tails = (tail(factors[f"energy_{n}"], rank) for n, rank in enumerate((a * c, a * b, b * c)))
        return np.minimum(sum(tails), 1.0)


def _fit(tensor: Tensor, ranks: tuple[int, int, int]) -> Ring:
    """The best ring of (out, in, kernel) that alternating least squares reaches."""
    a, b, c = ranks
    o, i, k = tensor.shape
    cost = tensor.numel() * a * (b + c) + (o + i) * k * a * b * c + _CG_STEPS * a * a * b * c * k * (b + c)
    sweeps = int(min(_SWEEPS, max(2, _BUDGET / cost)))
    if sweeps < _SWEEPS:
        tensor = tensor.float()
        return _descend(tensor, min(_starts(tensor, ranks), key=lambda start: _error(tensor, start)), sweeps)
    # Where it is cheap, every start gets its chance, since ALS can be stuck well above the best fit.
    reached = [_descend(tensor, start, sweeps) for start in _starts(tensor, ranks)]
    return _descend(tensor, min(reached, key=lambda ring: _error(tensor, ring)), 2 * sweeps)


def _descend(tensor: Tensor, ring: Ring, sweeps: int) -> Ring:
    error = _error(tensor, ring)
    for _ in range(sweeps):
        new = _sweep(tensor, ring)
        after = _error(tensor, new)
        if not after < error:
            break
        done = error - after < 1e-4 * error
        ring, error = new, after
        if done:
            break
    return ring


def _starts(tensor: Tensor, ranks: tuple[int, int, int]) -> list[Ring]:
    a, b, c = ranks
    o, i, _ = tensor.shape
    starts = []
    with tensorly() as tl:
        # Bond ranks in TensorLy: mode n has the bonds n and n + 1; the modes are in, kernel, out.
        modes = tensor.permute(1, 2, 0)
        for mode, (rows, left, right) in {0: (i, a, b), 2: (o, c, a)}.items():
            if left * right <= min(rows, tensor.numel() // rows):
                # Turned here, since TensorLy's own `mode` mixes up the bonds.
                order = [(mode + n) % 3 for n in range(3)]
                bonds = [ranks[n] for n in (*order, mode)]
                cores = list(tl.decomposition.tensor_ring(modes.permute(order), rank=bonds))
                starts.append(_pad([cores[order.index(n)] for n in range(3)], ranks))
        train = tl.decomposition.tensor_train(modes, rank=[1, min(b, i), min(c, o), 1])
    starts.append(_pad(train, ranks))
    return starts


def _pad(cores: Any, ranks: tuple[int, int, int]) -> Ring:
    """TensorLy's cores (bond, mode, bond) as a ring of these ranks; what they lack starts as little random numbers."""
    a, b, c = ranks
    generator = torch.Generator().manual_seed(0)
    ring = []
    for core, (left, right) in zip(cores, ((a, b), (b, c), (c, a)), strict=True):
        size = float(core.square().mean().sqrt()) * 1e-3
        full = torch.randn(left, core.shape[1], right, generator=generator, dtype=core.dtype).to(core.device) * size
        full[: core.shape[0], :, : core.shape[2]] = core
        ring.append(full)
    first, middle, last = ring
    return first.permute(0, 2, 1), middle.permute(2, 0, 1), last.permute(1, 2, 0)


def _error(tensor: Tensor, ring: Ring) -> float:
    first, middle, last = ring
    return float((tensor - torch.einsum("oac,cbk,abi->oik", last, middle, first)).square().sum())


def _sweep(tensor: Tensor, ring: Ring) -> Ring:
    """One round: the outer cores solved exactly, the middle one improved by conjugate gradients."""
    first, middle, last = ring
    (a, b, i), (c, _, k), o = first.shape, middle.shape, last.shape[0]
    design = torch.einsum("oac,cbk->abok", last, middle).reshape(a * b, o * k)
    first = _least_squares(design, tensor.permute(0, 2, 1).reshape(o * k, i), first.reshape(a * b, i)).reshape(a, b, i)
    middle = _improve(tensor, (first, middle, last))
    design = torch.einsum("cbk,abi->acik", middle, first).reshape(a * c, i * k)
    last = _least_squares(design, tensor.reshape(o, i * k).T, last.reshape(o, a * c).T).T.reshape(o, a, c)
    return first, middle, last


def _least_squares(design: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """X (q, n) near `present` that minimises |target − designᵀ X|², for a design (q, m) that may lack rank."""
    gram = design @ design.T
    gram = gram + torch.eye(len(gram)).to(gram) * (_RIDGE * gram.diagonal().mean() + 1e-300)
    return present + torch.linalg.solve(gram, design @ (target - design.T @ present))


def _improve(tensor: Tensor, ring: Ring) -> Tensor:
    """A few conjugate-gradient steps on the normal equations of the middle core."""
    first, middle, last = ring
    inner = torch.einsum("abi,xyi->abxy", first, first)
    outer = torch.einsum("oac,oxz->acxz", last, last)

    def normal(x: Tensor) -> Tensor:
        part = torch.einsum("acxz,zyk->acxyk", outer, x)
        return torch.einsum("acxyk,abxy->cbk", part, inner)

    seen = torch.einsum("oik,abi->oabk", tensor, first)
    residual = torch.einsum("oabk,oac->cbk", seen, last) - normal(middle)
    direction, squared = residual, residual.square().sum()
    for _ in range(_CG_STEPS):
        image = normal(direction)
        curvature = (direction * image).sum()
        if squared <= 1e-28 or curvature <= 0:
            break
        step = squared / curvature
        middle, residual = middle + step * direction, residual - step * image
        before, squared = squared, residual.square().sum()
        direction = residual + squared / before * direction
    return middle
