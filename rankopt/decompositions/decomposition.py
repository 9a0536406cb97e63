"""The one seam for methods: `Decomposition`, a way to write a layer by smaller tensors, at ranks that are chosen.

A method says how to prepare a weight once (`factorize`), how to get the tensors of its module for given ranks
(`stage_weights`), which dense weight they stand for (`reconstruct`), and what it builds of them at which cost. Most
methods build a chain of plain layers and say only what it looks like: see `chained.ChainDecomposition`.

Dense weights come with the groups in front: (groups, out/groups, in/groups, *kernel); see `LayerSpec.group_shape`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.decompositions.metric import Metric
from rankopt.errors import LayerError
from rankopt.layer_spec import LayerSpec

# Whole numbers, or integer arrays when many ranks are costed at once.
Rank = Any
Ranks = Mapping[str, Rank]
Factors = Mapping[str, Tensor]

MATRICES = ("linear", "embedding")  # kinds without spatial dimensions whose weight is one matrix


class Decomposition(ABC):
    """A way to write a layer by smaller tensors. Instances hold no state.

    Attributes:
        name: the name used in plans and search spaces.
        sliceable: whether one factorization serves every rank. If not, `stage_weights` solves anew for each.
        exact: whether full rank gives back the original weight.
        linear: whether the module stays linear when it is trained, so that it always has a dense product.
        needs_recovery: whether it equals the layer at no rank: its tensors are trained on what the layer does
            (`distil`), its loss is that of the outputs, and the prediction from weights does not apply.
        saves: the costs that shares of a layer are of: macs, params, or both (each gives candidates). Where a layer
            takes no MACs it is params.
        twin: the method that has the same factors and tensors ("": none), so that they are computed once.
        pointwise: the method that this one is, or comes closest to, on layers without a kernel.
    """

    name: str
    sliceable: bool = True
    exact: bool = True
    linear: bool = True
    needs_recovery: bool = False
    saves: tuple[str, ...] = ("macs",)
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

    def counted(self, layer: LayerSpec) -> tuple[str, ...]:
        """Those of its ranks that are counts of something, such as iterations, which no spectrum orders: candidates are
        made for each of their values."""
        return ()

    @abstractmethod
    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """Prepare a weight (groups, out, in, *kernel) in float32 or float64 once, for all ranks."""

    @abstractmethod
    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The tensors of the module at these ranks, bias apart. May raise `RefusedDecomposition`."""

    @abstractmethod
    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """The dense weight (groups, out, in, *kernel) that the tensors stand for."""

    @abstractmethod
    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Share of the weight's energy (in the metric) that these ranks lose, by the spectra; arrays in, array out.

        It only has to order the ways to split one cost between several ranks.
        """

    @abstractmethod
    def params(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Weight and bias entries of the built module; arrays of ranks give an array."""

    @abstractmethod
    def macs(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Multiply-accumulates of the built module over all calls of the layer; arrays of ranks give an array."""

    @abstractmethod
    def stage_shapes(self, layer: LayerSpec, ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
        """The shape of every tensor that `stage_weights` gives."""

    @abstractmethod
    def build(self, layer: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Module:
        """The module that holds copies of these tensors."""

    def build_at(
        self, layer: LayerSpec, ranks: Mapping[str, int], weights: Sequence[Tensor], bias: Tensor | None
    ) -> nn.Module:
        """`build` for methods some of whose ranks leave no trace in the tensors: iterations, landmarks."""
        return self.build(layer, weights, bias)

    def offered(
        self, layer: LayerSpec, keeps: Sequence[float], multiple: int, quantity: str
    ) -> list[dict[str, int]] | None:
        """The ranks that a search is offered, where that is not for every share those that lose least (None).

        Args:
            layer: the layer.
            keeps: shares of the dense layer's cost.
            multiple: ranks are multiples of this.
            quantity: the cost that shares are of, macs or params.
        """
        return None

    @abstractmethod
    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """Read the ranks off stage weights."""

    @abstractmethod
    def weights_of(self, layer: LayerSpec, ranks: Mapping[str, int], built: nn.Module) -> list[Tensor]:
        """The tensors out of a built module: views of its parameters, with gradients. Raises `ValueError` where it was
        not built by this method at these ranks: what the model has instead, as "has other ranks there"."""

    def bias_of(self, built: nn.Module) -> Tensor | None:
        """The bias out of a built module."""
        bias = getattr(built, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def bent(self, built: nn.Module) -> str | None:
        """Why no dense weight computes what a built module computes as it is now; None where one does."""
        return None if self.linear else "it is not linear"

    def last(self, built: nn.Module) -> nn.Module | None:
        """The Linear or convolution within a built module whose output is the module's, so that it can be refitted in
        closed form; None where there is none."""
        return None

    def head(self, layer: LayerSpec, built: nn.Module, bias: Tensor | None) -> nn.Module:
        """The output head that shares the tensors of a built embedding; raises `LayerError` where there is no such."""
        raise LayerError(f"{layer.name}: {self.name} can't be shared with the output head {', '.join(layer.tied)}")

    def distil(
        self, layer: LayerSpec, ranks: Mapping[str, int], weights: Sequence[Tensor], dense: nn.Module, samples: Any
    ) -> list[Tensor]:
        """Train the tensors to do what the dense layer did (only where `needs_recovery`).

        Args:
            layer: the layer.
            ranks: of the tensors.
            weights: where it begins, from `stage_weights`.
            dense: the dense layer itself.
            samples: `block_samples.BlockSamples`, calls of it with outputs.
        """
        return list(weights)

    def polish(self, layer: LayerSpec, weights: Sequence[Tensor], weight: Tensor, metric: Metric) -> list[Tensor]:
        """The tensors improved so that the output error in the full input metric falls (or stays)."""
        return list(weights)

    def skeleton(self, layer: LayerSpec, ranks: Mapping[str, int], dtype: torch.dtype, device: Any) -> nn.Module:
        """The built module with weights not yet filled in (used to load saved weights without decomposing)."""
        weights = [torch.empty(s, dtype=dtype, device=device) for s in self.stage_shapes(layer, ranks)]
        bias = torch.empty(layer.out_channels, dtype=dtype, device=device) if layer.bias else None
        return self.build_at(layer, ranks, weights, bias)

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


def one_channel(layer: LayerSpec) -> str | None:
    """Why a method that splits channels does not fit: a group has a single one, or the weight is no matrix."""
    if layer.dims == 0 and layer.kind not in MATRICES:
        return f"a layer of kind {layer.kind} is more than one matrix"
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


def wide(ranks: Ranks) -> dict[str, Rank]:
    """Arrays as 64-bit integers, since products of layer sizes overflow 32."""
    return {name: rank.astype(np.int64) if isinstance(rank, np.ndarray) else int(rank) for name, rank in ranks.items()}
