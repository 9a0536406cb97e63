"""`block_term`: a matrix as a sum of `blocks` Tucker terms, each with `rank` directions in every pair of modes.

W[o1…od, i1…id] ≈ Σ_b C[b, p, q, …] A1[b, i1, o1, p] A2[b, i2, o2, q] … (De Lathauwer, "Decompositions of a Higher-Order
Tensor in Block Terms", 2008; Ye et al., "Learning Compact Recurrent Neural Networks with Block-Term Tensor
Decomposition", 2018). With one block it is Tucker over pairs of modes, with rank 1 a sum of Kronecker products.

Terms are found one after the other, each the higher-order SVD of what the terms before it leave; then all descend
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import corner_energy, leading, mode_gram, mode_products, outside
from rankopt.decompositions.tensorized import Modes, TensorizedDecomposition, descended
from rankopt.decompositions.tt_matrix import interleaved, paired, sized, split
from rankopt.layer_spec import LayerSpec
from rankopt.nn.network import Network

_INPUTS, _OUTPUTS, _BONDS = "abcd", "ABCD", "rstu"
_BLOCKS = 8


class BlockTerm(TensorizedDecomposition):
    """A core and one tensor for every pair of modes, each with the blocks in front."""

    name = "block_term"
    sliceable = False
    exact = False

    def names(self, count: int) -> tuple[str, ...]:
        """How many terms, and how large."""
        return ("blocks", "rank")

    def bounds(self, modes: Modes) -> list[int]:
        """At most `_BLOCKS` terms, no larger than the smallest pair of modes."""
        return [_BLOCKS, min(paired(modes))]

    def network(self, modes: Modes, ranks: Ranks) -> Network:
        """(blocks, rank, …), and (blocks, i, o, rank) for every pair."""
        count = len(modes[0])
        ins, outs, bonds = _INPUTS[:count], _OUTPUTS[:count], _BONDS[:count]
        tensors = (f"z{bonds}", *(f"z{i}{o}{b}" for i, o, b in zip(ins, outs, bonds, strict=True)))
        sizes = sized(modes, ins, outs) | dict.fromkeys(bonds, ranks["rank"]) | {"z": ranks["blocks"]}
        return Network(ins, outs, tensors, sizes)

    def ranks_in(self, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], Modes]:
        """From the core and the pairs."""
        core, *sides = shapes
        return [core[0], core[1]], split([side[1:3] for side in sides])

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """The weight, and the energy in the corners of its higher-order SVD."""
        tensor = interleaved(self.tensor(layer, weight, {})[0])
        core, _ = _hosvd(tensor, [min(n, tensor.numel() // n) for n in tensor.shape])
        return {"weight": weight, "energy": corner_energy(core.square())}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Term after term, then all together."""
        weight, modes = factors["weight"], self._modes(layer, ranks)
        rest = interleaved(self.tensor(layer, weight, ranks)[0])
        rank, cores, sides = ranks["rank"], list[Tensor](), list[list[Tensor]]()
        for _ in range(ranks["blocks"]):
            core, bases = _hosvd(rest, [rank] * rest.dim())
            rest = rest - mode_products(core[None], [b[None] for b in bases])[0]
            cores.append(core)
            sides.append(bases)
        pairs = list(zip(*modes, strict=True))
        start = [torch.stack(cores)] + [
            torch.stack([bases[n] for bases in sides]).reshape(len(sides), *pairs[n], rank) for n in range(len(pairs))
        ]
        if ranks["blocks"] == 1:
            return start
        dense = weight.double()

        def error(tensors: Sequence[Tensor]) -> Tensor:
            return (dense - self.reconstruct(layer, tensors)).square().sum()

        return descended(start, error, 3 * weight.numel() * ranks["blocks"] * rank**2)

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The energy outside the corner that all terms together could span."""
        corners = factors["energy"]
        span = np.asarray(ranks["blocks"] * ranks["rank"])
        return outside(corners, *(np.minimum(span, n) for n in corners.shape))


def _hosvd(tensor: Tensor, ranks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Core and bases; a basis with fewer directions than asked for is filled with zeros."""
    bases = []
    for n, rank in enumerate(ranks):
        basis = leading(mode_gram(tensor[None], n), min(rank, tensor.shape[n]))[0][0]
        bases.append(torch.cat([basis, basis.new_zeros(len(basis), rank - basis.shape[1])], 1))
    return mode_products(tensor[None], [b.mT[None] for b in bases])[0], bases
