"""Exact costs: `plan_cost` of a plan without building it, `count` of a model by running it, `count_thop` as a check.

MACs are multiply-accumulates; a bias, an activation, a norm or a pooling costs none. The MACs of a model are those of
its linear and convolutional layers and those of its other products (attention, matmul), which a plan doesn't change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from rankopt.decompositions import method
from rankopt.errors import DataError, InputError, LayerError, UncountedOperationError
from rankopt.layers import LayerSpec, apart, as_call, plain_attention, run_once
from rankopt.operations import FORMULAS, Watch
from rankopt.plan import LayerChoice, Plan

COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)  # by `count_thop`


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one call on the example input, and parameters (a shared one once)."""

    macs: int
    params: int


def total_params(model: nn.Module) -> int:
    """Entries of all parameters, trainable or not, a shared one once; buffers are not counted."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise DataError(f"model: {name} has no shape yet (a lazy module); run the model once first")
    return sum(p.numel() for p in parameters.values())


def plan_params(model_params: int, layers: Iterable[LayerSpec], plan: Plan) -> int:
    """Parameters of the model that `plan` gives, from those of the dense model (`total_params`).

    Raises `LayerError` when the plan names an unknown layer or a rank is out of bounds.
    """
    saved = (
        layer.params - int(method(choice.method).params(layer, choice.ranks))
        for layer, choice in _changes(layers, plan)
    )
    return model_params - sum(saved)


def plan_macs(layers: Iterable[LayerSpec], plan: Plan, other_macs: int = 0) -> int:
    """MACs of the model that `plan` gives, on the input that `layers` was listed with.

    Args:
        layers: all layers, from `find_layers`.
        plan: choices; a layer that it doesn't name is dense.
        other_macs: MACs outside of the layers; see `other_macs`.

    Raises:
        LayerError: the plan names an unknown layer, a rank is out of bounds, or the layers were listed without a run.
    """
    layers = list(layers)
    total = other_macs + sum(layer.macs for layer in apart(layers))
    for layer, choice in _changes(layers, plan):
        if not layer.calls:
            raise LayerError(f"{layer.name}: its calls are not known; list the layers with find_layers(model, example)")
        total += int(method(choice.method).macs(layer, choice.ranks)) - layer.macs
    return total


def plan_cost(layers: Sequence[LayerSpec], plan: Plan, model_params: int, other_macs: int = 0) -> Cost:
    """Both costs of the model that `plan` gives; see `plan_macs` and `plan_params`."""
    return Cost(plan_macs(layers, plan, other_macs), plan_params(model_params, layers, plan))


def other_macs(counted: Cost, layers: Iterable[LayerSpec]) -> int:
    """MACs of a model outside of its layers: what `count` found less what the layers' shapes say.

    Raises `UncountedOperationError` when that is negative: then the counter missed a layer, or the inputs differ.
    """
    expected = sum(layer.macs for layer in apart(layers))
    if counted.macs < expected:
        raise UncountedOperationError(
            f"count: found {counted.macs:,} MACs where the layers alone need {expected:,}; "
            "was the same example input used for both?"
        )
    return counted.macs - expected


def count(
    model: nn.Module,
    example_input: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    allow: Iterable[str] = (),
) -> Cost:
    """Run the model once and count every multiply-accumulate of its products and convolutions.

    Attention is run by its plain formula, because the fused kernels hide theirs. Arithmetic outside of PyTorch's
    dispatcher (NumPy, an extension that calls its kernels itself) can't be seen.

    Args:
        model: run in eval mode without gradients, and left as it was.
        example_input: a tensor, or the tuple of positional arguments.
        example_kwargs: keyword arguments of the call.
        allow: operations to count as nothing, e.g. ``("mylib::op",)``.

    Raises:
        UncountedOperationError: the model runs an operation with arithmetic that no formula covers; names it.
        DataError: the model can't be run on the example input.
    """
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    watch = Watch(counter, frozenset(allow))
    with sdpa_kernel(SDPBackend.MATH), watch, counter:
        run_once(model, example_input, example_kwargs)
    if watch.uncounted:
        operation, place = next(iter(watch.uncounted.items()))
        others = f" (and {len(watch.uncounted) - 1} more)" if len(watch.uncounted) > 1 else ""
        raise UncountedOperationError(
            f"count: {place} runs {operation}{others}, whose arithmetic no counter knows; "
            f"rewrite it with PyTorch's own products, or name it in allow ([{operation!r}]) to count it as nothing"
        )
    return Cost(counter.get_total_flops() // 2, total_params(model))


def count_thop(model: nn.Module, example_input: Any, example_kwargs: Mapping[str, Any] | None = None) -> Cost:
    """Count with thop, linear and convolutional layers only: comparable with the sum of `LayerSpec.macs`.

    thop works on a copy, so no attributes or hooks stay behind. Raises `InputError` when thop is not installed.
    """
    try:
        import thop
        from thop.profile import register_hooks
    except ImportError:
        raise InputError("count_thop: needs the package ultralytics-thop; install it with pip") from None
    total = 0

    def only_layers(rule: Callable[..., None]) -> Callable[..., None]:
        def counted(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal total
            before = module.total_ops
            rule(module, args, output)
            total += int(module.total_ops - before)  # type: ignore[operator]

        return counted

    args, kwargs = as_call(example_input, example_kwargs)
    rules = {cls: only_layers(rule) if cls in COUNTED else _nothing for cls, rule in register_hooks.items()}
    with plain_attention():
        _, params = thop.profile(_Call(copy.deepcopy(model), kwargs), args, custom_ops=rules, verbose=False)
    return Cost(total, int(params))


def _nothing(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The rule of modules that aren't layers."""


class _Call(nn.Module):
    """The model with its keyword arguments filled in, because thop passes positional ones only."""

    def __init__(self, model: nn.Module, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.kwargs = kwargs

    def forward(self, *args: Tensor) -> Any:
        return self.model(*args, **self.kwargs)


def _changes(layers: Iterable[LayerSpec], plan: Plan) -> Iterator[tuple[LayerSpec, LayerChoice]]:
    """The changed layers with their choices, checked."""
    known = {layer.name: layer for layer in layers}
    for name, choice in plan.changed().items():
        if name not in known:
            raise LayerError(f"{name!r}: the plan changes a layer that is not in the list of layers")
        method(choice.method).check(known[name], choice.ranks)
        yield known[name], choice
