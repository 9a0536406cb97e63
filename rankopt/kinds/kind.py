"""`Kind`: the seam for kinds of layers, all that is known of one besides its `LayerSpec`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.layer_spec import Call, LayerSpec, group_weight, ungroup_weight

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Kind(ABC):
    """One kind of layer. Instances hold no state.

    Attributes:
        name: what `LayerSpec.kind` says, and search spaces after ``kind:``.
        classes: the modules of this kind. A subclass of one is found too, and left alone.
        linear: whether its output, at `tap`, is its input times its weight, so that a change of the weight has a
            predictable loss. Where not, outputs are gathered in calibration, and what a candidate changes there counts.
        moments: whether, although not linear, it first multiplies its input (n, groups, in/groups) with its weight, so
            that the input's second moments tell where weights matter.
        tokens: whether its inputs are row numbers of the weight.
    """

    name: str
    classes: tuple[type[nn.Module], ...] = ()
    linear: bool = True
    moments: bool = False
    tokens: bool = False

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, self.classes)

    def unfit(self, module: nn.Module) -> str | None:
        """Why this module of the kind can't be replaced, read off the module alone; None where it can."""
        if torch.nn.utils.parametrize.is_parametrized(module):
            return "its weight is parametrized (torch.nn.utils.parametrize); remove the parametrization first"
        if type(module) not in self.classes and issubclass(type(module), self.classes):
            return f"{type(module).__module__}.{type(module).__name__} is a subclass that may do something else"
        weight = module._parameters.get("weight")
        if not isinstance(weight, nn.Parameter):
            return "its weight is computed by a hook (weight_norm, spectral_norm, pruning); make it permanent first"
        if type(weight) is not nn.Parameter:
            return f"its weight is a {type(weight).__name__}, not a plain tensor"
        if weight.layout != torch.strided:
            return "its weight is sparse"
        if weight.dtype not in _DTYPES:
            return f"its weight is {str(weight.dtype).removeprefix('torch.')}; only real floating point is decomposed"
        if weight.numel() == 0:
            return "its weight is empty"
        return None

    @abstractmethod
    def sizes(self, module: nn.Module) -> dict[str, Any]:
        """The fields of its `LayerSpec` that follow from the module: channels, bias, groups, facts …"""

    @abstractmethod
    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call | str:
        """One call as it is recorded, or why the layer must be left alone because of how it is called."""

    def weight(self, layer: LayerSpec, module: nn.Module) -> Tensor:
        """The weight as (groups, out/groups, in/groups, *kernel), a view where possible, with the module's gradient."""
        return group_weight(layer, module.get_parameter("weight"))

    def bias(self, module: nn.Module) -> Tensor | None:
        """The bias (out,) as `Decomposition.build` takes it."""
        bias = getattr(module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def state(self, layer: LayerSpec, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The entries of the module's state dict for such a weight and bias: the inverse of `weight` and `bias`."""
        own = {"weight": ungroup_weight(layer, weight)}
        return own if bias is None else own | {"bias": bias}

    def tap(self, module: nn.Module) -> nn.Module:
        """The module, itself or within, whose input and output statistics are taken of."""
        return module

    @abstractmethod
    def dense(self, layer: LayerSpec, call: Call) -> nn.Module:
        """A module of this kind and these sizes, its values of no meaning (for latency tables)."""

    def example(self, layer: LayerSpec, call: Call) -> tuple[Any, ...]:
        """Positional arguments like those of a recorded call, random (for latency tables)."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(call.batch, layer.in_channels, *call.in_size, generator=generator),)


def only_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | str:
    """The input of a layer that is called with nothing else, or why it must be left alone."""
    if len(args) + len(kwargs) > 1:
        return "it is called with more than its input (output_size), which a chain of layers can't take"
    given = args[0] if args else kwargs.get("input")
    if not isinstance(given, Tensor) or not isinstance(output, Tensor):
        return "its input or output is not one tensor"
    return given
