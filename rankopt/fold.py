"""`folded`: a graph of torch.export with fewer layers that computes the same: batch norms and pointwise pairs folded.

Which layer feeds which is only known in a graph, so this happens on the way to an export and never to the model itself.

- A batch norm behind a convolution that nothing else reads goes into the convolution's weight and bias.
- Two pointwise convolutions (or linear layers) in a row, nothing between them and no groups, become one where that
  costs no more multiply-accumulates. The last stage of one decomposed layer and the first of the next often are.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
_CONV = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default)
_SAME = (_ATEN.conv1d.padding, _ATEN.conv2d.padding, _ATEN.conv3d.padding)
_TRANSPOSED = (_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input)
_LINEAR = _ATEN.linear.default
_NORM = _ATEN.batch_norm.default


def folded(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, int]]:
    """Fold what can be folded.

    Args:
        module: from ``ExportedProgram.module()``; its graph is changed, its tensors are not.

    Returns:
        A module with the tensors that are still used, and how many of each kind were folded: ``{"batch norm": 19}``.
    """
    count: Counter[str] = Counter()
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            module.graph.erase_node(node)
        elif node.op == "call_function" and node.target is _NORM and _norm(module, node):
            count["batch norm"] += 1
    for node in list(module.graph.nodes):  # in order, so that a longer row folds step by step
        if node.op == "call_function" and node.target in (*_CONV, _LINEAR) and _pair(module, node):
            count["pointwise pair"] += 1
    for node in reversed(list(module.graph.nodes)):  # what the folded layers read
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.graph.lint()
    return fx.GraphModule(module, module.graph), dict(count)


def _norm(module: fx.GraphModule, norm: fx.Node) -> bool:
    """Put a batch norm into the convolution before it."""
    given = _arguments(norm)
    before = given["input"]
    if given["training"] or not _only_read_by(before, norm, (*_CONV, *_SAME, *_TRANSPOSED)):
        return False
    layer = _arguments(before)
    values = {key: _value(module, given[key]) for key in ("weight", "bias", "running_mean", "running_var")}
    weight, bias = _value(module, layer["weight"]), _value(module, layer["bias"])
    known = weight is not None and (layer["bias"] is None or bias is not None)
    if not known or values["running_mean"] is None or values["running_var"] is None:
        return False
    if any(values[key] is None and given[key] is not None for key in ("weight", "bias")):
        return False
    assert weight is not None
    scale = (values["running_var"].double() + given["eps"]).rsqrt()
    if values["weight"] is not None:
        scale = scale * values["weight"].double()
    shift = -values["running_mean"].double() * scale
    if values["bias"] is not None:
        shift = shift + values["bias"].double()
    if bias is not None:
        shift = shift + bias.double() * scale
    ones = (1,) * (weight.dim() - 2)
    if before.target in _TRANSPOSED:  # (in, out/groups, *kernel): inputs of a group see the scales of its outputs
        groups = layer["groups"]
        scales = scale.reshape(groups, 1, -1, *ones)
        changed = weight.double().reshape(groups, -1, *weight.shape[1:]) * scales
    else:
        changed = weight.double() * scale.reshape(-1, 1, *ones)
    _replace(module, before, changed.reshape(weight.shape).to(weight.dtype), shift.to(weight.dtype))
    norm.replace_all_uses_with(before)
    module.graph.erase_node(norm)
    return True


def _pair(module: fx.GraphModule, last: fx.Node) -> bool:
    """Put a pointwise layer into the pointwise layer behind it, where that costs no more."""
    first = _arguments(last)["input"]
    if not _only_read_by(first, last, (last.target,)):
        return False
    a, b = _arguments(first), _arguments(last)
    if last.target is not _LINEAR and not (_pointwise(module, a) and _pointwise(module, b)):
        return False
    inner, outer = _value(module, a["weight"]), _value(module, b["weight"])
    biases = [_value(module, layer["bias"]) for layer in (a, b)]
    if inner is None or outer is None or inner.dtype != outer.dtype:
        return False
    if any(value is None and layer["bias"] is not None for value, layer in zip(biases, (a, b), strict=True)):
        return False
    before, after = (1, 1) if last.target is _LINEAR else (_positions(first), _positions(last))
    (rank, inputs), outputs = inner.shape[:2], outer.shape[0]
    if before is None or after is None or outputs * inputs * after > rank * inputs * before + outputs * rank * after:
        return False
    left, right = outer.double().reshape(outputs, rank), inner.double().reshape(rank, inputs)
    shift = None if biases[1] is None else biases[1].double()
    if biases[0] is not None:
        moved = left @ biases[0].double()
        shift = moved if shift is None else shift + moved
    weight = (left @ right).reshape(outputs, inputs, *inner.shape[2:]).to(inner.dtype)
    names = _names(last)
    arguments = [_arguments(last)[name] for name in names]
    arguments[0] = a["input"]
    if last.target is not _LINEAR:
        at = names.index("stride")
        arguments[at] = [s * t for s, t in zip(_wide(a, inner), _wide(b, outer), strict=True)]
    last.args, last.kwargs = tuple(arguments), {}
    _replace(module, last, weight, None if shift is None else shift.to(inner.dtype))
    module.graph.erase_node(first)
    return True


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator by name, with its defaults."""
    target: Any = node.target
    schema = target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= dict(zip([argument.name for argument in schema], node.args, strict=False))
    return given | dict(node.kwargs)


def _names(node: fx.Node) -> list[str]:
    """The names of an operator's arguments, in order."""
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments]


def _only_read_by(node: Any, reader: fx.Node, targets: tuple[Any, ...]) -> bool:
    """Whether it is a call of one of these operators whose result only `reader` reads."""
    is_call = isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
    return is_call and list(node.users) == [reader]


def _pointwise(module: fx.GraphModule, layer: dict[str, Any]) -> bool:
    weight = _value(module, layer["weight"])
    plain = weight is not None and math.prod(weight.shape[2:]) == 1 and layer["groups"] == 1
    return plain and all(p == 0 for p in _listed(layer["padding"]))


def _positions(node: fx.Node) -> int | None:
    """Output positions of a sample; None where they are not fixed."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(n, int) for n in value.shape[2:]):
        return None
    return math.prod(value.shape[2:])


def _wide(layer: dict[str, Any], weight: Tensor) -> list[int]:
    """The stride with one entry a dimension."""
    stride = _listed(layer["stride"])
    return stride if len(stride) == weight.dim() - 2 else stride * (weight.dim() - 2)


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _value(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that a node stands for, when it is a parameter, a buffer or a constant."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found.detach() if isinstance(found, Tensor) else None


def _replace(module: fx.GraphModule, layer: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer a weight and a bias of its own; the old ones may belong to other layers too."""
    names = _names(layer)
    arguments = [_arguments(layer)[name] for name in names]
    number = sum(name.startswith("folded_") for name in module._parameters)
    for key, value in (("weight", weight), ("bias", bias)):
        if value is None:
            arguments[names.index(key)] = None
            continue
        name = f"folded_{number}_{key}"
        module.register_parameter(name, torch.nn.Parameter(value.contiguous(), requires_grad=False))
        with module.graph.inserting_before(layer):
            node = module.graph.get_attr(name)
            old = arguments[names.index(key)]
            node.meta = dict(old.meta) if isinstance(old, fx.Node) else {}
            arguments[names.index(key)] = node
    layer.args, layer.kwargs = tuple(arguments), {}
