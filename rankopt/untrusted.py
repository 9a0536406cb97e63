"""Reading files that may come from somebody else: regular files only, of a bounded size, as strict JSON.

Everything here is checked before it is used: a link, a pipe, a file that is too large, text that is no JSON, a key that
stands twice, NaN, and nesting without end are one line of `ArtifactError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rankopt.errors import ArtifactError

LARGEST_JSON = 16 * 2**20
_CHUNK = 2**20


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file for reading; a symbolic link, a pipe or a device is refused and never followed or waited for.

    Raises `ArtifactError`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        reason = "is a symbolic link" if os.path.islink(path) else f"can't be read: {error.strerror}"
        raise ArtifactError(f"{path}: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ArtifactError(f"{path}: is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_bytes(path: Path, most: int = LARGEST_JSON) -> bytes:
    """The content of a regular file that is not larger than `most` bytes; raises `ArtifactError`."""
    with opened(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        content = file.read(size) if size <= most else b""
    if size > most:
        raise ArtifactError(f"{path}: is larger than {most >> 20} MiB, so it is not what rankopt wrote")
    return content


def read_text(path: Path, most: int = LARGEST_JSON) -> str:
    """As `read_bytes`, decoded from UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError:
        raise ArtifactError(f"{path}: is not a text file") from None


def read_json(path: Path, most: int = LARGEST_JSON) -> dict[str, Any]:
    """An object of strict JSON; raises `ArtifactError` naming the file."""
    return parse_json(read_text(path, most), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Strict JSON that holds an object: no key twice, no NaN or infinity. Raises `ArtifactError`."""
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ArtifactError(f"{where}: is nested too deeply") from None
    except ValueError as error:  # broken JSON, text that is no UTF-8, a number of thousands of digits
        raise ArtifactError(f"{where}: not valid JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{where}: needs an object, got {type(data).__name__}")
    return data


def size_and_digest(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 (hexadecimal) of a regular file; raises `ArtifactError`."""
    digest, size = hashlib.sha256(), 0
    with opened(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key[:80]!r} stands there twice")
        out[key] = value
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value that such a file holds")
