"""`hierarchical_tucker`: a matrix as a binary tree over four pairs of modes.

Leaves U_k[i_k, o_k, a_k], nodes B12[a1, a2, r] and B34[a3, a4, s], root R[r, s] (Hackbusch and Kühn, "A New Scheme for
the Tensor Representation", 2009; Grasedyck, "Hierarchical Singular Value Decomposition of Tensors", 2010). Parameters
grow with the number of modes, not with a power of a rank as Tucker's core does. Truncation from the root to the leaves
is in closed form: bases are singular vectors of the unfoldings, the tensors of the nodes their products, so ranks are
slices. `rank_leaf` is that of all leaves, as far as a leaf has so many directions, `rank_node` that of both nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import leading, tail
from rankopt.decompositions.tensorized import Modes, TensorizedDecomposition
from rankopt.decompositions.tt_matrix import interleaved, paired, sized, split
from rankopt.layer_spec import LayerSpec
from rankopt.nn.network import Network


class HierarchicalTucker(TensorizedDecomposition):
    """Four leaves, two nodes, a root."""

    name = "hierarchical_tucker"
    split = 4

    def names(self, count: int) -> tuple[str, ...]:
        """Of the leaves, of the nodes."""
        return ("rank_leaf", "rank_node")

    def bounds(self, modes: Modes) -> list[int]:
        """The largest pair of modes, and the smaller half of the tree."""
        leaves = paired(modes)
        return [max(leaves), min(leaves[0] * leaves[1], leaves[2] * leaves[3])]

    def network(self, modes: Modes, ranks: Ranks) -> Network:
        """Leaves, nodes, root."""
        leaves = {m: np.minimum(ranks["rank_leaf"], n) for m, n in zip("pqst", paired(modes), strict=True)}
        leaves = {m: n if isinstance(n, np.ndarray) and n.ndim else int(n) for m, n in leaves.items()}
        bonds = dict.fromkeys("xy", ranks["rank_node"])
        tensors = ("aAp", "bBq", "cCs", "dDt", "pqx", "sty", "xy")
        return Network("abcd", "ABCD", tensors, sized(modes, "abcd", "ABCD") | leaves | bonds)

    def ranks_in(self, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], Modes]:
        """The leaves' is the largest of theirs."""
        leaves = shapes[:4]
        return [max(leaf[2] for leaf in leaves), shapes[6][0]], split([leaf[:2] for leaf in leaves])

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Bases of all unfoldings, and their spectra."""
        return _tree(interleaved(self.tensor(layer, weight, {})[0])) | {"weight": weight}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices; with other modes than the automatic ones, of a tree of their own."""
        modes = self._modes(layer, ranks)
        if modes != self._modes(layer, {}):
            factors = _tree(interleaved(self.tensor(layer, factors["weight"], ranks)[0]))
        kept = [min(ranks["rank_leaf"], n) for n in paired(modes)]
        leaves = [
            factors[f"leaf_{n}"][:, :rank].reshape(i, o, rank)
            for n, (rank, i, o) in enumerate(zip(kept, *modes, strict=True))
        ]
        r = ranks["rank_node"]
        first, second = factors["node_0"][: kept[0], : kept[1], :r], factors["node_1"][: kept[2], : kept[3], :r]
        return [*leaves, first, second, factors["root"][:r, :r]]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The sum of all tails: the most that can be lost."""
        leaves = sum(tail(factors[f"leaf_energy_{n}"], ranks["rank_leaf"]) for n in range(4))
        nodes = tail(factors["node_energy_0"], ranks["rank_node"]) + tail(factors["node_energy_1"], ranks["rank_node"])
        return np.minimum(leaves + nodes, 1.0)


def _tree(tensor: Tensor) -> dict[str, Tensor]:
    """Bases, transfer tensors and spectra at full rank."""
    found, bases, sizes = dict[str, Tensor](), list[Tensor](), tensor.shape
    for n in range(4):
        unfolded = tensor.movedim(n, 0).flatten(1)
        basis, energy = leading((unfolded @ unfolded.mT)[None], sizes[n])
        bases.append(basis[0])
        found |= {f"leaf_{n}": basis[0], f"leaf_energy_{n}": energy}
    matrix = tensor.flatten(0, 1).flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    for n, half in enumerate((left, right.mT)):
        pair = half.reshape(sizes[2 * n], sizes[2 * n + 1], -1)
        found[f"node_{n}"] = torch.einsum("abx,ap,bq->pqx", pair, bases[2 * n], bases[2 * n + 1])
        found[f"node_energy_{n}"] = values.square()
    return found | {"root": torch.diag(values)}
