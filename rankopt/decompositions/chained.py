"""`ChainDecomposition`: methods that turn a layer into a chain of smaller ones, each a plain layer.

Such a method says what the chain looks like at given ranks (`stages`). Parameters, MACs and the module follow from it.
On an embedding the first stage is looked up.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.decompositions.decomposition import Decomposition, Rank, Ranks, wide
from rankopt.decompositions.metric import Metric
from rankopt.layer_spec import LayerSpec
from rankopt.nn.chain import Chain
from rankopt.nn.folded import Folded
from rankopt.nn.turned import Turned

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


class ChainDecomposition(Decomposition):
    """A way to write a layer as a chain of smaller ones; `reconstruct` is linear in the last stage's weight."""

    @abstractmethod
    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """The chain at these ranks, which may be integer arrays."""

    def params(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Weight and bias entries of the built module; arrays of ranks give an array."""
        total: Any = layer.out_channels if layer.bias else 0
        for stage in self.stages(layer, wide(ranks)):
            kernel = math.prod(layer.kernel_size[d] for d in stage.over)
            total = total + layer.groups * stage.outputs * (1 if stage.depthwise else stage.inputs) * kernel
        return total

    def macs(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Multiply-accumulates of the built module over all calls of the layer; arrays of ranks give an array."""
        total: Any = 0
        stages = self.stages(layer, wide(ranks))
        for call in layer.calls:
            size = list(call.in_size)
            for stage in stages[1:] if call.macs == 0 else stages:  # rows of the first one are looked up
                before = math.prod(size)
                for d in stage.over:
                    size[d] = call.out_size[d]
                positions = before if layer.transposed and stage.over else math.prod(size)
                kernel = math.prod(layer.kernel_size[d] for d in stage.over)
                fan_in = 1 if stage.depthwise else stage.inputs
                total = total + call.batch * positions * kernel * layer.groups * stage.outputs * fan_in * stage.copies
        return total

    def build(self, layer: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Chain:
        """The chain as plain modules holding copies of these stage weights; the bias goes to the last."""
        ranks = self.ranks_of(layer, weights)
        stages = self.stages(layer, ranks)
        modules = [
            _module(layer, stage, weight, bias if n == len(stages) - 1 else None)
            for n, (stage, weight) in enumerate(zip(stages, weights, strict=True))
        ]
        if layer.kind == "embedding":
            modules[0] = _table(layer, weights[0])
        return Chain(*modules)

    def head(self, layer: LayerSpec, built: nn.Module, bias: Tensor | None) -> nn.Module:
        """The stages from the last to the first, turned around, with the same parameters."""
        *others, first = list(built)[::-1]  # type: ignore[call-overload]
        last = nn.Linear(1, 1, bias=bias is not None, device="meta")
        last.out_features, last.in_features = first.weight.shape
        last.weight = first.weight
        if bias is not None:
            last.bias = nn.Parameter(bias.detach().clone())
        return Chain(*(Turned(stage.weight) for stage in others), last)

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

    def weights_of(self, layer: LayerSpec, ranks: Mapping[str, int], built: nn.Module) -> list[Tensor]:
        """Of the chain's modules, in order."""
        shapes = self.stage_shapes(layer, ranks)
        if not isinstance(built, nn.Sequential) or len(built) != len(shapes):
            raise ValueError(f"has no chain of {len(shapes)} stages there")
        try:
            return [_stage_weight(module, shape) for module, shape in zip(built, shapes, strict=True)]
        except RuntimeError:
            raise ValueError("has other ranks there") from None

    def bias_of(self, built: nn.Module) -> Tensor | None:
        """That of the last stage."""
        return super().bias_of(built[-1])  # type: ignore[index]

    def last(self, built: nn.Module) -> nn.Module | None:
        """The last stage."""
        return built[-1]  # type: ignore[index]

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


def _table(layer: LayerSpec, weight: Tensor) -> nn.Module:
    """The first stage of an embedding: a table of rows."""
    table = nn.Embedding(1, 1, device="meta")
    table.num_embeddings, table.embedding_dim = layer.in_channels, weight.shape[1]
    table.padding_idx = dict(layer.facts).get("padding_idx")
    return _fill(table, weight[0].mT, None)


def _is_many(copies: Rank) -> bool:
    return isinstance(copies, int | np.integer) and bool(copies > 1)


def _fill(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    # Copies: stage weights are often views of cached factors, which training the module must not change.
    module.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    return module


def _stage_weight(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """A stage's weight out of the module that `build` made of it."""
    inner: Any = module.conv if isinstance(module, Folded) else module
    weight: Tensor = inner.weight
    if isinstance(inner, nn.Embedding):
        weight = weight.mT
    if weight.dim() > 2 and inner.transposed:
        weight = weight.reshape(inner.groups, -1, *weight.shape[1:]).transpose(1, 2)
    return weight.reshape(shape)
