"""`calibrate`: what the data say of every layer, from one pass forward and a few backward.

Every batch runs once through the model, in eval mode, in small pieces. On the way each layer's input patches go into
their second moment; for the first samples the loss's gradient at each layer's output is taken too, for labels drawn
from the model's own prediction. Weights never receive a gradient, so a model's memory does not double.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.batches import Batch, pieces
from rankopt.decompositions.metric import Metric
from rankopt.divergence import Divergence, pick
from rankopt.errors import DataError
from rankopt.fisher import FisherSamples, by_position, weight_gradients
from rankopt.layer_spec import LayerSpec
from rankopt.layers import call_model, plain_attention
from rankopt.patches import output_rows, patches


@dataclass(frozen=True)
class CalibrationOptions:
    """How much is gathered.

    Attributes:
        fisher_samples: samples of which gradients are taken (the first ones).
        draws: labels drawn for each of them.
        temperature: of the distribution that they are drawn from. Above 1, samples that the model knows by heart (its
            training data) still say which changes matter: their plain gradients vanish, their errors later don't.
        max_rows: output positions a layer's moment is made of, spread evenly over the samples (None: all).
        max_patch: the largest patch (in/groups · kernel) whose full moment is held; above, the channels' alone.
        piece: samples that run through the model at once.
        layer_bytes: memory for one layer's gradients; fewer samples are kept where they don't fit.
        seed: for positions and labels.
    """

    fisher_samples: int = 256
    draws: int = 4
    temperature: float = 2.0
    max_rows: int | None = 2**17
    max_patch: int = 5120
    piece: int = 32
    layer_bytes: int = 192 * 2**20
    seed: int = 0


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments (`metric`) and gradient samples (`fisher`) of one layer."""

    metric: Metric
    fisher: FisherSamples


class _Gathered:
    """Running sums of one layer."""

    def __init__(self, layer: LayerSpec, options: CalibrationOptions, samples: int) -> None:
        self.layer, self.options = layer, options
        self.total = samples
        g, o, i, *k = layer.group_shape
        self.entries = math.prod((g, o, i, *k))
        self.full = i * math.prod(k) <= options.max_patch
        n = i * math.prod(k) if self.full else i
        self.moment = torch.zeros(g, n, n, dtype=torch.float64 if n <= 1024 else torch.float32)
        self.out_moment = torch.zeros(g, o, o, dtype=torch.float64 if o <= 1024 else torch.float32)
        self.rows = self.out_rows = 0
        self.alone: list[tuple[int, ...]] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[list[Tensor]] = []
        self.gradients: list[Tensor] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.held = 0
        self.generator = torch.Generator().manual_seed(options.seed)

    def add_input(self, x: Tensor) -> None:
        """Add the patches of one call to the moment, at a random share of the positions."""
        layer = self.layer
        if not self.full:
            g, _, i, *_ = layer.group_shape
            rows = x.movedim(1, -1).reshape(-1, g, i) if layer.dims else x.reshape(-1, g, i)
            rows = rows[self._subset(len(rows))].float()
        else:
            positions = math.prod(_out_size(layer, x)) if layer.dims else x[0].numel() // layer.in_channels
            rows = patches(layer, x.float(), self._subset(positions)).flatten(0, 1)
        if len(rows):
            self.moment += torch.einsum("pgi,pgj->gij", rows, rows).to(self.moment)
            self.rows += len(rows)

    def _subset(self, positions: int) -> Tensor:
        """Indices of the positions to use, so that all samples together give about `max_rows`."""
        limit = self.options.max_rows
        share = 1.0 if limit is None else limit / max(self.total * self.layer_positions, 1)
        wanted = max(1, math.ceil(positions * share))
        if wanted >= positions:
            return torch.arange(positions)
        return torch.randperm(positions, generator=self.generator)[:wanted]

    @property
    def layer_positions(self) -> int:
        """Output positions a sample, from the calls on the example input."""
        calls = self.layer.calls
        return max(1, sum(math.prod(c.out_size) * (1 if self.layer.dims else c.batch) for c in calls))

    def close_piece(self, samples: int) -> None:
        """Turn the inputs and output gradients of one piece into gradient samples, and forget them."""
        inputs, outputs = self.inputs, self.outputs
        self.inputs, self.outputs = [], []
        if not inputs or not outputs or any(len(g) != len(outputs[0]) or not g for g in outputs):
            return
        calls: list[tuple[Tensor, Tensor]] = []
        for n, (x, gs) in enumerate(zip(inputs, outputs, strict=True)):
            alone = self.alone[min(n, len(self.alone) - 1)] if self.alone else tuple(x.shape)
            by_sample = [_by_sample(self.layer, t, samples, alone) for t in (x, *gs)]
            calls.append((by_sample[0], torch.stack(by_sample[1:])))
        for _, g in calls:
            rows = by_position(self.layer, g.flatten(0, 1).float(), output_rows).flatten(0, 1)
            self.out_moment += torch.einsum("pgo,pgq->goq", rows, rows).to(self.out_moment)
            self.out_rows += len(rows)
        draws = calls[0][1].shape[0]
        dense = 4 * self.entries * draws
        paired = sum(4 * (x[0].numel() + draws * g[0, 0].numel()) for x, g in calls)
        as_pairs = paired < dense and len(calls) == 1
        room = max(self.options.layer_bytes - self.held, 0) // min(dense, paired if as_pairs else dense)
        take = min(samples, room) if self.held else max(1, min(samples, room))
        if take == 0:
            return
        self.held += take * (paired if as_pairs else dense)
        if as_pairs:
            x, g = calls[0]
            self.pairs.append((x[:take].clone(), g[:, :take].clone()))
        else:
            total: Any = sum(weight_gradients(self.layer, x[:take], g[:, :take]) for x, g in calls)
            self.gradients.append(total.flatten(0, 1))

    def finish(self) -> LayerStatistics:
        """Means of the sums."""
        moment = self.moment / max(self.rows, 1)
        gradient = self.out_moment / max(self.out_rows, 1) if self.out_rows else None
        metric = Metric(patch=moment, gradient=gradient) if self.full else Metric(channel=moment, gradient=gradient)
        gradients = torch.cat(self.gradients) if self.gradients else None
        return LayerStatistics(metric, FisherSamples(self.layer, gradients, tuple(self.pairs)))


def calibrate(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    batches: Sequence[Batch],
    divergence: Divergence,
    options: CalibrationOptions = CalibrationOptions(),
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
    except _Mixed:  # one by one they can always be told apart
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
    gathered = {layer.name: _Gathered(layer, options, total) for layer in layers}
    modules = dict(model.named_modules())
    generator = torch.Generator().manual_seed(options.seed)
    left = options.fisher_samples if layers else 0

    def drawn(output: Tensor, piece: Batch) -> Tensor:
        return divergence.score(output, generator, options.temperature)

    with _frozen(model), plain_attention():
        if layers and options.piece > 1:
            _probe(model, modules, gathered, next(pieces(batches[0], 1)))
        for batch in batches:
            for piece in pieces(batch, options.piece):
                draws = options.draws if left > 0 else 0
                _run_piece(model, modules, gathered, piece, score or drawn, draws)
                left -= len(piece)
    return {name: g.finish() for name, g in gathered.items()}


def _run_piece(
    model: nn.Module,
    modules: dict[str, nn.Module],
    gathered: dict[str, _Gathered],
    piece: Batch,
    score: Callable[[Tensor, Batch], Tensor],
    draws: int,
) -> None:
    """One forward pass, and one backward pass a draw, of a few samples."""
    taps: list[tuple[_Gathered, Tensor, list[Tensor]]] = []
    handles = []

    def hook(name: str) -> Any:
        def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
            layer = gathered[name].layer
            x = args[0] if args else kwargs["input"]
            single = _single(layer, x)
            x = x.unsqueeze(0) if single else x
            gathered[name].add_input(x.detach())
            if not draws or not torch.is_grad_enabled():
                return None
            # Adding a zero that wants a gradient makes the output a non-leaf in the graph, whatever the weights want.
            tapped = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            received: list[Tensor] = []
            tapped.register_hook(lambda grad: received.append(grad.detach().unsqueeze(0) if single else grad.detach()))
            taps.append((gathered[name], x.detach().clone(), received))
            return tapped

        return on_forward

    for name in gathered:
        handles.append(modules[name].register_forward_hook(hook(name), with_kwargs=True))
    try:
        with torch.set_grad_enabled(draws > 0):
            output = pick(call_model(model, piece.args, piece.kwargs, "calibration data"))
            if not torch.isfinite(output.detach()).all():
                raise DataError("calibration: the model's output holds NaN or infinity; check its weights and the data")
            for n in range(draws):
                if output.requires_grad:
                    score(output, piece).backward(retain_graph=n < draws - 1)
    finally:
        for handle in handles:
            handle.remove()
    if not draws:
        return
    for owner, x, received in taps:
        owner.inputs.append(x)
        owner.outputs.append(received)
    for owner in gathered.values():
        owner.close_piece(len(piece))


def _probe(model: nn.Module, modules: dict[str, nn.Module], gathered: dict[str, _Gathered], sample: Batch) -> None:
    """Note the shapes of all layers' inputs when the model is run on a single sample."""

    def hook(owner: _Gathered) -> Any:
        def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            owner.alone.append((1, *x.shape) if _single(owner.layer, x) else tuple(x.shape))

        return on_forward

    handles = [modules[n].register_forward_hook(hook(owner), with_kwargs=True) for n, owner in gathered.items()]
    try:
        with torch.no_grad():
            call_model(model, sample.args, sample.kwargs, "calibration data")
    finally:
        for handle in handles:
            handle.remove()


def _single(layer: LayerSpec, x: Tensor) -> bool:
    """Whether it lacks a batch dimension."""
    return x.dim() == (layer.dims + 1 if layer.dims else 1)


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


def _out_size(layer: LayerSpec, x: Tensor) -> tuple[int, ...]:
    size = []
    for d, n in enumerate(x.shape[2:]):
        reach = layer.dilation[d] * (layer.kernel_size[d] - 1)
        if layer.transposed:
            size.append((n - 1) * layer.stride[d] - 2 * int(layer.padding[d]) + reach + layer.output_padding[d] + 1)
        else:
            padding = reach if isinstance(layer.padding, str) else 2 * layer.padding[d]
            size.append((n + padding - reach - 1) // layer.stride[d] + 1)
    return tuple(size)


class _Mixed(Exception):
    """Rows of several samples that can't be told apart."""


def _by_sample(layer: LayerSpec, x: Tensor, samples: int, alone: tuple[int, ...]) -> Tensor:
    """Bring the samples to dimension 0: windows of one sample stand together, sequence-first inputs are turned.

    Args:
        layer: the layer.
        x: its input or output, or a gradient.
        samples: how many there are.
        alone: the shape of the layer's input when the model is run on a single sample.

    Raises `_Mixed` where the rows do not grow with the samples (a table of positions, one call for each sample).
    """
    rows = x.shape[0]
    if layer.dims == 0 and x.dim() >= 3 and x.shape[1] == samples and alone[0] > 1 and alone[1] == 1:
        return x.transpose(0, 1)
    if rows == samples and (alone[0] == 1 or samples == 1):
        return x
    if rows % samples == 0 and (rows != alone[0] or samples == 1):
        return x.reshape(samples, rows // samples, *x.shape[1:])
    raise _Mixed(f"{layer.name} sees {rows} rows for {samples} samples")
