"""`calibrate`: what the data say of every layer, from one pass forward and a few backward.

Every batch runs once through the model, in eval mode, in small pieces. On the way each layer's input patches go into
their second moment; for the first samples the loss's gradient at each layer's output is taken too, for labels drawn
from the model's own prediction. Weights never receive a gradient, so a model's memory does not double. What is kept of
a layer is up to its `Gatherer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.batches import Batch, pieces
from rankopt.by_sample import MixedError, given
from rankopt.divergence import Divergence, pick
from rankopt.errors import DataError
from rankopt.gatherer import CalibrationOptions, Gatherer, LayerStatistics, Seen
from rankopt.gathering import gatherer
from rankopt.layer_spec import LayerSpec
from rankopt.layers import call_model, plain_attention
from rankopt.nest import mapped

__all__ = ["CalibrationOptions", "LayerStatistics", "calibrate"]


def calibrate(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    batches: Sequence[Batch],
    divergence: Divergence,
    options: CalibrationOptions = CalibrationOptions(),  # noqa: B008  (frozen)
    score: Callable[[Tensor, Batch], Tensor] | None = None,
) -> dict[str, LayerStatistics]:
    """Gather the statistics of these layers.

    Args:
        model: the dense model; it is left as it was.
        layers: those to gather (all the others cost nothing).
        batches: calibration data; labels are not used.
        divergence: how outputs are judged; its `score` is what gradients are taken of.
        options: how much is gathered.
        score: what gradients are taken of instead: the sum over samples of something of theirs, of the model's output
            for a piece of a batch.

    Raises:
        DataError: when an output or gradient is not finite.
    """
    try:
        return _calibrate(model, layers, batches, divergence, options, score)
    except MixedError:  # one by one they can always be told apart
        return _calibrate(model, layers, batches, divergence, replace(options, piece=1), score)


def _calibrate(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    batches: Sequence[Batch],
    divergence: Divergence,
    options: CalibrationOptions,
    score: Callable[[Tensor, Batch], Tensor] | None,
) -> dict[str, LayerStatistics]:
    total = sum(len(b) for b in batches)
    gathered = {layer.name: gatherer(layer, options, total) for layer in layers}
    modules = dict(model.named_modules())
    generator = torch.Generator().manual_seed(options.seed)
    left = options.fisher_samples if layers else 0

    def scored(output: Tensor, piece: Batch, draw: int) -> Tensor:
        if score is not None:
            return score(output, piece)
        return divergence.score(output, generator, options.temperature, draw, options.draws)

    with _frozen(model), plain_attention():
        if layers and options.piece > 1:
            _probe(model, modules, gathered, next(pieces(batches[0], 1)))
        for batch in batches:
            for piece in pieces(batch, options.piece):
                draws = options.draws if left > 0 else 0
                _run_piece(model, modules, gathered, piece, scored, draws)
                left -= len(piece)
    return {name: g.finish() for name, g in gathered.items()}


def _run_piece(
    model: nn.Module,
    modules: dict[str, nn.Module],
    gathered: dict[str, Gatherer],
    piece: Batch,
    score: Callable[[Tensor, Batch, int], Tensor],
    draws: int,
) -> None:
    """One forward pass, and one backward pass a draw, of a few samples."""

    def hook(owner: Gatherer, role: str) -> Any:
        def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            owner.look(role, given(args, kwargs).detach())
            if not draws or not torch.is_grad_enabled():
                return None
            # Adding a zero that wants a gradient makes the output a non-leaf in the graph, whatever the weights want.
            picked = pick(output)
            tapped = picked + torch.zeros((), dtype=picked.dtype, device=picked.device, requires_grad=True)
            call = Seen(role, owner.keep(role, args, kwargs, output))
            tapped.register_hook(lambda grad: call.gradients.append(grad.detach()))
            owner.calls.append(call)
            return tapped if output is picked else mapped(output, lambda tensor: tapped if tensor is picked else tensor)

        return on_forward

    handles = [
        module.register_forward_hook(hook(owner, role), with_kwargs=True)
        for owner in gathered.values()
        for role, module in owner.taps(modules)
    ]
    try:
        with torch.set_grad_enabled(draws > 0):
            output = pick(call_model(model, piece.args, piece.kwargs, "calibration data"))
            if not torch.isfinite(output.detach()).all():
                raise DataError("calibration: the model's output holds NaN or infinity; check its weights and the data")
            for n in range(draws):
                if output.requires_grad:
                    score(output, piece, n).backward(retain_graph=n < draws - 1)
    finally:
        for handle in handles:
            handle.remove()
    if draws:
        for owner in gathered.values():
            owner.close_piece(len(piece))


def _probe(model: nn.Module, modules: dict[str, nn.Module], gathered: dict[str, Gatherer], sample: Batch) -> None:
    """Note the shapes of all layers' inputs when the model is run on a single sample."""

    def hook(owner: Gatherer, role: str) -> Any:
        def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            owner.alone(role, given(args, kwargs))

        return on_forward

    handles = [
        module.register_forward_hook(hook(owner, role), with_kwargs=True)
        for owner in gathered.values()
        for role, module in owner.taps(modules)
    ]
    try:
        with torch.no_grad():
            call_model(model, sample.args, sample.kwargs, "calibration data")
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no parameter wants a gradient; all as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    wants = {p: p.requires_grad for p in model.parameters()}
    model.eval()
    for p in wants:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, want in wants.items():
            p.requires_grad_(want)
