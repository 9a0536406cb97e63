"""`LatencyTable`: the time of every layer at every candidate on one target, measured alone, kept on disk.

Layers of one shape share their measurements. Of every method only some ranks are measured; the time of the others is
interpolated over their MACs, monotonically, and ranks are added where the interpolation misses what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression
from torch import nn

from rankopt.decompositions import method
from rankopt.kinds import kind_named
from rankopt.layer_spec import Call, LayerSpec
from rankopt.measurement import Measurement
from rankopt.plan import DENSE, LayerChoice
from rankopt.targets.target import Subject, Target
from rankopt.timing import Effort

if TYPE_CHECKING:
    from rankopt.latency_store import LatencyStore

EFFORT = Effort(seconds=0.1, rounds=7, error=0.02, longest=2, warmup=0.2)
_ANCHORS = 12  # ranks of a method that are measured at first: runtimes pad ranks, so that times go up in stairs
_MISS = 0.05  # of the dense layer's time: how far an interpolated time may be off before more ranks are measured
_AT_ONCE = 24
_NEIGHBOURS = "; between 1×1 convolutions"


class LatencyTable:
    """Times of layers on a target.

    Args:
        target: where they are measured.
        store: what is known already, and where new measurements go.
        neighbours: measure a layer between two pointwise ones, and take their own time off: fusion and changes of the
            memory layout are then seen as in a network. Only two-dimensional convolutions have such neighbours.
        effort: of one measurement.
    """

    def __init__(
        self, target: Target, store: LatencyStore, *, neighbours: bool = False, effort: Effort = EFFORT
    ) -> None:
        self.target, self.store, self.neighbours, self.effort = target, store, neighbours, effort
        self._curves: dict[str, dict[LayerChoice, float]] = {}  # shape and method → measured choice → share of dense
        for key in store.keys():  # noqa: SIM118  (a method of the store, not of a mapping)
            found = store.get(key)
            if key.startswith("layer: ") and key.endswith(")") and found is not None and found.kept is not None:
                self._add(key, found.kept)

    def fill(
        self,
        wanted: Iterable[tuple[LayerSpec, Sequence[LayerChoice]]],
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Measure what the interpolation needs for these candidates, unless it is known."""
        shapes = _shapes(wanted)
        self._dense([shape for shape in shapes.values()], progress)
        for number, (layer, call, choices) in enumerate(shapes.values()):
            for _ in range(3):
                missing = [c for c in self._needed(layer, call, choices) if not self.known(layer, call, c)]
                if not missing:
                    break
                text = f"timing {layer.name} on {self.target.called}, shape {number + 1} of {len(shapes)}"
                self._measure(layer, call, missing, lambda n, text=text: progress(f"{text}: {n} candidates"))  # type: ignore[misc]

    def measure(self, layer: LayerSpec, choices: Sequence[LayerChoice]) -> None:
        """Measure these candidates themselves, where so far they are interpolated."""
        for call in layer.calls:
            self._dense([(layer, call, [])], lambda text: None)
            self._measure(layer, call, [c for c in choices if c != DENSE and not self.known(layer, call, c)])

    def known(self, layer: LayerSpec, call: Call, choice: LayerChoice) -> bool:
        """Whether it was measured itself."""
        return self.store.get(self._key(layer, call, choice)) is not None

    def tells(self, layer: LayerSpec, choice: LayerChoice) -> bool:
        """Whether `time` rests on measurements: of this very candidate, or of others of its method."""
        return bool(layer.calls) and all(
            self.known(layer, call, DENSE)
            and (self.known(layer, call, choice) or bool(self._curve(layer, call, choice.method)))
            for call in layer.calls
        )

    def time(self, layer: LayerSpec, choice: LayerChoice) -> float:
        """Milliseconds of all calls of a layer; measured, or interpolated between measured ranks of the method."""
        return sum(self._time(layer, call, choice) for call in layer.calls)

    def _time(self, layer: LayerSpec, call: Call, choice: LayerChoice) -> float:
        dense = self.store.get(self._key(layer, call, DENSE))
        if dense is None:
            raise KeyError(f"{layer.name}: the table was not filled for it")
        if choice == DENSE:
            return dense.value
        own = self.store.get(self._key(layer, call, choice))
        if own is not None and own.kept is not None:
            return own.kept * dense.value
        curve = self._curve(layer, call, choice.method)
        return _interpolated(_points(layer, call, curve), _macs(layer, call, choice)) * dense.value

    def _curve(self, layer: LayerSpec, call: Call, name: str) -> dict[LayerChoice, float]:
        """The measured candidates of a method: choice → share of the dense layer's time."""
        return self._curves.get(self._key(layer, call, LayerChoice(name)), {})

    def _add(self, key: str, kept: float) -> None:
        head, _, inside = key[:-1].rpartition("(")
        ranks = {name.strip(): int(rank) for name, _, rank in (part.partition("=") for part in inside.split(","))}
        self._curves.setdefault(head, {})[LayerChoice(head.rpartition("; ")[2], ranks)] = kept

    def _put(self, key: str, found: Measurement) -> None:
        self.store.put(key, found)
        if key.endswith(")") and found.kept is not None:
            self._add(key, found.kept)

    def _needed(self, layer: LayerSpec, call: Call, choices: Sequence[LayerChoice]) -> list[LayerChoice]:
        """The candidates to be measured: some of every method, and more between those where it is not smooth."""
        out: list[LayerChoice] = []
        for name in dict.fromkeys(c.method for c in choices if c != DENSE):
            own = sorted((c for c in choices if c.method == name), key=lambda c: _macs(layer, call, c))
            picked = np.unique(np.linspace(0, len(own) - 1, min(_ANCHORS, len(own))).round().astype(int))
            out += [own[i] for i in picked]
            known = [i for i, c in enumerate(own) if self.known(layer, call, c)]
            for left, middle, right in zip(known, known[1:], known[2:], strict=False):
                curve = self._curve(layer, call, name)
                rest = {c: kept for c, kept in curve.items() if c != own[middle]}
                guess = _interpolated(_points(layer, call, rest), _macs(layer, call, own[middle]))
                if abs(guess - curve[own[middle]]) > _MISS:
                    out += [own[(left + middle) // 2], own[(middle + right) // 2]]
        return list(dict.fromkeys(out))

    def _dense(
        self, shapes: Sequence[tuple[LayerSpec, Call, Sequence[LayerChoice]]], progress: Callable[[str], None]
    ) -> None:
        """The dense layers, side by side, so that a drift of the machine hits all alike."""
        missing = [(la, call) for la, call, _ in shapes if not self.known(la, call, DENSE)]
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            progress(f"timing {len(missing)} dense layers on {self.target.called}")
            subjects = [self._subject(la, call, DENSE, kind_named(la).example(la, call)) for la, call in part]
            for (la, call), found in zip(part, self._net(part, subjects), strict=True):
                self._put(self._key(la, call, DENSE), found)

    def _measure(
        self,
        layer: LayerSpec,
        call: Call,
        choices: Sequence[LayerChoice],
        progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        for start in range(0, len(choices), _AT_ONCE):
            part = choices[start : start + _AT_ONCE]
            progress(len(part))
            args = kind_named(layer).example(layer, call)
            subjects = [self._subject(layer, call, choice, args) for choice in (DENSE, *part)]
            found = self._net([(layer, call)] * len(subjects), subjects)
            for choice, one in zip(part, found[1:], strict=True):
                self._put(self._key(layer, call, choice), one)

    def _net(self, layers: Sequence[tuple[LayerSpec, Call]], subjects: Sequence[Subject]) -> list[Measurement]:
        """Measured, less what the neighbours take by themselves."""
        if not self.neighbours:
            return self.target.measure(subjects, self.effort)
        apart: dict[str, Subject] = {}
        for (la, call), subject in zip(layers, subjects, strict=True):
            if la.kind == "conv2d":
                apart.setdefault(_signature(la, call), _pair(la, call, subject.args))
        found = self.target.measure([*subjects, *apart.values()], self.effort)
        own = dict(zip(apart, (m.value for m in found[len(subjects) :]), strict=True))
        net = [
            max(m.value - own.get(_signature(la, call), 0.0), 0.02 * m.value)
            for (la, call), m in zip(layers, found, strict=False)
        ]
        return [replace(m, value=v, kept=v / net[0]) for v, m in zip(net, found, strict=False)]

    def _subject(self, layer: LayerSpec, call: Call, choice: LayerChoice, args: tuple[Any, ...]) -> Subject:
        module = kind_named(layer).dense(layer, call) if choice == DENSE else _candidate(layer, call, choice)
        if self.neighbours and layer.kind == "conv2d":
            first, last = nn.Conv2d(layer.in_channels, layer.in_channels, 1), nn.Conv2d(layer.out_channels, 16, 1)
            module = nn.Sequential(first, nn.ReLU(), module, nn.ReLU(), last)
        return Subject(randomized(module), args, {}, self._key(layer, call, choice))

    def _key(self, layer: LayerSpec, call: Call, choice: LayerChoice) -> str:
        neighbours = _NEIGHBOURS if self.neighbours and layer.kind == "conv2d" else ""
        return f"layer: {_signature(layer, call)}{neighbours}; {choice}"


def randomized(module: nn.Module) -> nn.Module:
    """In eval mode with weights of a size that keeps activations normal: zeros and denormals take another time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else parameter.numel()
            values = torch.randn(parameter.shape, generator=generator) / math.sqrt(max(fan_in, 1))
            parameter.copy_(values.to(parameter.dtype))
    return module.eval().requires_grad_(False)


def _candidate(layer: LayerSpec, call: Call, choice: LayerChoice) -> nn.Module:
    """What stands in a layer's place; for a call of an output head that is tied to it, what stands in the head's."""
    way = method(choice.method)
    built = way.skeleton(layer, choice.ranks, torch.float32, "cpu")
    return way.head(layer, built, None) if layer.tied and call.macs is None else built


def _pair(layer: LayerSpec, call: Call, args: tuple[Any, ...]) -> Subject:
    """The neighbours alone, on tensors of the sizes they see."""
    first, last = nn.Conv2d(layer.in_channels, layer.in_channels, 1), nn.Conv2d(layer.out_channels, 16, 1)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = first, last

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.first(x).relu(), self.last(y.relu())

    inner = torch.randn(call.batch, layer.out_channels, *call.out_size)
    return Subject(randomized(Pair()), (*args, inner), {}, f"layer: {_signature(layer, call)}; neighbours alone")


def _shapes(
    wanted: Iterable[tuple[LayerSpec, Sequence[LayerChoice]]],
) -> dict[str, tuple[LayerSpec, Call, list[LayerChoice]]]:
    """By signature: a layer of that shape, its call, and all candidates that layers of that shape have."""
    found: dict[str, tuple[LayerSpec, Call, list[LayerChoice]]] = {}
    for layer, choices in wanted:
        for call in layer.calls:
            entry = found.setdefault(_signature(layer, call), (layer, call, []))
            entry[2].extend(c for c in choices if c not in entry[2])
    return found


def _signature(layer: LayerSpec, call: Call) -> str:
    """Everything about a layer and its input that its time depends on."""
    parts = [layer.kind, f"{layer.in_channels}→{layer.out_channels}"]
    for name in ("kernel_size", "stride", "padding", "dilation", "output_padding"):
        value = getattr(layer, name)
        if value not in ((), ""):
            parts.append(f"{name} {value if isinstance(value, str) else 'x'.join(map(str, value))}")
    if layer.groups > 1:
        parts.append(f"groups {layer.groups}")
    if layer.padding_mode != "zeros":
        parts.append(layer.padding_mode)
    parts.append("bias" if layer.bias else "no bias")
    parts += [f"{name} {value}" for name, value in layer.facts]
    if layer.tied and call.macs is None:
        parts.append("as the head")
    return ", ".join([*parts, "input " + "x".join(map(str, (call.batch, *call.in_size)))])


def _macs(layer: LayerSpec, call: Call, choice: LayerChoice) -> float:
    return float(method(choice.method).macs(replace(layer, calls=(call,)), choice.ranks))


def _points(layer: LayerSpec, call: Call, curve: Mapping[LayerChoice, float]) -> list[tuple[float, float]]:
    return [(_macs(layer, call, choice), kept) for choice, kept in curve.items()]


def _interpolated(points: Sequence[tuple[float, float]], macs: float) -> float:
    """Monotone in MACs: isotonic where measurements are not, then piecewise cubic; constant beyond the ends."""
    if not points:
        return 1.0
    xs = np.unique([x for x, _ in points])
    ys: NDArray[np.float64] = np.array([np.mean([y for x, y in points if x == value]) for value in xs])
    ys = np.asarray(isotonic_regression(ys).x)
    if len(xs) == 1:
        return float(ys[0])
    return float(PchipInterpolator(xs, ys)(np.clip(macs, xs[0], xs[-1])))
