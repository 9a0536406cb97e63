"""What is known of a self-attention layer whatever its form: `Shape`, `Projections`, and `Seen`, one call of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankopt.layer_spec import LayerSpec
from rankopt.nn.attention_calls import padding


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention layer.

    Attributes:
        channels: of input and output.
        heads, size: heads, and channels of each.
        scale: what scores are multiplied with.
        bias: whether queries, keys and values have one; `bias_out`: whether the output has.
        causal: no token looks at later ones, whatever mask it is given.
        dropout: of the attention weights, in training.
    """

    channels: int
    heads: int
    size: int
    scale: float
    bias: bool
    bias_out: bool
    causal: bool = False
    dropout: float = 0.0

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.size


def shape_of(layer: LayerSpec) -> Shape:
    """The sizes of an attention layer, out of its facts."""
    return Shape(**{name: value for name, value in layer.facts if name != "style"})


@dataclass(frozen=True)
class Projections:
    """The dense weights: `q`, `k`, `v` (heads·size, channels), `o` (channels, heads·size), biases or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    bq: Tensor | None = None
    bk: Tensor | None = None
    bv: Tensor | None = None
    bo: Tensor | None = None

    def to(self, *args: Any) -> Projections:
        """In another dtype or on another device."""
        return self._each(lambda t: t.to(*args))

    def detached(self) -> Projections:
        """Without gradients."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Projections:
        values: dict[str, Any] = {name: None if v is None else change(v) for name, v in vars(self).items()}
        return Projections(**values)

    @property
    def tensors(self) -> list[Tensor]:
        """All that are there."""
        return [v for v in vars(self).values() if v is not None]


@dataclass(frozen=True)
class Seen:
    """One call as the layer saw it: `x` (batch, tokens, channels), `masking`, and the padding where there is some.

    `masking` is "none", "padding", "causal" or "pairs" (a mask of another form); `mask` is True where a token may look,
    or added to scores, and broadcasts to (batch, heads, tokens, tokens).
    """

    x: Tensor
    masking: str
    mask: Tensor | None = None

    @property
    def keep(self) -> Tensor | None:
        """(batch, tokens), False at padding; None without padding."""
        if self.masking != "padding" or self.mask is None:
            return None
        return padding(self.mask, "attention").expand(self.x.shape[0], -1)


def unpacked(shape: Shape, weight: Tensor) -> Projections:
    """The projections out of the layer's weight (1, 4 · width + 1, channels + 1)."""
    q, k, v, o = weight[0, :-1].chunk(4)
    bq, bk, bv = (part[:, -1] if shape.bias else None for part in (q, k, v))
    last = weight[0, -1, :-1] if shape.bias_out else None
    return Projections(q[:, :-1], k[:, :-1], v[:, :-1], o[:, :-1].transpose(0, 1), bq, bk, bv, last)


def packed(dense: Projections) -> Tensor:
    """The inverse of `unpacked`."""
    parts = []
    for part, bias in zip(
        (dense.q, dense.k, dense.v, dense.o.transpose(0, 1)), (dense.bq, dense.bk, dense.bv, None), strict=True
    ):
        column = part.new_zeros(len(part)) if bias is None else bias
        parts.append(torch.cat([part, column[:, None]], 1))
    last = dense.o.new_zeros(dense.o.shape[0]) if dense.bo is None else dense.bo
    return torch.cat([*parts, torch.cat([last, last.new_zeros(1)])[None]])[None]


def classified(x: Tensor, mask: Tensor | None, causal: bool) -> Seen:
    """Which tokens may look at which, told by values."""
    if mask is None:
        return Seen(x, "causal" if causal else "none")
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    weighed = mask.dtype != torch.bool and bool((mask.masked_fill(~shown, 0) != 0).any())
    if weighed:
        return Seen(x, "pairs", mask)
    if bool(shown.all()):
        return Seen(x, "causal" if causal else "none", mask)
    if bool((shown == shown[:, :1, :1]).all()):
        return Seen(x, "padding", mask)
    n = x.shape[1]
    lower = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
    if shown.shape[-2:] == (n, n) and not bool((shown & ~lower).any()):
        return Seen(x, "causal", mask)
    return Seen(x, "pairs", mask)
