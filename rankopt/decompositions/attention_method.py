"""`AttentionMethod`: what all ways to write a self-attention layer have in common.

The layer's weight is one matrix (1, 4 · width + 1, channels + 1): queries, keys and values with their biases in the
last column, the output projection turned around, and its bias in the last row. A method says what it builds in terms of
sizes (`Shape`) and tokens; what it builds is the core, which `kinds.attention` makes callable as the layer was.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.attention_moments import Moments, moments_of, no_moments
from rankopt.attention_parts import Projections, Shape, shape_of, unpacked
from rankopt.attention_styles import STYLES
from rankopt.decompositions.decomposition import Decomposition, Factors, Ranks, wide
from rankopt.decompositions.metric import Metric
from rankopt.layer_spec import LayerSpec
from rankopt.nn.attention import Attention
from rankopt.nn.attention_calls import AttentionCall

_ANY = 2**20  # the bound of a rank that tokens bound, where the tokens are not known


class AttentionMethod(Decomposition):
    """A way to write a self-attention layer; its tensors are the core's parameters in order."""

    def why_not_of(self, shape: Shape, masking: str, tokens: int) -> str | None:
        """Why it does not fit a layer of these sizes, called with this masking on so many tokens, or None."""
        return None

    @abstractmethod
    def rank_names_of(self, shape: Shape) -> tuple[str, ...]:
        """The names of its ranks."""

    @abstractmethod
    def bounds_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """The largest useful value of every rank."""

    def fixed_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """Ranks that the tokens give."""
        return {}

    @abstractmethod
    def params_of(self, shape: Shape, ranks: Ranks) -> Any:
        """Parameters of the core; arrays of ranks give an array."""

    @abstractmethod
    def macs_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """Multiply-accumulates on one sample of so many tokens; arrays of ranks give an array."""

    @abstractmethod
    def core(self, shape: Shape, ranks: Mapping[str, int], **where: Any) -> nn.Module:
        """The module at these ranks, its values of no meaning; `where`: dtype and device."""

    @abstractmethod
    def prepare(self, shape: Shape, dense: Projections, moments: Moments) -> Factors:
        """What is prepared once for all ranks."""

    @abstractmethod
    def tensors_of(self, shape: Shape, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The core's parameters at these ranks, in the order of ``core(...).parameters()``."""

    def why_not(self, layer: LayerSpec) -> str | None:
        """Attention only; a layer that was not run is judged by its sizes."""
        if layer.kind != "attention":
            return "it is for self-attention"
        shape = shape_of(layer)
        if not layer.calls:
            return self.why_not_of(shape, "none", 0)
        reasons = (self.why_not_of(shape, call.note or "none", call.in_size[0]) for call in layer.calls)
        return next((reason for reason in reasons if reason), None)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """See `rank_names_of`."""
        return self.rank_names_of(shape_of(layer))

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """See `bounds_of`; by the shortest call."""
        tokens = min((call.in_size[0] for call in layer.calls), default=_ANY)
        return self.bounds_of(shape_of(layer), tokens)

    def params(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """See `params_of`."""
        return self.params_of(shape_of(layer), wide(ranks))

    def macs(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """See `macs_of`."""
        shape = shape_of(layer)
        total: Any = 0
        for call in layer.calls:
            total = total + call.batch * self.macs_of(shape, call.in_size[0], wide(ranks))
        return total

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """In the second moments of the data where calls of the layer were gathered."""
        shape = shape_of(layer)
        dense = unpacked(shape, weight)
        if metric.calls is None or not metric.calls.calls:
            return self.prepare(shape, dense, no_moments(shape))
        style = STYLES[layer.fact("style")]
        calls = [style.seen(metric.calls.module, call.args, call.kwargs) for call in metric.calls]
        return self.prepare(shape, dense, moments_of(dense, shape, calls))

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """See `tensors_of`."""
        return self.tensors_of(shape_of(layer), factors, ranks)

    def stage_shapes(self, layer: LayerSpec, ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Those of the core's parameters."""
        return [tuple(p.shape) for p in self.core(shape_of(layer), ranks, device="meta").parameters()]

    def build(self, layer: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Module:
        """See `build_at`; only where the tensors tell the ranks."""
        return self.build_at(layer, self.ranks_of(layer, weights), weights, bias)

    def build_at(
        self, layer: LayerSpec, ranks: Mapping[str, int], weights: Sequence[Tensor], bias: Tensor | None
    ) -> nn.Module:
        """The core; `SelfAttention.placed` makes it callable as the layer was."""
        core = self.core(shape_of(layer), ranks, dtype=weights[0].dtype, device=weights[0].device)
        return filled(core, weights)

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """The dense layer that computes the same, its heads filled up with zeros where they got smaller.

        Raises `NotImplementedError` where no attention does (`needs_recovery`).
        """
        shape = shape_of(layer)
        core = self.core(shape, self.ranks_of(layer, weights), device="meta")
        if not isinstance(core, Attention):
            raise NotImplementedError(f"{self.name} is no attention")
        values = dict(zip((name for name, _ in core.named_parameters()), weights, strict=True))
        inward = _matrix(core.inward, "inward.", values, shape.channels)
        outward = _matrix(core.outward, "outward.", values, shape.heads * core.size_v)
        sizes = [shape.heads * n for n in (core.size_qk, core.size_qk, core.size_v)]
        rows = []
        for part in inward.split(sizes):  # (heads · r, channels + 1), the bias last
            by_head = part.unflatten(0, (shape.heads, -1))
            rows.append(F.pad(by_head, (0, 0, 0, shape.size - by_head.shape[1])).flatten(0, 1))
        by_head = outward[:, :-1].unflatten(1, (shape.heads, -1))
        back = F.pad(by_head, (0, shape.size - by_head.shape[2])).flatten(1).transpose(0, 1)
        last = F.pad(outward[:, -1], (0, 1))
        return torch.cat([*rows, F.pad(back, (0, 1)), last[None]])[None]

    def weights_of(self, layer: LayerSpec, ranks: Mapping[str, int], built: nn.Module) -> list[Tensor]:
        """Parameters of the core."""
        core = built.core if isinstance(built, AttentionCall) else built
        found = list(core.parameters())
        if [tuple(p.shape) for p in found] != self.stage_shapes(layer, ranks):
            raise ValueError(f"{layer.name}: has other ranks than {dict(ranks)}")
        return [*found]


def _matrix(part: nn.Module, prefix: str, values: Mapping[str, Tensor], inputs: int) -> Tensor:
    """What an affine module computes as (outputs, inputs + 1), its constant last; with gradients to the values."""
    own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    like = next(iter(own.values()))
    corners = torch.cat([torch.eye(inputs, dtype=like.dtype, device=like.device), like.new_zeros(1, inputs)])
    found: Tensor = torch.func.functional_call(part, own, (corners,))
    constant = found[-1:]
    return torch.cat([found[:-1] - constant, constant]).transpose(0, 1)


def filled(core: nn.Module, weights: Sequence[Tensor]) -> nn.Module:
    """Copy weights into the parameters of a core, in order."""
    with torch.no_grad():
        for parameter, weight in zip(core.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return core
