"""`LayerCosts`: where the parameters, MACs and latency of a plan go, layer by layer.

Parameters and MACs are exact. Latency is what the latency tables on disk say of each layer alone; nothing is measured
here, and layers that run together take another time than alone, so these times need not add up to the model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.decompositions import method
from rankopt.errors import InputError, RankoptError
from rankopt.latency_store import LatencyStore, default_path
from rankopt.latency_table import LatencyTable
from rankopt.layer_spec import LayerSpec
from rankopt.layers import architecture_digest, find_layers
from rankopt.nest import with_batch
from rankopt.plan import DENSE, LayerChoice
from rankopt.targets.target import Target

if TYPE_CHECKING:
    from rankopt.study_file import StudyFile


@dataclass(frozen=True)
class LayerCost:
    """What one layer takes.

    Attributes:
        params, macs: exact; a shared module once.
        latency: target → ms of all its calls, alone; without the targets where that is not known.
        rank: the geometric mean of its ranks (0: dense).
        rank_share: the geometric mean of rank / largest useful rank (1: dense).
    """

    params: int
    macs: int
    latency: Mapping[str, float]
    rank: float = 0.0
    rank_share: float = 1.0


@dataclass(frozen=True)
class Times:
    """Latencies of single layers on one target: the table, and the layers as sized for it."""

    table: LatencyTable
    layers: Mapping[str, LayerSpec]

    def of(self, name: str, choice: LayerChoice) -> float | None:
        """Milliseconds, None where nothing was measured to say so."""
        layer = self.layers.get(name)
        if layer is None or not self.table.tells(layer, choice):
            return None
        return self.table.time(layer, choice)


@dataclass(frozen=True)
class LayerCosts:
    """Costs of every layer of one model at every choice.

    Attributes:
        layers: from `find_layers`, in the order of execution.
        times: target → `Times`.
        notes: what could not be found out, and why.
    """

    layers: Sequence[LayerSpec]
    times: Mapping[str, Times] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def of(self, layer: LayerSpec, choice: LayerChoice) -> LayerCost:
        """The cost of a layer at a choice; raises `LayerError` where the ranks don't fit it."""
        found = {label: times.of(layer.name, choice) for label, times in self.times.items()}
        latency = {label: ms for label, ms in found.items() if ms is not None}
        if choice.method == DENSE.method:
            return LayerCost(layer.params, layer.macs, latency)
        way = method(choice.method)
        way.check(layer, choice.ranks)
        bounds = way.rank_bounds(layer)
        ranks = [choice.ranks[name] for name in bounds]
        shares = [choice.ranks[name] / bounds[name] for name in bounds]
        return LayerCost(
            int(way.params(layer, choice.ranks)), int(way.macs(layer, choice.ranks)), latency, _mean(ranks),
            _mean(shares),
        )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else 1.0


def layer_costs(
    file: StudyFile, targets: Sequence[Target] | None = None, facts: Mapping[str, str] | None = None
) -> LayerCosts:
    """Build the study's model and look up what its layers cost.

    Args:
        file: the study.
        targets: whose latency tables are looked into (None: those of the study).
        facts: what the study was begun with; a model of another architecture is refused.

    Raises:
        RankoptError: the model can't be built or run, or is another one than the study's.
    """
    model = file.build_model()
    args, kwargs = file.example()
    layers = find_layers(model, args, kwargs)
    begun = (facts or {}).get("model")
    if begun is not None and begun != architecture_digest(model, layers):
        raise InputError(f"{file.path}: model: its layers are others than those that the study was begun with")
    times: dict[str, Times] = {}
    notes: list[str] = []
    for target in file.make_targets() if targets is None else targets:
        try:
            times[target.called] = _times(target, file.cache_folder, model, layers, args, kwargs)
        except RankoptError as error:
            notes.append(f"latency of single layers on {target.called}: {error.message}")
    return LayerCosts(sorted(layers, key=lambda la: la.order), times, notes)


def _times(
    target: Target, cache: Path | None, model: Any, layers: Sequence[LayerSpec], args: Any, kwargs: Any
) -> Times:
    alone = target.for_layers()
    conditions = alone.conditions()
    path = default_path(conditions)
    path = path if cache is None else cache / path.name
    if not path.is_file():
        raise InputError(f"not known: no table was recorded under the conditions of this machine ({path.name})")
    sized = layers
    if target.batch is not None:
        args, kwargs = with_batch((args, dict(kwargs)), target.batch)
        sized = find_layers(model, args, kwargs)
    store = LatencyStore(path, conditions)
    return Times(LatencyTable(alone, store, neighbours=target.neighbours), {layer.name: layer for layer in sized})
