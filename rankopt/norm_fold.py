"""Batch norms folded into the layers before them, for the length of a trial.

In eval mode a batch norm is a factor and a shift a channel, which the last stage of the layer before it can take over.
A trial in bfloat16 then has a pass over memory less a layer. Which norm follows which layer is seen in one run of the
dense model, and believed only if that model, folded so, still says the same; plans replace layers alone, so what holds
for it holds for every compressed copy. What is handed over keeps its norms (see `fold` for exported programs).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankopt.batches import Batch
from rankopt.divergence import pick
from rankopt.layers import inference

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # whose outputs are dimension 0 of the weight
_SAMPLES = 8
_OFF = 1e-3  # how far an output of the folded dense model may be off, as a share of the largest


def followers(model: nn.Module, layers: Sequence[str], batch: Batch) -> dict[str, str]:
    """Layer → the batch norm that takes its output and stands for it from there on.

    Args:
        model: the dense model, in eval mode.
        layers: names of modules that plans may replace or leave as they are.
        batch: inputs to run it on.

    Returns:
        All such pairs, or none where the model folded so says something else (an output that is used elsewhere too).
    """
    few, modules = batch.take(slice(0, _SAMPLES)), dict(model.named_modules())
    outputs: dict[str, list[Any]] = {}
    inputs: dict[str, list[Any]] = {}
    hooks = [modules[n].register_forward_hook(_kept(outputs, n)) for n in layers if type(modules[n]) in _PLAIN]
    norms = [n for n, m in modules.items() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    hooks += [modules[n].register_forward_hook(_taken(inputs, n)) for n in norms]
    try:
        with inference(model):
            wanted = pick(model(*few.args, **few.kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    pairs = {
        layer: norm
        for layer, (output, *again) in outputs.items()
        for norm, (given, *twice) in inputs.items()
        if given is output and not again and not twice
    }
    try:
        folded = copy.deepcopy(model)
        own = dict(folded.named_modules())
        if not all(fold_(own[layer], folded, norm) for layer, norm in pairs.items()):
            return {}
        with inference(folded):
            found = pick(folded(*few.args, **few.kwargs))
    except Exception:  # the model can't do without a norm of its own
        return {}
    return pairs if bool((found - wanted).abs().max() <= _OFF * wanted.abs().max()) else {}


def fold_(last: nn.Module | None, model: nn.Module, norm: str) -> bool:
    """Let a plain layer take over the norm behind it, in place; False (and nothing is changed) where it can't."""
    module: Any = model.get_submodule(norm)
    if last is None or type(last) not in _PLAIN or not isinstance(module, _BatchNorm):
        return False
    layer: Any = last
    mean, variance = module.running_mean, module.running_var
    if mean is None or variance is None or len(mean) != len(layer.weight):
        return False
    with torch.no_grad():
        factor = torch.rsqrt(variance + module.eps)
        if module.weight is not None:
            factor = factor * module.weight
        shift = -mean * factor if layer.bias is None else (layer.bias - mean) * factor
        if module.bias is not None:
            shift = shift + module.bias
        layer.weight.mul_(factor.reshape(-1, *(1,) * (layer.weight.dim() - 1)))
        layer.bias = nn.Parameter(shift, requires_grad=False)
    # no other module takes its place: the layer may be folded while the norm waits for it
    vars(module)["forward"] = _same
    return True


def folding(pairs: Mapping[str, str], model: nn.Module, lasts: Mapping[str, nn.Module | None]) -> Callable[[str], None]:
    """What folds the norm behind a layer of this model, by the layer's name."""

    def fold(layer: str) -> None:
        if layer in pairs:
            fold_(lasts.get(layer), model, pairs[layer])

    return fold


def _same(x: Tensor) -> Tensor:
    return x


def _kept(outputs: dict[str, list[Any]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.setdefault(name, []).append(output)

    return hook


def _taken(inputs: dict[str, list[Any]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs.setdefault(name, []).append(args[0] if args else None)

    return hook
