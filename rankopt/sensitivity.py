"""`Sensitivities`: what every candidate is predicted to change, measured anew around a compressed model.

Losses are predicted at the dense model, and far from it they do not add up: errors of one layer are damped or carried
on by others that are compressed too. Around a compressed model the divergence from the dense one has a slope, so that
for a change D of one layer's weight

    divergence(D) − divergence(0) ≈ mean over samples of ⟨∇ divergence, D⟩ + ½ mean of ⟨score, D⟩²

with the scores drawn from the compressed model's own prediction (Fisher, as at the dense model). Both come from one
pass each over a part of the calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankopt.batches import Batch, first
from rankopt.calibration import CalibrationOptions, LayerStatistics, calibrate
from rankopt.candidates import Group
from rankopt.decompositions import method
from rankopt.divergence import Divergence, pick
from rankopt.errors import RefusedDecomposition
from rankopt.factors import Factors
from rankopt.fisher import GradientSamples
from rankopt.layer_spec import LayerSpec
from rankopt.plan import DENSE, LayerChoice, Plan

_BATCH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class SensitivityOptions:
    """How much is measured.

    Attributes:
        samples: calibration samples, the first ones.
        draws: labels drawn for each.
        seed: for the labels.
    """

    samples: int = 192
    draws: int = 2
    seed: int = 0


class Sensitivities:
    """Call it with a plan: for every group, the change of the divergence that each choice is predicted to cause there.

    Args:
        model: the dense model.
        groups: the candidates.
        factors: the factor cache.
        batches: calibration data.
        divergence: how outputs are judged.
        build: a plan → the compressed model as a trial has it.
        options: see above.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        factors: Factors,
        batches: Sequence[Batch],
        divergence: Divergence,
        build: Callable[[Plan], nn.Module],
        options: SensitivityOptions = SensitivityOptions(),
    ) -> None:
        self.model, self.groups, self.factors, self.divergence = model, list(groups), factors, divergence
        self.batches, self.build, self.options = first(batches, options.samples), build, options

    def __call__(self, plan: Plan) -> list[NDArray[np.float64]]:
        """(choices,) for every group: nats, 0 at the plan's own choice, below 0 where it would get better."""
        built, layers = self.build(plan), [layer for group in self.groups for layer in group.layers]
        options = self.options
        drawn = CalibrationOptions(options.samples, options.draws, temperature=1.0, max_rows=1, seed=options.seed)
        sloped = CalibrationOptions(options.samples, 1, temperature=1.0, max_rows=1, seed=options.seed)
        curved = calibrate(built, layers, self.batches, self.divergence, drawn)
        slopes = calibrate(built, layers, self.batches, self.divergence, sloped, self._against_dense)
        return [self._changes(group, plan[group.name], curved, slopes) for group in self.groups]

    def _against_dense(self, output: Tensor, piece: Batch) -> Tensor:
        with torch.no_grad():
            dense = pick(self.model(*piece.args, **piece.kwargs))
        return self.divergence.between(dense, output).sum()

    def _changes(
        self, group: Group, now: LayerChoice, curved: dict[str, LayerStatistics], slopes: dict[str, LayerStatistics]
    ) -> NDArray[np.float64]:
        total = np.zeros(len(group.choices))
        for layer in group.layers:
            curvature, slope = curved[layer.name].fisher, slopes[layer.name].fisher
            if not (isinstance(curvature, GradientSamples) and isinstance(slope, GradientSamples)):
                return self._as_before(group, now)
            weight = self._weight(layer, now)
            step = max(1, _BATCH_BYTES // (4 * weight.numel()))
            for start in range(0, len(group.choices), step):
                part = group.choices[start : start + step]
                changes = torch.stack([(self._weight(layer, choice) - weight).float() for choice in part])
                found = curvature.losses(changes) + slope.scores(changes).sum(1) / max(len(slope), 1)
                total[start : start + step] += found.double().numpy()
        return total

    def _as_before(self, group: Group, now: LayerChoice) -> NDArray[np.float64]:
        """Where weights predict nothing: the losses that distilled candidates had at the dense model."""
        return group.losses - group.losses[group.choices.index(now)]

    def _weight(self, layer: LayerSpec, choice: LayerChoice) -> Tensor:
        """The dense weight that a choice stands for, before any refit."""
        if choice == DENSE:
            return self.factors.weight(layer)
        try:
            return method(choice.method).reconstruct(layer, self.factors(layer, choice))
        except RefusedDecomposition:
            return torch.full_like(self.factors.weight(layer), float("inf"))
