"""`Capsules`: `CapsuleLayer`, votes and routing. Its loss is taken at its output, since routing is not linear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.kinds.kind import Kind
from rankopt.layer_spec import Call, LayerSpec
from rankopt.nn.capsules import CapsuleLayer


class Capsules(Kind):
    """One group an input capsule: the weight is (in_caps, out_caps · d_out, d_in)."""

    name = "capsules"
    classes = (CapsuleLayer,)
    linear = False
    moments = True

    def unfit(self, module: nn.Module) -> str | None:
        """What is unusual about its votes."""
        if type(module) is not CapsuleLayer:
            return f"{type(module).__module__}.{type(module).__name__} is a subclass that may do something else"
        return super().unfit(module.votes)

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        """Capsules times their dimensions; what routing needs are facts."""
        m: Any = module
        facts = {"out_caps": m.out_caps, "d_out": m.d_out, "iterations": m.iterations, "types": m.types}
        return {
            "in_channels": m.in_caps * m.d_in,
            "out_channels": m.in_caps * m.out_caps * m.d_out,
            "groups": m.in_caps,
            "bias": False,
            "facts": tuple(facts.items()),
        }

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call | str:
        """With or without a mask, with any leading dimensions."""
        m: Any = module
        given = args[0] if args else kwargs.get("u")
        if not isinstance(given, Tensor):
            return "its input is not one tensor"
        batch = math.prod(given.shape[:-2])
        return Call(batch, (), (), macs=batch * m.in_caps * m.out_caps * m.d_out * (m.d_in + 2 * m.iterations - 1))

    def weight(self, layer: LayerSpec, module: nn.Module) -> Tensor:
        """Of the votes."""
        return module.get_parameter("votes.weight").flatten(1, 2)

    def state(self, layer: LayerSpec, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The inverse of `weight`."""
        return {"votes.weight": weight.unflatten(1, (layer.fact("out_caps"), layer.fact("d_out")))}

    def dense(self, layer: LayerSpec, call: Call) -> nn.Module:
        """The same sizes."""
        in_caps, facts = layer.groups, dict(layer.facts)
        d_in = layer.in_channels // in_caps
        return CapsuleLayer(in_caps, facts["out_caps"], facts["d_out"], d_in, facts["iterations"], facts["types"])

    def example(self, layer: LayerSpec, call: Call) -> tuple[Any, ...]:
        """Capsules of lengths below 1."""
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(call.batch, layer.groups, layer.in_channels // layer.groups, generator=generator)
        return (0.3 * u,)
