"""Strict reading of YAML files: no duplicate or unknown keys, and every fault is one line that names the key."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rankopt.errors import StudyFileError

_MAX_BYTES = 4 * 2**20
_SHOWN = 60
M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """A model that takes values as they stand (no "3" for 3) and names the closest key for an unknown one."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(f"needs a mapping of {', '.join(cls.model_fields)}")
        for key in data:
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key!r}{closest(key, cls.model_fields)}")
        return data


def closest(given: object, known: Iterable[str]) -> str:
    """What to add to a message about an unknown name: the nearest known one, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(str(given), names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names) or 'none'}"


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; raises `StudyFileError` naming the file and the line."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise StudyFileError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, so it is not a {what}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyFileError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StudyFileError(f"{path}: not a text file") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise StudyFileError(f"{path}: not valid YAML{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise StudyFileError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise StudyFileError(f"{path}: needs the keys of a {what}, got {'nothing' if data is None else shown(data)}")
    return data


def parse(model: type[M], data: Any, label: str) -> M:
    """Validate; the first fault becomes one line, ``<label><key>: what is wrong, got <what was given>``."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise StudyFileError(f"{label}{key}{': ' if key else ''}{_text(first)}") from None


def shown(value: object) -> str:
    """A value as it is repeated in a message: its start, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _text(fault: Any) -> str:
    if fault["type"] == "missing":
        return "is needed"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":  # raised by one of our own checks, which say what they were given
        return message
    return f"{message[0].lower()}{message[1:]}, got {shown(fault['input'])}"


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing a key that stands twice (the later one would silently win)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} must be text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
