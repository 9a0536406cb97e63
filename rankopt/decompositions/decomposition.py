"""The one seam for methods: `Decomposition`, and the `Stage`s from which its costs and its modules are derived.

Every method turns a layer into a chain of smaller linear maps, each a plain convolution or linear layer. A method says
what the chain looks like at given ranks (`stages`), how to prepare a weight once (`factorize`), how to get the weights
of the stages for given ranks (`stage_weights`), and which dense weight they stand for (`reconstruct`). Parameters,
MACs and the module follow from the stages.

Weights come with the groups in front: (groups, out/groups, in/groups, *kernel); see `LayerSpec.group_shape`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.decompositions.metric import Metric
from rankopt.errors import LayerError
from rankopt.layer_spec import LayerSpec
from rankopt.nn.chain import Chain
from rankopt.nn.folded import Folded

# Whole numbers, or integer arrays when many ranks are costed at once.
Rank = Any
Ranks = Mapping[str, Rank]
Factors = Mapping[str, Tensor]

# Relative to the mean of the normal matrix, in double precision.
_PULL = 1e-9


@dataclass(frozen=True)
class Stage:
    """One linear map of the chain, per group of the layer.

    Attributes:
        inputs, outputs: channels per group (per copy, where `copies` > 1).
        over: the spatial dimensions that this stage convolves; the others see a kernel of 1.
        depthwise: every input channel is convolved alone, giving outputs / inputs channels each.
        copies: how many blocks of channels share this stage's kernel (tensor ring).

    Its weight is (groups, outputs, inputs, *kernel over `over`), without the inputs when depthwise.
    """

    inputs: Rank
    outputs: Rank
    over: tuple[int, ...] = ()
    depthwise: bool = False
    copies: Rank = 1


class Decomposition(ABC):
    """A way to write a layer as a chain of smaller ones. Instances hold no state.

    Attributes:
        name: the name used in plans and search spaces.
        sliceable: whether one factorization serves every rank. If not, `stage_weights` solves anew for each.
        exact: whether full rank gives back the original weight.
        linear: whether the built module stays a linear layer when it is trained, so that `merged` can make one of it.
        saves: the cost that shares of a layer are of, "macs" or "params" (where MACs don't fall).
        twin: the method that has the same factors and stage weights ("": none), so that they are computed once.
        pointwise: the method that this one is, or comes closest to, on layers without a kernel.
    """

    name: str
    sliceable: bool = True
    exact: bool = True
    linear: bool = True
    saves: str = "macs"
    twin: str = ""
    pointwise: str = "svd"

    @abstractmethod
    def why_not(self, layer: LayerSpec) -> str | None:
        """Why this method does not fit the layer, or None when it does."""

    @abstractmethod
    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """The names of its ranks on this layer, in order."""

    @abstractmethod
    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """The largest useful value of every rank."""

    @abstractmethod
    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """The chain at these ranks, which may be integer arrays."""

    @abstractmethod
    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Prepare a weight (groups, out, in, *kernel) in float32 or float64 once, for all ranks."""

    @abstractmethod
    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The weights of the stages at these ranks. May raise `RefusedDecomposition`."""

    @abstractmethod
    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """The dense weight (groups, out, in, *kernel) that the stages stand for; linear in the last stage's weight."""

    @abstractmethod
    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Share of the weight's energy (in the metric) that these ranks lose, by the spectra; arrays in, array out.

        It only has to order the ways to split one cost between several ranks.
        """

    def check(self, layer: LayerSpec, ranks: Mapping[str, int]) -> None:
        """Raise `LayerError` unless the method fits the layer and the ranks are complete and within bounds."""
        reason = self.why_not(layer)
        if reason:
            raise LayerError(f"{layer.name}: {self.name} does not fit: {reason}")
        names = self.rank_names(layer)
        if set(ranks) != set(names):
            raise LayerError(f"{layer.name}: {self.name} needs the ranks {', '.join(names)}, got {dict(ranks)}")
        for name, bound in self.rank_bounds(layer).items():
            rank = ranks[name]
            whole = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
            if not whole or not 1 <= rank <= bound:
                raise LayerError(
                    f"{layer.name}: {self.name} needs a whole number 1 <= {name} <= {bound} ({layer.describe()}), "
                    f"got {rank!r}"
                )

    def params(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Weight and bias entries of the built module; arrays of ranks give an array."""
        total: Any = layer.out_channels if layer.bias else 0
        for stage in self.stages(layer, _wide(ranks)):
            kernel = math.prod(layer.kernel_size[d] for d in stage.over)
            total = total + layer.groups * stage.outputs * (1 if stage.depthwise else stage.inputs) * kernel
        return total

    def macs(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Multiply-accumulates of the built module over all calls of the layer; arrays of ranks give an array."""
        total: Any = 0
        stages = self.stages(layer, _wide(ranks))
        for call in layer.calls:
            size = list(call.in_size)
            for stage in stages:
                before = math.prod(size)
                for d in stage.over:
                    size[d] = call.out_size[d]
                positions = before if layer.transposed and stage.over else math.prod(size)
                kernel = math.prod(layer.kernel_size[d] for d in stage.over)
                fan_in = 1 if stage.depthwise else stage.inputs
                total = total + call.batch * positions * kernel * layer.groups * stage.outputs * fan_in * stage.copies
        return total

    def build(self, layer: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Sequential:
        """The chain as plain modules holding copies of these stage weights; the bias goes to the last."""
        ranks = self.ranks_of(layer, weights)
        stages = self.stages(layer, ranks)
        modules = [
            _module(layer, stage, weight, bias if n == len(stages) - 1 else None)
            for n, (stage, weight) in enumerate(zip(stages, weights, strict=True))
        ]
        return Chain(*modules)

    @abstractmethod
    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """Read the ranks off stage weights."""

    def polish(self, layer: LayerSpec, weights: Sequence[Tensor], weight: Tensor, metric: Metric) -> list[Tensor]:
        """Solve the last stage again in closed form so that the output error in the full input metric is smallest.

        The dense weight is L·R with the last stage's weight L as (out × q) and the others folded into R (q × patch), so
        min over L of trace((W − LR) P (W − LR)ᵀ) is linear least squares. A tiny pull towards the present L keeps it
        well posed. A group whose error would not fall keeps its L, so `metric.error` never rises.

        Args:
            layer: the layer.
            weights: its stage weights, as from `stage_weights`.
            weight: the dense weight (groups, out, in, *kernel) to come close to.
            metric: the input's second moments; the gradient plays no part, since every output has its own row of L.

        Returns:
            The stage weights, of which only the last may have changed.
        """
        *others, last = (w.double() for w in weights)
        dense, (groups, _, *rest) = weight.double(), last.shape
        q = math.prod(rest)
        eye = torch.eye(q, dtype=last.dtype, device=last.device).expand(groups, q, q).reshape(groups, q, *rest)
        design = self.reconstruct(layer, [*others, eye])
        heavy = metric.weighted(design)
        gram = heavy @ design.flatten(2).mT
        pull = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)[:, None, None] * _PULL
        left = dense - self.reconstruct(layer, [*others, last])
        step = torch.linalg.solve(gram + pull * torch.eye(q).to(gram), heavy @ left.flatten(2).mT)
        solved = (last + step.mT.reshape(last.shape)).to(weights[-1].dtype)
        before = metric.output_moment(left).diagonal(dim1=-2, dim2=-1).sum(-1)
        rest_error = dense - self.reconstruct(layer, [*others, solved.double()])
        after = metric.output_moment(rest_error).diagonal(dim1=-2, dim2=-1).sum(-1)
        better = (after < before).reshape(groups, *(1,) * (last.dim() - 1))
        return [*weights[:-1], torch.where(better, solved, weights[-1])]

    def skeleton(self, layer: LayerSpec, ranks: Mapping[str, int], dtype: torch.dtype, device: Any) -> nn.Sequential:
        """The built module with weights not yet filled in (used to load saved weights without decomposing)."""
        weights = [torch.empty(s, dtype=dtype, device=device) for s in self.stage_shapes(layer, ranks)]
        bias = torch.empty(layer.out_channels, dtype=dtype, device=device) if layer.bias else None
        return self.build(layer, weights, bias)

    def stage_shapes(self, layer: LayerSpec, ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
        """The shape of every stage's weight."""
        return [
            (
                layer.groups,
                s.outputs,
                *(() if s.depthwise else (s.inputs,)),
                *(layer.kernel_size[d] for d in s.over),
            )
            for s in self.stages(layer, ranks)
        ]


def one_channel(layer: LayerSpec) -> str | None:
    """Why a method that splits channels does not fit, where a group has a single one."""
    _, o, i, *_ = layer.group_shape
    if o == 1 or i == 1:
        side = "input" if i == 1 else "output"
        return f"one {side} channel{' a group' if layer.groups > 1 else ''} leaves nothing to split"
    return None


def channels_and_kernel(layer: LayerSpec, instead: str = "svd") -> str | None:
    """Why a method that splits channels from a spatial kernel does not fit."""
    if layer.dims == 0 or math.prod(layer.kernel_size) == 1:
        return f"without a spatial kernel it is the same as {instead}"
    return one_channel(layer)


def spatial_modes(layer: LayerSpec) -> list[tuple[int, ...]]:
    """The spatial dimensions that are modes of their own: those with a kernel of more than 1.

    The others go with the first of them, for their stride and padding have to be somebody's.
    """
    flat = [d for d, k in enumerate(layer.kernel_size) if k == 1]
    modes = [(d,) for d, k in enumerate(layer.kernel_size) if k > 1]
    return [tuple(sorted((*modes[0], *flat))), *modes[1:]] if modes else []


def _wide(ranks: Ranks) -> dict[str, Rank]:
    """Arrays as 64-bit integers, since products of layer sizes overflow 32."""
    return {name: rank.astype(np.int64) if isinstance(rank, np.ndarray) else int(rank) for name, rank in ranks.items()}


def _module(layer: LayerSpec, stage: Stage, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A Conv, ConvTranspose or Linear that computes one stage."""
    if layer.dims == 0:
        linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
        linear.in_features, linear.out_features = stage.inputs, stage.outputs
        return _fill(linear, weight[0], bias)
    groups = layer.groups * (stage.inputs if stage.depthwise else 1)
    inputs, outputs = layer.groups * stage.inputs, layer.groups * stage.outputs
    kernel = [layer.kernel_size[d] if d in stage.over else 1 for d in range(layer.dims)]
    options: dict[str, Any] = {"kernel_size": kernel, "groups": groups, "bias": bias is not None, "device": "meta"}
    transposed = layer.transposed and bool(stage.over)
    if stage.over:
        for key, rest in (("stride", 1), ("dilation", 1), ("padding", 0), ("output_padding", 0)):
            given = getattr(layer, key)
            if key == "output_padding" and not transposed:
                continue
            options[key] = (
                given if isinstance(given, str) else [given[d] if d in stage.over else rest for d in range(layer.dims)]
            )
        options["padding_mode"] = layer.padding_mode
    names = ("ConvTranspose1d", "ConvTranspose2d") if transposed else ("Conv1d", "Conv2d", "Conv3d")
    conv = getattr(nn, names[layer.dims - 1])(inputs, outputs, **options)
    w = weight.reshape(groups, outputs // groups, 1, *weight.shape[2:]) if stage.depthwise else weight
    spread = w.reshape(*w.shape[:3], *kernel)
    spread = spread.transpose(1, 2) if transposed else spread
    conv = _fill(conv, spread.reshape(conv.weight.shape), bias)
    return Folded(conv, int(stage.copies), layer.groups) if _is_many(stage.copies) else conv


def _is_many(copies: Rank) -> bool:
    return isinstance(copies, int | np.integer) and bool(copies > 1)


def _fill(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    # Copies: stage weights are often views of cached factors, which training the module must not change.
    module.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    return module
