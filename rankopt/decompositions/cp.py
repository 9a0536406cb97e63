"""`cp`: a sum of `rank` rank-one terms, with the kernel's modes taken as one.

W[o, i, k] ≈ Σ_r B[o, r] K[k, r] A[i, r]: a pointwise convolution to `rank` channels, a depthwise one with the whole
kernel, a pointwise one to the outputs (Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned
CP-Decomposition", 2015).

There is no closed form. Alternating least squares starts from a point that is always sound: rotate the kernel mode into
its singular basis, take the SVD of every slice and keep the `rank` strongest of all terms. These are orthogonal, so
nothing cancels. Small tensors get a random start as well. A sweep is TensorLy's `parafac` on the channel modes; the
kernel's mode is solved here, because `parafac` would form a matrix (out·in) × rank for it, gigabytes for a wide layer.

ALS likes to run into degeneracy: two huge terms that cancel each other, and lose all their digits in float16 and in
fine-tuning (Phan et al., "Stable Low-Rank Tensor Decomposition for Compression of Convolutional Neural Networks",
2020). So every run goes from strong to weak regularisation, and of all stops the best one counts whose terms' energies
add up to no more than `_ENERGY` times the tensor's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankopt.decompositions.chained import ChainDecomposition, Stage
from rankopt.decompositions.decomposition import Factors, Ranks, channels_and_kernel
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import mode_products, mode_roots, tail, tensorly
from rankopt.errors import RefusedDecomposition
from rankopt.layer_spec import LayerSpec

_ENERGY = 10.0
_REGULARISATION = (1e-2, 1e-3, 1e-4)
_RESTARTS = 1
_SWEEPS = 25
_ENOUGH = 1e-5
# Multiply-accumulates that a group's run may cost: a few seconds on one thread.
_BUDGET = 1e11


class Cp(ChainDecomposition):
    """Pointwise in → rank, depthwise over the whole kernel, pointwise rank → out."""

    name = "cp"
    sliceable = False
    exact = False

    def why_not(self, layer: LayerSpec) -> str | None:
        """Needs a kernel, and channels on both sides."""
        return channels_and_kernel(layer)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """One rank."""
        return ("rank",)

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The largest rank with fewer MACs than the dense layer; costs grow in proportion to it."""
        _, o, i, *k = layer.group_shape
        size = math.prod(k)
        cost = self.macs(layer, {"rank": 1})
        dense = layer.macs
        if not cost:
            cost, dense = i + size + o, o * i * size
        return {"rank": max(1, min((dense - 1) // cost, o * i, o * size, i * size))}

    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """in → rank → rank → out."""
        _, o, i, *_ = layer.group_shape
        r = ranks["rank"]
        return [Stage(i, r), Stage(r, r, tuple(range(layer.dims)), depthwise=True), Stage(r, o)]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """The whitened tensor (groups, out, in, kernel), what undoes the whitening, and the spectrum of the slices."""
        if not torch.isfinite(weight).all():
            raise RefusedDecomposition(f"{layer.name}: cp needs a finite weight")
        roots = mode_roots(metric, weight.double())
        white = mode_products(weight.double().flatten(3), [half for half, _ in roots])
        energy = torch.stack([_slices(t)[1].square() for t in white]).sum(0)
        undo = {f"undo_{n}": inverse.to(weight) for n, (_, inverse) in enumerate(roots)}
        return {"white": white, "energy": energy, **undo}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """ALS, for every group.

        Raises:
            RefusedDecomposition: when no sound result was found.
        """
        solved = [_solve(t, ranks["rank"], layer.name) for t in factors["white"]]
        out, inp, kernel = (torch.stack(factor).to(factors["undo_0"]) for factor in zip(*solved, strict=True))
        out, inp = factors["undo_0"] @ out, factors["undo_1"] @ inp
        return [inp.mT, kernel.mT.reshape(layer.groups, -1, *layer.kernel_size), out]

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """The sum of the terms."""
        first, kernel, last = weights
        return torch.einsum("gor,gr...,gri->goi...", last, kernel, first)

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the first stage's outputs."""
        return {"rank": weights[0].shape[1]}

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """What the start loses: the tail of the slices' singular values. ALS only improves on it."""
        return tail(factors["energy"], ranks["rank"])


def _slices(tensor: Tensor) -> tuple[list[Tensor], Tensor]:
    """The terms of all slices, strongest first: factors with unit columns for (out, in, kernel), and the strengths."""
    flat = tensor.flatten(0, 1)
    _, basis = torch.linalg.eigh(flat.mT @ flat)
    u, s, v = torch.linalg.svd((flat @ basis).T.reshape(-1, *tensor.shape[:2]), full_matrices=False)
    order = s.flatten().argsort(descending=True)
    which = torch.arange(s.shape[0], device=s.device)[:, None].expand_as(s).flatten()[order]
    columns = [u.mT.flatten(0, 1)[order].T, v.flatten(0, 1)[order].T, basis[:, which]]
    return columns, s.flatten()[order]


def _starts(tensor: Tensor, rank: int, restarts: int) -> Iterator[list[Tensor]]:
    columns, strengths = _slices(tensor)
    generator = torch.Generator().manual_seed(rank)
    noise = [torch.randn(n, rank, generator=generator, dtype=tensor.dtype).to(tensor.device) for n in tensor.shape]
    have = min(rank, len(strengths))
    # Terms beyond the slices' own start near zero.
    start = [n * 1e-3 for n in noise]
    for factor, column in zip(start, columns, strict=True):
        factor[:, :have] = column[:, :have] * strengths[:have].clamp_min(0) ** (1 / 3)
    yield start
    for _ in range(restarts):
        factors = [torch.randn(f.shape, generator=generator, dtype=f.dtype) * f.shape[0] ** -0.5 for f in noise]
        yield [f.to(tensor.device) for f in factors]


def _solve(tensor: Tensor, rank: int, name: str) -> list[Tensor]:
    """Factors (out, rank), (in, rank), (kernel, rank) of the best sound approximation that was met."""
    norm = torch.linalg.vector_norm(tensor)
    if norm == 0:
        return [tensor.new_zeros(n, rank) for n in tensor.shape]
    sweep = 3 * rank * (tensor.numel() + rank**2)
    sweeps = int(min(_SWEEPS, max(2, _BUDGET / sweep / len(_REGULARISATION))))
    small = sweeps == _SWEEPS
    unit = (tensor / norm).to(torch.float64 if small else torch.float32)
    best, least = None, math.inf
    for start in _starts(unit, rank, _RESTARTS if small else 0):
        for factors in [start, *_descend(unit, start, sweeps)]:
            energy = torch.stack([f.square().sum(0) for f in factors]).prod(0).sum()
            error = (unit - torch.einsum("or,ir,kr->oik", *factors)).square().sum()
            if energy <= _ENERGY and error < least:  # false for NaN
                best, least = factors, float(error)
    if best is None or least >= 1:
        raise RefusedDecomposition(
            f"{name}: cp at rank {rank} found only terms that cancel each other or nothing better than zero; "
            "choose another rank or method"
        )
    # Equal norms for the three factors of a term keep them in range in half precision.
    norms = torch.stack([f.norm(dim=0) for f in best])
    mean = (norms.prod(0) * norm).pow(1 / 3)
    return [f * (mean / n.clamp_min(1e-30)) for f, n in zip(best, norms, strict=True)]


def _descend(tensor: Tensor, start: list[Tensor], sweeps: int) -> Iterator[list[Tensor]]:
    """ALS from strong to weak regularisation, each from where the one before it stopped."""
    rank = start[0].shape[1]
    factors = start
    kernel_first = tensor.permute(2, 0, 1).contiguous()
    for strength in _REGULARISATION:
        # Relative to the diagonal of the normal matrices of a unit tensor with terms of equal strength.
        pull = strength / rank ** (2 / 3)
        error = math.inf
        for _ in range(sweeps):
            factors, after = _sweep(kernel_first, factors, pull)
            if not error - after > _ENOUGH:
                break
            error = after
        if not all(torch.isfinite(f).all() for f in factors):
            return
        yield factors


def _sweep(tensor: Tensor, factors: list[Tensor], pull: float) -> tuple[list[Tensor], float]:
    """Solve for every factor of (kernel, out, in) in turn; also the squared error after."""
    out, inp, kernel = factors
    rank = out.shape[1]
    with tensorly() as tl:
        init = tl.cp_tensor.CPTensor((tensor.new_ones(rank), [kernel, out, inp]))
        solved = tl.decomposition.parafac(
            tensor, rank, n_iter_max=1, init=init, l2_reg=pull, tol=0, fixed_modes=[0]
        ).factors
    _, out, inp = solved
    gram = (out.T @ out) * (inp.T @ inp)
    seen = torch.einsum("kir,ir->kr", torch.einsum("koi,or->kir", tensor, out), inp)
    kernel = torch.linalg.solve(gram + pull * torch.eye(rank).to(gram), seen.T).T
    error = 1 - 2 * (seen * kernel).sum() + (kernel.T @ kernel * gram).sum()
    return [out, inp, kernel], float(error)
