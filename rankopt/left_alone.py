"""`left_alone`: the modules of a model that can't be replaced, each with the reason, read off the modules alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from rankopt.layer_spec import KINDS, is_flipped, kind_of

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def left_alone(names: Mapping[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Module → why replacing it would break something that a forward hook can't see.

    Args:
        names: every module of the model with all the names it goes by.
    """
    reasons = _sharing(names)
    for module in names:
        if isinstance(module, nn.MultiheadAttention):
            for child in module.modules():
                reasons[child] = "nn.MultiheadAttention reads this layer's weight directly"
        if isinstance(module, torch.jit.ScriptModule):
            for child in module.modules():
                reasons[child] = "part of a TorchScript module, which can't be rewritten"
    for module in names:
        if module not in reasons and kind_of(module):
            reason = _unfit(module)
            if reason:
                reasons[module] = reason
    return reasons


def _sharing(names: Mapping[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Modules that hold a parameter which another module holds too."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in names:
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, key))
    reasons: dict[nn.Module, str] = {}
    for holders in owners.values():
        for module, key in holders:
            others = [f"{names[m][0]}.{k}" for m, k in holders if m is not module]
            if others:
                reasons[module] = f"shares its {key} with {', '.join(others)}"
    return reasons


def _unfit(module: nn.Module) -> str | None:
    """What is unusual about one linear or convolutional layer."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize); remove the parametrization first"
    if type(module) not in KINDS and not is_flipped(module):
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
