"""`Factors`: one factorization a layer and method, in bounded memory, and the stage weights for any ranks out of it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankopt.block_samples import BlockSamples
from rankopt.decompositions import method
from rankopt.decompositions.metric import Metric
from rankopt.errors import LayerError
from rankopt.kinds import kind_named
from rankopt.layer_spec import LayerSpec
from rankopt.plan import LayerChoice
from rankopt.spool import Spool

_LARGE = 4 * 2**20  # weight entries above which float32 is used, since float64 would not pay for its time and memory
_SLICES = 8  # what share of the memory holds slices
_POLISHED = 8 * 2**20  # weight entries above which nothing is polished: it takes eight copies of the weight in float64


class Factors:
    """The factor cache. Call it with a layer and a choice to get stage weights (what `surgery.apply` takes).

    `samples` holds calls of the layers that are more than a weight: methods take their own statistics out of them
    (`Metric.calls`), or are distilled on them (`Decomposition.needs_recovery`).

    Args:
        model: the dense model.
        metrics: layer name → its metric; a layer without one is factorized from its weights alone.
        max_bytes: memory for factors; the rest waits on disk.
        polish: solve the last stage of every slice again in the full metric (where there is one, and the layer has at
            most 8 M weights).
        gradient: weight output channels with the second moment of their gradients when truncating.
    """

    def __init__(
        self,
        model: nn.Module,
        metrics: Mapping[str, Metric] | Callable[[str], Metric] | None = None,
        *,
        max_bytes: int = 2**30,
        polish: bool = True,
        gradient: bool = False,
    ) -> None:
        self._modules = dict(model.named_modules())
        self._metrics = metrics if callable(metrics) else (metrics or {}).get
        self._informed = metrics is not None  # otherwise factorized from weights alone
        self._most_sliced = max_bytes // _SLICES
        self._spool = Spool(max_bytes - self._most_sliced)
        self._slices: OrderedDict[str, list[Tensor]] = OrderedDict()
        self._sliced = 0
        self.polish = polish
        self.gradient = gradient
        self.samples: dict[str, BlockSamples] = {}

    def __call__(self, layer: LayerSpec, choice: LayerChoice) -> list[Tensor]:
        """Stage weights for the choice; may raise `RefusedDecomposition`."""
        way = method(choice.method)
        if way.twin:
            return self(layer, LayerChoice(way.twin, choice.ranks))
        key = f"{layer.name}|{choice.method}|{sorted(choice.ranks.items())}{'|gradient' * self.gradient}"
        if self.polish and key in self._slices:
            self._slices.move_to_end(key)
            return list(self._slices[key])
        if not way.sliceable and key in self._spool:
            return [t for _, t in sorted(self._spool.get(key).items())]
        weights = way.stage_weights(layer, self.full(layer, choice.method), choice.ranks)
        if way.needs_recovery and layer.name in self.samples:
            weights = way.distil(layer, choice.ranks, weights, self._modules[layer.name], self.samples[layer.name])
        elif self.polish and math.prod(layer.weight_shape) <= _POLISHED and (metric := self.metric(layer.name)).known:
            weights = way.polish(layer, weights, self.weight(layer).to(weights[0].dtype), metric)
            if way.sliceable:
                self._remember(key, weights)
        if not way.sliceable:
            self._spool.put(key, {f"{n:02d}": w.contiguous() for n, w in enumerate(weights)})
        return weights

    def _remember(self, key: str, weights: Sequence[Tensor]) -> None:
        """Polishing a slice is dear: those that were used last are held, in an eighth of the memory."""
        self._slices[key] = [_own(w) for w in weights]
        self._sliced += _bytes(weights)
        while self._sliced > self._most_sliced:
            self._sliced -= _bytes(self._slices.popitem(last=False)[1])

    def keep(self, layer: LayerSpec, samples: object) -> None:
        """Hold the samples of a layer for as long as its methods may have to be distilled."""
        if isinstance(samples, BlockSamples):
            self.samples[layer.name] = samples

    def module(self, layer: LayerSpec, choice: LayerChoice) -> nn.Module:
        """What stands in the layer's place at this choice, in the layer's own precision and in eval mode."""
        old = self._modules[layer.name]
        sample = next(old.parameters())
        weights = [w.to(sample.device, sample.dtype) for w in self(layer, choice)]
        kind = kind_named(layer)
        return kind.placed(old, method(choice.method).build_at(layer, choice.ranks, weights, kind.bias(old))).eval()

    def metric(self, name: str) -> Metric:
        """The layer's metric as it is used: without gradients unless they are asked for."""
        metric = self._metrics(name) or Metric()
        return metric if self.gradient else metric.without_gradient()

    def weight(self, layer: LayerSpec) -> Tensor:
        """The dense weight, groups in front, in the working precision."""
        weight = kind_named(layer).weight(layer, self._modules[layer.name]).detach()
        if not torch.isfinite(weight).all():
            raise LayerError(f"{layer.name}: its weight holds NaN or infinity; mend the model first")
        return weight.to(torch.float32 if weight.numel() > _LARGE else torch.float64)

    def full(self, layer: LayerSpec, name: str) -> dict[str, Tensor]:
        """The prepared factorization that serves all ranks."""
        name = method(name).twin or name
        key = f"{layer.name}|{name}"
        if key not in self._spool:
            calls = self.samples.get(layer.name) if self._informed else None
            metric = replace(self.metric(layer.name), calls=calls)
            factors = method(name).factorize(layer, self.weight(layer), metric)
            self._spool.put(key, {part: _own(tensor) for part, tensor in factors.items()})
        return self._spool.get(key)


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: a view would hold all that it was cut from."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
