"""`Embedding`: nn.Embedding, a linear layer on one-hot rows that is looked up; alone or tied to an output head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankopt.kinds.kind import Kind, only_input
from rankopt.layer_spec import Call, LayerSpec


class Embedding(Kind):
    """`in_channels` is the number of rows, `out_channels` their width; a lookup takes no multiply-accumulates."""

    name = "embedding"
    classes = (nn.Embedding,)
    tokens = True

    def unfit(self, module: nn.Module) -> str | None:
        """Options under which a lookup is more than a lookup."""
        found = super().unfit(module)
        if found:
            return found
        m: Any = module
        if m.max_norm is not None:
            return "max_norm changes its rows when they are looked up, which rows of a product can't do"
        if m.sparse:
            return "sparse=True asks for sparse gradients, which the factors of a product don't have"
        if m.scale_grad_by_freq:
            return "scale_grad_by_freq=True scales gradients row by row, which rows of a product share"
        return None

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        """Rows and width; whether the row of padding is filled, as in pretrained models of transformers."""
        m: Any = module
        facts = () if m.padding_idx is None else (("padding_idx", int(m.padding_idx)),)
        sizes = {"in_channels": m.num_embeddings, "out_channels": m.embedding_dim, "bias": False, "flipped": True}
        filled = m.padding_idx is not None and not m.weight.is_meta and bool((m.weight[m.padding_idx] != 0).any())
        return sizes | {"facts": facts, "padding_filled": filled}

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call | str:
        """Every number is looked up alone."""
        given = only_input(args, kwargs, output)
        return given if isinstance(given, str) else Call(math.prod(given.shape), (), (), macs=0)

    def dense(self, layer: LayerSpec, call: Call) -> nn.Module:
        """The table, or for a call of the head that is tied to it, the head."""
        if call.macs is None:
            return nn.Linear(layer.out_channels, layer.in_channels, bias=False)
        return nn.Embedding(layer.in_channels, layer.out_channels, padding_idx=dict(layer.facts).get("padding_idx"))

    def example(self, layer: LayerSpec, call: Call) -> tuple[Any, ...]:
        """Row numbers, or what the head reads."""
        if call.macs is None:
            return (torch.randn(call.batch, layer.out_channels, generator=torch.Generator().manual_seed(0)),)
        return (torch.randint(layer.in_channels, (call.batch,), generator=torch.Generator().manual_seed(0)),)


def tied_heads(names: Mapping[nn.Module, list[str]]) -> dict[nn.Module, list[nn.Module]]:
    """Embedding → the linear layers that hold its weight turned around, where nobody else does.

    Args:
        names: every module of the model with all the names it goes by.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in names:
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, key))
    found: dict[nn.Module, list[nn.Module]] = {}
    for holders in owners.values():
        tables = [m for m, _ in holders if type(m) is nn.Embedding]
        heads: list[nn.Module] = [m for m, _ in holders if type(m) is nn.Linear]
        plain = len(tables) == 1 and heads and len(tables) + len(heads) == len(holders)
        if plain and all(key == "weight" for _, key in holders):
            found[tables[0]] = heads
    return found
