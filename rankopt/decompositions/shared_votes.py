"""`caps_shared`: votes of a capsule layer that the positions of one type of capsules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.decompositions.capsule_votes import CapsuleVotes, moments, rows_for, shape
from rankopt.decompositions.decomposition import Factors, Rank, Ranks
from rankopt.decompositions.metric import Metric
from rankopt.layer_spec import LayerSpec
from rankopt.nn.factored_capsules import FactoredCapsules, Network

_TABLE = 64  # numbers of parts whose loss is computed; between them it is interpolated


class CapsShared(CapsuleVotes):
    """Votes shared by the input capsules of one type, whose positions are cut into `parts` runs of nearly equal length.

    With one part a type's votes do not depend on the position; with as many as there are positions nothing is shared. A
    layer that was not told of types has a single one.
    """

    name = "caps_shared"
    saves = ("params", "macs")

    def own_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The positions of a type."""
        return {"parts": layer.groups // layer.fact("types")}

    def network(self, layer: LayerSpec) -> Network:
        """One factor; the capsules below are types × parts × places."""
        return Network(("tkjde",), below="tkm")

    def letters(self, layer: LayerSpec, ranks: Ranks) -> dict[str, Rank]:
        """Types, parts, and places in the longest part."""
        parts = ranks["parts"]
        return {"k": parts, "t": layer.fact("types"), "m": -(-self.own_bounds(layer)["parts"] // parts)}

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """What the least squares of every part are made of, and what numbers of parts lose."""
        moment = moments(metric, weight)
        ridge = 1e-9 * moment.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-30)
        moment = moment + ridge * torch.eye(moment.shape[1]).to(moment)
        seen = weight @ moment
        types = layer.fact("types")
        shared = {"moment": moment.unflatten(0, (types, -1)), "seen": seen.unflatten(0, (types, -1))}
        whole = float((seen * weight).sum())
        numbers = np.unique(np.geomspace(1, shared["seen"].shape[1], _TABLE).round().astype(np.int64))
        kept = []
        for parts in numbers:
            sums, solved = _solved(shared, int(parts))
            kept.append(float((sums * solved).sum()))
        lost = 1 - torch.tensor(kept, dtype=torch.float64) / max(whole, 1e-300)
        return {**shared, "numbers": torch.from_numpy(numbers), "lost": lost.clamp_min(0)}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The weight of every part that misses the votes of its capsules least."""
        _, solved = _solved(factors, ranks["parts"])
        return [solved.unflatten(2, shape(layer)[1:3]), rows_for(layer, ranks, solved)]

    def build(self, layer: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Module:
        """Parts of unequal length get places that stay empty."""
        weight, rows = weights
        types, parts = weight.shape[:2]
        part = _parts(layer.groups // types, parts)
        longest = int(torch.bincount(part).max())
        places = None
        if parts * longest * types != layer.groups:
            starts = torch.searchsorted(part, torch.arange(parts))
            within = part * longest + torch.arange(len(part)) - starts[part]
            places = (torch.arange(types)[:, None] * parts * longest + within).flatten()
        below = {"t": types, "k": parts, "m": longest}
        sizes = (*shape(layer), len(rows))
        return FactoredCapsules(sizes, self.network(layer), [weight], below, places)

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the weight's second mode."""
        return {"parts": weights[0].shape[1], "iterations": len(weights[1])}

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """Every capsule's part."""
        shared = weights[0].flatten(2, 3)
        part = _parts(layer.groups // shared.shape[0], shared.shape[1]).to(shared.device)
        return shared.index_select(1, part).flatten(0, 1)

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """By the table, between whose entries it is interpolated."""
        return np.interp(ranks["parts"], factors["numbers"].numpy(), factors["lost"].numpy())


def _parts(positions: int, parts: int) -> Tensor:
    """The part of every position: runs whose lengths differ by at most one."""
    return torch.arange(positions) * parts // positions


def _solved(factors: Factors, parts: int) -> tuple[Tensor, Tensor]:
    """Sums over every part of W M, and the weight X with X ΣM = ΣWM, both (types, parts, out, in)."""
    part = _parts(factors["seen"].shape[1], parts).to(factors["seen"].device)
    sums, gram = (
        factors[name]
        .new_zeros(factors[name].shape[0], parts, *factors[name].shape[2:])
        .index_add_(1, part, factors[name])
        for name in ("seen", "moment")
    )
    return sums, torch.linalg.solve(gram, sums.mT).mT
