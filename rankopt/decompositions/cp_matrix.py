"""`cp_matrix`: a matrix as a sum of `rank` terms, each a product of one vector a mode.

W[o1…od, i1…id] ≈ Σ_r O1[o1, r] … Od[od, r] I1[i1, r] … Id[id, r] (Hitchcock 1927; Novikov et al.'s setting with CP in
place of the train). By TensorLy's alternating least squares with a little regularisation, from the SVDs of the
unfoldings; terms that cancel each other are refused, as in `cp`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import tail, tensorly
from rankopt.decompositions.tensorized import Modes, TensorizedDecomposition
from rankopt.decompositions.tt_matrix import sized
from rankopt.errors import RefusedDecomposition
from rankopt.layer_spec import LayerSpec
from rankopt.nn.network import Network

_INPUTS, _OUTPUTS = "abcd", "ABCD"
_ENERGY = 10.0
_REGULARISATION = (1e-3, 1e-2, 1e-1)
_SWEEPS = 40
_BUDGET = 1e10  # multiply-accumulates of a run: about a second on one thread
_MOST = 512  # terms


class CpMatrix(TensorizedDecomposition):
    """One factor for every mode of the input and of the output."""

    name = "cp_matrix"
    sliceable = False
    exact = False

    def names(self, count: int) -> tuple[str, ...]:
        """One rank."""
        return ("rank",)

    def bounds(self, modes: Modes) -> list[int]:
        """As long as it has fewer entries than the matrix, and at most `_MOST`."""
        entries = math.prod(modes[0]) * math.prod(modes[1])
        return [max(1, min(_MOST, (entries - 1) // (sum(modes[0]) + sum(modes[1]))))]

    def network(self, modes: Modes, ranks: Ranks) -> Network:
        """(mode, rank) for every mode, outputs first."""
        ins, outs = _INPUTS[: len(modes[0])], _OUTPUTS[: len(modes[1])]
        return Network(ins, outs, tuple(f"{m}r" for m in outs + ins), sized(modes, ins, outs) | {"r": ranks["rank"]})

    def ranks_in(self, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], Modes]:
        """From the factors."""
        count = len(shapes) // 2
        return [shapes[0][1]], (tuple(s[0] for s in shapes[count:]), tuple(s[0] for s in shapes[:count]))

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """The weight, and its singular values."""
        return {"weight": weight, "energy": torch.linalg.svdvals(weight[0]).square()}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Alternating least squares, more and more regularised until no terms cancel.

        Raises:
            RefusedDecomposition: they do to the end.
        """
        tensor, _ = self.tensor(layer, factors["weight"], ranks)
        norm = torch.linalg.vector_norm(tensor)
        if norm == 0:
            return [tensor.new_zeros(n, ranks["rank"]) for n in tensor.shape]
        unit = tensor / norm
        for strength in _REGULARISATION:
            found = _solved(unit, ranks["rank"], strength)
            if found is not None:
                scale = float(norm) ** (1 / len(found))
                return [f * scale for f in found]
        raise RefusedDecomposition(
            f"{layer.name}: cp_matrix at rank {ranks['rank']} found only terms that cancel each other; choose another"
            " rank or method"
        )

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Singular values behind the rank: no sum of so many terms can lose less, for each is of rank one."""
        return tail(factors["energy"], ranks["rank"])


def _solved(unit: Tensor, rank: int, strength: float) -> list[Tensor] | None:
    """Factors with columns of equal norms, None where they are not sound."""
    sweeps = int(min(_SWEEPS, max(3, _BUDGET / (2 * rank * unit.numel() * unit.dim()))))
    with tensorly() as tl:
        start = tl.decomposition.parafac(
            unit, rank, n_iter_max=sweeps, init="svd" if rank <= min(unit.shape) else "random", random_state=0,
            l2_reg=strength / rank ** (2 / 3), tol=1e-6,
        )  # fmt: skip
    factors = [f * (start.weights if n == 0 else 1.0) for n, f in enumerate(start.factors)]
    energy = torch.stack([f.square().sum(0) for f in factors]).prod(0).sum()
    if not bool(energy <= _ENERGY):  # also for NaN
        return None
    norms = torch.stack([f.norm(dim=0) for f in factors])
    mean = norms.prod(0).pow(1 / len(factors))
    return [f * (mean / n.clamp_min(1e-30)) for f, n in zip(factors, norms, strict=True)]
