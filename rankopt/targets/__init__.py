"""The table of targets: name → `Target` class. A package adds one by the entry point ``rankopt.targets``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from rankopt.errors import InputError
from rankopt.targets.target import Target
from rankopt.yaml_file import closest, parse

# Loaded when they are asked for: reading a study file needs no runtime.
_OWN = {
    "torch": "torch_cpu:TorchCpu",
    "torch-compile": "torch_compile:TorchCompile",
    "cuda": "cuda:Cuda",
    "onnxruntime": "onnxruntime:OnnxRuntime",
    "openvino": "openvino:OpenVino",
    "ray-node": "ray_node:RayNode",
    "command": "command:Command",
    "replay": "replay:Replay",
}


@cache
def names() -> tuple[str, ...]:
    """All that are known, the project's own first."""
    return tuple(dict.fromkeys([*_OWN, *(e.name for e in entry_points(group="rankopt.targets"))]))


def target_class(name: str) -> type[Target]:
    """Look a target up; raises `InputError` that lists the known ones."""
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        return getattr(import_module(f"rankopt.targets.{module}"), attribute)
    for entry in entry_points(group="rankopt.targets"):
        if entry.name == name:
            return entry.load()
    raise InputError(f"target: {name!r} is not known{closest(name, names())}")


def make(name: str, options: Mapping[str, Any] | None = None, where: str = "") -> Target:
    """A target with these options; raises `InputError` that names the option that is wrong."""
    return parse(target_class(name), dict(options or {}), f"{where}target {name}: ")


def read(text: str) -> Target:
    """A target as it is written on the command line: ``torch`` or ``torch:threads=2,dtype=bfloat16``."""
    import yaml

    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, sign, value = part.partition("=")
        if not sign:
            raise InputError(f"target {text!r}: options are written NAME:KEY=VALUE,KEY=VALUE, got {part!r}")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"target {text!r}: {key.strip()} can't be read, got {value!r}") from None
    return make(name.strip(), options)
