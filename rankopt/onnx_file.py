"""`exported`: modules as ONNX models, by torch.onnx. Many small ones are exported together, which saves much time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rankopt.errors import InputError
from rankopt.nest import tensors
from rankopt.targets.target import Subject
from rankopt.targets.torch_cpu import converted, first_line
from rankopt.traced import quiet

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
_TOGETHER_NUMBERS = 32 * 2**20  # parameters of what is exported in one go
_PRODUCTS = ("MatMul", "Gemm", "Mul", "Einsum")
_FEW = 16  # entries of a constant that may be multiplied once and for all
_LARGEST = 2**31 - 2**20  # what one ONNX file without side files can hold


def exported(subjects: Sequence[Subject]) -> list[bytes]:
    """Every subject as a serialized ONNX model, kept in `Subject.onnx`.

    Shapes are those of the subject's inputs; weights and floating inputs become float32. An argument that is no tensor
    is a constant of the model. The inputs' order is that of `arrays`.

    Raises:
        InputError: a package is missing, a module can't be exported, or is larger than 2 GiB.
    """
    waiting = [s for s in subjects if s.onnx is None]
    for group in _groups(waiting):
        calls = [converted(s, "float32", "contiguous") for s in group]
        models = _together(calls) if len(group) > 1 else None
        for subject, model in zip(group, models or map(_alone, calls), strict=True):
            if model.ByteSize() > _LARGEST:
                raise InputError("onnx: the model is larger than the 2 GiB that an ONNX file holds; measure with torch")
            subject.onnx = model.SerializeToString()
    return [s.onnx for s in subjects if s.onnx is not None]


def arrays(subject: Subject) -> list[Any]:
    """The input tensors as NumPy arrays, in the order of the exported model's inputs; floating ones as float32."""
    return [
        (t.float() if t.is_floating_point() else t).detach().cpu().contiguous().numpy()
        for t in tensors((subject.args, dict(subject.kwargs)))
    ]


def input_names(model: bytes) -> list[str]:
    """The names of a serialized model's inputs, in order."""
    import onnx

    return [entry.name for entry in onnx.load_model_from_string(model).graph.input]


def parsed(model: bytes) -> Any:
    """A serialized model as a protocol buffer; raises what the parser raises."""
    import onnx

    return onnx.load_model_from_string(model)


def graphs_of(model: Any) -> Iterator[Any]:
    """The graph of a model, the graphs within it (branches, loops), and its functions."""
    waiting = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else []
                waiting += list(attribute.graphs)


def simplified(program: Any) -> Any:
    """The model of an ONNX program that was exported with ``optimize=False``, simplified as torch does it by itself,
    except that products of weights stay products.

    Who stores factors of a weight in place of it would else find the weight in the file, wherever it is small.
    """
    from onnxscript.optimizer import optimize_ir

    optimize_ir(program.model, should_fold=lambda node: False if _multiplies(node) else None)
    return program.model_proto


def _multiplies(node: Any) -> bool:
    """Whether at least two of the constants that a product is of are more than a few numbers."""
    constants = [value.const_value for value in node.inputs if value is not None]
    return node.op_type in _PRODUCTS and sum(c is not None and c.size > _FEW for c in constants) > 1


def _groups(subjects: Sequence[Subject]) -> Iterator[list[Subject]]:
    """Runs of subjects that share one and the same input, up to a total size."""
    group: list[Subject] = []
    held = 0
    for subject in subjects:
        size = sum(p.numel() for p in subject.module.parameters())
        alike = bool(group) and subject.args is group[0].args and not (subject.kwargs or group[0].kwargs)
        if group and not (alike and held + size <= _TOGETHER_NUMBERS):
            yield group
            group, held = [], 0
        group.append(subject)
        held += size
    if group:
        yield group


class _Side(nn.Module):
    """All modules on one input."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.all = nn.ModuleList(modules)

    def forward(self, *args: Any) -> tuple[Any, ...]:
        return tuple(module(*args) for module in self.all)


def _together(calls: Sequence[Call]) -> list[Any] | None:
    """One export, cut into its branches; None where that does not work (an output that is no single tensor)."""
    from onnx.utils import Extractor

    names = [f"out_{n}" for n in range(len(calls))]
    try:
        model = _export(_Side([module for module, _, _ in calls]).eval(), calls[0][1], {}, names)
        if [o.name for o in model.graph.output] != names:
            return None
        inputs = [i.name for i in model.graph.input]
        extractor = Extractor(model)
        return [extractor.extract_model(inputs, [name]) for name in names]
    except InputError:
        raise
    except Exception:  # each on its own then, and what is wrong with one is said of that one
        return None


def _alone(call: Call) -> Any:
    try:
        return _export(*call, None)
    except InputError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter's own text is a page of advice
            cause = cause.__cause__
        raise InputError(f"onnx: {type(call[0]).__name__} can't be exported: {first_line(cause)}") from error


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str] | None) -> Any:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("onnx: needs the packages onnx and onnxscript; pip install 'rankopt[onnx]'") from None
    with quiet(), torch.no_grad():
        if args and not kwargs and isinstance(args[-1], dict):
            args = (*args, {})  # a dict at the end would be taken for the keyword arguments
        program = torch.onnx.export(module, args, kwargs=kwargs or None, dynamo=True, output_names=names, verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return program.model_proto
