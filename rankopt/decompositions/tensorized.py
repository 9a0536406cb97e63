"""`TensorizedDecomposition`: methods that turn a matrix into a tensor by splitting its sizes, as a tensor network.

W[o, i] with o = (o1, …, od) and i = (i1, …, id) as digits is a tensor of 2d modes (Novikov et al., "Tensorizing Neural
Networks", 2015). The sizes of the modes are chosen for balance, a little above the layer's own where these are prime
(the rest is zero), or given with the ranks as ``in_1 …, out_1 …``. The activations absorb the tensors one after the
other in the cheapest order (`nn.network`), and exact MACs are those of that order; an embedding looks up slices.

What the data say of the inputs is not a product over these modes, so nothing can be whitened before the factorization:
it starts from the weight itself, in closed form where there is one, and then all tensors descend together on the output
error in the full metric of the data (`polish`), by L-BFGS.

With `rebuilt` the dense weight is made in every call instead: for storage limits, since MACs then exceed the dense
layer's. These variants end in ``_memory``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.decompositions.decomposition import MATRICES, Decomposition, Ranks, wide
from rankopt.decompositions.metric import Metric
from rankopt.errors import LayerError
from rankopt.layer_spec import LayerSpec
from rankopt.nn.contracted import Contracted, ContractedEmbedding, multiplied, owned
from rankopt.nn.network import Network

Modes = tuple[tuple[int, ...], tuple[int, ...]]  # of the inputs, of the outputs

_MANY = 64  # sizes from which a matrix is split into three modes a side, below into two
_RATIO = 2  # how much larger the largest mode of a side may be than its smallest
# Multiply-accumulates that a descent may cost: about two seconds on one thread.
_BUDGET = 2e10
_ITERATIONS = 30


class TensorizedDecomposition(Decomposition):
    """A linear layer or an embedding as a tensor network.

    Attributes:
        split: modes a side; 0: by the layer's sizes.
        rebuilt: whether the dense weight is made in every call.
    """

    saves = ("params", "macs")
    split: int = 0
    rebuilt: bool = False

    @abstractmethod
    def network(self, modes: Modes, ranks: Ranks) -> Network:
        """The network for modes of these sizes. Its inputs are ``abc…``, its outputs ``ABC…``."""

    @abstractmethod
    def names(self, count: int) -> tuple[str, ...]:
        """The names of the ranks with so many modes a side."""

    @abstractmethod
    def bounds(self, modes: Modes) -> list[int]:
        """The largest useful ranks."""

    @abstractmethod
    def ranks_in(self, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], Modes]:
        """The ranks, and the modes, that belong to tensors of these shapes."""

    def why_not(self, layer: LayerSpec) -> str | None:
        """Fits linear layers and embeddings that are not too small."""
        if layer.kind not in MATRICES:
            return "only the matrix of a linear layer or an embedding is turned into a tensor"
        if self.rebuilt and layer.kind == "embedding":
            return "rows of an embedding are looked up; its dense weight is never needed"
        if layer.padding_filled:
            return "its row of padding_idx is not zero, and the row of padding is zero here"
        least = 2 ** (self.split or 2)
        if min(layer.in_channels, layer.out_channels) < least:
            return f"a side of {min(layer.in_channels, layer.out_channels)} is too small to be split into modes"
        return None

    def count(self, layer: LayerSpec) -> int:
        """Modes a side."""
        return self.split or (3 if min(layer.in_channels, layer.out_channels) >= _MANY else 2)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """By the number of modes."""
        return self.names(self.count(layer))

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """With the modes that are chosen automatically."""
        bounds = self.bounds(self._modes(layer, {}))
        return dict(zip(self.rank_names(layer), bounds, strict=True))

    def check(self, layer: LayerSpec, ranks: Mapping[str, int]) -> None:
        """Ranks within bounds, and modes, where they are given, whose product is no less than the layer's size."""
        names = self._mode_names(layer)
        given = {name: rank for name, rank in ranks.items() if name in names}
        if not given or self.why_not(layer):
            super().check(layer, ranks)
            return
        if set(given) != set(names):
            raise LayerError(f"{layer.name}: {self.name} needs all of {', '.join(names)} or none, got {dict(given)}")
        modes = self._modes(layer, given)
        for side, size, least in (("in", modes[0], layer.in_channels), ("out", modes[1], layer.out_channels)):
            if math.prod(size) < least or math.prod(size) >= 2 * least or min(size) < 1:
                product = " × ".join(map(str, size))
                raise LayerError(
                    f"{layer.name}: {self.name} needs modes {side}_1 … whose product is at least {least} and less than "
                    f"twice that, got {product}"
                )
        bare = {name: rank for name, rank in ranks.items() if name not in names}
        limits = dict(zip(self.rank_names(layer), self.bounds(modes), strict=True))
        if set(bare) != set(limits):
            raise LayerError(f"{layer.name}: {self.name} needs the ranks {', '.join(limits)}, got {bare}")
        for name, rank in bare.items():
            if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 1 <= rank <= limits[name]:
                raise LayerError(
                    f"{layer.name}: {self.name} needs a whole number 1 <= {name} <= {limits[name]} with these modes, "
                    f"got {rank!r}"
                )

    def params(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Entries of all tensors, and the bias."""
        return self._network(layer, ranks).entries + (layer.out_channels if layer.bias else 0)

    def macs(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Of the cheapest order, for all calls of the layer and of the heads that are tied to it."""
        network, total = self._network(layer, ranks), 0 * self._network(layer, ranks).entries
        for call in layer.calls:
            if self.rebuilt:
                total = total + network.dense().macs + call.batch * layer.in_channels * layer.out_channels
            elif call.macs == 0:
                total = total + call.batch * network.lookup().macs
            else:
                order = (network.turned() if layer.kind == "embedding" else network).rows()
                total = total + call.batch * order.macs
        return total

    def stage_shapes(self, layer: LayerSpec, ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
        """The network's."""
        return [tuple(int(n) for n in shape) for shape in self._network(layer, ranks).shapes]

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """With the modes where these are not the automatic ones."""
        ranks, modes = self.ranks_in([tuple(w.shape) for w in weights])
        found = dict(zip(self.rank_names(layer), ranks, strict=True))
        if modes != self._modes(layer, {}):
            found |= dict(zip(self._mode_names(layer), (*modes[0], *modes[1]), strict=True))
        return found

    def build(self, layer: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Module:
        """A `Contracted` layer or embedding."""
        network = self._network(layer, self.ranks_of(layer, weights))
        own = [owned(w) for w in weights]
        if layer.kind == "embedding":
            padding = dict(layer.facts).get("padding_idx")
            return ContractedEmbedding(network, own, layer.in_channels, layer.out_channels, padding)
        bias = None if bias is None else bias.detach().clone()
        return Contracted(network, own, layer.in_channels, layer.out_channels, bias, rebuilt=self.rebuilt)

    def head(self, layer: LayerSpec, built: nn.Module, bias: Tensor | None) -> nn.Module:
        """The same parameters from the width to the rows."""
        assert isinstance(built, ContractedEmbedding)
        bias = None if bias is None else bias.detach().clone()
        turned = built.network.turned()
        return Contracted(turned, list(built.tensors), layer.out_channels, layer.in_channels, bias)

    def weights_of(self, layer: LayerSpec, ranks: Mapping[str, int], built: nn.Module) -> list[Tensor]:
        """The module's parameters."""
        if not isinstance(built, Contracted | ContractedEmbedding):
            raise ValueError("has no tensor network there")
        if [tuple(t.shape) for t in built.tensors] != self.stage_shapes(layer, ranks):
            raise ValueError("has other ranks there")
        return list(built.tensors)

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """All tensors multiplied together, without the padding."""
        network = self._network(layer, self.ranks_of(layer, weights))
        return multiplied(network, weights)[None, : layer.out_channels, : layer.in_channels]

    def polish(self, layer: LayerSpec, weights: Sequence[Tensor], weight: Tensor, metric: Metric) -> list[Tensor]:
        """All tensors descend together on the output error in the metric; what is no better is not taken."""
        dense = weight.double()

        def error(tensors: Sequence[Tensor]) -> Tensor:
            left = dense - self.reconstruct(layer, tensors)
            heavy = metric.weighted(left)
            if metric.turned is not None:
                heavy = metric.turned.to(heavy) @ heavy
            return (heavy * left.flatten(2)).sum()

        side = layer.in_channels if metric.patch is not None or metric.channel is not None else 1
        cost = 3 * layer.in_channels * layer.out_channels * max(side, 64)
        return descended(weights, error, cost)

    def tensor(self, layer: LayerSpec, weight: Tensor, ranks: Ranks) -> tuple[Tensor, Modes]:
        """The weight (1, out, in) as (o1, …, od, i1, …, id), padded with zeros, and these sizes."""
        ins, outs = self._modes(layer, ranks)
        whole = weight.new_zeros(math.prod(outs), math.prod(ins))
        whole[: layer.out_channels, : layer.in_channels] = weight[0]
        return whole.reshape(*outs, *ins), (ins, outs)

    def _network(self, layer: LayerSpec, ranks: Ranks) -> Network:
        names = self._mode_names(layer)
        return self.network(self._modes(layer, ranks), wide({n: r for n, r in ranks.items() if n not in names}))

    def _mode_names(self, layer: LayerSpec) -> tuple[str, ...]:
        count = self.count(layer)
        return (*(f"in_{n + 1}" for n in range(count)), *(f"out_{n + 1}" for n in range(count)))

    def _modes(self, layer: LayerSpec, ranks: Ranks) -> Modes:
        """As given, or balanced."""
        count = self.count(layer)
        if "in_1" in ranks:
            given = [int(ranks.get(name, 0)) for name in self._mode_names(layer)]
            return tuple(given[:count]), tuple(given[count:])
        return balanced(layer.in_channels, count), balanced(layer.out_channels, count)


def memory(cls: type[TensorizedDecomposition]) -> type[TensorizedDecomposition]:
    """The variant of a method that makes the dense weight in every call."""
    name = f"{cls.name}_memory"
    own = {"name": name, "rebuilt": True, "saves": ("params",), "__doc__": f"`{cls.name}` for storage limits."}
    return type(f"{cls.__name__}Memory", (cls,), own)


@lru_cache(maxsize=4096)
def balanced(size: int, count: int) -> tuple[int, ...]:
    """`count` sizes in ascending order, the largest at most twice the smallest, of the least product from `size` on."""
    product = size
    while True:
        found = _factors(product, count, 1)
        fair = [f for f in found if f[-1] <= _RATIO * f[0]]
        if fair:
            return min(fair, key=lambda f: f[-1] / f[0])
        product += 1


def _factors(product: int, count: int, least: int) -> list[tuple[int, ...]]:
    """All ways to write a product of `count` factors in ascending order, none below `least`."""
    if count == 1:
        return [(product,)] if product >= least else []
    found = []
    for first in range(least, round(product ** (1 / count)) + 2):
        if product % first == 0:
            found += [(first, *rest) for rest in _factors(product // first, count - 1, first)]
    return found


def descended(
    tensors: Sequence[Tensor], error: Callable[[Sequence[Tensor]], Tensor], cost: float, most: int = _ITERATIONS
) -> list[Tensor]:
    """Tensors of smaller error, by L-BFGS in double precision; the given ones where it finds none.

    Args:
        tensors: where it begins.
        error: a scalar of them, differentiable.
        cost: multiply-accumulates of one evaluation with its gradient, by which the number of steps goes.
        most: steps.
    """
    steps = int(min(most, _BUDGET / max(cost, 1)))
    own = [t.detach().double().clone(memory_format=torch.contiguous_format).requires_grad_() for t in tensors]
    before = float(error([t.double() for t in tensors]))
    if steps < 2 or not math.isfinite(before) or before <= 0:
        return list(tensors)
    optimizer = torch.optim.LBFGS(own, max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = error(own) / before
        loss.backward()
        return loss

    optimizer.step(closure)
    found = [o.detach().to(t.dtype) for o, t in zip(own, tensors, strict=True)]
    finite = all(bool(torch.isfinite(t).all()) for t in found)
    return found if finite and float(error([t.double() for t in found])) < before else list(tensors)
