"""The table of kinds of layers: name → `Kind`. A package adds one by the entry point ``rankopt.kinds``."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from torch import nn

from rankopt.kinds.capsules import Capsules
from rankopt.kinds.convolution import CONVOLUTIONS
from rankopt.kinds.embedding import Embedding
from rankopt.kinds.kind import Kind
from rankopt.kinds.linear import Linear
from rankopt.layer_spec import LayerSpec

_OWN: tuple[Kind, ...] = (Linear(), *CONVOLUTIONS, Embedding(), Capsules())


@cache
def table() -> dict[str, Kind]:
    """All kinds by name, the project's own first."""
    kinds = {kind.name: kind for kind in _OWN}
    for entry in entry_points(group="rankopt.kinds"):
        kinds.setdefault(entry.name, entry.load()())
    return kinds


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer (a subclass has its parent's), None when it is no layer that can be decomposed."""
    return next((kind for kind in table().values() if kind.matches(module)), None)


def kind_named(layer: LayerSpec) -> Kind:
    """The kind that a layer's spec names."""
    return table()[layer.kind]
