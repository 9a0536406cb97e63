"""`Attention`: multi-head self-attention whose heads may have any size and whose projections any form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Softmax attention between projections of one input.

    Queries and keys of a head have `size_qk` channels, values `size_v`; the sizes may be others than those of the layer
    that it stands for, while the scale of the scores stays that layer's.

    Args:
        inward: (..., in) → (..., heads · (2 · size_qk + size_v)), queries, keys and values behind each other.
        outward: (..., heads · size_v) → (..., out).
        heads, size_qk, size_v: see above.
        scale: what scores are multiplied with.
        dropout: of the attention weights, in training.
    """

    def __init__(
        self,
        inward: nn.Module,
        outward: nn.Module,
        heads: int,
        size_qk: int,
        size_v: int,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inward, self.outward = inward, outward
        self.heads, self.size_qk, self.size_v = heads, size_qk, size_v
        self.scale, self.dropout = scale, dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, tokens, in) → queries, keys, values, each (batch, heads, tokens, size)."""
        sizes = [self.heads * self.size_qk, self.heads * self.size_qk, self.heads * self.size_v]
        q, k, v = self.inward(x).split(sizes, dim=-1)
        return _heads(q, self.heads), _heads(k, self.heads), _heads(v, self.heads)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The output (batch, tokens, out), and the attention weights (batch, heads, tokens, tokens) where wanted.

        Args:
            q, k, v: as from `project`, the keys and values perhaps longer (those of earlier tokens).
            mask: True where a token may look, or what is added to the scores; broadcast to (batch, heads, q, k).
            causal: no token looks at later ones; used where there is no mask.
            weights: whether attention weights are wanted.
        """
        dropout = self.dropout if self.training else 0.0
        seen: Tensor | None = None
        if weights:
            seen = torch.softmax(masked((q * self.scale) @ k.transpose(-2, -1), mask, causal), -1)
            mixed = F.dropout(seen, dropout) @ v
        else:
            only_causal = causal and mask is None
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, only_causal, scale=self.scale)
        return self.outward(mixed.transpose(1, 2).flatten(2)), seen

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """(batch, tokens, in) → (batch, tokens, out)."""
        return self.attend(*self.project(x), mask, causal)[0]

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"heads={self.heads}, size_qk={self.size_qk}, size_v={self.size_v}, scale={self.scale:.4g}"


class Apart(nn.Module):
    """Queries, keys and values, each from a few channels of its own that one product gives.

    Args:
        first: (..., in) → (..., Σ ranks).
        lasts: rank → heads · size, for queries, keys and values.
    """

    def __init__(self, first: nn.Module, lasts: nn.ModuleList) -> None:
        super().__init__()
        self.first, self.lasts = first, lasts

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        parts = self.first(x).split([last.in_features for last in self.lasts], dim=-1)
        return torch.cat([last(part) for last, part in zip(self.lasts, parts, strict=True)], -1)


def masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores with the mask (True: may look; or added) or, where there is none, with the causal one applied."""
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
