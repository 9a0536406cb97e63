"""The methods for capsule layers but one: `caps_svd`, `caps_tucker`, `caps_cp`, `caps_tt`, `caps_routing`.

Factors by the letters of `capsule_votes`, ranks in capitals:

    caps_svd      W[i,j] = A[i,j] (d × R) B[i,j] (R × e)            a singular value decomposition for every pair
    caps_tucker   A[i,P] B[j,Q] G[P,Q,d,e]                          Tucker over the capsules alone
    caps_cp       Σ_R A[i,R] B[j,R] C[d,R] D[e,R]                   a sum of rank-one terms
    caps_tt       E[e,X] A[X,i,Y] B[Y,j,Z] D[Z,d]                   a tensor train, in the order in which data pass it
    caps_shared   W[t,k,j] for all capsules of type t in part k     votes shared by positions of one type
    caps_routing  W                                                 the votes as they are, with fewer iterations

Parameters and multiply-accumulates go different ways. A factor of few entries may be used many times, and one of many
entries once, so each has its own price; and what routing itself costs, (2 · iterations - 1) · i · j · d, falls only
where the votes need not be formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankopt.decompositions.capsule_votes import CapsuleVotes, modes, moments, one_moment, rows_for, shape
from rankopt.decompositions.decomposition import Factors, Rank, Ranks
from rankopt.decompositions.metric import Metric, root
from rankopt.decompositions.multilinear import corner_energy, leading, outside, tail, tensorly
from rankopt.errors import RefusedDecomposition
from rankopt.layer_spec import LayerSpec
from rankopt.nn.factored_capsules import Network

# Sweeps at every strength of the regularisation, which goes from strong to weak, each from where the last one stopped.
_SWEEPS = 30
_REGULARISATION = (1e-2, 1e-3, 1e-4, 1e-5)
# The most that the terms' energies may add up to, in those of the tensor: beyond, they cancel each other.
_ENERGY = 10.0
_NOTHING = 1e-6


class CapsRouting(CapsuleVotes):
    """Fewer iterations, and nothing else."""

    name = "caps_routing"

    def own_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """None."""
        return {}

    def network(self, layer: LayerSpec) -> Network:
        """The weight itself."""
        return Network(("ijde",))

    def letters(self, layer: LayerSpec, ranks: Ranks) -> dict[str, Rank]:
        """None."""
        return {}

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """The weight."""
        return {"weight": modes(layer, weight)}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The weight."""
        return [factors["weight"], rows_for(layer, ranks, factors["weight"])]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """No energy."""
        return np.zeros(np.shape(ranks["iterations"]))


class CapsSvd(CapsuleVotes):
    """One rank for all pairs of capsules."""

    name = "caps_svd"
    saves = ("macs", "params")

    def own_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The smaller dimension."""
        _, _, d, e = shape(layer)
        return {"rank": min(d, e)}

    def network(self, layer: LayerSpec) -> Network:
        """Two factors a pair."""
        return Network(("ijdr", "ijre"))

    def letters(self, layer: LayerSpec, ranks: Ranks) -> dict[str, Rank]:
        """One rank."""
        return {"r": ranks["rank"]}

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Leading left singular vectors U of W M½, for each capsule's own moment M; W ≈ U (Uᵀ W)."""
        whole = modes(layer, weight)
        half, _ = root(moments(metric, weight), weight.shape[2], weight)
        left, values, _ = torch.linalg.svd(whole @ half[:, None], full_matrices=False)
        return {"left": left, "right": left.mT @ whole, "energy": values.square().sum((0, 1))}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices."""
        r = ranks["rank"]
        left = factors["left"][..., :r]
        return [left, factors["right"][:, :, :r], rows_for(layer, ranks, left)]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The tail of the summed spectra."""
        return tail(factors["energy"], ranks["rank"])


class CapsTucker(CapsuleVotes):
    """Ranks of the capsules below and above; their dimensions stay."""

    name = "caps_tucker"
    saves = ("macs", "params")

    def own_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The ranks of the unfoldings."""
        i, j, d, e = shape(layer)
        return {"rank_in": min(i, j * d * e), "rank_out": min(j, i * d * e)}

    def network(self, layer: LayerSpec) -> Network:
        """Bases and the core."""
        return Network(("ip", "jq", "pqde"))

    def letters(self, layer: LayerSpec, ranks: Ranks) -> dict[str, Rank]:
        """Below, above."""
        return {"p": ranks["rank_in"], "q": ranks["rank_out"]}

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Bases of the higher-order SVD of the whitened weight; the core is the weight itself seen through them."""
        scale, moment = one_moment(metric, weight)
        half, _ = root(moment[None], weight.shape[2], weight)
        scaled = modes(layer, weight) * scale[:, None, None, None]
        white = scaled @ half[0]
        bounds = list(self.own_bounds(layer).values())
        below, above = (
            leading((flat @ flat.mT)[None], bound)[0][0]
            for flat, bound in zip((white.flatten(1), white.transpose(0, 1).flatten(1)), bounds, strict=True)
        )
        core = torch.einsum("ijde,ip,jq->pqde", scaled, below, above)
        seen = core @ half[0]
        return {
            "below": below / scale[:, None],
            "above": above,
            "core": core,
            "energy": corner_energy(seen.square().sum((2, 3))),
        }

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices."""
        p, q = ranks["rank_in"], ranks["rank_out"]
        below = factors["below"][:, :p]
        return [below, factors["above"][:, :q], factors["core"][:p, :q], rows_for(layer, ranks, below)]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The core's energy outside the kept corner."""
        return outside(factors["energy"], ranks["rank_in"], ranks["rank_out"])


class CapsCp(CapsuleVotes):
    """A sum of rank-one terms over all four modes, by alternating least squares (TensorLy)."""

    name = "caps_cp"
    sliceable = False
    exact = False

    def own_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The largest rank with no more parameters than the weight."""
        sizes = shape(layer)
        return {"rank": max(1, math.prod(sizes) // sum(sizes))}

    def network(self, layer: LayerSpec) -> Network:
        """One factor a mode."""
        return Network(("ir", "jr", "dr", "er"))

    def letters(self, layer: LayerSpec, ranks: Ranks) -> dict[str, Rank]:
        """One rank."""
        return {"r": ranks["rank"]}

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """The whitened weight, what undoes the whitening, the spectrum of the capsules below."""
        scale, moment = one_moment(metric, weight)
        half, inverse = root(moment[None], weight.shape[2], weight)
        white = (modes(layer, weight) * scale[:, None, None, None]) @ half[0]
        flat = white.flatten(1)
        gram = flat @ flat.mT if flat.shape[0] < flat.shape[1] else flat.mT @ flat
        energy = leading(gram[None], len(gram))[1]
        return {"white": white, "scale": scale, "inverse": inverse[0], "energy": energy}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The fit; refused where its terms cancel each other."""
        white, rank = factors["white"], ranks["rank"]
        size = white.norm().clamp_min(1e-30)
        found = _parafac(white / size, rank)
        if found is None:
            raise RefusedDecomposition(f"{layer.name}: caps_cp finds only terms that cancel each other at rank {rank}")
        terms = math.prod((f.square().sum(0) for f in found), start=torch.ones((), dtype=white.dtype))
        share = (terms.sqrt() * size).clamp_min(1e-30) ** 0.25  # terms of equal norm in all four factors
        below, above, out, inp = (f * share / f.norm(dim=0).clamp_min(1e-30) for f in found)
        below = below / factors["scale"][:, None]
        return [below, above, out, factors["inverse"] @ inp, rows_for(layer, ranks, below)]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """At least what the capsules below lose at this rank."""
        return tail(factors["energy"], ranks["rank"])


class CapsTt(CapsuleVotes):
    """A tensor train from the dimension below over the capsules below and above to the dimension above."""

    name = "caps_tt"
    saves = ("macs", "params")

    def own_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The ranks of the unfoldings at the three bonds."""
        i, j, d, e = shape(layer)
        return {"rank_1": min(e, i * j * d), "rank_2": min(e * i, j * d), "rank_3": min(d, e * i * j)}

    def network(self, layer: LayerSpec) -> Network:
        """One core a mode."""
        return Network(("ex", "xiy", "yjz", "zd"))

    def letters(self, layer: LayerSpec, ranks: Ranks) -> dict[str, Rank]:
        """The bonds."""
        return {"x": ranks["rank_1"], "y": ranks["rank_2"], "z": ranks["rank_3"]}

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """TT-SVD of the whitened weight from the side above, so that ranks are slices; the core of the dimension below
        is the weight itself seen through all the others."""
        scale, moment = one_moment(metric, weight)
        half, _ = root(moment[None], weight.shape[2], weight)
        scaled = (modes(layer, weight) * scale[:, None, None, None]).permute(2, 1, 0, 3)  # d, j, i, e
        white = scaled @ half[0]
        x, y, z = self.own_bounds(layer).values()
        with tensorly() as tl:
            out, above, below, _ = tl.decomposition.tensor_train(white, rank=[1, z, y, x, 1])
        inp = torch.einsum("djie,dz,zjy,yix->ex", scaled, out[0], above, below)
        bonds = (white.flatten(0, 2).mT, white.flatten(0, 1).flatten(1), white.flatten(1))
        pairs = enumerate(zip(bonds, (x, y, z), strict=True), 1)
        spectra = {f"energy_{n}": leading((b @ b.mT)[None], r)[1] for n, (b, r) in pairs}
        cores = {"inp": inp, "below": (below / scale[:, None]).permute(2, 1, 0), "above": above.permute(2, 1, 0)}
        return {**cores, "out": out[0].mT, **spectra}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices of the bonds."""
        x, y, z = (ranks[f"rank_{n}"] for n in (1, 2, 3))
        inp = factors["inp"][:, :x]
        cores = [inp, factors["below"][:x, :, :y], factors["above"][:y, :, :z], factors["out"][:z]]
        return [*cores, rows_for(layer, ranks, inp)]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The sum of the bonds' tails: the most that can be lost."""
        tails = (tail(factors[f"energy_{n}"], ranks[f"rank_{n}"]) for n in (1, 2, 3))
        return np.minimum(sum(tails), 1.0)


def _parafac(tensor: Tensor, rank: int) -> list[Tensor] | None:
    """Factors of a tensor of norm 1, of the weakest regularisation at which terms do not cancel each other."""
    best: list[Tensor] | None = None
    with tensorly() as tl:
        init: Any = "svd" if rank <= min(tensor.shape) else "random"
        for strength in _REGULARISATION:
            fit = tl.decomposition.parafac(
                tensor, rank, n_iter_max=_SWEEPS, init=init, random_state=0, l2_reg=strength / rank ** (3 / 4), tol=1e-5
            )
            weights, solved = fit
            if not all(bool(torch.isfinite(f).all()) for f in solved):
                break
            terms = weights.square() * math.prod(f.square().sum(0) for f in solved)
            energy = float(terms.sum())
            if energy < _NOTHING:  # pulled to zero, where the next round would stay
                continue
            if energy <= _ENERGY:
                best = [solved[0] * weights, *solved[1:]]
            init = tl.cp_tensor.CPTensor((weights, [f.clone() for f in solved]))
    return best
