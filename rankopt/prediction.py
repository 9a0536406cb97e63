"""`predict`: the loss of every choice of a layer, from gradients of its weight or from what changes at its output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankopt.block_samples import BlockSamples
from rankopt.decompositions import method
from rankopt.errors import RefusedDecomposition
from rankopt.factors import Factors
from rankopt.fisher import GradientSamples
from rankopt.gatherer import LayerStatistics
from rankopt.layer_spec import LayerSpec
from rankopt.plan import DENSE, LayerChoice

_BATCH_BYTES = 256 * 2**20


def predict(
    layers: tuple[LayerSpec, ...],
    choices: Sequence[LayerChoice],
    factors: Factors,
    statistics: Sequence[LayerStatistics],
    refused: dict[str, str],
) -> tuple[NDArray[np.float64], list[LayerChoice]]:
    """Predicted loss of every choice, and the choices that could be built; why not the others goes into `refused`.

    Of several layers the losses add up.
    """
    total = np.zeros(len(choices))
    bad: set[int] = set()
    for layer, gathered in zip(layers, statistics, strict=True):
        if isinstance(gathered.fisher, BlockSamples):
            total += _from_outputs(layer, choices, factors, gathered.fisher, bad, refused)
        else:
            total += _from_weights(layer, choices, factors, gathered.fisher, bad, refused)
    good = [n for n in range(len(choices)) if n not in bad and np.isfinite(total[n])]
    return total[good], [choices[n] for n in good]


def unpredicted(choices: Iterable[LayerChoice]) -> list[str]:
    """A line that says for which of these methods nothing is predicted from weights; none where there are no such."""
    names = sorted({c.method for c in choices if c != DENSE and method(c.method).needs_recovery})
    if not names:
        return []
    return [
        f"the prediction does not apply to {', '.join(names)}, which equal the layer at no rank: every candidate was "
        "trained alone and counts by what it then changed at the layer's output; give plans with them recovery"
    ]


def _from_weights(
    layer: LayerSpec,
    choices: Sequence[LayerChoice],
    factors: Factors,
    samples: GradientSamples,
    bad: set[int],
    refused: dict[str, str],
) -> NDArray[np.float64]:
    """By the changes of the dense weight."""
    total = np.zeros(len(choices))
    weight = factors.weight(layer)
    step = max(1, _BATCH_BYTES // (4 * weight.numel()))
    pending: list[tuple[int, Tensor]] = []

    def flush() -> None:
        if pending:
            losses = samples.losses(torch.stack([change for _, change in pending]))
            total[[n for n, _ in pending]] = losses.double().numpy()
            pending.clear()

    for n, choice in enumerate(choices):
        if choice == DENSE or n in bad:
            continue
        try:
            dense_weight = method(choice.method).reconstruct(layer, factors(layer, choice))
        except RefusedDecomposition as error:
            bad.add(n)
            refused[str(choice)] = error.message
            continue
        pending.append((n, (dense_weight - weight).float()))
        if len(pending) >= step:
            flush()
    flush()
    return total


def _from_outputs(
    layer: LayerSpec,
    choices: Sequence[LayerChoice],
    factors: Factors,
    samples: BlockSamples,
    bad: set[int],
    refused: dict[str, str],
) -> NDArray[np.float64]:
    """What every choice changes at the layer's output, as it is after it was distilled."""
    total = np.zeros(len(choices))
    for n, choice in enumerate(choices):
        if choice == DENSE or n in bad:
            continue
        try:
            total[n] = samples.loss(factors.module(layer, choice))
        except RefusedDecomposition as error:
            bad.add(n)
            refused[str(choice)] = error.message
    return total
