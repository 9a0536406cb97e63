"""`FisherSamples`: the loss's gradients at one layer, and the loss that a change of its weight is predicted to cause.

For sample s, with labels y drawn from the model's own prediction, a weight change D moves log p(y) by ⟨G_s, D⟩, where
G_s is the gradient of the layer's weight for this sample alone. Half the mean square of it is the Fisher approximation
of the Kullback-Leibler divergence that the change causes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankopt.layer_spec import LayerSpec
from rankopt.patches import output_rows, patches

_CHUNK_BYTES = 128 * 2**20


class GradientSamples(ABC):
    """Gradients of one layer's weight, sample by sample, in some form."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples times draws."""

    @abstractmethod
    def scores(self, changes: Tensor) -> Tensor:
        """⟨G_s, D⟩ for weight changes (k, groups, out, in, *kernel): (k, samples)."""

    def losses(self, changes: Tensor) -> Tensor:
        """Predicted divergence of each weight change alone, (k,), in nats; 0 without samples."""
        return self.scores(changes).square().sum(1) / (2 * max(len(self), 1))


@dataclass(frozen=True)
class FisherSamples(GradientSamples):
    """Gradients of one layer's weight, sample by sample, in whichever form is smaller.

    Attributes:
        layer: the layer.
        gradients: (samples, weight entries), entries in the order of `group_weight`; or None, and instead
        pairs: inputs (n, ...) and output gradients (draws, n, ...) for every call and chunk, whose products they are.
    """

    layer: LayerSpec
    gradients: Tensor | None = None
    pairs: Sequence[tuple[Tensor, Tensor]] = ()

    def __len__(self) -> int:
        if self.gradients is not None:
            return len(self.gradients)
        return sum(g.shape[0] * g.shape[1] for _, g in self.pairs)

    def scores(self, changes: Tensor) -> Tensor:
        """⟨G_s, D⟩ for weight changes (k, groups, out, in, *kernel): (k, samples)."""
        flat = changes.flatten(1).float()
        return torch.cat([flat.new_zeros(len(flat), 0), *(flat @ part.T for part in self._parts())], dim=1)

    def _parts(self) -> Iterator[Tensor]:
        if self.gradients is not None:
            yield self.gradients
            return
        for x, g in self.pairs:
            draws, n = g.shape[:2]
            entries = self.layer.in_channels * self.layer.out_channels // self.layer.groups
            for size in self.layer.kernel_size:
                entries *= size
            step = max(1, _CHUNK_BYTES // (4 * entries * draws))
            for start in range(0, n, step):
                part = slice(start, start + step)
                yield weight_gradients(self.layer, x[part], g[:, part]).flatten(2).flatten(0, 1)


def weight_gradients(layer: LayerSpec, x: Tensor, gradient: Tensor) -> Tensor:
    """Per-sample gradients of the weight, (draws, n, groups, out/groups, in/groups·kernel), in float32.

    Args:
        layer: the layer.
        x: (n, ...) its input, batched.
        gradient: (draws, n, ...) gradients at its output.
    """
    draws, n = gradient.shape[:2]
    rows = by_position(layer, x.float(), patches)  # n p g i
    outer = by_position(layer, gradient.float().flatten(0, 1), output_rows).unflatten(0, (draws, n))  # d n p g o
    return torch.einsum("dnpgo,npgi->dngoi", outer, rows)


def by_position(layer: LayerSpec, value: Tensor, rows: Callable[[LayerSpec, Tensor], Tensor]) -> Tensor:
    """(n, positions, groups, channels) by `patches` or `output_rows`, also of (n, frames, channels, *size)."""
    if layer.dims == 0 or value.dim() == layer.dims + 2:
        return rows(layer, value)
    found = rows(layer, value.flatten(0, 1))
    return found.reshape(len(value), -1, *found.shape[2:])
