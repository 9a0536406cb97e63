"""The self-attention layers that are known: how each is recognized, read, and called.

nn.MultiheadAttention, and the attention blocks of GPT-2, BERT and ViT in transformers and of models that share their
code. Those are recognized by their names, so transformers is not imported; what is read of them is checked by shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.attention_parts import Projections, Seen, Shape, classified
from rankopt.errors import InputError
from rankopt.nn.attention_calls import AttentionCall, BertCall, Gpt2Call, TorchCall, VitCall


class Style(ABC):
    """One form of self-attention layer."""

    name: str

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Whether the module is of this form."""

    @abstractmethod
    def why_not(self, module: Any) -> str | None:
        """Why this one can't be replaced although it is of this form."""

    @abstractmethod
    def shape(self, module: Any) -> Shape:
        """Its sizes."""

    @abstractmethod
    def read(self, module: Any) -> Projections:
        """Its weights, as they are (views where possible)."""

    @abstractmethod
    def state(self, dense: Projections) -> dict[str, Tensor | None]:
        """The entries of its state dict for such weights; None where it has no such bias."""

    @abstractmethod
    def call(self, module: Any, core: nn.Module) -> AttentionCall:
        """A module called as this one, around another core."""

    @abstractmethod
    def seen(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Seen:
        """What a call gave it. Raises `InputError` for a call that is not self-attention on plain inputs."""

    def same_output(self, module: Any, output: Any) -> Tensor:
        """(batch, tokens, channels) of what a call returned."""
        return output[0] if isinstance(output, tuple) else output


class _Torch(Style):
    name = "torch"

    def fits(self, module: nn.Module) -> bool:
        return type(module) is nn.MultiheadAttention

    def why_not(self, module: nn.MultiheadAttention) -> str | None:
        if not module._qkv_same_embed_dim:
            return "its keys or values are made of inputs of another size, so it is no self-attention"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds keys and values of its own (add_bias_kv, add_zero_attn)"
        return None

    def shape(self, module: nn.MultiheadAttention) -> Shape:
        bias = module.in_proj_bias is not None
        size = module.head_dim
        return Shape(module.embed_dim, module.num_heads, size, size**-0.5, bias, bias, dropout=module.dropout)

    def read(self, module: nn.MultiheadAttention) -> Projections:
        q, k, v = module.in_proj_weight.chunk(3)
        bq, bk, bv = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        return Projections(q, k, v, module.out_proj.weight, bq, bk, bv, module.out_proj.bias)

    def state(self, dense: Projections) -> dict[str, Tensor | None]:
        bias = None if dense.bq is None else _together(dense.bq, dense.bk, dense.bv)
        return {
            "in_proj_weight": _together(dense.q, dense.k, dense.v), "in_proj_bias": bias,
            "out_proj.weight": dense.o, "out_proj.bias": dense.bo,
        }  # fmt: skip

    def call(self, module: nn.MultiheadAttention, core: nn.Module) -> AttentionCall:
        return TorchCall(core, module.embed_dim, module.num_heads, module.batch_first)

    def seen(self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Seen:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights",
                 "is_causal")  # fmt: skip
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        query = given["query"]
        if given["key"] is not query or given["value"] is not query:
            raise InputError("its query, key and value are not one tensor, so it is no self-attention")
        single = query.dim() == 2
        x = query.unsqueeze(0) if single else query if module.batch_first else query.transpose(0, 1)
        call = TorchCall(nn.Identity(), module.embed_dim, module.num_heads, module.batch_first)
        mask = call._merged(given.get("attn_mask"), given.get("key_padding_mask"), x)
        return classified(x, mask, False)

    def same_output(self, module: nn.MultiheadAttention, output: Any) -> Tensor:
        y: Tensor = output[0]
        return y.unsqueeze(0) if y.dim() == 2 else y if module.batch_first else y.transpose(0, 1)


class _Named(Style):
    """Blocks of transformers, by the names of their classes."""

    classes: tuple[str, ...]

    def fits(self, module: nn.Module) -> bool:
        return type(module).__name__ in self.classes and type(module).__module__.startswith("transformers.models.")

    def seen(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Seen:
        given = dict(zip(self.arguments, args, strict=False)) | dict(kwargs)
        if given.get("encoder_hidden_states") is not None:
            raise InputError("it looks at an encoder's states, so it is no self-attention")
        return classified(given["hidden_states"], given.get("attention_mask"), self.shape(module).causal)

    arguments: tuple[str, ...] = ("hidden_states", "attention_mask")


class _Gpt2(_Named):
    name = "gpt2"
    classes = ("GPT2Attention",)
    arguments = ("hidden_states", "cache", "attention_mask", "encoder_hidden_states")

    def why_not(self, module: Any) -> str | None:
        if module.is_cross_attention:
            return "it looks at an encoder's states, so it is no self-attention"
        if module.reorder_and_upcast_attn:
            return "it computes scores in float32 (reorder_and_upcast_attn), which is not built here"
        return None

    def shape(self, module: Any) -> Shape:
        return Shape(
            module.embed_dim, module.num_heads, module.head_dim, float(module.scaling), True, True,
            bool(module.is_causal), module.attn_dropout.p,
        )  # fmt: skip

    def read(self, module: Any) -> Projections:
        q, k, v = module.c_attn.weight.mT.chunk(3)
        bq, bk, bv = module.c_attn.bias.chunk(3)
        return Projections(q, k, v, module.c_proj.weight.mT, bq, bk, bv, module.c_proj.bias)

    def state(self, dense: Projections) -> dict[str, Tensor | None]:
        return {
            "c_attn.weight": _together(dense.q, dense.k, dense.v).mT,
            "c_attn.bias": _together(dense.bq, dense.bk, dense.bv),
            "c_proj.weight": dense.o.mT,
            "c_proj.bias": dense.bo,
        }

    def call(self, module: Any, core: nn.Module) -> AttentionCall:
        dropout = nn.Dropout(module.resid_dropout.p)
        return Gpt2Call(core, self.shape(module).causal, dropout, module.layer_idx or 0)


class _Bert(_Named):
    name = "bert"
    classes = ("BertAttention", "RobertaAttention", "CamembertAttention", "XLMRobertaAttention", "ElectraAttention",
               "ErnieAttention")  # fmt: skip
    arguments = ("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "cache")

    def why_not(self, module: Any) -> str | None:
        if module.is_cross_attention:
            return "it looks at an encoder's states, so it is no self-attention"
        return None

    def shape(self, module: Any) -> Shape:
        own = module.self
        return Shape(
            own.query.in_features, own.num_attention_heads, own.attention_head_size, float(own.scaling),
            own.query.bias is not None, module.output.dense.bias is not None, bool(own.is_causal), own.dropout.p,
        )  # fmt: skip

    def read(self, module: Any) -> Projections:
        own, out = module.self, module.output.dense
        return Projections(
            own.query.weight, own.key.weight, own.value.weight, out.weight,
            own.query.bias, own.key.bias, own.value.bias, out.bias,
        )  # fmt: skip

    def state(self, dense: Projections) -> dict[str, Tensor | None]:
        return _by_name(dense, ("self.query", "self.key", "self.value", "output.dense"))

    def call(self, module: Any, core: nn.Module) -> AttentionCall:
        old = module.output
        norm = nn.LayerNorm(
            old.LayerNorm.normalized_shape, old.LayerNorm.eps, device=old.dense.weight.device,
            dtype=old.LayerNorm.weight.dtype,
        )  # fmt: skip
        if not old.LayerNorm.weight.is_meta:
            norm.load_state_dict(old.LayerNorm.state_dict())
        return BertCall(core, self.shape(module).causal, nn.Dropout(old.dropout.p), norm, module.self.layer_idx or 0)


class _Vit(_Named):
    name = "vit"
    classes = ("ViTAttention", "DeiTAttention", "IJepaAttention", "ViTMSNAttention", "Dinov2Attention")

    def why_not(self, module: Any) -> str | None:
        return None

    def shape(self, module: Any) -> Shape:
        return Shape(
            module.q_proj.in_features, module.num_attention_heads, module.head_dim, float(module.scaling),
            module.q_proj.bias is not None, module.o_proj.bias is not None, False, float(module.attention_dropout),
        )  # fmt: skip

    def read(self, module: Any) -> Projections:
        q, k, v, o = module.q_proj, module.k_proj, module.v_proj, module.o_proj
        return Projections(q.weight, k.weight, v.weight, o.weight, q.bias, k.bias, v.bias, o.bias)

    def state(self, dense: Projections) -> dict[str, Tensor | None]:
        return _by_name(dense, ("q_proj", "k_proj", "v_proj", "o_proj"))

    def call(self, module: Any, core: nn.Module) -> AttentionCall:
        return VitCall(core)


STYLES: dict[str, Style] = {style.name: style for style in (_Torch(), _Gpt2(), _Bert(), _Vit())}


def style_of(module: nn.Module) -> Style | None:
    """The form of a self-attention layer, None when it is none that is known."""
    return next((style for style in STYLES.values() if style.fits(module)), None)


def _together(*parts: Tensor | None) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


def _by_name(dense: Projections, names: tuple[str, ...]) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    for part, name in zip("qkvo", names, strict=True):
        found |= {f"{name}.weight": getattr(dense, part), f"{name}.bias": getattr(dense, f"b{part}")}
    return found
