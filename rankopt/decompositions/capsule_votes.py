"""`CapsuleVotes`: the votes' weight W[i, j, d, e] of a capsule layer as a network of factors, routed through in the
order that costs least.

i and j number the capsules below and above, e and d their dimensions. A method says how the letters of its factors go
together (`network`), and what sizes its ranks give them; modules, costs and the dense weight follow. Every method has
`iterations` beside its ranks, the number of routing iterations: fewer are cheaper and not the same function, so only
with all of them is full rank exact.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.decompositions.decomposition import Decomposition, Rank, Ranks, wide
from rankopt.decompositions.metric import Metric
from rankopt.layer_spec import LayerSpec
from rankopt.nn.factored_capsules import FactoredCapsules, Network, routing_orders


class CapsuleVotes(Decomposition):
    """What all methods for capsule layers have in common."""

    @abstractmethod
    def own_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The ranks besides `iterations`, with their largest useful values."""

    @abstractmethod
    def network(self, layer: LayerSpec) -> Network:
        """The factors."""

    @abstractmethod
    def letters(self, layer: LayerSpec, ranks: Ranks) -> dict[str, Rank]:
        """Letter → size of the ranks, and of the letters that stand for the capsules below where these are several."""

    def why_not(self, layer: LayerSpec) -> str | None:
        """Only capsule layers have votes."""
        return None if layer.kind == "capsules" else "only a capsule layer has votes and routing"

    def counted(self, layer: LayerSpec) -> tuple[str, ...]:
        """The iterations."""
        return ("iterations",)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """The method's own, and the iterations."""
        return (*self.own_bounds(layer), "iterations")

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """At most the iterations that the layer has."""
        return {**self.own_bounds(layer), "iterations": layer.fact("iterations")}

    def sizes(self, layer: LayerSpec, ranks: Ranks) -> dict[str, Rank]:
        """Letter → size."""
        i, j, d, e = shape(layer)
        return {"i": i, "j": j, "d": d, "e": e, **self.letters(layer, ranks)}

    def params(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Entries of all factors."""
        ranks = wide(ranks)
        sizes = self.sizes(layer, ranks)
        total = sum(_entries(factor, sizes) for factor in self.network(layer).factors)
        return total + 0 * ranks["iterations"]  # an array where that is one

    def macs(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """In all iterations of all calls, in the cheapest order."""
        ranks = wide(ranks)
        samples = sum(call.batch for call in layer.calls)
        return samples * routing_orders(self.network(layer), self.sizes(layer, ranks), ranks["iterations"]).macs

    def stage_shapes(self, layer: LayerSpec, ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
        """The factors, and an empty tensor that has as many rows as there are iterations."""
        sizes = self.sizes(layer, ranks)
        shapes = [tuple(int(sizes[x]) for x in factor) for factor in self.network(layer).factors]
        return [*shapes, (ranks["iterations"], 0)]

    def build(self, layer: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Module:
        """Routing through the factors."""
        *factors, rows = weights
        return FactoredCapsules((*shape(layer), len(rows)), self.network(layer), factors)

    def weights_of(self, layer: LayerSpec, ranks: Mapping[str, int], built: nn.Module) -> list[Tensor]:
        """Of the module."""
        if not isinstance(built, FactoredCapsules) or built.network != self.network(layer):
            raise ValueError(f"has no capsule layer of {self.name} there")
        rows = torch.empty(built.iterations, 0)
        weights = [*built.factors, rows.to(next(built.parameters()))]
        if [tuple(w.shape) for w in weights] != self.stage_shapes(layer, ranks):
            raise ValueError("has other ranks there")
        return weights

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """By the letters that are ranks; they are named in the order of `own_bounds`."""
        *factors, rows = weights
        sizes: dict[str, int] = {}
        for letters, factor in zip(self.network(layer).factors, factors, strict=True):
            sizes |= dict(zip(letters, factor.shape, strict=True))
        own = [sizes[x] for x in self.letters(layer, dict.fromkeys(self.rank_names(layer), 1)) if x in sizes]
        return dict(zip(self.rank_names(layer), (*own, len(rows)), strict=True))

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """The product of the factors, (in_caps, out_caps · d_out, d_in)."""
        *factors, _ = weights
        return torch.einsum(",".join(self.network(layer).factors) + "->ijde", *factors).flatten(1, 2)


def shape(layer: LayerSpec) -> tuple[int, int, int, int]:
    """in_caps, out_caps, d_out, d_in of a capsule layer."""
    return layer.groups, layer.fact("out_caps"), layer.fact("d_out"), layer.in_channels // layer.groups


def rows_for(layer: LayerSpec, ranks: Mapping[str, int], like: Tensor) -> Tensor:
    """The empty tensor that says how many iterations there are."""
    return like.new_empty(ranks["iterations"], 0)


def modes(layer: LayerSpec, weight: Tensor) -> Tensor:
    """The canonical weight as W[i, j, d, e]."""
    return weight.unflatten(1, shape(layer)[1:3])


def moments(metric: Metric, weight: Tensor) -> Tensor:
    """(in_caps, d_in, d_in) second moments of every capsule below, like the weight; the identity without data."""
    size = weight.shape[2]
    if metric.patch is None:
        return torch.eye(size, dtype=weight.dtype, device=weight.device).expand(weight.shape[0], size, size)
    return metric.patch.to(weight)


def one_moment(metric: Metric, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The moment of each capsule below as a share (in_caps,) of a common one (d_in, d_in), as products of modes need.

    Shares are scales of the input, whose mean square is 1; a capsule that is hardly ever there keeps a thousandth.
    """
    each = moments(metric, weight)
    energy = each.diagonal(dim1=1, dim2=2).sum(1)
    mean = energy.mean().clamp_min(torch.finfo(weight.dtype).tiny)
    return (energy / mean).sqrt().clamp_min(1e-3), each.mean(0)


def _entries(letters: str, sizes: Mapping[str, Rank]) -> Rank:
    if any(isinstance(sizes[x], np.ndarray) for x in letters):
        return math.prod((np.asarray(sizes[x], dtype=np.int64) for x in letters), start=np.int64(1))
    return math.prod(int(sizes[x]) for x in letters)
