"""`BlockSamples`: calls of one layer with its outputs and their gradients, where its weights do not predict a loss.

For sample s, with labels y drawn from the model's own prediction, a change of the layer's output by Δ_s moves log p(y)
by ⟨g_s, Δ_s⟩ to first order. Half the mean square of it estimates the divergence that another module in the layer's
place causes, whatever it computes; it is as good as Δ is small, so it is asked after the module was distilled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.divergence import pick


@dataclass(frozen=True)
class BlockSample:
    """One call with a piece of a batch: what was given, what came back, and gradients (draws, *output) of it.

    `draws` is 0 where no gradients were taken.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    gradient: Tensor
    samples: int


@dataclass(frozen=True)
class BlockSamples:
    """Calls of one layer."""

    calls: Sequence[BlockSample] = ()

    def __len__(self) -> int:
        return sum(call.samples * len(call.gradient) for call in self.calls)

    def __iter__(self) -> Iterator[BlockSample]:
        return iter(self.calls)

    def loss(self, module: nn.Module) -> float:
        """Predicted divergence, in nats, of the model with `module` in the layer's place; 0 without gradients."""
        total = 0.0
        for call in self.calls:
            with torch.no_grad():
                change = (pick(module(*call.args, **call.kwargs)) - call.output).float()
            product = (call.gradient.float() * change).reshape(len(call.gradient), call.samples, -1)
            total += float(product.sum(2).square().sum())
        return total / (2 * max(len(self), 1))
