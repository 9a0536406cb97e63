"""`candidates`: what every layer can become, what each choice costs exactly and what it is predicted to lose.

Layers are worked off in chunks whose statistics fit the memory that is allowed; a chunk costs one pass over the
calibration data, so a model that fits takes a single pass. Besides, the largest layer alone needs about fifteen times
its weight while it is factorized and its candidates are judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rankopt.allocate import Choices
from rankopt.batches import Batch
from rankopt.block_samples import BlockSamples
from rankopt.calibration import CalibrationOptions, LayerStatistics, calibrate
from rankopt.decompositions import method
from rankopt.decompositions.metric import Metric
from rankopt.divergence import Divergence
from rankopt.factors import Factors
from rankopt.fisher import GradientSamples
from rankopt.kinds import kind_named
from rankopt.layer_spec import LayerSpec, inside
from rankopt.plan import DENSE, LayerChoice
from rankopt.prediction import predict
from rankopt.rank_split import offered
from rankopt.space_file import LayerSpace
from rankopt.spool import Spool

_LEAST_BYTES = 2**30
_UNSEEN = "no gradient of the output that is judged reaches it"


@dataclass(frozen=True)
class Group:
    """Layers that choose together (usually one) and their candidates.

    Attributes:
        layers: the layers; all of one shape when there are several.
        choices: the candidates.
        losses: (n,) predicted divergence in nats.
        macs, params: (n,) exact, summed over the layers.
        refused: method → why it is not offered here.
        energy: (n,) share of the weight's energy that each loses by the spectra (empty where it was not asked for).
    """

    layers: tuple[LayerSpec, ...]
    choices: tuple[LayerChoice, ...]
    losses: NDArray[np.float64]
    macs: NDArray[np.float64]
    params: NDArray[np.float64]
    refused: Mapping[str, str] = field(default_factory=dict)
    energy: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def name(self) -> str:
        """The name of the first layer."""
        return self.layers[0].name

    @property
    def kept(self) -> NDArray[np.float64]:
        """(n,) the share of the group's MACs that every choice keeps; of its parameters where it takes none."""
        macs = sum(layer.macs for layer in self.layers)
        return self.macs / macs if macs else self.params / max(sum(layer.params for layer in self.layers), 1)

    def as_choices(
        self, losses: NDArray[np.float64] | None = None, costs: Mapping[str, NDArray[np.float64]] | None = None
    ) -> Choices:
        """For the allocator, with other losses and further costs when given."""
        own = {"macs": self.macs, "params": self.params}
        return Choices(self.losses if losses is None else losses, own | dict(costs or {}))


class Statistics:
    """The metrics of all layers in bounded memory: name → `Metric`."""

    def __init__(self, max_bytes: int) -> None:
        self._spool = Spool(max_bytes)

    def put(self, name: str, metric: Metric) -> None:
        """Store, in float32 (the eigenvalues that matter lie far above what that rounds away)."""
        self._spool.put(name, {k: v.float() for k, v in vars(metric).items() if v is not None})

    def __call__(self, name: str) -> Metric:
        """The metric of a layer, empty when it has none."""
        return Metric(**self._spool.get(name)) if name in self._spool else Metric()


def candidates(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    spaces: Mapping[str, LayerSpace],
    tied: Sequence[Sequence[str]],
    batches: Sequence[Batch],
    divergence: Divergence,
    *,
    options: CalibrationOptions = CalibrationOptions(),  # noqa: B008  (frozen)
    use_statistics: bool = True,
    polish: bool = True,
    gradient: bool = False,
    max_bytes: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    further: Mapping[str, Collection[LayerChoice]] | None = None,
) -> tuple[list[Group], Factors]:
    """Candidates of every layer that has any, and the factor cache that builds them.

    Args:
        model: the dense model.
        layers: from `find_layers`.
        spaces: layer name → what it may become.
        tied: groups of names that must share a choice.
        batches: calibration data.
        divergence: how outputs are judged.
        options: how much is gathered in calibration.
        use_statistics: truncate in the metric of the data (otherwise weights alone; losses are predicted either way).
        polish, gradient: see `Factors`.
        max_bytes: memory for what is gathered and kept here (None: `default_memory`): half of it for the statistics
            of a chunk, a quarter for metrics and a quarter for factors; what does not fit waits on disk.
        progress: called with a line of text now and then.
        further: layer name → choices that are candidates too, where the space offers their method and they pay.
    """
    max_bytes = default_memory(model) if max_bytes is None else max_bytes
    groups = _grouped(outermost(_open(layers, spaces), spaces), tied)
    statistics = Statistics(max_bytes // 4)
    factors = Factors(
        model, statistics if use_statistics else None, max_bytes=max_bytes // 4, polish=polish, gradient=gradient
    )
    found: list[Group] = []
    for chunk in _chunks(groups, options, max_bytes // 2):
        members = [layer for group in chunk for layer in group]
        progress(f"calibrating {members[0].name} to {members[-1].name}")
        gathered = calibrate(model, members, batches, divergence, options)
        for group in chunk:
            for layer in group:
                metric = gathered[layer.name].metric
                statistics.put(layer.name, metric if gradient else metric.without_gradient())
                factors.keep(layer, gathered[layer.name].fisher)
            progress(f"factorizing {group[0].name}")
            more = [choice for layer in group for choice in (further or {}).get(layer.name, ())]
            own = [gathered.pop(layer.name) for layer in group]
            found.append(_group(group, spaces[group[0].name], factors, own, more))
    return [g for g in found if any(choice != DENSE for choice in g.choices)], factors


def factor_cache(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    spaces: Mapping[str, LayerSpace],
    batches: Sequence[Batch],
    divergence: Divergence,
    *,
    options: CalibrationOptions = CalibrationOptions(),  # noqa: B008  (frozen)
    use_statistics: bool = True,
    max_bytes: int | None = None,
) -> Factors:
    """The factors that `candidates` would give, without its predictions: enough to build plans that are known."""
    max_bytes = default_memory(model) if max_bytes is None else max_bytes
    statistics = Statistics(max_bytes // 4)
    samples: dict[str, GradientSamples | BlockSamples] = {}
    if use_statistics:
        opened = outermost(_open(layers, spaces), spaces)
        blocks = any(not kind_named(layer).linear for layer in opened)
        plain = options if blocks else replace(options, fisher_samples=0)
        for chunk in _chunks([(layer,) for layer in opened], plain, max_bytes // 2):
            gathered = calibrate(model, [layer for (layer,) in chunk], batches, divergence, plain)
            for name, found in gathered.items():
                statistics.put(name, found.metric)
                samples[name] = found.fisher
    factors = Factors(model, statistics if use_statistics else None, max_bytes=max_bytes // 4)
    for layer in layers:
        if layer.name in samples:
            factors.keep(layer, samples[layer.name])
    return factors


def _open(layers: Sequence[LayerSpec], spaces: Mapping[str, LayerSpace]) -> list[LayerSpec]:
    return [la for la in layers if la.skip is None and la.name in spaces and not spaces[la.name].dense]


def outermost(layers: Sequence[LayerSpec], spaces: Mapping[str, LayerSpace]) -> list[LayerSpec]:
    """Without the parts of layers that the space offers something as a whole: one of both can be replaced, not both.

    Layers that are more than a weight and are offered nothing are left out too: their calls would be gathered in vain.
    """
    whole = [la for la in layers if any(method(name).why_not(la) is None for name in _offered(spaces[la.name]))]
    wanted = [la for la in layers if la in whole or kind_named(la).linear]
    return [la for la in wanted if not any(inside(la, outer) for outer in whole)]


def _offered(space: LayerSpace) -> list[str]:
    return [*space.methods, *(entry["method"] for entry in space.explicit)]


def default_memory(model: nn.Module) -> int:
    """Bytes to work with besides the models themselves: a quarter of the weights, and at least 1 GiB."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(_LEAST_BYTES, weights // 4)


def _grouped(layers: Sequence[LayerSpec], tied: Sequence[Sequence[str]]) -> list[tuple[LayerSpec, ...]]:
    owner = {name: tuple(names) for names in tied for name in names}
    by_name = {layer.name: layer for layer in layers}
    groups: list[tuple[LayerSpec, ...]] = []
    seen: set[str] = set()
    for layer in layers:
        if layer.name not in seen:
            group = tuple(by_name[n] for n in owner.get(layer.name, (layer.name,)) if n in by_name)
            seen.update(la.name for la in group)
            groups.append(group)
    return groups


def _chunks(
    groups: Sequence[tuple[LayerSpec, ...]], options: CalibrationOptions, max_bytes: int
) -> Iterator[list[tuple[LayerSpec, ...]]]:
    chunk: list[tuple[LayerSpec, ...]] = []
    held = 0
    for group in groups:
        need = sum(_need(layer, options) for layer in group)
        if chunk and held + need > max_bytes:
            yield chunk
            chunk, held = [], 0
        chunk.append(group)
        held += need
    if chunk:
        yield chunk


def _need(layer: LayerSpec, options: CalibrationOptions) -> int:
    """Bytes of statistics that one layer holds while it is gathered, from above."""
    g, o, i, *k = layer.group_shape
    patch = i * math.prod(k)
    patch = patch if patch <= options.max_patch else i
    if not kind_named(layer).linear:
        return options.layer_bytes
    if kind_named(layer).tokens:
        return 16 * o * o + options.layer_bytes
    moments = 2 * g * sum(n * n * (8 if n <= 1024 else 4) for n in (patch, o))  # the sum, and the mean made of it
    gradients = 4 * math.prod(layer.group_shape) * options.draws  # of one sample, as they are or as pairs
    if len(layer.calls) == 1:
        call = layer.calls[0]
        seen, made = (
            n * math.prod(s) for n, s in ((layer.in_channels, call.in_size), (layer.out_channels, call.out_size))
        )
        gradients = min(gradients, 4 * call.batch * (seen + options.draws * made))
    return moments + min(gradients * options.fisher_samples, options.layer_bytes)


def _group(
    layers: tuple[LayerSpec, ...],
    space: LayerSpace,
    factors: Factors,
    statistics: Sequence[LayerStatistics],
    further: Sequence[LayerChoice],
) -> Group:
    """All candidates of layers that choose together; losses add over the layers."""
    first, refused = layers[0], dict[str, str]()
    choices: list[LayerChoice] = [DENSE] if space.allow_dense and _within(first, DENSE, space.cap) else []
    if not all(len(gathered.fisher) for gathered in statistics):  # another output may need it: it stays dense
        return Group(layers, (DENSE,), np.zeros(1), *_costs(layers, [DENSE]), {"*": _UNSEEN})
    for entry in space.explicit:
        choices.append(LayerChoice(entry["method"], entry["ranks"]))
    for name in space.methods:
        way = method(name)
        reason = way.why_not(first)
        if reason:
            refused[name] = reason
            continue
        full = [factors.full(layer, name) for layer in layers]
        keeps = space.keeps if way.sliceable or space.solved_keeps is None else space.solved_keeps
        named = [
            LayerChoice(name, ranks)
            for quantity in [q for q in way.saves if getattr(first, q)] or ["params"]
            for ranks in offered(way, first, full, keeps, space.rank_multiple, quantity)
        ]
        for choice in [*named, *(c for c in further if c.method == name)]:
            if choice not in choices and _pays(first, choice) and _within(first, choice, space.cap):
                choices.append(choice)
    changes, kept = predict(layers, choices, factors, statistics, refused)
    return Group(layers, tuple(kept), changes, *_costs(layers, kept), refused, _energy(layers, kept, factors))


def _energy(layers: Sequence[LayerSpec], choices: Sequence[LayerChoice], factors: Factors) -> NDArray[np.float64]:
    """Share of the weights' energy that every choice loses, by the spectra, averaged over the layers."""
    lost = np.zeros(len(choices))
    for n, choice in enumerate(choices):
        if choice != DENSE:
            way = method(choice.method)
            each = [way.lost(factors.full(la, choice.method), choice.ranks) for la in layers]
            lost[n] = float(np.mean([float(v) for v in each]))
    return lost


def _costs(
    layers: Sequence[LayerSpec], choices: Sequence[LayerChoice]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """MACs and parameters of every choice, summed over the layers."""
    macs = np.array([sum(_macs(la, c) for la in layers) for c in choices], float)
    return macs, np.array([sum(_params(la, c) for la in layers) for c in choices], float)


def _macs(layer: LayerSpec, choice: LayerChoice) -> int:
    return layer.macs if choice == DENSE else int(method(choice.method).macs(layer, choice.ranks))


def _params(layer: LayerSpec, choice: LayerChoice) -> int:
    return layer.params if choice == DENSE else int(method(choice.method).params(layer, choice.ranks))


def _pays(layer: LayerSpec, choice: LayerChoice) -> bool:
    return _macs(layer, choice) < layer.macs or _params(layer, choice) < layer.params


def _within(layer: LayerSpec, choice: LayerChoice, cap: Mapping[str, float]) -> bool:
    cost = {"macs": (_macs(layer, choice), layer.macs), "params": (_params(layer, choice), layer.params)}
    return all(cost[q][0] <= share * cost[q][1] for q, share in cap.items())
