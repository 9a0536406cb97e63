"""`gather`: what attention layers are given, what they give, and the gradients there, from one pass over the data.

Attention has no weight error that a Fisher product would judge, since replacements are no linear layers. But the
prediction of `FisherSamples` needs no weights: half the mean square of ⟨∂ log p / ∂ output, change of the output⟩, here
with the change that a built block was measured to cause on calibration samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.attention_moments import Moments, attended_values, moments_of
from rankopt.attention_styles import Projections, Seen, Shape, Style, style_of
from rankopt.batches import Batch, pieces
from rankopt.distill_block import Example
from rankopt.divergence import Divergence, pick
from rankopt.errors import DataError
from rankopt.layers import call_model, inference, plain_attention
from rankopt.nn.attention import Attention


@dataclass(frozen=True)
class SampleOptions:
    """How much is gathered.

    Attributes:
        samples: the first ones.
        gradients: those of them of which gradients are taken, and `draws`: labels drawn for each.
        temperature: see `CalibrationOptions`.
        piece: samples that run through the model at once.
        layer_bytes: memory for one layer; fewer samples are kept where they don't fit.
        seed: for the labels.
    """

    samples: int = 256
    gradients: int = 128
    draws: int = 2
    temperature: float = 2.0
    piece: int = 32
    layer_bytes: int = 192 * 2**20
    seed: int = 0


@dataclass(frozen=True)
class BlockSamples:
    """Calls of one attention layer.

    Attributes:
        shape, dense: the layer.
        calls: what it was given.
        gradients: for every call that has some, (draws, batch, tokens, channels), at the module's output.
    """

    shape: Shape
    dense: Projections
    calls: Sequence[Seen]
    gradients: Sequence[Tensor]

    def moments(self) -> Moments:
        """Of tokens and attended values."""
        return moments_of(self.dense, self.shape, self.calls)

    def outputs(self) -> list[Tensor]:
        """What the dense layer makes of each call, (batch, tokens, channels)."""
        bias = 0 if self.dense.bo is None else self.dense.bo
        return [attended_values(self.dense, self.shape, call) @ self.dense.o.mT + bias for call in self.calls]

    def examples(self) -> list[Example]:
        """Calls as examples to distill on."""
        return [Example(c.x, y, c.keep) for c, y in zip(self.calls, self.outputs(), strict=True)]

    def loss(self, core: nn.Module, finish: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Predicted divergence in nats when `core` stands in the layer's place, from the change of its output.

        Args:
            core: `Attention`, or a module called with inputs and padding.
            finish: (output of the core, input) → output of the module.
        """
        total, count = 0.0, 0
        with torch.no_grad():
            for call, dense, gradient in zip(self.calls, self.outputs(), self.gradients, strict=False):
                change = finish(run_core(core, call), call.x) - finish(dense, call.x)
                score = (gradient * change).flatten(2).sum(2)
                total += float(score.double().square().sum())
                count += score.numel()
        return total / (2 * max(count, 1))


def run_core(core: nn.Module, call: Seen) -> Tensor:
    """What a core makes of a recorded call."""
    if isinstance(core, Attention):
        output: Tensor = core(call.x, call.mask, call.masking == "causal" and call.mask is None)
        return output
    mixed: Tensor = core(call.x, call.keep)
    return mixed


def gather(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    divergence: Divergence,
    options: SampleOptions = SampleOptions(),
) -> dict[str, BlockSamples]:
    """Samples of these attention layers.

    Args:
        model: the dense model; it is left as it was.
        names: of modules that `style_of` knows.
        batches: calibration data.
        divergence: how outputs are judged.
        options: see `SampleOptions`.

    Raises:
        DataError: the model's output is not finite.
    """
    modules = dict(model.named_modules())
    found: dict[str, tuple[list[Seen], list[Tensor]]] = {name: ([], []) for name in names}
    held = dict.fromkeys(names, 0)
    generator = torch.Generator().manual_seed(options.seed)
    wants = {p: p.requires_grad for p in model.parameters()}
    done = 0
    try:
        for p in wants:
            p.requires_grad_(False)
        for batch in batches:
            for piece in pieces(batch, options.piece):
                if done >= options.samples:
                    break
                draws = options.draws if done < options.gradients else 0
                _piece(model, modules, found, held, piece, divergence, generator, replace(options, draws=draws))
                done += len(piece)
    finally:
        for p, want in wants.items():
            p.requires_grad_(want)
    made = {}
    for name, (calls, gradients) in found.items():
        style, module = style_of(modules[name]), modules[name]
        assert style is not None
        dense = _detached(style.read(module))
        made[name] = BlockSamples(style.shape(module), dense, calls, gradients)
    return made


def _piece(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    found: Mapping[str, tuple[list[Seen], list[Tensor]]],
    held: dict[str, int],
    piece: Batch,
    divergence: Divergence,
    generator: torch.Generator,
    options: SampleOptions,
) -> None:
    taps: list[tuple[str, list[Tensor]]] = []

    def hook(name: str, style: Style) -> Any:
        def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            seen = style.seen(module, args, kwargs)
            y = output[0]
            need = 4 * seen.x.numel() * (1 + options.draws)
            if held[name] and held[name] + need > options.layer_bytes:
                return None
            held[name] += need
            found[name][0].append(
                Seen(seen.x.detach().clone(), seen.masking, None if seen.mask is None else seen.mask.detach().clone())
            )
            if not options.draws:
                return None
            tapped = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
            received: list[Tensor] = []
            tapped.register_hook(lambda grad: received.append(style.same_output(module, (grad.detach(),))))
            taps.append((name, received))
            return (tapped, *output[1:])

        return on_forward

    handles = []
    for name in found:
        style = style_of(modules[name])
        assert style is not None
        handles.append(modules[name].register_forward_hook(hook(name, style), with_kwargs=True))
    try:
        with inference(model), plain_attention(), torch.set_grad_enabled(options.draws > 0):
            output = pick(call_model(model, piece.args, piece.kwargs, "calibration data"))
            if not torch.isfinite(output.detach()).all():
                raise DataError("calibration: the model's output holds NaN or infinity; check its weights and the data")
            for n in range(options.draws):
                score = divergence.score(output, generator, options.temperature)
                score.backward(retain_graph=n < options.draws - 1)
    finally:
        for handle in handles:
            handle.remove()
    for name, received in taps:
        found[name][1].append(torch.stack(received) if received else torch.zeros(0))


def _detached(dense: Projections) -> Projections:
    return Projections(**{k: None if v is None else v.detach() for k, v in vars(dense).items()})
