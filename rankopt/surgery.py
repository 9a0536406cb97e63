"""`apply`: a model and a plan in, a new model out. `structure`: the same without values, to load saved weights into.

The model is deep-copied with the replacements already in the copy's memo. So the weights of a replaced layer are never
copied, a shared module is replaced once and stays shared, and references that the model holds outside its module tree
(a list of layers, a hook bound to a module) point to the replacement too.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.declared_ties import declare
from rankopt.decompositions import method
from rankopt.decompositions.metric import Metric
from rankopt.errors import InputError, LayerError, PlanError, RefusedDecomposition
from rankopt.kinds import kind_named, kind_of
from rankopt.layers import (
    LayerSpec,
    architecture_digest,
    inside,
    module_names,
    static_layers,
    weights_digest,
)
from rankopt.plan import LayerChoice, Plan

StageWeights = Callable[[LayerSpec, LayerChoice], Sequence[Tensor]]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def apply(
    model: nn.Module, plan: Plan, factors: StageWeights | None = None, *, other_weights: bool = False
) -> nn.Module:
    """Replace the layers that `plan` changes, in a copy; the given model is untouched.

    Args:
        model: the dense model. It is neither run nor moved.
        plan: layer name → choice; a layer that is not named, or is ``dense``, stays as it is.
        factors: gives the weights of the stages of a layer at a choice, e.g. from a factor cache. Without it every
            layer is decomposed here, from its weight alone.
        other_weights: accept a plan made for the same architecture with other weights.

    Returns:
        A new model with the dtype, device, modes, hooks, ``requires_grad`` and memory format of the old one. It shares
        no memory with the old one or with what `factors` gave. When the model is itself the layer, its replacement.

    Raises:
        LayerError: unknown or skipped layers, ranks out of bounds, weights that are not finite, a model that can't be
            copied. All of it is checked before a layer is built.
        PlanError: the plan's fingerprint is another model's.
        RefusedDecomposition: a layer can't be decomposed well at these ranks.
    """
    changes = checked(model, plan, weights=not other_weights)
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer, _ in changes:
        _check_values(layer, modules[layer.name])
    give = factors or (lambda layer, choice: _factorized(layer, choice, modules[layer.name]))
    new: dict[str, nn.Module] = {}
    with torch.no_grad():
        for layer, choice in changes:
            new |= _built(layer, choice, modules, give(layer, choice))
    return _copy(model, new)


def structure(model: nn.Module, plan: Plan) -> nn.Module:
    """`apply` without values: the replaced layers have the right shapes, and memory that is not filled in.

    Nothing is decomposed, and the model's weights may be any, so an untrained model of the same class will do.
    """
    changes = checked(model, plan, weights=False)
    modules = dict(model.named_modules(remove_duplicate=False))
    new: dict[str, nn.Module] = {}
    for layer, choice in changes:
        sample = next(modules[layer.name].parameters())
        built = method(choice.method).skeleton(layer, choice.ranks, sample.dtype, sample.device)
        placed = kind_named(layer).placed(modules[layer.name], built)
        new |= _with_heads(layer, choice, modules, placed)
    return _copy(model, new)


def checked(model: nn.Module, plan: Plan, *, weights: bool = True) -> list[tuple[LayerSpec, LayerChoice]]:
    """The layers that `plan` changes, after every check that needs no values; raises as `apply` does."""
    layers = {layer.name: layer for layer in static_layers(model)}
    problem = _first_problem(plan, layers)
    if plan.fingerprint is not None:
        digest = architecture_digest(model, list(layers.values()))
        if digest != plan.fingerprint.architecture:
            raise PlanError(
                f"plan: made for another architecture (fingerprint {plan.fingerprint.architecture}, this model has "
                f"{digest}): {problem or _missing(plan, layers)}; give the model that the plan was made for"
            )
        if problem is None and weights and (digest := weights_digest(model)) != plan.fingerprint.weights:
            raise PlanError(
                f"plan: made for other weights (fingerprint {plan.fingerprint.weights}, this model has {digest}); "
                "load the weights it was made for, or pass other_weights=True"
            )
    if problem is not None:
        raise problem
    return [(layers[name], choice) for name, choice in plan.changed().items()]


def _first_problem(plan: Plan, layers: Mapping[str, LayerSpec]) -> InputError | None:
    """The first choice that does not fit the layers."""
    for name, choice in plan.layers.items():
        if name not in layers:
            return LayerError(_unknown(name, layers))
        if choice.method == "dense":
            if choice.ranks:
                return LayerError(f"{name}: dense takes no ranks, got {dict(choice.ranks)}")
            continue
        if layers[name].skip is not None:
            return LayerError(f"{name}: can't be decomposed: {layers[name].skip}; make it dense in the plan")
        try:
            method(choice.method).check(layers[name], choice.ranks)
        except LayerError as error:
            return error
        outer = next((n for n in plan.changed() if n in layers and inside(layers[name], layers[n])), None)
        if outer is not None:
            return LayerError(f"{name}: is a part of {outer!r}, which the plan changes too; make one of them dense")
    return None


def _unknown(name: str, layers: Mapping[str, LayerSpec]) -> str:
    for layer in layers.values():
        if name in layer.aliases:
            return f"{name!r}: is another name of {layer.name!r}; use that one"
    close = difflib.get_close_matches(name, layers, n=1, cutoff=0.0)
    hint = f"the closest is {close[0]!r}" if close else "it has none"
    return f"{name!r}: the model has no linear, convolutional or other layer of that name; {hint}"


def _missing(plan: Plan, layers: Mapping[str, LayerSpec]) -> str:
    """The first difference between the names in a plan and in a model, when the choices themselves would fit."""
    for name in plan.skipped:
        if name not in layers:
            return _unknown(name, layers)
    for name, layer in layers.items():
        if (plan.layers or plan.skipped) and name not in plan.layers and name not in plan.skipped:
            return f"the plan does not know {name!r} ({layer.describe()})"
    return "the layers have the same names, but a shape, a stride or another entry of the state dict differs"


def _check_values(layer: LayerSpec, module: nn.Module) -> None:
    for key, value in module.named_parameters():
        if value.is_meta:
            raise LayerError(f"{layer.name}: {key} is on the meta device and has no values; load the weights first")
        if not bool(torch.isfinite(value).all()):
            raise LayerError(f"{layer.name}: {key} ({layer.describe()}) holds NaN or infinite values; repair the model")


def _factorized(layer: LayerSpec, choice: LayerChoice, module: nn.Module) -> Sequence[Tensor]:
    """Stage weights from the weight alone."""
    weight = kind_named(layer).weight(layer, module)
    decomposition = method(choice.method)
    precise = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    prepared = decomposition.factorize(layer, precise, Metric())
    return decomposition.stage_weights(layer, prepared, choice.ranks)


def _built(
    layer: LayerSpec, choice: LayerChoice, modules: Mapping[str, nn.Module], weights: Sequence[Tensor]
) -> dict[str, nn.Module]:
    decomposition, old = method(choice.method), modules[layer.name]
    expected = [tuple(int(n) for n in shape) for shape in decomposition.stage_shapes(layer, choice.ranks)]
    given = [tuple(w.shape) for w in weights]
    if given != expected:
        raise LayerError(f"{layer.name}: {choice} needs stage weights of the shapes {expected}, got {given}")
    sample = next(old.parameters())
    own = [w.detach().to(sample.device, sample.dtype) for w in weights]  # `build` copies them, and the bias
    if not all(bool(torch.isfinite(w).all()) for w in own):
        raise RefusedDecomposition(f"{layer.name}: {choice} has values that {layer.dtype} can't hold")
    kind = kind_named(layer)
    built = kind.placed(old, decomposition.build_at(layer, choice.ranks, own, kind.bias(old)))
    return _with_heads(layer, choice, modules, built)


def _with_heads(
    layer: LayerSpec, choice: LayerChoice, modules: Mapping[str, nn.Module], built: nn.Module
) -> dict[str, nn.Module]:
    """What stands in the place of a layer, and of the output heads that are tied to it."""
    new = {layer.name: _like(modules[layer.name], built)}
    for name in layer.tied:
        bias = kind_of(modules[name]).bias(modules[name])  # type: ignore[union-attr]
        new[name] = _like(modules[name], method(choice.method).head(layer, built, bias))
    return new


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give `new` the mode, ``requires_grad`` and memory format of the layer it replaces."""
    weights = [p for name, p in old.named_parameters() if not name.endswith("bias")]
    biases = [p for name, p in old.named_parameters() if name.endswith("bias")] or weights
    channels_last = _channels_last(weights[0])
    for name, parameter in new.named_parameters():
        if channels_last and parameter.dim() in _FORMATS:
            value = parameter.data
            parameter.data = torch.empty_like(value, memory_format=_FORMATS[value.dim()]).copy_(value)
        like = biases if name.endswith("bias") else weights
        parameter.requires_grad_(any(p.requires_grad for p in like))
    return new.train(old.training)


def _channels_last(weight: Tensor) -> bool:
    """By strides, because is_contiguous says yes to both formats when the kernel is 1×1."""
    if weight.dim() not in _FORMATS:
        return False
    wanted = torch.empty(weight.shape, device="meta", memory_format=_FORMATS[weight.dim()]).stride()
    return weight.stride() == wanted and wanted != torch.empty(weight.shape, device="meta").stride()


def _copy(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """Deep-copy `model` with `new` in the places of the layers of these names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    memo: dict[int, Any] = {id(modules[name]): replacement for name, replacement in new.items()}
    try:
        copied = copy.deepcopy(model, memo)
        for name, replacement in new.items():
            for key in _HOOKS:
                vars(replacement)[key] = copy.deepcopy(vars(modules[name])[key], memo)
            vars(replacement)["_is_full_backward_hook"] = vars(modules[name]).get("_is_full_backward_hook")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise LayerError(
            f"model: {type(model).__name__} can't be copied{_culprit(model)}: {type(error).__name__}: {reason}"
        ) from error
    found = dict(copied.named_modules(remove_duplicate=False))
    for name, replacement in new.items():
        if found.get(name) is not replacement:
            raise LayerError(f"{name}: was not replaced, because a module above it has a __deepcopy__ of its own")
    _keep_shared_biases(modules, new, memo)
    _without_fast_path(copied, set(new.values()))
    declare(copied, new)
    return copied


def _keep_shared_biases(
    modules: Mapping[str, nn.Module], new: Mapping[str, nn.Module], memo: Mapping[int, Any]
) -> None:
    """A bias that a module outside holds too (in BERT's output head) is one parameter in the copy as well."""
    for name, replacement in new.items():
        old = getattr(modules[name], "bias", None)
        shared = memo.get(id(old)) if isinstance(old, nn.Parameter) else None
        if shared is not None:
            for part in replacement.modules():
                own = part._parameters.get("bias")
                if own is not None and own.shape == shared.shape:
                    part.bias = shared


def _culprit(model: nn.Module) -> str:
    """Where a tensor that is the result of a computation is kept, the most common reason why a copy fails."""
    for module, names in module_names(model).items():
        for key, value in {**vars(module), **module._buffers}.items():
            if isinstance(value, Tensor) and not value.is_leaf:
                return f" (detach the tensor {'.'.join([*filter(None, names[:1]), key])})"
    return ""


def _without_fast_path(model: nn.Module, replaced: set[nn.Module]) -> None:
    """Keep PyTorch's transformer modules from reading the weights of layers that are no longer there.

    Their fused path in eval mode reads ``linear1.weight`` and ``linear2.weight`` instead of calling the layers.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not replaced.isdisjoint(module.modules()):
            module.activation_relu_or_gelu = 0  # "the activation is unknown to the fused kernel"; read nowhere else
        elif isinstance(module, nn.TransformerEncoder) and not replaced.isdisjoint(module.modules()):
            module.use_nested_tensor = False  # that path reads weights too, and hands on nested tensors
