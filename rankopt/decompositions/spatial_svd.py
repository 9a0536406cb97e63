"""`spatial_svd`: one rank, the kernel split into a column and a row.

With W as the matrix M[(in, k1), (out, k2)] of rank r, a k1×1 convolution to `rank` channels is followed by a 1×k2
convolution to the outputs (Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions",
2014). In three dimensions the first is split from the other two: k1×1×1, then 1×k2×k3.

M is whitened on the left by the moment of (in, k1), averaged over the other kernel positions, and weighted on the
right by the gradient's. With V the leading right singular vectors of H M G½ the stages are M G½ V and Vᵀ G⁻½: the
projection is on the right, so the input moment H² never has to be inverted.

It is the one method here that also fits depthwise layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankopt.decompositions.chained import ChainDecomposition, Stage
from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.decompositions.metric import Metric, root
from rankopt.decompositions.multilinear import leading, tail
from rankopt.layer_spec import LayerSpec


class SpatialSvd(ChainDecomposition):
    """k1×1 convolution in → rank, then 1×k2 convolution rank → out."""

    name = "spatial_svd"

    def why_not(self, layer: LayerSpec) -> str | None:
        """Needs two sides of the kernel that are more than 1."""
        if layer.dims < 2:
            return "there is no second spatial dimension to split the kernel into"
        if layer.kernel_size[0] == 1 or math.prod(layer.kernel_size[1:]) == 1:
            return f"with a kernel of {'×'.join(map(str, layer.kernel_size))} it is the same as svd or svd_in"
        return None

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """One rank."""
        return ("rank",)

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The smaller side of the matrix [(in, k1), (out, k2)] of a group."""
        _, o, i, first, *rest = layer.group_shape
        return {"rank": min(i * first, o * math.prod(rest))}

    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """in → rank over dimension 0, rank → out over the others."""
        _, o, i, *_ = layer.group_shape
        return [Stage(i, ranks["rank"], (0,)), Stage(ranks["rank"], o, tuple(range(1, layer.dims)))]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Eigenvectors of (H M G½)ᵀ (H M G½)."""
        g, o, i, first, *rest = weight.shape
        bound = self.rank_bounds(layer)["rank"]
        half, _ = root(metric.over_modes(tuple(weight.shape[2:]), (0, 1)), i * first, weight)
        out_half, out_inverse = root(metric.gradient, o, weight)
        scaled = torch.einsum("gop,gpikl->gikol", out_half, weight.flatten(4))
        matrix = scaled.reshape(g, i * first, -1)
        white = half @ matrix
        vectors, energy = leading(white.mT @ white, bound)
        last = torch.einsum("gpo,golr->gprl", out_inverse, vectors.reshape(g, o, -1, bound))
        return {
            "first": (matrix @ vectors).mT.reshape(g, bound, i, first),
            "last": last.reshape(g, o, bound, *rest),
            "energy": energy,
        }

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices."""
        r = ranks["rank"]
        return [factors["first"][:, :r], factors["last"][:, :, :r]]

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """Sum over the rank of row times column."""
        return torch.einsum("grik,gor...->goik...", *weights)

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the first stage's outputs."""
        return {"rank": weights[0].shape[1]}

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Tail of the spectrum."""
        return tail(factors["energy"], ranks["rank"])
