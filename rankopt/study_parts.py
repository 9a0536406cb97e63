"""The parts of a study file: its sections, and how single values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rankopt.callables import check_spec
from rankopt.durations import seconds_of
from rankopt.errors import LimitError
from rankopt.limits import Limit, parse_limit
from rankopt.targets import names as target_names
from rankopt.yaml_file import Strict, closest, shown


def read_objective(value: Any) -> str:
    """The name of an objective."""
    name, _, label = str(value).partition("@")
    known = ("accuracy", "kl", "macs", "params", "latency", "latency_p95", "memory")
    if not isinstance(value, str) or name not in known or (label and not name.startswith("latency")):
        raise ValueError(f"an objective is one of {', '.join(known)} (or latency@TARGET), got {shown(value)}")
    return value


def one_of(names: Sequence[str]) -> Callable[[Any], str]:
    """A text that is one of these names."""

    def checked(value: Any) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, got {shown(value)}{closest(str(value), names)}")
        return value

    return checked


def read_targets(value: Any) -> list[dict[str, Any]]:
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


def short_for(key: str) -> BeforeValidator:
    """Let a plain text stand for ``{key: text}``."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def read_limit(value: Any) -> Limit:
    """A limit as text."""
    if not isinstance(value, str):
        raise LimitError(f"a limit is a text such as 'macs<=50%', got {value!r}")
    return parse_limit(value)


def read_metric(value: Any) -> str:
    """accuracy, kl, or a callable that is named."""
    return value if value in ("accuracy", "kl") else check_spec(value)


def read_name(value: Any) -> str:
    """A name that can be part of a file's."""
    if not isinstance(value, str) or not value.strip() or len(value) > 100 or set(value) & set('/\\:*?"<>|\n'):
        raise ValueError(f"a name is a short text without slashes, got {shown(value)}")
    return value


def read_texts(value: Any) -> Any:
    """A list of texts, or one of them."""
    return [value] if isinstance(value, str) else value


def read_seconds(value: Any) -> float | None:
    """A duration; None is none."""
    return None if value is None else seconds_of(value)


class CallSpec(Strict):
    """A callable and its keyword arguments."""

    call: Annotated[str, BeforeValidator(check_spec)]
    args: dict[str, Any] = Field(default_factory=dict)


class ModelSpec(CallSpec):
    """What makes the model, and a checkpoint of weights for it (a path beside the study file; None: as it is made)."""

    weights: str | None = Field(None, min_length=1)


class SplitSpec(Strict):
    """How much of a split is used (None: all), and the batch size for data that do not come in batches."""

    samples: int | None = Field(None, ge=1)
    batch: int = Field(128, ge=1)


class RefitSpec(Strict):
    """Whether a trial's layers are refitted in sequence, and on how many calibration samples (None: all)."""

    enabled: bool = True
    samples: int | None = Field(None, ge=1)


class OutputSpec(Strict):
    """What the model returns, and which dimension holds the classes; the default is read off an output."""

    kind: Literal["auto", "logits", "regression"] = "auto"
    class_dim: int | None = None
