"""`traced`: a module as one program of torch.export with a free batch size, folded; what all exports start from."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.cost import count
from rankopt.errors import InputError, RankoptError
from rankopt.fold import folded
from rankopt.layers import plain_attention
from rankopt.nest import tensors, with_batch
from rankopt.targets.target import Subject
from rankopt.targets.torch_cpu import converted, first_line

Call = tuple[tuple[Any, ...], dict[str, Any]]
_TRACED_WITH = 2  # samples: with one, torch.export takes the size for a constant


@dataclass(frozen=True)
class Traced:
    """A module ready to be written in any format.

    Attributes:
        program: of torch.export, float32, folded, without example inputs and without paths of source files.
        module: what it was made from, in float32: what exports are compared with.
        call: the inputs that it was traced with.
        names: of the inputs, in order.
        batch: the only batch size that the program takes; None: any.
        fixed_because: why, where it takes only one.
        folds: how many layers of a kind were folded away.
        macs: of one call on the example input as it was given; None where they can't be counted.
    """

    program: Any
    module: nn.Module
    call: Call
    names: tuple[str, ...]
    batch: int | None = None
    fixed_because: str = ""
    folds: Mapping[str, int] = field(default_factory=dict)
    macs: int | None = None


class Plain(nn.Module):
    """A module whose outputs are tensors in tuples, lists and dicts: what a program can return without its classes.

    An output of a class of its own (a dataclass, a named tuple, an output of transformers) becomes a dict or a tuple;
    what is no tensor, such as a cache of keys and values, is left out.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

        @functools.wraps(module.forward)  # torch.export reads the names of arguments off the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return plain_output(module(*args, **kwargs))

        self.forward = forward


def plain_output(value: Any) -> Any:
    """Tensors in tuples, lists and dicts; None for what is neither."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        entries = {str(key): plain_output(entry) for key, entry in value.items()}
        return {key: entry for key, entry in entries.items() if entry is not None}
    if isinstance(value, list | tuple):
        found = [entry for entry in map(plain_output, value) if entry is not None]
        return found if isinstance(value, list) else tuple(found)
    return None


def traced(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, fold: bool = True) -> Traced:
    """Trace a module with a free batch size; where that fails, with the example's own.

    Raises:
        InputError: it can't be traced; the first line of what torch.export says.
    """
    subject = Subject(module, args, kwargs)
    model, first_args, first_kwargs = converted(subject, "float32", "contiguous")
    call = with_batch((first_args, first_kwargs), _TRACED_WITH)
    with torch.no_grad(), plain_attention():
        output = model(*first_args, **first_kwargs)
    if not tensors(plain_output(output)):
        raise InputError(f"export: {type(module).__name__} returns no tensor")
    if not _is_plain(output):
        model = Plain(model).eval()
    batch, why = None, ""
    try:
        program = _export(model, call, free=True)
    except Exception as error:
        call, why = (first_args, first_kwargs), first_line(error)
        batch = next((t.shape[0] for t in tensors(call) if t.dim()), 1)
        program = _export_or_say(model, call)
    graph: nn.Module = model
    folds: Mapping[str, int] = {}
    if fold:
        smaller, folds = folded(program.module())
        if folds:
            graph, program = smaller, _export(smaller, call, free=batch is None)
    macs = None
    with contextlib.suppress(RankoptError):  # an operation that no counter knows
        macs = count(graph, first_args, first_kwargs).macs
    return Traced(_anonymous(program), model, call, _names(module, call), batch, why, folds, macs)


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters report their steps, and warn of their own internals."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def culprit(module: nn.Module, call: Call, fault: Callable[[nn.Module, Call], str | None]) -> tuple[str, str] | None:
    """The innermost module that has a fault of its own: its name and what is wrong with it.

    Args:
        module: has the fault as a whole.
        call: its inputs.
        fault: says what is wrong with a module on its inputs, or None.

    Returns:
        None where no module within it shows the fault alone.
    """
    inputs: dict[nn.Module, Call] = {}

    def record(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.setdefault(inner, (args, kwargs))

    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in module.modules()]
    try:
        with torch.no_grad(), plain_attention():
            module(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    found, name, looking = None, "", module
    while True:
        for child_name, child in _called(looking, inputs):
            text = fault(child, inputs[child])
            if text is not None:
                name = f"{name}.{child_name}" if name else child_name
                found, looking = (name, text), child
                break
        else:
            return found


def _called(module: nn.Module, inputs: Mapping[nn.Module, Call]) -> list[tuple[str, nn.Module]]:
    """The modules directly within one that were called; those of a list that is never called itself, too."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if child in inputs:
            found.append((name, child))
        else:
            found += [(f"{name}.{inner}", grandchild) for inner, grandchild in _called(child, inputs)]
    return found


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, Tensor)


def _export_or_say(model: nn.Module, call: Call) -> Any:
    try:
        return _export(model, call, free=False)
    except Exception as error:
        raise InputError(f"torch.export: {first_line(error)}") from error


def _export(model: nn.Module, call: Call, free: bool) -> Any:
    args, kwargs = call
    shapes: Any = None
    if free:
        collection = torch.export.ShapesCollection()
        given = tensors(call)
        size = given[0].shape[0] if given and given[0].dim() else None
        dimension = torch.export.Dim("batch", min=1, max=2**16)
        for tensor in given:
            if tensor.dim() and tensor.shape[0] == size:
                collection[tensor] = {0: dimension}
        shapes = collection.dynamic_shapes(model, args, kwargs)
    with quiet(), torch.no_grad(), plain_attention():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _anonymous(program: Any) -> Any:
    """Without example inputs, which would be pickled, and without the paths of source files."""
    program.example_inputs = None
    for graph in (m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in graph.nodes:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn", "custom"):
                node.meta.pop(key, None)
    return program


def _names(module: nn.Module, call: Call) -> tuple[str, ...]:
    """Names for the input tensors: those of the parameters of `forward`, numbered where one holds several."""
    args, kwargs = call
    known = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind < p.VAR_POSITIONAL]
    pairs = [(known[n] if n < len(known) else f"input_{n}", value) for n, value in enumerate(args)]
    names: list[str] = []
    for name, value in [*pairs, *kwargs.items()]:
        inner = tensors(value)
        names += [name] if len(inner) == 1 else [f"{name}_{n}" for n in range(len(inner))]
    return tuple(names)
