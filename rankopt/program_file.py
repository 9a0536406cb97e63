"""`.pt2` files: `write_program`, and `load_program`, which runs nothing that the file says before it is checked.

``torch.export.load`` must not see a file of somebody else's: it unpickles (example inputs, odd tensors), evaluates the
texts of symbolic sizes, writes names into Python source that it executes, and calls whatever operator the file names.
So a file is taken apart here, every part is checked against what an exported model needs, and a new archive with the
checked parts alone, in memory, is what torch reads:

- records: the program, its weights and constants, stored as they are (not compressed, so no larger than the file);
- nothing pickled, no example inputs, no compiled code;
- what the program's own text may say is in `rankopt.program_text`;
- every tensor lies within its record, and no record is larger than it says.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankopt.errors import ArtifactError
from rankopt.program_text import NAME, checked_program, device_of
from rankopt.targets.torch_cpu import first_line
from rankopt.traced import quiet
from rankopt.untrusted import opened, parse_json

_MODEL, _SAMPLE = "models/model.json", "data/sample_inputs/model.pt"
_CONFIGS = {
    "weights": "data/weights/model_weights_config.json",
    "constants": "data/constants/model_constants_config.json",
}
_PLAIN = {  # record → what it holds; the others hold a number
    "archive_format": b"pt2",
    "archive_version": b"0",
    "byteorder": b"little",
    "version": None,
    ".data/version": None,
}
_RECORD = re.compile(r"data/(?:weights/weight|constants/tensor)_[0-9]{1,8}", re.ASCII)
_IGNORED = (".data/", ".format_version", ".storage_alignment")
_LARGEST_PROGRAM = 256 * 2**20
_MOST_RECORDS = 2**17


def write_program(program: Any, path: Path) -> None:
    """Write an ExportedProgram by ``torch.export.save``, and check that it can be loaded from there.

    Raises:
        ArtifactError: it holds what `load_program` refuses; says what.
    """
    with quiet():
        torch.export.save(program, path)
    checked_archive(path)


def load_program(path: Path) -> nn.Module:
    """The module of a program that was exported, with none of the code that it was made by.

    Raises:
        ArtifactError: the file is damaged, or asks for something that an exported model does not need.
    """
    archive = checked_archive(path)
    try:
        with quiet():
            return torch.export.load(archive).module().requires_grad_(False)
    except Exception as error:
        raise ArtifactError(
            f"{path}: is no program that this torch ({torch.__version__}) reads: {first_line(error)}"
        ) from None


def checked_archive(path: Path) -> io.BytesIO:
    """The checked parts of a ``.pt2`` file as a new archive in memory; raises `ArtifactError`."""
    out = io.BytesIO()
    with opened(path) as file:
        try:
            with zipfile.ZipFile(file) as given, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as made:
                for name, content in _parts(given, str(path)):
                    made.writestr(f"model/{name}", content)
        except (
            zipfile.BadZipFile,
            zipfile.LargeZipFile,
            EOFError,
            NotImplementedError,
            RuntimeError,
            OSError,
        ) as error:
            raise ArtifactError(f"{path}: is damaged: {first_line(error)}") from None
        except (ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{path}: is damaged: {first_line(error)}") from None
    out.seek(0)
    return out


def _parts(archive: zipfile.ZipFile, path: str) -> Iterator[tuple[str, bytes]]:
    """Name within the archive → content, checked."""
    records = _records(archive, path)

    def read(name: str, most: int | None = None) -> bytes:
        if name not in records:
            raise ArtifactError(f"{path}: lacks {name}; it was not written by this torch ({torch.__version__})")
        if most is not None and records[name].file_size > most:
            raise ArtifactError(f"{path}: {name} is larger than {most >> 20} MiB")
        return archive.read(records[name])

    for name, wanted in _PLAIN.items():
        if name in records:
            content = read(name, 2**20)
            if content.strip() != wanted and not (wanted is None and content.strip().isdigit() and len(content) < 9):
                raise ArtifactError(f"{path}: {name} is not what this torch writes ({torch.__version__})")
            yield name, content
    if records.get(_SAMPLE) is not None and records[_SAMPLE].file_size:
        raise ArtifactError(f"{path}: holds pickled example inputs, which are never read; export it with rankopt")
    yield _SAMPLE, b""
    program = checked_program(parse_json(read(_MODEL, _LARGEST_PROGRAM), f"{path}: {_MODEL}"), path)
    yield _MODEL, json.dumps(program).encode()
    for kind, config in _CONFIGS.items():
        given = parse_json(read(config, _LARGEST_PROGRAM), f"{path}: {config}")
        own = _payload(given, kind, records, path)
        yield config, json.dumps(given).encode()
        for record in own:
            yield record, read(record)
    extra = set(records) - {_MODEL, _SAMPLE, *_CONFIGS.values(), *_PLAIN}
    odd = next((name for name in sorted(extra) if not _RECORD.fullmatch(name) and not name.startswith(_IGNORED)), None)
    if odd is not None:
        raise ArtifactError(f"{path}: holds {odd[:120]!r}, which no exported model needs")


def _records(archive: zipfile.ZipFile, path: str) -> dict[str, zipfile.ZipInfo]:
    """Record name (below the archive's own folder) → entry."""
    entries = archive.infolist()
    if len(entries) > _MOST_RECORDS:
        raise ArtifactError(f"{path}: holds {len(entries)} records, more than any exported model")
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        folder, _, name = entry.filename.partition("/")
        if not name or folder in ("", ".", "..") or ".." in name.split("/") or name in found:
            raise ArtifactError(f"{path}: holds the record {entry.filename[:120]!r} twice, or outside of its folder")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise ArtifactError(f"{path}: {entry.filename[:120]!r} is compressed or encrypted, which torch never does")
        found[name] = entry
    return found


def _payload(config: dict[str, Any], kind: str, records: Mapping[str, zipfile.ZipInfo], path: str) -> list[str]:
    """The records of the weights or constants, each tensor checked to lie within its record."""
    entries = config.get("config")
    if set(config) != {"config"} or not isinstance(entries, dict):
        raise ArtifactError(f"{path}: the list of {kind} is damaged")
    names: dict[str, None] = {}
    for name, entry in entries.items():
        where = f"{path}: {kind} {name[:120]!r}"
        if not NAME.fullmatch(name) or not isinstance(entry, dict):
            raise ArtifactError(f"{where} has no proper name or description")
        if entry.get("use_pickle") is not False:
            raise ArtifactError(f"{where} is pickled, and nothing pickled is read")
        record = f"data/{kind}/{entry.get('path_name')}"
        if not _RECORD.fullmatch(record) or record not in records:
            raise ArtifactError(f"{where} is in a record that is missing or no tensor's")
        _check_meta(entry.get("tensor_meta"), records[record].file_size, where)
        names[record] = None
    return list(names)


def _check_meta(meta: Any, size: int, where: str) -> None:
    if not isinstance(meta, dict) or device_of(meta.get("device")) != "cpu":
        raise ArtifactError(f"{where} must be a tensor on the CPU")
    from torch._export.serde.serialize import deserialize_scalar_type

    try:
        dtype = deserialize_scalar_type(meta["dtype"])
        shape, strides = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))
        offset = int(meta["storage_offset"]["as_int"])
    except (KeyError, TypeError, ValueError, IndexError):
        raise ArtifactError(f"{where} has a size that is not fixed, or an unknown dtype") from None
    if len(shape) != len(strides) or len(shape) > 64 or any(not 0 <= n < 2**62 for n in (*shape, *strides, offset)):
        raise ArtifactError(f"{where} has an impossible shape")
    empty = math.prod(shape) == 0
    last = 0 if empty else offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    if last * dtype.itemsize > size or (empty and size == 0 and max(shape, default=0) > 2**31):
        raise ArtifactError(f"{where} of shape {str(shape)[:80]} does not fit into its {size} bytes")
