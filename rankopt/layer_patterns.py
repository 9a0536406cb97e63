"""Patterns that name layers in a search space: ``layer1.*.conv?``, ``kind:pointwise``, ``re:layer[34].*``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from rankopt.errors import StudyFileError
from rankopt.yaml_file import closest

if TYPE_CHECKING:
    from rankopt.layer_spec import LayerSpec

_PLAIN_KINDS = (
    *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"),
    *("embedding", "attention", "capsules"),
)
_KINDS: dict[str, Callable[[LayerSpec], bool]] = {
    "conv": lambda layer: layer.dims > 0,
    "pointwise": lambda layer: layer.dims > 0 and set(layer.kernel_size) == {1},
    "depthwise": lambda layer: layer.depthwise,
    "grouped": lambda layer: layer.groups > 1,
    "tied": lambda layer: bool(layer.tied),
}


def _pattern(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"a pattern is a text, got {value!r}")
    kinds = (*_PLAIN_KINDS, *_KINDS)
    if value.startswith("kind:") and value[5:] not in kinds:
        raise ValueError(f"unknown kind {value[5:]!r}{closest(value[5:], kinds)}")
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from None
    return value


Pattern = Annotated[str, BeforeValidator(_pattern)]
Patterns = Annotated[list[Pattern], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1)]


def fits(pattern: str, layer: LayerSpec) -> bool:
    """Whether the layer, under any of its names, is one that the pattern means."""
    if pattern.startswith("kind:"):
        kind = pattern[5:]
        return layer.kind == kind or (kind in _KINDS and _KINDS[kind](layer))
    names = (layer.name, *layer.aliases)
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in names)
    return any(fnmatchcase(name, pattern) for name in names)


def matching(pattern: str, layers: Sequence[LayerSpec], where: str) -> list[LayerSpec]:
    """The layers that fit; none raises `StudyFileError`, except for kinds: a space may speak of kinds a model lacks."""
    found = [layer for layer in layers if fits(pattern, layer)]
    if not found and not pattern.startswith("kind:"):
        raise StudyFileError(
            f"{where}: {pattern!r} matches no layer{closest(pattern, [layer.name for layer in layers])}"
        )
    return found
