"""What single keys of a study file may hold: texts and short forms → values, or an error that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BeforeValidator

from rankopt.callables import check_spec
from rankopt.errors import LimitError
from rankopt.limits import Limit, parse_limit
from rankopt.targets import names as target_names
from rankopt.yaml_file import closest, shown


def objective(value: Any) -> str:
    """The name of what is minimized or maximized."""
    quantity, _, label = str(value).partition("@")
    known = ("accuracy", "kl", "macs", "params", "latency", "latency_p95", "memory")
    if not isinstance(value, str) or quantity not in known or (label and not quantity.startswith("latency")):
        raise ValueError(f"an objective is one of {', '.join(known)} (or latency@TARGET), got {shown(value)}")
    return value


def one_of(names: Sequence[str]) -> Callable[[Any], str]:
    """A text that is one of these names."""

    def checked(value: Any) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, got {shown(value)}{closest(str(value), names)}")
        return value

    return checked


def targets(value: Any) -> list[dict[str, Any]]:
    """A name, a mapping with a name and options, or a list of them; ``none`` is none at all."""
    listed = value if isinstance(value, list) else [] if value in (None, "none") else [value]
    out = []
    for one in listed:
        spec = {"name": one} if isinstance(one, str) else one
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise ValueError(f"a target is a name, or a mapping with name and its options, got {shown(one)}")
        if spec["name"] not in target_names():
            raise ValueError(f"{spec['name']!r} is not known{closest(spec['name'], target_names())}")
        out.append(dict(spec))
    return out


def short(key: str) -> BeforeValidator:
    """Let a plain text stand for ``{key: text}``."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def texts(value: Any) -> Any:
    """A list of texts, or one of them."""
    return [value] if isinstance(value, str) else value


def limit(value: Any) -> Limit:
    """A limit, out of its text."""
    if not isinstance(value, str):
        raise LimitError(f"a limit is a text such as 'macs<=50%', got {value!r}")
    return parse_limit(value)


def metric(value: Any) -> str:
    """accuracy, kl, or what names a callable."""
    return value if value in ("accuracy", "kl") else check_spec(value)


def name(value: Any) -> str:
    """A study's name, which is part of file names."""
    if not isinstance(value, str) or not value.strip() or len(value) > 100 or set(value) & set('/\\:*?"<>|\n'):
        raise ValueError(f"a name is a short text without slashes, got {shown(value)}")
    return value
