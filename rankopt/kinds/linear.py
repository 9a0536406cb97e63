"""`Linear`: nn.Linear, and Conv1D of transformers, a linear layer that keeps its weight turned around."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from rankopt.kinds.kind import Kind, only_input
from rankopt.layer_spec import Call, LayerSpec


class Linear(Kind):
    """y = W x + b."""

    name = "linear"
    classes = (nn.Linear,)

    def matches(self, module: nn.Module) -> bool:
        """Also Conv1D of transformers."""
        return is_flipped(module) or super().matches(module)

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        """Inputs and outputs."""
        m: Any = module
        if is_flipped(module):
            inputs, outputs = m.weight.shape
            return {"in_channels": inputs, "out_channels": outputs, "bias": m.bias is not None, "flipped": True}
        return {"in_channels": m.in_features, "out_channels": m.out_features, "bias": m.bias is not None}

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call | str:
        """All dimensions but the last are the batch."""
        given = only_input(args, kwargs, output)
        return given if isinstance(given, str) else Call(math.prod(given.shape[:-1]), (), ())

    def dense(self, layer: LayerSpec, call: Call) -> nn.Module:
        """Always as nn.Linear."""
        return nn.Linear(layer.in_channels, layer.out_channels, bias=layer.bias)


def is_flipped(module: nn.Module) -> bool:
    """Whether this is Conv1D of transformers (GPT-2 and its kin): a linear layer whose weight is (in, out).

    By name, so that transformers is not imported where nobody uses it.
    """
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
