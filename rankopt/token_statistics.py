"""Statistics of an embedding, alone or tied to an output head: how often rows are looked up, and gradients.

Rows that are looked up never come together, so the input's second moment is a diagonal, the frequencies (with one added
to each count, since a row that the calibration data lack is not free). Where an output head holds the same weight, an
error D (width × rows) also moves its outputs by Dᵀh for an input h. The gradients of these outputs are about as large
as the rows are frequent, so that costs trace(H D P Dᵀ) with the moment H of h and the same frequencies P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankopt.fisher import GradientSamples
from rankopt.layer_spec import LayerSpec

_CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class TokenPiece:
    """What some samples do with the weight.

    Attributes:
        samples: how many.
        looked_up: row numbers (n, positions) and gradients (draws, n, positions, width) of the rows, for every lookup.
        multiplied: what the head was given (n, positions, width), and gradients (draws, n, positions, rows) of its
            outputs, for every call of it.
    """

    samples: int
    looked_up: Sequence[tuple[Tensor, Tensor]]
    multiplied: Sequence[tuple[Tensor, Tensor]] = ()

    @property
    def draws(self) -> int:
        """How often labels were drawn."""
        return next(g.shape[0] for _, g in (*self.looked_up, *self.multiplied))


@dataclass(frozen=True)
class TokenSamples(GradientSamples):
    """Gradients of an embedding's weight, sample by sample, never formed."""

    layer: LayerSpec
    pieces: Sequence[TokenPiece] = ()

    def __len__(self) -> int:
        return sum(piece.samples * piece.draws for piece in self.pieces)

    def scores(self, changes: Tensor) -> Tensor:
        """⟨G_s, D⟩ for weight changes (k, 1, width, rows): (k, samples)."""
        table = changes[:, 0].float().mT.contiguous()  # k rows width
        parts = [table.new_zeros(len(table), 0)]
        for piece in self.pieces:
            total = table.new_zeros(len(table), piece.draws, piece.samples)
            for ids, gradient in piece.looked_up:
                step = max(1, _CHUNK_BYTES // (4 * ids[0].numel() * table.shape[-1] * len(table)))
                for start in range(0, piece.samples, step):
                    part = slice(start, start + step)
                    total[:, :, part] += torch.einsum("knpw,dnpw->kdn", table[:, ids[part]], gradient[:, part].float())
            for given, gradient in piece.multiplied:
                for n in range(piece.samples):
                    moved = torch.einsum("pw,dpr->drw", given[n].float(), gradient[:, n].float())
                    total[:, :, n] += torch.einsum("krw,drw->kd", table, moved)
            parts.append(total.flatten(1))
        return torch.cat(parts, 1)
