"""`LatencyStore`: measurements by key, under one set of conditions, in a file of JSON lines that survives a kill.

The first line is ``{"schema": 1, "conditions": {...}}``, every further one ``{"key": ..., "measurement": {...}}``;
where a key stands twice, the later line counts. Several processes may append to one file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from filelock import FileLock

from rankopt.errors import InputError
from rankopt.measurement import Measurement, conditions_digest, same_conditions

SCHEMA = 1


class LatencyStore:
    """Measurements by key.

    Args:
        path: the file, made when the first measurement is put (None: in memory only).
        conditions: under which all of them were measured.

    Raises:
        ConditionsError: the file holds measurements of other conditions; names what differs.
        InputError: the file is not such a table, or can't be read or written.
    """

    def __init__(self, path: Path | None, conditions: Mapping[str, str]) -> None:
        self.path, self.conditions = path, dict(conditions)
        self._found: dict[str, Measurement] = {}
        if path is not None and path.exists() and (table := _read(path)):
            begun, self._found = table
            same_conditions(begun, self.conditions, str(path))

    @classmethod
    def read(cls, path: str | Path) -> LatencyStore:
        """A recorded table with the conditions that it states, in memory: what is put there does not reach the file."""
        table = _read(Path(path))
        if table is None:
            raise InputError(f"{path}: line 1: needs schema and conditions, the file holds no whole line")
        store = cls(None, table[0])
        store._found = table[1]
        return store

    def get(self, key: str) -> Measurement | None:
        """What was measured, or None."""
        return self._found.get(key)

    def put(self, key: str, measurement: Measurement) -> None:
        """Keep a measurement; it is on disk when this returns.

        Raises:
            ConditionsError: it was measured under other conditions than the store's.
            InputError: the file can't be written.
        """
        if measurement.conditions:
            known = {k: v for k, v in measurement.conditions.items() if k in self.conditions}
            same_conditions(self.conditions, known, str(self.path or "latency store"))
        if self.path is not None:
            line = json.dumps({"key": key, "measurement": measurement.to_dict()}, ensure_ascii=False, allow_nan=False)
            try:
                self._append(self.path, f"{line}\n".encode())
            except OSError as error:
                raise InputError(f"{self.path}: can't be written: {error.strerror or error}") from None
        self._found[key] = measurement

    def keys(self) -> list[str]:
        """All keys, in the order in which they were first put."""
        return list(self._found)

    def _append(self, path: Path, line: bytes) -> None:
        """One write to the end of the file, after what a killed writer left there was removed.

        The lock keeps that removal from hitting a line that another process is writing.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")), closing(_Appended(path)) as file:
            end = file.whole()
            if end == 0:
                head = {"schema": SCHEMA, "conditions": self.conditions}
                line = f"{json.dumps(head, ensure_ascii=False)}\n".encode() + line
            file.append(end, line)


def default_path(conditions: Mapping[str, str]) -> Path:
    """The file for these conditions in the user's cache folder: $RANKOPT_CACHE, else $XDG_CACHE_HOME/rankopt."""
    root = os.environ.get("RANKOPT_CACHE")
    folder = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankopt"
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", conditions.get("target", "target"))
    return folder / "latency" / f"{name}-{conditions_digest(conditions)}.jsonl"


class _Appended:
    """A file that is only appended to."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def whole(self) -> int:
        """Where the last whole line ends; one that only lacks its line end gets it."""
        size = os.fstat(self._file).st_size
        start, tail = size, b""
        while start and b"\n" not in tail:
            start = max(0, start - 65536)
            tail = os.pread(self._file, size - start, start)
        rest = tail[tail.rfind(b"\n") + 1 :]
        if rest and _is_json(rest):
            os.write(self._file, b"\n")
            return size + 1
        return size - len(rest)

    def append(self, end: int, line: bytes) -> None:
        """Write `line` at `end`, whole or not at all."""
        if os.fstat(self._file).st_size != end:
            os.ftruncate(self._file, end)
        written = os.write(self._file, line)
        if written != len(line):
            os.ftruncate(self._file, end)
            raise OSError(f"only {written} of {len(line)} bytes could be written; is the disk full?")
        os.fsync(self._file)

    def close(self) -> None:
        """Close it."""
        os.close(self._file)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Measurement]] | None:
    """Conditions and measurements; None where not even the first line is whole. A torn last line is left out."""
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    if _is_json(rest):  # whole, but for the line end
        lines.append(rest)
    if not lines:
        return None
    head = _object(lines[0], f"{path}: line 1", ("schema", "conditions"))
    conditions = head["conditions"]
    if head["schema"] != SCHEMA:
        raise InputError(f"{path}: line 1: schema must be {SCHEMA}, got {str(head['schema'])[:40]!r}")
    if not isinstance(conditions, dict) or not all(isinstance(v, str) for v in conditions.values()):
        raise InputError(f"{path}: line 1: conditions must be an object of texts, got {str(conditions)[:80]}")
    found: dict[str, Measurement] = {}
    for number, line in enumerate(lines[1:], 2):
        entry = _object(line, f"{path}: line {number}", ("key", "measurement"))
        if not isinstance(entry["key"], str):
            raise InputError(f"{path}: line {number}: key must be text, got {str(entry['key'])[:40]!r}")
        found[entry["key"]] = Measurement.from_dict(entry["measurement"], conditions, f"{path}: line {number}")
    return conditions, found


def _object(line: bytes, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON") from None
    if not isinstance(value, dict) or set(value) != set(keys):
        raise InputError(f"{where}: needs an object of {' and '.join(keys)}, got {str(value)[:80]}")
    return value


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def store_of(cache: Path | bool | None, conditions: Mapping[str, str]) -> LatencyStore:
    """The store of these conditions in the folder `cache` (None: the user's cache folder; False: on no disk)."""
    path = default_path(conditions)
    return LatencyStore(None if cache is False else cache / path.name if isinstance(cache, Path) else path, conditions)
