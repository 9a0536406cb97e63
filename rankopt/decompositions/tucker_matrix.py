"""`tucker_matrix`: a matrix as a core with a factor for every mode of the input and of the output.

W[o1, o2, i1, i2] ≈ Σ C[p1, p2, q1, q2] O1[o1, p1] O2[o2, p2] I1[i1, q1] I2[i2, q2] (Tucker 1966; De Lathauwer et al.,
"A Multilinear Singular Value Decomposition", 2000). Two modes a side, since a core grows with the power of the modes.
The bases are those of the higher-order SVD, so ranks are slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import corner_energy, leading, mode_gram, mode_products, outside
from rankopt.decompositions.tensorized import Modes, TensorizedDecomposition
from rankopt.decompositions.tt_matrix import sized
from rankopt.layer_spec import LayerSpec
from rankopt.nn.network import Network

_NAMES = ("rank_out_1", "rank_out_2", "rank_in_1", "rank_in_2")


class TuckerMatrix(TensorizedDecomposition):
    """Four factors around a core."""

    name = "tucker_matrix"
    split = 2

    def names(self, count: int) -> tuple[str, ...]:
        """Outputs, inputs."""
        return _NAMES

    def bounds(self, modes: Modes) -> list[int]:
        """The ranks of the unfoldings."""
        sizes = [*modes[1], *modes[0]]
        total = math.prod(sizes)
        return [min(n, total // n) for n in sizes]

    def network(self, modes: Modes, ranks: Ranks) -> Network:
        """The core, and for every mode (mode, rank)."""
        bonds = dict(zip("pPqQ", (ranks[n] for n in _NAMES), strict=True))
        return Network("ab", "AB", ("pPqQ", "Ap", "BP", "aq", "bQ"), sized(modes, "ab", "AB") | bonds)

    def ranks_in(self, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], Modes]:
        """From the core and the factors."""
        core, *sides = shapes
        outs, ins = tuple(s[0] for s in sides[:2]), tuple(s[0] for s in sides[2:])
        return list(core), (ins, outs)

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Higher-order SVD."""
        tensor, modes = self.tensor(layer, weight, {})
        return _hosvd(tensor, self.bounds(modes)) | {"weight": weight}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices; with other modes than the automatic ones, of a decomposition of their own."""
        if (modes := self._modes(layer, ranks)) != self._modes(layer, {}):
            factors = _hosvd(self.tensor(layer, factors["weight"], ranks)[0], self.bounds(modes))
        kept = [ranks[name] for name in _NAMES]
        core = factors["core"][tuple(slice(n) for n in kept)]
        return [core, *(factors[f"side_{n}"][:, :rank] for n, rank in enumerate(kept))]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The core's energy outside the kept corner."""
        return outside(factors["energy"], *(ranks[name] for name in _NAMES))


def _hosvd(tensor: Tensor, bounds: Sequence[int]) -> dict[str, Tensor]:
    whole = tensor[None]
    bases = [leading(mode_gram(whole, n), bound)[0] for n, bound in enumerate(bounds)]
    core = mode_products(whole, [basis.mT for basis in bases])[0]
    return {"core": core, "energy": corner_energy(core.square())} | {f"side_{n}": b[0] for n, b in enumerate(bases)}
