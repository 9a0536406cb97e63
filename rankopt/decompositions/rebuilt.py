"""`relu_svd`, `relu_tucker`, `relu_cp`, `sin_svd`: the weight as an elementwise function of a low-rank product.

- **ReLU.** Positive and negative parts of a weight, one below the other, are a nonnegative matrix with zeros in half of
  its places, which ReLU-NMD is made for (Saul 2022; Seraghiti et al. 2023; see `nmd`):

      [max(W, 0); max(−W, 0)] ≈ max(0, [U₊; U₋] V),   W ≈ max(0, U₊V) − max(0, U₋V).

  With U₋ = −U₊ that is U₊V itself, so the linear factorization of the same rank is where it starts; the other factor
  is shared. `relu_tucker` and `relu_cp` are the same with a Tucker or CP tensor in place of U V. The smaller side of
  the layer is the one that is doubled.
- **Sine.** W ≈ a · sin(U V), of any rank where U V is of a low one (Ji et al., "Efficient learning with sine-activated
  low-rank matrices", 2024). It starts where the sine is nearly straight, at the linear factorization too.

These are for *storage*: the dense weight is made of the factors in every call (`nn.Rebuilt`), so a layer takes the
MACs of the dense one and those of the product besides, and only its parameters fall. Elementwise operations are not
counted. Shares of a layer that a search space asks to keep are therefore shares of its parameters.

From its starts (with ReLU a second one by ReLU-NMD) all factors descend together on the output error in the metric of
the data, by L-BFGS, so that no result is worse than the linear one of the same rank. That descent does nearly all:
which start wins is a matter of a few per cent. There is no last stage that a refit could solve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.decompositions import nmd
from rankopt.decompositions.decomposition import Decomposition, Factors, Ranks, wide
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.products import FORMS
from rankopt.layer_spec import LayerSpec
from rankopt.nn.rebuilt import Rebuilt, dense_weight, multiplied

_ITERATIONS = 40  # of L-BFGS: so many from every start, and as many again from where the best one ended
_BENDS = (1 / 50, 6.0)  # largest angle, in radians, with which the sine starts: straight, and bent
_SWEEPS = 60  # of ReLU-NMD
# Multiply-accumulates that the descent of one group may cost: a second or two on one thread.
_BUDGET = 2e10


class FunctionOfProduct(Decomposition):
    """An elementwise function of a product of factors.

    Args:
        function: "relu" or "sin".
        form: "svd", "tucker" or "cp": what the product is.
    """

    sliceable = False
    exact = False
    saves = ("params",)

    def __init__(self, function: str, form: str) -> None:
        self.function, self.form = function, FORMS[form]
        self.name = f"{function}_{form}"
        self.pointwise = f"{function}_svd"

    def why_not(self, layer: LayerSpec) -> str | None:
        """Needs channels on both sides; Tucker and CP a kernel too. A table would be rebuilt for every look-up."""
        if layer.kind == "embedding":
            return "the whole table would be rebuilt for every look-up"
        return self.form.why_not(layer)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """One rank, or one a mode."""
        return self.form.names

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The ranks of the unfoldings; where there is one rank, the largest with fewer parameters than the layer."""
        bounds = self.form.bounds(self.form.modes(layer), self._modes(layer))
        return dict(zip(self.form.names, bounds, strict=True))

    def params(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """The factors' entries, and the bias."""
        total: Any = layer.out_channels if layer.bias else 0
        for shape in self._shapes(layer, wide(ranks)):
            total = total + layer.groups * _product(shape)
        return total

    def macs(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Those of the dense layer, and in every call those of the product."""
        given = wide(ranks)
        product = self.form.macs(self._modes(layer), [given[name] for name in self.form.names])
        total = layer.macs + len(layer.calls) * layer.groups * product
        return total if isinstance(total, np.ndarray) else int(total)

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """The linear method's factors, the weight and the input's second moment."""
        moments = {"patch": metric.patch} if metric.patch is not None else {"channel": metric.channel}
        known = {name: moment for name, moment in moments.items() if moment is not None}
        return {**self.form.factorize(layer, weight, metric), "dense": weight, **known}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The descent from the linear factorization, group by group.

        Raises:
            RefusedDecomposition: CP alone, where it found no sound start.
        """
        linear = self.form.start(layer, factors, ranks)
        dense, groups = factors["dense"], []
        for g in range(layer.groups):
            own = slice(g, g + 1)
            moments = {name: factors[name][own] for name in ("patch", "channel") if name in factors}
            groups.append(self._solved(layer, [f[own] for f in linear], dense[own], Metric(**moments)))
        return [torch.cat(parts) for parts in zip(*groups, strict=True)]

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """The function of the product."""
        found = dense_weight(self.function, self._side(layer), weights)
        return found.reshape(*found.shape[:2], -1, *layer.kernel_size)

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the factors' shapes."""
        return dict(zip(self.form.names, self.form.ranks(self._product_of(weights)), strict=True))

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """As the linear factorization."""
        return self.form.lost(factors, ranks)

    def weights_of(self, layer: LayerSpec, ranks: Mapping[str, int], built: nn.Module) -> list[Tensor]:
        """The factors."""
        shapes = self.stage_shapes(layer, ranks)
        if not isinstance(built, Rebuilt) or built.function != self.function:
            raise ValueError(f"has no layer there that rebuilds its weight by {self.function}")
        factors = list(built.factors)
        if [tuple(f.shape) for f in factors] != shapes:
            raise ValueError("has other ranks there")
        return factors

    def build(self, layer: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Module:
        """The layer that makes its weight of the factors."""
        keys = ("kind", "kernel_size", "groups", "stride", "padding", "dilation", "padding_mode", "output_padding")
        options = {key: getattr(layer, key) for key in (*keys, "flipped")}
        return Rebuilt(self.function, self._side(layer), weights, bias, options)

    def stage_shapes(self, layer: LayerSpec, ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
        """The factors, groups in front; with the sine the amplitude before them."""
        shapes = self._shapes(layer, wide(ranks))
        return [(layer.groups, *(int(n) for n in shape)) for shape in shapes]

    def _side(self, layer: LayerSpec) -> int:
        """The side that is doubled: the smaller one."""
        out, other, *_ = self.form.modes(layer)
        return 1 if out <= other else 2

    def _modes(self, layer: LayerSpec) -> list[int]:
        """The product's sizes."""
        modes = list(self.form.modes(layer))
        if self.function == "relu":
            modes[self._side(layer) - 1] *= 2
        return modes

    def _shapes(self, layer: LayerSpec, ranks: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        own = self.form.shapes(self._modes(layer), [ranks[name] for name in self.form.names])
        return own if self.function == "relu" else [(), *own]

    def _product_of(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        return weights if self.function == "relu" else weights[1:]

    def _solved(self, layer: LayerSpec, linear: list[Tensor], dense: Tensor, metric: Metric) -> list[Tensor]:
        """One group: every start descends, the best end counts; never worse than the linear factors."""
        side, shape = self._side(layer), dense.shape
        scale = float(metric.error(dense))
        if not scale > 0:
            scale = 1.0

        def error(weights: Sequence[Tensor], judge: Metric = metric) -> Tensor:
            difference = dense_weight(self.function, side, weights).reshape(shape) - dense.to(weights[-1])
            return judge.error(difference) / scale

        quick = Metric(*(None if m is None else m.float() for m in (metric.patch, metric.channel)))

        if self.function == "sin":
            largest = float(multiplied(linear).abs().max())
            starts = []
            for bend in _BENDS:
                amplitude = largest / bend if largest > 0 else 1.0
                first = [linear[0] / amplitude, *linear[1:]]
                starts.append([dense.new_full((1,), amplitude), *_balanced(first)])
        else:
            starts = [_balanced(self.form.doubled(linear, side))]
            starts.append(_balanced(self._latent(dense, starts[0], side, metric)))
        cost = dense.numel() * (math.prod(shape[2:]) if metric.patch is not None else 1)
        iterations = int(min(_ITERATIONS, max(5, _BUDGET / (4 * cost))))
        descend = partial(_descended, error=partial(error, judge=quick), iterations=iterations)
        best = min([*starts, *map(descend, starts)], key=lambda weights: float(error(weights)))
        return min([best, descend(best)], key=lambda weights: float(error(weights)))

    def _latent(self, dense: Tensor, start: list[Tensor], side: int, metric: Metric) -> list[Tensor]:
        """ReLU-NMD of the positive part above the negative one; columns of a matrix weighted by the data."""
        matrix = dense.flatten(2) if len(start) == 2 else dense.flatten(3)
        weights = None
        if len(start) == 2 and metric.patch is not None:
            spread = metric.patch.diagonal(dim1=-2, dim2=-1)[0].to(dense).clamp_min(0).sqrt()
            weights = spread.clamp_min(1e-3 * float(spread.max().clamp_min(1e-30)))
            matrix = matrix * weights
        x = torch.cat([matrix.clamp_min(0), (-matrix).clamp_min(0)], side)[0]
        factors = [f[0] for f in start]
        if weights is not None:
            factors[1] = factors[1] * (weights if side == 1 else weights.repeat(2))
        found = nmd.extrapolated(x, factors, self.form.step, lambda f: multiplied([t[None] for t in f])[0], _SWEEPS)
        solved = list(found.factors)
        if weights is not None:
            solved[1] = solved[1] / (weights if side == 1 else weights.repeat(2))
        return [f[None] for f in solved]


def _balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same product from factors of equal norms, which a descent along all of them likes."""
    norms = [float(torch.linalg.vector_norm(f)) for f in factors]
    if not all(n > 0 and math.isfinite(n) for n in norms):
        return list(factors)
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    return [f * (mean / n) for f, n in zip(factors, norms, strict=True)]


def _descended(start: list[Tensor], error: Callable[[Sequence[Tensor]], Tensor], iterations: int) -> list[Tensor]:
    """L-BFGS on all factors in float32; the best point that was met."""
    with torch.enable_grad():
        copies = (f.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format) for f in start)
        moving = [f.requires_grad_() for f in copies]
        method = torch.optim.LBFGS(
            moving, max_iter=iterations, tolerance_grad=1e-8, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )
        best, least = list(start), math.inf

        def closure() -> Tensor:
            nonlocal best, least
            method.zero_grad()
            loss = error(moving)
            loss.backward()
            value = float(loss.detach())
            if value < least:  # false for NaN
                best, least = [f.detach().to(s, copy=True) for f, s in zip(moving, start, strict=True)], value
            return loss

        method.step(closure)
    return best


def _product(values: Sequence[Any]) -> Any:
    total: Any = 1
    for value in values:
        total = total * value
    return total
