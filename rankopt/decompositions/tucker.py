"""`tucker`: a rank for every mode, the kernel's spatial modes included.

W[o, i, k1, k2] ≈ Σ B[o, p] C[p, q, s, t] A[q, i] D1[s, k1] D2[t, k2] (Tucker 1966; De Lathauwer et al., "A Multilinear
Singular Value Decomposition", 2000). As a chain: pointwise to `rank_in` channels; for every spatial dimension a
depthwise convolution that gives each channel `rank_k…` outputs; the core as a pointwise convolution; pointwise to the
outputs.

All modes are whitened and the bases are those of the higher-order SVD, so ranks are slices. A spatial dimension whose
kernel is 1 has no rank; `rank_k1` belongs to the first spatial dimension, `rank_k2` to the second, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rankopt.decompositions.chained import ChainDecomposition, Stage
from rankopt.decompositions.decomposition import Factors, Ranks, channels_and_kernel, spatial_modes
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import corner_energy, leading, mode_gram, mode_products, mode_roots, outside
from rankopt.layer_spec import LayerSpec


class Tucker(ChainDecomposition):
    """Pointwise, a depthwise convolution per spatial dimension, the core pointwise, pointwise."""

    name = "tucker"

    def why_not(self, layer: LayerSpec) -> str | None:
        """Needs a kernel, and channels on both sides."""
        return channels_and_kernel(layer)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """Outputs, inputs, and one for every spatial dimension with a kernel of more than 1."""
        spatial = (f"rank_k{d + 1}" for d, k in enumerate(layer.kernel_size) if k > 1)
        return ("rank_out", "rank_in", *spatial)

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The ranks of the unfoldings."""
        _, o, i, *k = layer.group_shape
        sizes = [o, i, *(size for size in k if size > 1)]
        total = math.prod(sizes)
        return {n: min(s, total // s) for n, s in zip(self.rank_names(layer), sizes, strict=True)}

    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """in → rank_in → (× rank_k1) → (× rank_k2) … → rank_out → out."""
        _, o, i, *_ = layer.group_shape
        p, q, *spatial = (ranks[n] for n in self.rank_names(layer))
        chain, width = [Stage(i, q)], q
        for mode, rank in zip(spatial_modes(layer), spatial, strict=True):
            chain.append(Stage(width, width * rank, mode, depthwise=True))
            width = width * rank
        return [*chain, Stage(width, p), Stage(p, o)]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Higher-order SVD of the weight whitened along all modes."""
        roots = mode_roots(metric, weight, spatial_modes(layer))
        modes = weight.reshape(weight.shape[0], *(half.shape[-1] for half, _ in roots))
        white = mode_products(modes, [half for half, _ in roots])
        bounds = list(self.rank_bounds(layer).values())
        bases = [leading(mode_gram(white, n), bound)[0] for n, bound in enumerate(bounds)]
        core = mode_products(white, [basis.mT for basis in bases])
        # What undoes the whitening along with the basis: (groups, mode, rank).
        sides = {f"side_{n}": inverse @ basis for n, ((_, inverse), basis) in enumerate(zip(roots, bases, strict=True))}
        return {"core": core, "energy": corner_energy(core.square().sum(0)), **sides}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices; the spatial sides are repeated for every channel of their depthwise stage."""
        p, q, *spatial = (ranks[n] for n in self.rank_names(layer))
        core = factors["core"][(slice(None), *(slice(ranks[n]) for n in self.rank_names(layer)))]
        chain, width = [factors["side_1"][:, :, :q].mT], q
        for n, (mode, rank) in enumerate(zip(spatial_modes(layer), spatial, strict=True)):
            side = factors[f"side_{n + 2}"][:, :, :rank].mT
            repeated = side[:, None].expand(-1, width, -1, -1)
            chain.append(repeated.reshape(side.shape[0], width * rank, *(layer.kernel_size[d] for d in mode)))
            width *= rank
        return [*chain, core.flatten(2), factors["side_0"][:, :, :p]]

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """Down the chain, each depthwise stage applied to the channels that it sees (trained, they may differ)."""
        first, *depthwise, core, last = weights
        groups = first.shape[0]
        dense = first  # (groups, channels so far, in, kernel so far)
        for stage in depthwise:
            width = dense.shape[1]
            kernel = stage.reshape(groups, width, stage.shape[1] // width, -1)
            spread = torch.einsum("gc...,gcsk->gcs...k", dense, kernel)
            dense = spread.reshape(groups, stage.shape[1], *dense.shape[2:], kernel.shape[-1])
        whole = torch.einsum("gop,gpc,gc...->go...", last, core, dense)
        return whole.reshape(*whole.shape[:3], *layer.kernel_size)

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the growth of the channels along the depthwise stages."""
        first, *depthwise, core, _ = weights
        widths = [first.shape[1], *(stage.shape[1] for stage in depthwise)]
        spatial = [after // before for before, after in pairwise(widths)]
        return dict(zip(self.rank_names(layer), (core.shape[1], first.shape[1], *spatial), strict=True))

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The core's energy outside the kept corner."""
        spatial = sorted(name for name in ranks if name.startswith("rank_k"))
        return outside(factors["energy"], *(ranks[n] for n in ("rank_out", "rank_in", *spatial)))
