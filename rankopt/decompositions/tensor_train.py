"""`tensor_train`: a chain with one bond between neighbouring modes in, k1, …, kd, out.

W[o, i, k1, k2] ≈ Σ G0[i, a] G1[a, k1, b] G2[b, k2, c] G3[c, o] (Oseledets, "Tensor-Train Decomposition", 2011): a
pointwise convolution, one convolution for every spatial dimension with a kernel of more than 1, a pointwise one.

TT-SVD runs once at full rank, on the whitened weight and from the output side, so that the bases that carry over are
those on the output side of every bond. Ranks are then slices, and the error is at most the sum of what each bond cuts
off. The input's core is the plain weight seen through those bases: its moment never has to be inverted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankopt.decompositions.chained import ChainDecomposition, Stage
from rankopt.decompositions.decomposition import Factors, Ranks, one_channel, spatial_modes
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import mode_products, mode_roots, tail, tensorly
from rankopt.layer_spec import LayerSpec


class TensorTrain(ChainDecomposition):
    """Pointwise in → rank_1, a convolution per spatial dimension to rank_2, …, pointwise to the outputs."""

    name = "tensor_train"

    def why_not(self, layer: LayerSpec) -> str | None:
        """Needs at least two spatial modes to be something of its own."""
        if layer.dims == 0:
            return "a matrix's tensor train is its svd"
        modes = len(spatial_modes(layer))
        if modes < 2:
            return f"with {'one' if modes else 'no'} spatial mode it is the same as {'tucker2' if modes else 'svd'}"
        return one_channel(layer)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """One for every bond, from the input side."""
        return tuple(f"rank_{n + 1}" for n in range(len(spatial_modes(layer)) + 1))

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The smaller side of the matrix that a bond cuts the weight into."""
        _, o, i, *k = layer.group_shape
        sizes = [i, *(size for size in k if size > 1), o]
        return {
            n: min(math.prod(sizes[: b + 1]), math.prod(sizes[b + 1 :])) for b, n in enumerate(self.rank_names(layer))
        }

    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """in → rank_1 → rank_2 … → out."""
        _, o, i, *_ = layer.group_shape
        bonds = [ranks[n] for n in self.rank_names(layer)]
        modes = spatial_modes(layer)
        inner = [Stage(bonds[n], bonds[n + 1], mode) for n, mode in enumerate(modes)]
        return [Stage(i, bonds[0]), *inner, Stage(bonds[-1], o)]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Full-rank TT-SVD of the whitened weight with its modes in the order out, kd, …, k1, in."""
        (out_half, out_inverse), (in_half, _) = mode_roots(metric, weight)
        modes = weight.reshape(*weight.shape[:3], *(k for k in layer.kernel_size if k > 1))
        seen = mode_products(modes, [out_half]).permute(0, 1, *range(modes.dim() - 1, 2, -1), 2)
        white = (seen.flatten(1, -2) @ in_half).reshape(seen.shape)
        cores = train(white, list(self.rank_bounds(layer).values())[::-1])
        # The input's core: the weight, plain along the input, seen through all the other cores.
        factors = {"stage_0": _view(cores[:-1]).mT @ seen.flatten(1, -2)}
        for n, core in enumerate(cores[-2:0:-1]):
            factors[f"stage_{n + 1}"] = core.permute(0, 1, 3, 2)
        factors[f"stage_{len(cores) - 1}"] = out_inverse @ cores[0][:, 0]
        for n, energy in enumerate(spectra(cores)):
            factors[f"energy_{n + 1}"] = energy
        return factors

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices of the bonds."""
        bonds = [ranks[n] for n in self.rank_names(layer)]
        first, last = factors["stage_0"], factors[f"stage_{len(bonds)}"]
        inner = [
            factors[f"stage_{n}"][:, :right, :left].reshape(-1, right, left, *(layer.kernel_size[d] for d in mode))
            for n, mode, left, right in zip(
                range(1, len(bonds)), spatial_modes(layer), bonds[:-1], bonds[1:], strict=True
            )
        ]
        return [first[:, : bonds[0]], *inner, last[:, :, : bonds[-1]]]

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """The product of all cores."""
        first, *inner, last = weights
        dense = first  # (groups, bond, in, kernel so far)
        for stage in inner:
            dense = torch.einsum("gbak,ga...->gb...k", stage.flatten(3), dense)
        whole = torch.einsum("gob,gb...->go...", last, dense)
        return whole.reshape(*whole.shape[:3], *layer.kernel_size)

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """The outputs of all stages but the last."""
        return {n: w.shape[1] for n, w in zip(self.rank_names(layer), weights[:-1], strict=True)}

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The sum of the bonds' tails: exact when one bond is cut, else the most that can be lost."""
        return np.minimum(sum(tail(factors[f"energy_{name[5:]}"], rank) for name, rank in ranks.items()), 1.0)


def train(tensor: Tensor, bonds: list[int]) -> list[Tensor]:
    """Cores (groups, left, mode, right) of every group's TT-SVD, all but the last orthonormal seen from the left."""
    with tensorly() as tl:
        trains = [tl.decomposition.tensor_train(t, rank=[1, *bonds, 1]) for t in tensor]
    return [torch.stack(list(cores)) for cores in zip(*trains, strict=True)]


def _view(cores: Sequence[Tensor]) -> Tensor:
    """(groups, modes so far, bond): the cores from the left multiplied together."""
    out = cores[0].flatten(1, 2)
    for core in cores[1:]:
        out = torch.einsum("gma,gakb->gmkb", out, core).flatten(1, 2)
    return out


def spectra(cores: Sequence[Tensor]) -> list[Tensor]:
    """Squared singular values at every bond, from the last; with orthonormal cores on the left, they are row norms."""
    gram = cores[-1].flatten(2) @ cores[-1].flatten(2).mT
    spectra = [gram.diagonal(dim1=-2, dim2=-1).sum(0)]
    for core in cores[-2:0:-1]:
        gram = torch.einsum("gakb,gbc,gdkc->gad", core, gram, core)
        spectra.append(gram.diagonal(dim1=-2, dim2=-1).sum(0))
    return spectra
