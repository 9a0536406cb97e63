"""`.pt2` files: `write_program`, and `load_program`, which runs nothing that the file says before it is checked.

``torch.export.load`` must not see a file of somebody else's: it unpickles (example inputs, odd tensors), evaluates the
texts of symbolic sizes, writes names into Python source that it executes, and calls whatever operator the file names.
So a file is taken apart here, every part is checked against what an exported model needs, and a new archive with the
checked parts alone, in memory, is what torch reads:

- records: the program, its weights and constants, stored as they are (not compressed, so no larger than the file);
- nothing pickled, no example inputs, no compiled code;
- operators: PyTorch's own (``aten``), none that reads or writes files, and arithmetic on sizes;
- names are identifiers, texts are words, sizes are sums and products of numbers and symbols;
- every tensor lies within its record, and no record is larger than it says.
"""

from __future__ import annotations

import ast
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
_LONGEST_SIZE, _MOST_POWERS = 4096, 4
_SYNTAX = (ast.Expression, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd, ast.operator, ast.Compare, ast.cmpop, ast.keyword)

_NAME = re.compile(r"[A-Za-z0-9_.]{0,512}", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9_,.\-> ]{0,64}", re.ASCII)  # of an argument: a mode, an equation of einsum
_VERSION = re.compile(r"[0-9A-Za-z.+<=\-]{1,64}", re.ASCII)
_SYMBOL = re.compile(r"[a-z]{1,8}[0-9]{1,9}", re.ASCII)
_SIZE_WORDS = (
    "Symbol Integer Rational Add Mul Pow Max Min Eq Ne Equality Unequality Ge Gt Le Lt GreaterThan StrictGreaterThan "
    "LessThan StrictLessThan And Or Not true false FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilDiv "
    "CeilToInt FloorToInt IntTrueDiv FloatTrueDiv TruncToInt RoundToInt ToFloat PowByNatural Identity"
)
_FUNCTIONS = frozenset(_SIZE_WORDS.split())
_PYTHON = "add sub mul floordiv truediv mod neg eq ne lt le gt ge and_ or_ not_ pow getitem"
_SYMBOLIC = "sym_max sym_min sym_not sym_float sym_int sym_ite"
_ARITHMETIC = {f"_operator.{n}" for n in _PYTHON.split()} | {f"torch.{n}" for n in _SYMBOLIC.split()}
_OPERATOR = re.compile(r"torch\.ops\.aten\.([a-z0-9_]+)\.([A-Za-z0-9_]+)", re.ASCII)
_ASSERT = "torch.ops.aten._assert_scalar.default"
_NEVER = frozenset({"from_file", "save", "load", "set_", "resize_", "_foobar"})
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_REFUSED = {"as_graph", "as_custom_obj", "as_operator", "custom_obj", "token", "as_string_to_argument"}


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
    program = _program(parse_json(read(_MODEL, _LARGEST_PROGRAM), f"{path}: {_MODEL}"), path)
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
        if not _NAME.fullmatch(name) or not isinstance(entry, dict):
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
    if not isinstance(meta, dict) or _device(meta.get("device")) != "cpu":
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


def _device(entry: Any) -> Any:
    return entry.get("type") if isinstance(entry, dict) else None


def _program(program: dict[str, Any], path: str) -> dict[str, Any]:
    """The program without what only describes where it came from; every text in it is checked."""
    graph_module = program.get("graph_module")
    if not isinstance(graph_module, dict) or not isinstance(graph_module.get("graph"), dict):
        raise ArtifactError(f"{path}: {_MODEL} holds no graph")
    program["guards_code"] = []
    graph_module["metadata"] = {}
    calls = graph_module.get("module_call_graph")
    if not isinstance(calls, list):
        raise ArtifactError(f"{path}: {_MODEL} does not say how the model is called")
    graph_module["module_call_graph"] = [c for c in calls if isinstance(c, dict) and c.get("fqn") == ""]
    _walk(program, "", path)
    return program


def _walk(value: Any, key: str, path: str) -> None:
    if isinstance(value, dict):
        if "target" in value and "metadata" in value:
            value["metadata"] = {}
            if value["target"] == _ASSERT:  # its text is a sentence
                value["inputs"] = [_without_text(entry) for entry in _list(value.get("inputs"), path)]
        for name, entry in value.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _REFUSED:
                raise ArtifactError(f"{path}: the program uses {name[:80]!r}, which no exported model needs")
            named = name == "as_device" or (name == "device" and entry is not None)
            if named and _device(entry) != "cpu":
                raise ArtifactError(f"{path}: the program asks for a device other than the CPU")
            _walk(entry, name, path)
    elif isinstance(value, list):
        for entry in value:
            _walk(entry, key, path)
    elif isinstance(value, str):
        _check_text(value, key, path)


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise ArtifactError(f"{path}: the program is damaged: needs a list, got {type(value).__name__}")
    return value


def _without_text(entry: Any) -> Any:
    argument = entry.get("arg") if isinstance(entry, dict) else None
    if isinstance(argument, dict) and "as_string" in argument:
        return {**entry, "arg": {"as_string": "assertion"}}
    return entry


def _check_text(text: str, key: str, path: str) -> None:
    """What a text may be depends on what it is for."""
    if key == "target":
        _check_operator(text, path)
    elif key == "expr_str":
        _check_size(text, path)
    elif key in ("in_spec", "out_spec"):
        _check_tree(text, path)
    elif key in ("as_string", "as_strings"):
        if not _WORD.fullmatch(text):
            raise ArtifactError(f"{path}: the program has the argument {text[:60]!r}, which is no mode of an operator")
    elif key in ("as_float", "as_floats"):
        if text not in ("Infinity", "-Infinity", "NaN"):
            raise ArtifactError(f"{path}: the program has the number {text[:60]!r}, which is none")
    elif key == "torch_version":
        if not _VERSION.fullmatch(text):
            raise ArtifactError(f"{path}: {text[:60]!r} is no version of torch")
    elif not _NAME.fullmatch(text):
        raise ArtifactError(f"{path}: the program uses the name {text[:60]!r}, which is no name")


def _check_operator(text: str, path: str) -> None:
    if text in _ARITHMETIC:
        return
    found = _OPERATOR.fullmatch(text)
    if found and found[1] not in _NEVER and torch._C._dispatch_has_kernel(f"aten::{_overload(*found.groups())}"):
        return
    raise ArtifactError(
        f"{path}: the program calls {text[:80]!r}, which is not among PyTorch's own operators on tensors"
    )


def _overload(name: str, overload: str) -> str:
    return name if overload == "default" else f"{name}.{overload}"


def _check_size(text: str, path: str) -> None:
    """An expression as sympy writes it: calls of known functions on symbols and whole numbers, and arithmetic."""
    try:
        tree = ast.parse(text, mode="eval") if len(text) <= _LONGEST_SIZE else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    nodes = list(ast.walk(tree)) if tree is not None else []
    powers = [node for node in nodes if _is_power(node)]
    if not nodes or len(powers) > _MOST_POWERS or not all(map(_harmless, nodes)):
        raise ArtifactError(f"{path}: the program has the size {text[:60]!r}, which is no sum or product of sizes")


def _is_power(node: ast.AST) -> bool:
    by_name = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "Pow" in node.func.id
    return by_name or isinstance(node, ast.Pow)


def _harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        number = type(node.value) is int and abs(node.value) < 2**63
        return (
            number or node.value in (True, False) or (type(node.value) is str and bool(_SYMBOL.fullmatch(node.value)))
        )
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Call):
        known = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        last = node.args[-1] if node.args else None
        return known and (not _is_power(node) or _small(last)) and all(isinstance(k.arg, str) for k in node.keywords)
    if isinstance(node, ast.BinOp):
        return not isinstance(node.op, ast.Pow) or _small(node.right)
    return isinstance(node, _SYNTAX)


def _small(node: ast.AST | None) -> bool:
    """A whole number that a size may be raised to."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Integer" and node.args:
        node = node.args[0]
    node = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value <= _MOST_POWERS


def _check_tree(text: str, path: str) -> None:
    """How arguments and results are nested: tuples, lists and dicts only."""
    try:
        version, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        version, tree = None, None
    waiting, seen = [tree], 0
    while waiting:
        node, seen = waiting.pop(), seen + 1
        proper = isinstance(node, dict) and isinstance(node.get("children_spec"), list)
        if version != 1 or not proper or node.get("type") not in _CONTAINERS or seen > 2**16:
            raise ArtifactError(f"{path}: the program takes or returns something else than tuples, lists and dicts")
        context = node.get("context")
        if context is not None and (
            not isinstance(context, str) or not re.fullmatch(r'[A-Za-z0-9_., "\[\]]*', context)
        ):
            raise ArtifactError(f"{path}: the program has the argument name {str(context)[:60]!r}, which is no name")
        waiting += node["children_spec"]
