"""`Factors`: one factorization a layer and method, in bounded memory, and the stage weights for any ranks out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rankopt.decompositions import method
from rankopt.decompositions.metric import Metric
from rankopt.errors import LayerError
from rankopt.layer_spec import LayerSpec, group_weight
from rankopt.plan import LayerChoice
from rankopt.spool import Spool

_LARGE = 4 * 2**20  # weight entries above which float32 is used, since float64 would not pay for its time and memory
_POLISHED = 8 * 2**20  # weight entries above which nothing is polished: it takes eight copies of the weight in float64


class Factors:
    """The factor cache. Call it with a layer and a choice to get stage weights (what `surgery.apply` takes).

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
        self._spool = Spool(max_bytes)
        self.polish = polish
        self.gradient = gradient

    def __call__(self, layer: LayerSpec, choice: LayerChoice) -> list[Tensor]:
        """Stage weights for the choice; may raise `RefusedDecomposition`."""
        way = method(choice.method)
        if way.twin:
            return self(layer, LayerChoice(way.twin, choice.ranks))
        key = f"{layer.name}|{choice.method}|{sorted(choice.ranks.items())}"
        if not way.sliceable and key in self._spool:
            return [t for _, t in sorted(self._spool.get(key).items())]
        weights = way.stage_weights(layer, self.full(layer, choice.method), choice.ranks)
        if self.polish and math.prod(layer.weight_shape) <= _POLISHED and (metric := self.metric(layer.name)).known:
            weights = way.polish(layer, weights, self.weight(layer).to(weights[0].dtype), metric)
        if not way.sliceable:
            self._spool.put(key, {f"{n:02d}": w.contiguous() for n, w in enumerate(weights)})
        return weights

    def metric(self, name: str) -> Metric:
        """The layer's metric as it is used: without gradients unless they are asked for."""
        metric = self._metrics(name) or Metric()
        return metric if self.gradient else metric.without_gradient()

    def weight(self, layer: LayerSpec) -> Tensor:
        """The dense weight, groups in front, in the working precision."""
        weight = self._modules[layer.name].get_parameter("weight").detach()
        if not torch.isfinite(weight).all():
            raise LayerError(f"{layer.name}: its weight holds NaN or infinity; mend the model first")
        return group_weight(layer, weight).to(torch.float32 if weight.numel() > _LARGE else torch.float64)

    def full(self, layer: LayerSpec, name: str) -> dict[str, Tensor]:
        """The prepared factorization that serves all ranks."""
        name = method(name).twin or name
        key = f"{layer.name}|{name}"
        if key not in self._spool:
            factors = method(name).factorize(layer, self.weight(layer), self.metric(layer.name))
            self._spool.put(key, {part: _own(tensor) for part, tensor in factors.items()})
        return self._spool.get(key)


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: a view would hold all that it was cut from."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
