"""`Manifest`: which files a saved model consists of, their sizes and hashes, and the exports among them.

``manifest.json`` (schema 2)::

    {"schema": 2,
     "weights": "0123456789abcdef",                      digest of the values, see layers.weights_digest
     "inputs": {"args": [...], "kwargs": {...}},         what the model was exported with, see fresh_inputs; or null
     "exports": {"onnx": {"files": ["model.onnx"], "opset": 20, ...}},
     "files": {"plan.json": {"bytes": 812, "sha256": "..."}, ...}}

The hashes find what was damaged, swapped or edited. They are no signature: whoever can write the directory can write
them too, so every reader checks what it reads as if there were no hashes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankopt.errors import ArtifactError
from rankopt.untrusted import opened, read_json, size_and_digest

MANIFEST = "manifest.json"
SCHEMA = 2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MOST_FILES = 64


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a saved model consists of.

    Attributes:
        weights: digest of the values.
        files: name → record, of all files but the manifest itself.
        exports: format → its files and what is stated of them.
        inputs: what the model was exported with, or None.
    """

    weights: str
    files: Mapping[str, FileRecord]
    exports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, folder: Path, weights: str, exports: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Manifest:
        """Of all files in a folder that was just written."""
        files = {path.name: FileRecord(*size_and_digest(path)) for path in sorted(folder.iterdir())}
        return cls(weights, files, exports, inputs)

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``."""
        data = {
            "schema": SCHEMA,
            "weights": self.weights,
            "inputs": self.inputs,
            "exports": self.exports,
            "files": {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in self.files.items()},
        }
        (folder / MANIFEST).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check it; raises `ArtifactError`."""
        path = folder / MANIFEST
        if not path.exists() and not path.is_symlink():
            raise ArtifactError(
                f"{path}: is missing, so this is no whole saved model of schema {SCHEMA}; "
                "write it again (rankopt export, or rankopt apply with its plan.json)"
            )
        data = read_json(path)
        if data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
            raise ArtifactError(f"{path}: schema must be {SCHEMA}, got {str(data.get('schema'))[:40]}")
        unknown = sorted(set(data) - {"schema", "weights", "inputs", "exports", "files"})
        if unknown:
            raise ArtifactError(f"{path}: unknown key {unknown[0][:80]!r}")
        weights, inputs = data.get("weights"), data.get("inputs")
        if not isinstance(weights, str) or len(weights) > 128:
            raise ArtifactError(f"{path}: weights must be a digest")
        if inputs is not None and not isinstance(inputs, dict):
            raise ArtifactError(f"{path}: inputs must be an object or null")
        files = _files(data.get("files"), path)
        return cls(weights, files, _exports(data.get("exports"), files, path), inputs)

    def check(self, folder: Path, name: str) -> Path:
        """The path of a file whose size and hash are as recorded; raises `ArtifactError` where they are not."""
        path = folder / name
        if name not in self.files:
            raise ArtifactError(f"{path}: is not listed in {MANIFEST}, so it does not belong to this saved model")
        with opened(path) as file:
            size = file.seek(0, 2)
        if size != self.files[name].bytes:
            raise ArtifactError(
                f"{path}: is damaged or swapped: it has {size} bytes, saved were {self.files[name].bytes}"
            )
        if size_and_digest(path)[1] != self.files[name].sha256:
            raise ArtifactError(f"{path}: is damaged or swapped: its SHA-256 is not the one that was recorded")
        return path


def _files(data: Any, path: Path) -> dict[str, FileRecord]:
    if not isinstance(data, dict) or not 0 < len(data) <= _MOST_FILES:
        raise ArtifactError(f"{path}: files must be an object of at most {_MOST_FILES} file names")
    for name, entry in data.items():
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise ArtifactError(f"{path}: files: {name[:80]!r} is no name of a file in this directory")
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise ArtifactError(f"{path}: files.{name} must hold bytes and sha256")
        size, digest = entry["bytes"], entry["sha256"]
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ArtifactError(f"{path}: files.{name}.bytes must be a whole number")
        if not isinstance(digest, str) or not _HEX.fullmatch(digest):
            raise ArtifactError(f"{path}: files.{name}.sha256 must be 64 hexadecimal digits")
    return {name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in data.items()}


def _exports(data: Any, files: Mapping[str, FileRecord], path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: exports must be an object")
    for name, entry in data.items():
        own = entry.get("files") if isinstance(entry, dict) else None
        if not isinstance(own, list) or not own or not all(isinstance(n, str) and n in files for n in own):
            raise ArtifactError(f"{path}: exports.{name[:40]} must name files that are listed under files")
    return dict(data)
