"""`find_layers`: which layers of a model can be decomposed, their shapes and costs, and why the others are left alone.

The model is run once with forward hooks; nothing is traced, so any Python control flow is fine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import DataError, RankoptError
from rankopt.kinds import kind_of
from rankopt.kinds.embedding import tied_heads
from rankopt.layer_spec import Call, LayerSpec, apart, group_weight, inside, ungroup_weight
from rankopt.left_alone import left_alone
from rankopt.plan import Fingerprint

__all__ = [
    "Call",
    "LayerSpec",
    "apart",
    "architecture_digest",
    "as_call",
    "call_model",
    "decomposable",
    "find_layers",
    "fingerprint",
    "group_weight",
    "inference",
    "inside",
    "kind_of",
    "module_names",
    "plain_attention",
    "run_once",
    "static_layers",
    "ungroup_weight",
    "weights_digest",
]

_NOT_CALLED = "its forward is not called on the example input (unused, or its parent reads the weight directly)"


def as_call(
    example_input: Any, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call of the model: a tuple is the positional arguments, None is none, all else is one."""
    args = example_input if isinstance(example_input, tuple) else () if example_input is None else (example_input,)
    return args, dict(example_kwargs or {})


@contextmanager
def plain_attention() -> Iterator[None]:
    """Inside, nn.TransformerEncoderLayer and nn.MultiheadAttention run their ordinary path, where hooks fire."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in eval mode and no gradients are recorded; each module's own mode comes back after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run_once(
    model: nn.Module,
    example_input: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    where: str = "example input",
) -> Any:
    """The output on the example input, in eval mode, without gradients and fused attention; the model stays as it was.

    Raises `DataError` when the model can't be run on it; `where` says what was given.
    """
    if not isinstance(model, nn.Module):
        raise DataError(f"model: needs a torch.nn.Module, got {type(model).__name__}")
    with inference(model), plain_attention():
        return call_model(model, *as_call(example_input, example_kwargs), where)


def call_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str) -> Any:
    """Call the model; what it raises becomes a `DataError` that says on which data."""
    try:
        return model(*args, **kwargs)
    except RankoptError:
        raise
    except Exception as error:
        raise DataError(
            f"{where}: {type(model).__name__} does not run on it: {type(error).__name__}: {_first_line(error)}"
        ) from error


def find_layers(
    model: nn.Module, example_input: Any, example_kwargs: Mapping[str, Any] | None = None
) -> list[LayerSpec]:
    """List every layer of `model` that is of a kind that is known (`rankopt.kinds`), in the order in which they run.

    Args:
        model: any module; it is run once, in eval mode and without gradients, and left as it was.
        example_input: a tensor, or the tuple of positional arguments; MACs are counted for exactly this input.
        example_kwargs: keyword arguments of the call.

    Returns:
        One `LayerSpec` a module (a shared module once, with its other names as aliases). `skip` holds the reason
        when the layer can't be replaced. A layer that consists of layers stands before them.

    Raises:
        DataError: when the model can't be run on the example input.
    """
    names = module_names(model)
    calls: dict[nn.Module, list[Call]] = {}
    seen: dict[nn.Module, str] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kind = kind_of(module)
        assert kind is not None
        call = kind.call(module, args, kwargs, output)
        if isinstance(call, str):
            seen[module] = call
        else:
            calls[module].append(call)

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.setdefault(module, [])

    handles = [m.register_forward_pre_hook(begin) for m in names if kind_of(m)]
    handles += [m.register_forward_hook(record, with_kwargs=True) for m in names if kind_of(m)]
    try:
        run_once(model, example_input, example_kwargs)
    finally:
        for handle in handles:
            handle.remove()
    reasons, heads = left_alone(names), tied_heads(names)
    for table, tied in heads.items():
        for module in (table, *tied):
            if module in seen or module not in calls:  # none can be replaced without the others
                reasons.setdefault(table, seen.get(module, _NOT_CALLED))
        calls.get(table, []).extend(call for head in tied for call in calls.get(head, ()))
    found = [*calls, *(m for m in names if kind_of(m) and m not in calls)]
    return [
        _spec(
            m,
            names,
            tuple(calls.get(m, ())),
            reasons.get(m) or seen.get(m) or (None if m in calls else _NOT_CALLED),
            i,
            heads.get(m, ()),
        )
        for i, m in enumerate(found)
    ]


def static_layers(model: nn.Module) -> list[LayerSpec]:
    """The layers in the order of ``named_modules``, without running the model.

    The same specs as from `find_layers`, but for `calls` (none, so `macs` is 0), the order, and the reasons that only
    a run can give: here a layer that is never called has no `skip`.
    """
    names = module_names(model)
    reasons, heads = left_alone(names), tied_heads(names)
    found = [m for m in names if kind_of(m)]
    return [_spec(m, names, (), reasons.get(m), i, heads.get(m, ())) for i, m in enumerate(found)]


def decomposable(layers: list[LayerSpec]) -> list[LayerSpec]:
    """Those that are not left alone."""
    return [layer for layer in layers if layer.skip is None]


def fingerprint(model: nn.Module, layers: list[LayerSpec] | None = None) -> Fingerprint:
    """Digests of the architecture and of all weights. `layers` may come from a run or not, in any order."""
    return Fingerprint(architecture_digest(model, layers), weights_digest(model))


def architecture_digest(model: nn.Module, layers: list[LayerSpec] | None = None) -> str:
    """Sixteen hexadecimal digits of the layers (names, shapes, strides …) and the state dict's names and shapes."""
    digest = hashlib.sha256()
    for layer in sorted(static_layers(model) if layers is None else layers, key=lambda spec: spec.name):
        options = (layer.stride, layer.padding, layer.dilation, layer.padding_mode, layer.output_padding, layer.bias)
        more = f" {layer.facts}" if layer.facts else ""
        digest.update(f"{layer.name} {layer.describe()} {options}{more}\n".encode())
    for name, tensor in _state(model).items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
    return digest.hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of all values in the state dict, whatever their device and memory format."""
    digest = hashlib.sha256()
    for name, tensor in _state(model).items():
        digest.update(name.encode())
        if tensor.device.type != "meta":
            dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
            flat = dense.cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:16]


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of the model with all its names, in the order of ``named_modules``; the first name counts."""
    if not isinstance(model, nn.Module):
        raise DataError(f"model: needs a torch.nn.Module, got {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict; raises `DataError` when a lazy module was not run yet."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, tensor in state.items():
        if torch.nn.parameter.is_lazy(tensor):
            raise DataError(f"model: {name} has no shape yet (a lazy module); run the model once first")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _spec(
    module: nn.Module,
    names: Mapping[nn.Module, list[str]],
    calls: tuple[Call, ...],
    skip: str | None,
    order: int,
    heads: Sequence[nn.Module],
) -> LayerSpec:
    kind = kind_of(module)
    assert kind is not None
    weight = getattr(module, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) else next(module.parameters()).dtype
    return LayerSpec(
        name=names[module][0],
        kind=kind.name,
        calls=calls,
        aliases=tuple(names[module][1:]),
        skip=skip,
        dtype=str(dtype).removeprefix("torch."),
        tied=tuple(names[head][0] for head in heads),
        order=order,
        **kind.sizes(module),
    )
