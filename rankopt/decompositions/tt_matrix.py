"""`tt_matrix`: a matrix as a tensor train of pairs of modes.

W[o1…od, i1…id] ≈ G1[i1, o1, r] G2[r, i2, o2, s] … (Oseledets, "Approximation of 2^d × 2^d matrices using tensor
decomposition", 2010; Novikov et al., "Tensorizing Neural Networks", 2015). With two modes a side it is a sum of
`rank_1` Kronecker products. TT-SVD by TensorLy; ranks are slices of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import tail
from rankopt.decompositions.tensor_train import spectra, train
from rankopt.decompositions.tensorized import Modes, TensorizedDecomposition
from rankopt.layer_spec import LayerSpec
from rankopt.nn.network import Network

_INPUTS, _OUTPUTS, _BONDS = "abcd", "ABCD", "rstu"


class TtMatrix(TensorizedDecomposition):
    """A train whose tensors each hold one mode of the input and one of the output."""

    name = "tt_matrix"

    def names(self, count: int) -> tuple[str, ...]:
        """One for every bond."""
        return tuple(f"rank_{n + 1}" for n in range(count - 1))

    def bounds(self, modes: Modes) -> list[int]:
        """The smaller side of the matrix that a bond cuts the tensor into."""
        pairs = paired(modes)
        return [min(math.prod(pairs[: n + 1]), math.prod(pairs[n + 1 :])) for n in range(len(pairs) - 1)]

    def network(self, modes: Modes, ranks: Ranks) -> Network:
        """(i1, o1, r) (r, i2, o2, s) … (t, id, od)."""
        count = len(modes[0])
        ins, outs, bonds = _INPUTS[:count], _OUTPUTS[:count], ["", *_BONDS[: count - 1], ""]
        tensors = tuple(f"{bonds[n]}{ins[n]}{outs[n]}{bonds[n + 1]}" for n in range(count))
        sizes = sized(modes, ins, outs) | dict(zip(_BONDS, (ranks[n] for n in self.names(count)), strict=False))
        return Network(ins, outs, tensors, sizes)

    def ranks_in(self, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], Modes]:
        """The bonds stand first and last."""
        first, *others = shapes
        modes = [first[:2], *(shape[1:3] for shape in others)]
        return [shape[0] for shape in others], split(modes)

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Full-rank TT-SVD."""
        tensor, modes = self.tensor(layer, weight, {})
        cores = train(interleaved(tensor)[None], self.bounds(modes))
        factors = {f"tensor_{n}": core[0] for n, core in enumerate(cores)}
        spectrum = spectra(cores)[::-1]  # from the first bond on
        return factors | {f"energy_{n + 1}": energy for n, energy in enumerate(spectrum)} | {"weight": weight}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices of the bonds; with other modes than the automatic ones, of a TT-SVD of their own."""
        modes = self._modes(layer, ranks)
        if modes != self._modes(layer, {}):
            tensor, _ = self.tensor(layer, factors["weight"], ranks)
            cores = [core[0] for core in train(interleaved(tensor)[None], self.bounds(modes))]
        else:
            cores = [factors[f"tensor_{n}"] for n in range(len(modes[0]))]
        bonds = [1, *(ranks[name] for name in self.rank_names(layer)), 1]
        whole = [
            core[:left, :, :right].reshape(left, i, o, right)
            for core, i, o, left, right in zip(cores, *modes, bonds[:-1], bonds[1:], strict=True)
        ]
        return [whole[0][0], *whole[1:-1], whole[-1][..., 0]]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The sum of the bonds' tails: the most that can be lost."""
        return np.minimum(sum(tail(factors[f"energy_{name[5:]}"], rank) for name, rank in ranks.items()), 1.0)


def sized(modes: Modes, ins: str, outs: str) -> dict[str, Any]:
    """Mode → size."""
    return dict(zip(ins, modes[0], strict=True)) | dict(zip(outs, modes[1], strict=True))


def paired(modes: Modes) -> list[int]:
    """The sizes of pairs of modes, one of each side."""
    return [i * o for i, o in zip(*modes, strict=True)]


def split(pairs: Sequence[tuple[int, ...]]) -> Modes:
    """(i, o) for every pair → all i, all o."""
    return tuple(i for i, _ in pairs), tuple(o for _, o in pairs)


def interleaved(tensor: Tensor) -> Tensor:
    """(o1, …, od, i1, …, id) → (i1·o1, …, id·od)."""
    count = tensor.dim() // 2
    order = [m for n in range(count) for m in (count + n, n)]
    pairs = [tensor.shape[count + n] * tensor.shape[n] for n in range(count)]
    return tensor.permute(order).reshape(pairs)
