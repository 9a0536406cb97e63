"""`checked_program`: the text of a program of torch.export, in which everything is what an exported model needs.

- operators are PyTorch's own (``aten``), none that reads or writes files or skips its checks, and arithmetic on sizes;
- names are identifiers, because torch writes them into source that it executes;
- texts are single words, sizes are sums and products of numbers and symbols, because torch evaluates them;
- arguments and results are nested in tuples, lists and dicts only.

What only describes where the program came from is left out.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import torch

from rankopt.errors import ArtifactError

_LONGEST_SIZE, _MOST_POWERS = 4096, 4
_SYNTAX = (ast.Expression, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd, ast.operator, ast.Compare, ast.cmpop, ast.keyword)

NAME = re.compile(r"[A-Za-z0-9_.]{0,512}", re.ASCII)
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
_NEVER = frozenset({"from_file", "save", "load", "set_", "resize_"})
_PRIVATE = (  # the only ones whose names begin with an underscore; others skip checks of bounds
    "assert_scalar assert_tensor_metadata to_copy softmax log_softmax unsafe_view conj shape_as_tensor weight_norm "
    "adaptive_avg_pool2d adaptive_avg_pool3d native_batch_norm_legit_no_training scaled_dot_product_attention_math "
    "scaled_dot_product_flash_attention_for_cpu local_scalar_dense trilinear cdist_forward euclidean_dist safe_softmax "
    "masked_softmax pad_circular pad_enum addmm_activation fft_c2c fft_c2r fft_r2c linalg_det linalg_eigh linalg_svd "
    "linalg_solve_ex linalg_slogdet _and__ _or__ _xor__ _lshift__ _rshift__"
)
_KNOWN_PRIVATE = frozenset(f"_{name}" for name in _PRIVATE.split())
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_REFUSED = {"as_graph", "as_custom_obj", "as_operator", "custom_obj", "token", "as_string_to_argument"}


def device_of(entry: Any) -> Any:
    """The type of a device in a program, None where there is none."""
    return entry.get("type") if isinstance(entry, dict) else None


def checked_program(program: dict[str, Any], path: str) -> dict[str, Any]:
    """The program without what only describes where it came from, after every text in it was checked.

    Args:
        program: parsed JSON of ``models/model.json``; it is changed.
        path: of the archive, for messages.

    Raises:
        ArtifactError: says what is more than an exported model needs.
    """
    graph_module = program.get("graph_module")
    if not isinstance(graph_module, dict) or not isinstance(graph_module.get("graph"), dict):
        raise ArtifactError(f"{path}: the program holds no graph")
    program["guards_code"] = []
    graph_module["metadata"] = {}
    calls = graph_module.get("module_call_graph")
    if not isinstance(calls, list):
        raise ArtifactError(f"{path}: the program does not say how the model is called")
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
            if not isinstance(name, str) or not NAME.fullmatch(name) or name in _REFUSED:
                raise ArtifactError(f"{path}: the program uses {name[:80]!r}, which no exported model needs")
            named = name == "as_device" or (name == "device" and entry is not None)
            if named and device_of(entry) != "cpu":
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
    elif not NAME.fullmatch(text):
        raise ArtifactError(f"{path}: the program uses the name {text[:60]!r}, which is no name")


def _check_operator(text: str, path: str) -> None:
    if text in _ARITHMETIC:
        return
    found = _OPERATOR.fullmatch(text)
    public = found and (found[1] in _KNOWN_PRIVATE if found[1].startswith("_") else found[1] not in _NEVER)
    if found and public and torch._C._dispatch_has_kernel(f"aten::{_overload(*found.groups())}"):
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
