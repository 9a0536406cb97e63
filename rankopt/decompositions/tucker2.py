"""`tucker2`: two ranks, the channels of both sides compressed and the kernel kept.

W[o, i, k] ≈ Σ_pq B[o, p] C[p, q, k] A[q, i]: a pointwise convolution to `rank_in` channels, the kernel from `rank_in`
to `rank_out`, a pointwise one to the outputs (Kim et al., "Compression of Deep Convolutional Neural Networks for Fast
and Low Power Mobile Applications", 2016).

The output basis comes from the exact second moment of the output (as in `svd`), the input basis from the unfolding of
the whitened weight. Both are orthonormal in the whitened space, so ranks are slices and what they lose is one minus
the energy of the kept corner of the core: exact without statistics, close with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankopt.decompositions.chained import ChainDecomposition, Stage
from rankopt.decompositions.decomposition import Factors, Ranks, channels_and_kernel
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import corner_energy, leading, mode_gram, mode_products, mode_roots, outside
from rankopt.layer_spec import LayerSpec


class Tucker2(ChainDecomposition):
    """Pointwise in → rank_in, kernel rank_in → rank_out, pointwise rank_out → out."""

    name = "tucker2"

    def why_not(self, layer: LayerSpec) -> str | None:
        """Needs a kernel, and channels on both sides."""
        return channels_and_kernel(layer)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """Outputs, inputs."""
        return ("rank_out", "rank_in")

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The ranks of the two unfoldings."""
        _, o, i, *k = layer.group_shape
        size = math.prod(k)
        return {"rank_out": min(o, i * size), "rank_in": min(i, o * size)}

    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """in → rank_in → rank_out → out."""
        _, o, i, *_ = layer.group_shape
        p, q = ranks["rank_out"], ranks["rank_in"]
        return [Stage(i, q), Stage(q, p, tuple(range(layer.dims))), Stage(p, o)]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Truncated higher-order SVD of the whitened weight."""
        bounds = self.rank_bounds(layer)
        (out_half, out_inverse), (in_half, in_inverse) = mode_roots(metric, weight)
        out_basis, _ = leading(out_half @ metric.output_moment(weight) @ out_half.mT, bounds["rank_out"])
        white = mode_products(weight.flatten(3), [out_half, in_half])
        in_basis, _ = leading(mode_gram(white, 1), bounds["rank_in"])
        core = mode_products(white, [out_basis.mT, in_basis.mT])
        return {
            "first": in_basis.mT @ in_inverse,
            "core": core.reshape(*core.shape[:3], *layer.kernel_size),
            "last": out_inverse @ out_basis,
            "energy": corner_energy(core.square().sum((0, 3))),
        }

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices."""
        p, q = ranks["rank_out"], ranks["rank_in"]
        return [factors["first"][:, :q], factors["core"][:, :p, :q], factors["last"][:, :, :p]]

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """last · core · first."""
        first, core, last = weights
        return torch.einsum("gop,gpq...,gqi->goi...", last, core, first)

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the core."""
        return {"rank_out": weights[1].shape[1], "rank_in": weights[1].shape[2]}

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The core's energy outside the kept corner."""
        return outside(factors["energy"], ranks["rank_out"], ranks["rank_in"])
