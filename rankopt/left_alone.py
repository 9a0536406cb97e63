"""`left_alone`: the modules of a model that can't be replaced, each with the reason, read off the modules alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from rankopt.kinds import kind_of
from rankopt.kinds.embedding import tied_heads


def left_alone(names: Mapping[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Module → why replacing it would break something that a forward hook can't see.

    Args:
        names: every module of the model with all the names it goes by.
    """
    reasons = _sharing(names)
    for table, heads in tied_heads(names).items():
        if any(kind.unfit(head) for head in heads if (kind := kind_of(head))):
            continue
        del reasons[table]
        for head in heads:
            reasons[head] = f"shares its weight with {names[table][0]}.weight, by whose choice it is replaced too"
    for module in names:
        if isinstance(module, nn.MultiheadAttention):
            for child in list(module.modules())[1:]:
                reasons[child] = "nn.MultiheadAttention reads this layer's weight directly"
        if isinstance(module, torch.jit.ScriptModule):
            for child in module.modules():
                reasons[child] = "part of a TorchScript module, which can't be rewritten"
    for module in names:
        kind = kind_of(module)
        if module not in reasons and kind:
            reason = kind.unfit(module)
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
