"""`Convolution`: convolutions and transposed convolutions of any geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from rankopt.kinds.kind import Kind, only_input
from rankopt.layer_spec import Call, LayerSpec


class Convolution(Kind):
    """One class of PyTorch's.

    Args:
        name, cls: of this kind.
    """

    def __init__(self, name: str, cls: type[nn.Module]) -> None:
        self.name, self.classes = name, (cls,)

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        """Channels and geometry."""
        m: Any = module
        padding = m.padding if m.padding == "same" else (0,) * len(m.kernel_size) if m.padding == "valid" else m.padding
        return {
            "in_channels": m.in_channels,
            "out_channels": m.out_channels,
            "bias": m.bias is not None,
            "kernel_size": tuple(m.kernel_size),
            "stride": tuple(m.stride),
            "padding": padding if isinstance(padding, str) else tuple(padding),
            "dilation": tuple(m.dilation),
            "groups": m.groups,
            "padding_mode": m.padding_mode,
            "output_padding": tuple(m.output_padding) if self.name.startswith("conv_transpose") else (),
        }

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call | str:
        """With or without a batch."""
        given = only_input(args, kwargs, output)
        if isinstance(given, str):
            return given
        dims = len(module.kernel_size)  # type: ignore[arg-type]
        batch = given.shape[0] if given.dim() == dims + 2 else 1
        return Call(batch, tuple(given.shape[-dims:]), tuple(output.shape[-dims:]))

    def dense(self, layer: LayerSpec, call: Call) -> nn.Module:
        """The same geometry."""
        options: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
            "bias": layer.bias,
            "padding_mode": layer.padding_mode,
        }
        if layer.transposed:
            options["output_padding"] = layer.output_padding
        return self.classes[0](layer.in_channels, layer.out_channels, layer.kernel_size, **options)


CONVOLUTIONS = (
    Convolution("conv1d", nn.Conv1d),
    Convolution("conv2d", nn.Conv2d),
    Convolution("conv3d", nn.Conv3d),
    Convolution("conv_transpose1d", nn.ConvTranspose1d),
    Convolution("conv_transpose2d", nn.ConvTranspose2d),
)
