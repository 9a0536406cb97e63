"""Modules that are called as the attention layers they stand for, around `Attention`, `Nystrom` or `FactorMixing`.

`TorchCall` is called as nn.MultiheadAttention, the others as the attention blocks of models of transformers. Softmax
attention takes any mask. The others mix all tokens of a sample, so they honour padding and refuse every other mask when
they are called, with an error that says so; they have no attention weights and give None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import InputError
from rankopt.nn.attention import Attention


class AttentionCall(nn.Module):
    """What all forms of call have in common: `core` on one input, with the masks in one form.

    Args:
        core: (batch, tokens, in) → (batch, tokens, out).
        causal: where no mask says otherwise, no token looks at later ones.
    """

    def __init__(self, core: nn.Module, causal: bool = False) -> None:
        super().__init__()
        self.core, self.causal = core, causal

    def run(
        self, x: Tensor, mask: Tensor | None, causal: bool, weights: bool = False, cache: Any = None, place: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and attention weights (batch, heads, tokens, tokens) or None.

        Args:
            x: (batch, tokens, in).
            mask: True where a token may look, or what is added to scores; broadcast to (batch, heads, tokens, tokens).
            causal: whether no token looks at later ones, where there is no mask.
            weights: whether attention weights are wanted.
            cache: keys and values of earlier tokens, as models of transformers keep them; `place`: of which layer.
        """
        core = self.core
        if isinstance(core, Attention):
            q, k, v = core.project(x)
            if cache is not None:
                k, v = cache.update(k, v, place)
            return core.attend(q, k, v, mask, causal and q.shape[2] > 1, weights)
        if cache is not None or causal:
            wanted = "causal attention" if causal else "a cache of earlier tokens"
            raise InputError(f"{type(core).__name__} mixes all tokens of a sample; {wanted} needs attention")
        keep = None if mask is None else padding(mask, type(core).__name__).expand(x.shape[0], -1)
        return core(x, keep), None


def padding(mask: Tensor, name: str) -> Tensor:
    """(batch, tokens), False at padding, of a mask (batch, 1, 1 or tokens, tokens) that hides the same from all.

    Raises:
        InputError: different tokens may look at different ones, or the mask weighs what it shows. Not seen while a
            model is traced.
    """
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    keep = shown[:, 0, 0]
    if not torch.compiler.is_compiling():
        weighed = mask.dtype != torch.bool and bool((mask.masked_fill(~shown, 0) != 0).any())
        if weighed or not bool((shown == keep[:, None, None]).all()):
            raise InputError(
                f"{name} mixes all tokens of a sample: it can leave padding out, and no other mask can be honoured"
            )
    return keep


class TorchCall(AttentionCall):
    """Called as nn.MultiheadAttention, for self-attention.

    nn.TransformerEncoderLayer asks its attention for the attributes below; that there is no ``in_proj_bias`` keeps it
    from its fused path, which would read weights that aren't there.
    """

    in_proj_bias: None = None
    _qkv_same_embed_dim = True

    def __init__(self, core: nn.Module, embed_dim: int, num_heads: int, batch_first: bool) -> None:
        super().__init__(core)
        self.embed_dim, self.num_heads, self.batch_first = embed_dim, num_heads, batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See nn.MultiheadAttention. Raises `InputError` when query, key and value are not one tensor."""
        if query is not key or key is not value:
            raise InputError("attention was replaced as self-attention; it can't take a query of its own")
        single = query.dim() == 2
        x = query.unsqueeze(0) if single else query if self.batch_first else query.transpose(0, 1)
        hint = is_causal and key_padding_mask is None and not need_weights  # as PyTorch: then the mask is not looked at
        mask = None if hint else self._merged(attn_mask, key_padding_mask, x)
        y, weights = self.run(x, mask, hint, need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _merged(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, x: Tensor) -> Tensor | None:
        """Both masks as one that is added to (batch, heads, tokens, tokens); here True means: not seen."""
        if attn_mask is not None:
            attn_mask = _added(attn_mask, x)
            many = attn_mask.dim() == 3
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads)) if many else attn_mask[None, None]
        if key_padding_mask is None:
            return attn_mask
        if key_padding_mask.dim() == 1:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        by_key = _added(key_padding_mask, x)[:, None, None, :]
        return by_key if attn_mask is None else attn_mask + by_key


class Gpt2Call(AttentionCall):
    """Called as GPT2Attention of transformers.

    Args:
        core, causal: see `AttentionCall`.
        dropout: of the output.
        place: the layer's number in the cache.
    """

    def __init__(self, core: nn.Module, causal: bool, dropout: nn.Module, place: int) -> None:
        super().__init__(core, causal)
        self.resid_dropout, self.layer_idx = dropout, place

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See GPT2Attention."""
        _no_encoder(encoder_hidden_states)
        cache = kwargs.get("past_key_values") if cache is None else cache
        causal = self.causal and kwargs.get("is_causal") is not False and attention_mask is None
        y, weights = self.run(hidden_states, attention_mask, causal, output_attentions, _of_self(cache), self.layer_idx)
        return self.resid_dropout(y), weights


class BertCall(AttentionCall):
    """Called as BertAttention of transformers and its kin: attention, dropout, and the norm of the sum with the input.

    Args:
        core, causal: see `AttentionCall`.
        dropout, norm: those of the block's output.
        place: the layer's number in the cache.
    """

    def __init__(self, core: nn.Module, causal: bool, dropout: nn.Module, norm: nn.Module, place: int) -> None:
        super().__init__(core, causal)
        self.output = nn.ModuleDict({"dropout": dropout, "LayerNorm": norm})  # named as they were
        self.layer_idx = place

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See BertAttention."""
        _no_encoder(encoder_hidden_states)
        cache = kwargs.get("past_key_values") if cache is None else cache
        causal = self.causal and attention_mask is None
        y, weights = self.run(hidden_states, attention_mask, causal, False, _of_self(cache), self.layer_idx)
        return self.output["LayerNorm"](self.output["dropout"](y) + hidden_states), weights


class VitCall(AttentionCall):
    """Called as ViTAttention of transformers and its kin."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See ViTAttention."""
        return self.run(hidden_states, attention_mask, False)


def _added(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of PyTorch's attention (True: not seen) as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(x.dtype)
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, float("-inf"))


def _of_self(cache: Any) -> Any:
    return getattr(cache, "self_attention_cache", cache)


def _no_encoder(states: Tensor | None) -> None:
    if states is not None:
        raise InputError("attention was replaced as self-attention; it can't look at an encoder's states")
