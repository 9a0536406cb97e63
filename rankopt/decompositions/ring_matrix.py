"""`ring_matrix`: a matrix as a ring of pairs of modes, `tt_matrix` with the ends joined by one more bond.

W[o1…od, i1…id] ≈ Σ G1[q, i1, o1, r] G2[r, i2, o2, s] … Gd[…, id, od, q] (Zhao et al., "Tensor Ring Decomposition",
2016; Wang et al., "Wide Compression: Tensor Ring Nets", 2018). The last rank is the bond that closes the ring.

There is no closed form at given ranks. The fit starts from TT-SVD in one slice of the closing bond, and from TensorLy's
TR-SVD cut to the ranks, and from noise, and all tensors descend together; the best end counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import tail, tensorly
from rankopt.decompositions.tensor_train import spectra, train
from rankopt.decompositions.tensorized import Modes, TensorizedDecomposition, descended
from rankopt.decompositions.tt_matrix import TtMatrix, interleaved, paired, sized, split
from rankopt.layer_spec import LayerSpec
from rankopt.nn.network import Network

_INPUTS, _OUTPUTS, _BONDS = "abcd", "ABCD", "rstu"
_CLOSING = 8  # the largest bond that closes a ring
_NOISE = 1e-2


class RingMatrix(TensorizedDecomposition):
    """A ring whose tensors each hold one mode of the input and one of the output."""

    name = "ring_matrix"
    split = 3  # of two tensors, a ring is a train
    sliceable = False
    exact = False

    def names(self, count: int) -> tuple[str, ...]:
        """One for every bond, the closing one last."""
        return tuple(f"rank_{n + 1}" for n in range(count))

    def bounds(self, modes: Modes) -> list[int]:
        """Those of the train; the closing bond no more than the first pair of modes holds, and than `_CLOSING`."""
        return [*TtMatrix().bounds(modes), min(_CLOSING, *paired(modes))]

    def network(self, modes: Modes, ranks: Ranks) -> Network:
        """(q, i1, o1, r) (r, i2, o2, s) … (t, id, od, q)."""
        count = len(modes[0])
        ins, outs, bonds = _INPUTS[:count], _OUTPUTS[:count], _BONDS[:count]
        tensors = tuple(f"{bonds[n - 1]}{ins[n]}{outs[n]}{bonds[n]}" for n in range(count))
        sizes = sized(modes, ins, outs) | dict(zip(bonds, (ranks[n] for n in self.names(count)), strict=True))
        return Network(ins, outs, tensors, sizes)

    def ranks_in(self, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], Modes]:
        """The bonds stand first and last."""
        return [shape[3] for shape in shapes], split([shape[1:3] for shape in shapes])

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """The weight, and the spectra of the train."""
        tensor, modes = self.tensor(layer, weight, {})
        spectrum = spectra(train(interleaved(tensor)[None], TtMatrix().bounds(modes)))[::-1]
        return {"weight": weight} | {f"energy_{n + 1}": energy for n, energy in enumerate(spectrum)}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The best end of three descents."""
        weight, modes = factors["weight"], self._modes(layer, ranks)
        bonds = [ranks[name] for name in self.rank_names(layer)]
        tensor = interleaved(self.tensor(layer, weight, ranks)[0])
        dense = weight.double()

        def error(tensors: Sequence[Tensor]) -> Tensor:
            return (dense - self.reconstruct(layer, tensors)).square().sum()

        ends = [
            descended(start, error, 3 * weight.numel() * max(bonds) ** 2)
            for start in (way(tensor, modes, bonds) for way in (_opened, _ring, _anywhere))
        ]
        return min(ends, key=lambda tensors: float(error([t.double() for t in tensors])))

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """The tails of the train behind what a cut through the ring lets through: a bond and the closing one."""
        closing = f"rank_{len(ranks)}"
        bonds = [name for name in ranks if name != closing]
        tails = (tail(factors[f"energy_{name[5:]}"], np.asarray(ranks[name] * ranks[closing])) for name in bonds)
        return np.minimum(sum(tails), 1.0)


def _opened(tensor: Tensor, modes: Modes, bonds: Sequence[int]) -> list[Tensor]:
    """The train in the first slice of the closing bond, small noise in the others."""
    cores = [core[0] for core in train(tensor[None], TtMatrix().bounds(modes))]
    return _padded(cores, modes, bonds, 0)


def _ring(tensor: Tensor, modes: Modes, bonds: Sequence[int]) -> list[Tensor]:
    """TR-SVD with the closing bond and the first one as they are wanted where that is defined, cut to the others."""
    pairs, closing = paired(modes), bonds[-1]
    if closing * bonds[0] > min(pairs[0], tensor.numel() // pairs[0]):
        return _opened(tensor, modes, bonds)
    with tensorly() as tl:
        full = [closing, bonds[0], *(min(b, tensor.numel()) for b in bonds[1:-1]), closing]
        cores = list(tl.decomposition.tensor_ring(tensor, rank=full))
    return _padded(cores, modes, bonds, 1)


def _anywhere(tensor: Tensor, modes: Modes, bonds: Sequence[int]) -> list[Tensor]:
    """Nothing but noise, of a size that makes the ring about as large as the tensor."""
    generator = torch.Generator().manual_seed(2)
    size = float(tensor.square().mean() / math.prod(bonds)) ** (0.5 / len(bonds))
    shapes = zip([bonds[-1], *bonds[:-1]], *modes, bonds, strict=True)
    return [size * torch.randn(shape, generator=generator, dtype=tensor.dtype) for shape in shapes]


def _padded(cores: Sequence[Tensor], modes: Modes, bonds: Sequence[int], seed: int) -> list[Tensor]:
    """Cores (bond, pair of modes, bond) cut to a ring of these bonds; what they lack is small noise."""
    found, generator = [], torch.Generator().manual_seed(seed)
    for core, i, o, left, right in zip(cores, *modes, [bonds[-1], *bonds[:-1]], bonds, strict=True):
        scale = _NOISE * float(core.square().mean().sqrt())
        whole = torch.randn(left, i, o, right, generator=generator, dtype=core.dtype) * scale
        cut = core[:left, :, :right]
        whole[: cut.shape[0], :, :, : cut.shape[2]] = cut.reshape(cut.shape[0], i, o, cut.shape[2])
        found.append(whole)
    return found
