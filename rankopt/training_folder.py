"""Checkpoints of a training: a folder a step, with ``state.safetensors`` and ``state.json``; nothing is pickled.

A checkpoint appears complete or not at all, and the one before it goes only when it is there, so a process may be
killed at any time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankopt.errors import ArtifactError

TENSORS, FACTS = "state.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_KEPT = 2


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the checkpoint of a step; the last two are kept. Raises `ArtifactError` when that is not possible."""
    beside = folder / f".step-{step}-{uuid.uuid4().hex[:8]}"
    target = folder / f"step-{step:08d}"
    try:
        beside.mkdir(parents=True)
        stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(stored, beside / TENSORS)
        (beside / FACTS).write_text(json.dumps(dict(facts), allow_nan=False) + "\n", encoding="utf-8")
        for path in (beside / TENSORS, beside / FACTS, beside):
            _to_disk(path)
        if target.exists():  # the same step once more, after going back to an earlier one
            shutil.rmtree(target)
        os.rename(beside, target)
        _to_disk(folder)
        for _, old in _found(folder)[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: a checkpoint can't be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of the last checkpoint, or None where there is none yet.

    Raises:
        ArtifactError: it can't be read; names the file.
    """
    found = _found(folder)
    if not found:
        return None
    path = found[-1][1]
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        with safe_open(path / TENSORS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ArtifactError(f"{path}: is damaged: {first}; remove it to go on from the one before") from None
    if not isinstance(facts, dict):
        raise ArtifactError(f"{path / FACTS}: is damaged: needs an object; remove {path} to go on from the one before")
    return tensors, facts


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values in memory of their own."""
    return {name: torch.clone(value.detach()) for name, value in tensors.items()}


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of every complete checkpoint, in order."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in named)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
