"""`svd` and `svd_in`: one rank, the truncated singular value decomposition.

`svd` splits off the output channels: a kernel-sized stage to `rank` channels, then a pointwise one (Linear: two
Linears). In the metric of the input this is the closed-form optimum: project the output onto the leading
eigenvectors of its second moment (Zhang et al., "Accelerating Very Deep Convolutional Networks", 2015).

`svd_in` splits off the input channels: a pointwise stage to `rank` channels, then a kernel-sized one. Its metric is the
channel moment, which is exact when neighbouring positions are uncorrelated and an approximation otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankopt.decompositions.chained import ChainDecomposition, Stage
from rankopt.decompositions.decomposition import Factors, Ranks, one_channel
from rankopt.decompositions.metric import Metric, root
from rankopt.decompositions.multilinear import leading, tail
from rankopt.layer_spec import LayerSpec


class Svd(ChainDecomposition):
    """Kernel first: in → rank over the whole kernel, then rank → out pointwise."""

    name = "svd"

    def why_not(self, layer: LayerSpec) -> str | None:
        """Depthwise layers have nothing to split."""
        return one_channel(layer)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """One rank."""
        return ("rank",)

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The smaller side of the unfolded weight of a group."""
        _, o, i, *k = layer.group_shape
        return {"rank": min(o, i * math.prod(k))}

    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """in → rank → out."""
        _, o, i, *_ = layer.group_shape
        return [Stage(i, ranks["rank"], tuple(range(layer.dims))), Stage(ranks["rank"], o)]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Eigenvectors of the output's second moment: W = (G⁻½ U)(Uᵀ G½ W); the input moment is never inverted."""
        bound = self.rank_bounds(layer)["rank"]
        half, inverse = root(metric.side, weight.shape[1], weight)
        vectors, energy = leading(half @ metric.output_moment(weight) @ half.mT, bound)
        flat = weight.flatten(3) if layer.dims else weight[..., None]
        first = torch.einsum("gor,goik->grik", half.mT @ vectors, flat)
        return {
            "first": first.reshape(*first.shape[:3], *layer.kernel_size),
            "last": inverse @ vectors,
            "energy": energy,
        }

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices."""
        r = ranks["rank"]
        return [factors["first"][:, :r], factors["last"][:, :, :r]]

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """last · first."""
        return torch.einsum("gor,gr...->go...", weights[1], weights[0])

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the first stage's outputs."""
        return {"rank": weights[0].shape[1]}

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Tail of the spectrum."""
        return tail(factors["energy"], ranks["rank"])


class SvdIn(ChainDecomposition):
    """Pointwise first: in → rank, then rank → out over the whole kernel."""

    name = "svd_in"

    def why_not(self, layer: LayerSpec) -> str | None:
        """On a Linear or where the kernel is 1 the two forms are the same."""
        if layer.dims == 0 or math.prod(layer.kernel_size) == 1:
            return "without a spatial kernel it is the same as svd"
        return one_channel(layer)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """One rank."""
        return ("rank",)

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The smaller side of the weight unfolded along the input channels."""
        _, o, i, *k = layer.group_shape
        return {"rank": min(i, o * math.prod(k))}

    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """in → rank → out."""
        _, o, i, *_ = layer.group_shape
        return [Stage(i, ranks["rank"]), Stage(ranks["rank"], o, tuple(range(layer.dims)))]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """SVD of the weight whitened along the input channels (and weighted along the outputs)."""
        bound = self.rank_bounds(layer)["rank"]
        half, inverse = root(metric.over_modes((weight.shape[2], *layer.kernel_size), (0,)), weight.shape[2], weight)
        out_half, _ = root(metric.side, weight.shape[1], weight)
        flat = weight.flatten(3)
        white = torch.einsum("gop,gpik,gij->gjok", out_half, flat, half).flatten(2)
        vectors, energy = leading(white @ white.mT, bound)
        last = torch.einsum("goik,gir->gork", flat, half @ vectors)
        return {
            "first": (inverse @ vectors).mT,
            "last": last.reshape(*last.shape[:3], *layer.kernel_size),
            "energy": energy,
        }

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices."""
        r = ranks["rank"]
        return [factors["first"][:, :r], factors["last"][:, :, :r]]

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """last · first."""
        return torch.einsum("gor...,gri->goi...", weights[1], weights[0])

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the first stage's outputs."""
        return {"rank": weights[0].shape[1]}

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Tail of the spectrum."""
        return tail(factors["energy"], ranks["rank"])
