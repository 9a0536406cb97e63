"""`SelfAttention`: nn.MultiheadAttention, and the attention blocks of GPT-2, BERT and ViT in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.attention_parts import Shape, packed, shape_of, unpacked
from rankopt.attention_styles import STYLES, Style, style_of
from rankopt.errors import InputError
from rankopt.kinds.kind import Kind
from rankopt.layer_spec import Call, LayerSpec

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class SelfAttention(Kind):
    """Projections, softmax attention and the output projection as one layer.

    Its facts are the sizes in `Shape` and the `style` of its calls; its MACs those of the projections and of both
    products between tokens. A call's note says which tokens may look at which: none (all), padding, causal or pairs.
    """

    name = "attention"
    classes = (nn.MultiheadAttention,)
    linear = False

    def matches(self, module: nn.Module) -> bool:
        """By class, or by the name of a class of transformers."""
        return style_of(module) is not None

    def unfit(self, module: nn.Module) -> str | None:
        """Forms of attention that are not built here, and weights that are not plain."""
        style = _style(module)
        for part in module.modules():
            if torch.nn.utils.parametrize.is_parametrized(part):
                return "a weight is parametrized (torch.nn.utils.parametrize); remove the parametrization first"
        reason = style.why_not(module)
        if reason:
            return reason
        if any(t.layout != torch.strided or t.dtype not in _DTYPES for t in style.read(module).tensors):
            return "its weights are not plain floating-point tensors"
        return None

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        """Channels, and the rest as facts; all biases count among the weights."""
        style = _style(module)
        if style.why_not(module):
            channels = next(module.parameters()).shape[-1]
            params = sum(p.numel() for p in module.parameters())
            return {"in_channels": channels, "out_channels": channels, "bias": False, "own_params": params}
        shape = style.shape(module)
        return {
            "in_channels": shape.channels,
            "out_channels": shape.channels,
            "bias": False,
            "facts": tuple(sorted((vars(shape) | {"style": style.name}).items())),
            "own_params": sum(t.numel() for t in style.read(module).tensors),
        }

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call | str:
        """Samples, tokens, and which tokens may look at which."""
        style = _style(module)
        try:
            seen = style.seen(module, args, kwargs)
        except InputError as error:
            return error.message
        batch, tokens, _ = seen.x.shape
        macs = 0 if style.why_not(module) else batch * dense_macs(style.shape(module), tokens)
        return Call(batch, (tokens,), (tokens,), macs, seen.masking)

    def weight(self, layer: LayerSpec, module: nn.Module) -> Tensor:
        """All projections and biases, see `attention_parts.packed`."""
        return packed(_style(module).read(module))

    def bias(self, module: nn.Module) -> Tensor | None:
        """None apart from the weight."""
        return None

    def state(self, layer: LayerSpec, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The entries of the block's own state dict."""
        found = STYLES[layer.fact("style")].state(unpacked(shape_of(layer), weight))
        return {name: value for name, value in found.items() if value is not None}

    def repeated(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Without the cache of earlier tokens, which a call adds to."""
        return args, {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values")}

    def samples_at(self, module: nn.Module) -> int:
        """PyTorch's own has tokens first unless it is told otherwise."""
        return 0 if getattr(module, "batch_first", True) else 1

    def placed(self, old: nn.Module, built: nn.Module) -> nn.Module:
        """The core, called as the old module is."""
        return _style(old).call(old, built)

    def dense(self, layer: LayerSpec, call: Call) -> nn.Module:
        """PyTorch's own, whatever the style."""
        shape = shape_of(layer)
        return _Alone(nn.MultiheadAttention(shape.channels, shape.heads, bias=shape.bias, batch_first=True))

    def example(self, layer: LayerSpec, call: Call) -> tuple[Any, ...]:
        """As many samples and tokens."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(call.batch, call.in_size[0], layer.in_channels, generator=generator),)


class _Alone(nn.Module):
    """Attention on one input, without masks, for latency tables."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) → the same."""
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


def dense_macs(shape: Shape, tokens: int) -> int:
    """Multiply-accumulates of the dense layer on one sample."""
    return tokens * 4 * shape.channels * shape.width + 2 * tokens**2 * shape.width


def _style(module: nn.Module) -> Style:
    style = style_of(module)
    assert style is not None
    return style
