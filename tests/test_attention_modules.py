"""Attention by other means: every form of call against the dense layer, masks, padding, caches, landmarks, moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rankopt.attention_moments import (
    attended_values,
    balanced,
    moments_of,
    no_moments,
    of_outputs,
    of_scores,
    solved_output,
    weighted_svd,
)
from rankopt.attention_parts import Projections, Seen, Shape
from rankopt.attention_styles import style_of
from rankopt.errors import InputError
from rankopt.nn.attention import Attention
from rankopt.nn.attention_calls import TorchCall
from rankopt.nn.factor_mixing import NmfMixing
from rankopt.nn.nystrom import Nystrom, macs_of_nystrom, pseudo_inverse, segment_means


def packed(dense: Projections, shape: Shape) -> Attention:
    """The dense layer as an `Attention`."""
    inward = nn.Linear(shape.channels, 3 * shape.width, bias=shape.bias)
    outward = nn.Linear(shape.width, shape.channels, bias=shape.bias_out)
    with torch.no_grad():
        inward.weight.copy_(torch.cat([dense.q, dense.k, dense.v]))
        outward.weight.copy_(dense.o)
        if shape.bias:
            inward.bias.copy_(torch.cat([dense.bq, dense.bk, dense.bv]))
        if shape.bias_out:
            outward.bias.copy_(dense.bo)
    inward, outward = inward.to(dense.q.dtype), outward.to(dense.q.dtype)
    return Attention(inward, outward, shape.heads, shape.size, shape.size, shape.scale, shape.dropout)


def replaced(module: nn.Module) -> nn.Module:
    style = style_of(module)
    assert style is not None
    assert style.why_not(module) is None
    return style.call(module, packed(style.read(module), style.shape(module))).eval()


def mha(channels: int = 12, heads: int = 3, **options: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(channels, heads, **options).eval()
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
        nn.init.normal_(layer.out_proj.bias)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "float padding", "causal", "both", "by head", "hint", "single"])
def test_called_as_multihead_attention(bias: bool, first: bool, weights: bool, masks: str) -> None:
    torch.manual_seed(0)
    layer = mha(bias=bias, batch_first=first)
    x = torch.randn(2, 5, 12) if first else torch.randn(5, 2, 12)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    triangle = torch.ones(5, 5, dtype=torch.bool).triu(1)
    added = torch.randn(2 * 3, 5, 5)
    kwargs: dict[str, Any] = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.zeros(2, 5).masked_fill(padding, float("-inf"))},
        "causal": {"attn_mask": triangle},
        "both": {"attn_mask": triangle, "key_padding_mask": padding},
        "by head": {"attn_mask": added},
        "hint": {"attn_mask": triangle, "is_causal": True},
        "single": {},
    }[masks]
    if masks == "single":
        x = x[0]
    wanted, seen = layer(x, x, x, need_weights=weights, **kwargs)
    got, mine = replaced(layer)(x, x, x, need_weights=weights, **kwargs)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert (mine is None) == (seen is None)
    if seen is not None:
        assert torch.allclose(mine, seen, atol=1e-5)


def test_called_as_multihead_attention_by_an_encoder_layer() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 5, 12)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=padding)
        for layer in model.layers:
            layer.self_attn = replaced(layer.self_attn)
        got = model(x, src_key_padding_mask=padding)
    assert torch.allclose(got[~padding], wanted[~padding], atol=1e-5)


def test_a_query_of_its_own_is_refused() -> None:
    x, y = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    with pytest.raises(InputError, match="self-attention"):
        replaced(mha(batch_first=True))(x, y, y)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit", "deit", "roberta"])
def test_called_as_blocks_of_transformers(kind: str, eager: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "intermediate_size": 32, "attn_implementation": "eager" if eager else "sdpa"}  # fmt: skip
    tokens = torch.randint(5, 60, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    call: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": mask}
    if kind in ("bert", "roberta"):
        config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind]
        made = {"bert": transformers.BertModel, "roberta": transformers.RobertaModel}[kind]
        model = made(config(vocab_size=60, max_position_embeddings=32, **small))
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, n_positions=32, n_embd=24, n_layer=2, n_head=4,
                                    bos_token_id=1, eos_token_id=2, attn_implementation=small["attn_implementation"])
        )  # fmt: skip
    else:
        config = {"vit": transformers.ViTConfig, "deit": transformers.DeiTConfig}[kind]
        made = {"vit": transformers.ViTModel, "deit": transformers.DeiTModel}[kind]
        model = made(config(image_size=16, patch_size=4, **small))
        call = {"pixel_values": torch.randn(2, 3, 16, 16)}
    model = model.eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        wanted = model(**call)[0]
        found = [(n, m) for n, m in model.named_modules() if style_of(m) is not None]
        assert len(found) == 2
        for name, module in found:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replaced(module))
        got = model(**call)[0]
        keep = mask.bool() if "attention_mask" in call else slice(None)
        assert torch.allclose(got[keep], wanted[keep], atol=1e-5)
        if kind == "gpt2":
            start = tokens[:1, :4]
            long = model.generate(start, max_new_tokens=4, do_sample=False, pad_token_id=0)
            slow = model.generate(start, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
            assert torch.equal(long, slow)


def test_mixers_refuse_masks_between_pairs() -> None:
    x = torch.randn(2, 5, 12)
    core = NmfMixing(nn.Linear(12, 12), nn.Linear(12, 12), 3, 2, torch.randn(3, 12))
    layer = TorchCall(core, 12, 3, True)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert layer(x, x, x, key_padding_mask=padding)[0].shape == x.shape
    with pytest.raises(InputError, match="no other mask"):
        layer(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1))
    with pytest.raises(InputError, match="no other mask"):
        layer(x, x, x, attn_mask=torch.randn(5, 5))
    with pytest.raises(InputError, match="causal"):
        layer(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1), is_causal=True, need_weights=False)


# Landmarks


def nystrom(landmarks: int, dtype: torch.dtype = torch.float64) -> tuple[Nystrom, Attention]:
    layer = mha(12, 3, batch_first=True)
    style = style_of(layer)
    assert style is not None
    dense = packed(style.read(layer), style.shape(layer)).to(dtype)
    return Nystrom(dense.inward, dense.outward, 3, landmarks, dense.scale), dense


def test_one_landmark_a_token_comes_close_to_attention() -> None:
    torch.manual_seed(0)
    layer, dense = nystrom(6)
    x = torch.randn(2, 6, 12, dtype=torch.float64) * 3
    assert torch.allclose(layer(x), dense(x), atol=0.05 * float(dense(x).detach().abs().max()))


@pytest.mark.parametrize("landmarks", [1, 3, 4, 7])
def test_nystrom_leaves_padding_out(landmarks: int) -> None:
    torch.manual_seed(0)
    layer, _ = nystrom(landmarks)
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    keep = torch.tensor([[True] * 5 + [False] * 2, [False] * 2 + [True] * 5, [True] * 6 + [False]])
    got = layer(x, keep)
    assert got.isfinite().all()
    for n in range(3):
        assert torch.allclose(got[n, keep[n]], layer(x[n : n + 1, keep[n]])[0], atol=1e-10)


@given(tokens=st.integers(1, 12), count=st.integers(1, 12))
@settings(max_examples=40)
def test_segment_means(tokens: int, count: int) -> None:
    x = torch.randn(2, 3, tokens, 4, dtype=torch.float64)
    got = segment_means(x, count)
    for run in range(count):
        own = [t for t in range(tokens) if t * count // tokens == run]
        wanted = x[:, :, own].mean(2) if own else torch.zeros(2, 3, 4, dtype=torch.float64)
        assert torch.allclose(got[:, :, run], wanted)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pseudo_inverse(n: int) -> None:
    torch.manual_seed(n)
    a = torch.softmax(torch.randn(3, n, n, dtype=torch.float64), -1)
    assert torch.allclose(pseudo_inverse(a, 40), torch.linalg.pinv(a), atol=1e-6)


def test_nystrom_costs_what_a_counter_finds() -> None:
    layer, _ = nystrom(4)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() // 2 == 2 * (7 * 12 * 48 + 3 * macs_of_nystrom(7, 4, 4))


def test_attention_costs_what_a_counter_finds() -> None:
    inward, outward = nn.Linear(12, 3 * (2 * 2 + 5)), nn.Linear(15, 12)
    layer = Attention(inward, outward, 3, 2, 5, 0.5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(2, 7, 12))
    assert counter.get_total_flops() // 2 == 2 * (7 * 12 * 27 + 7 * 15 * 12 + 3 * 7 * 7 * (2 + 5))


# What the data say


def made() -> tuple[Projections, Shape, list[Seen]]:
    torch.manual_seed(0)
    layer = mha(12, 3, batch_first=True).double()
    style = style_of(layer)
    assert style is not None
    skewed = torch.randn(12, 12, dtype=torch.float64) @ torch.diag(torch.linspace(2, 0.05, 12).double())
    x = torch.randn(6, 9, 12, dtype=torch.float64) @ skewed + 0.5
    keep = torch.ones(6, 9, dtype=torch.bool)
    keep[3:, 6:] = False
    calls = [Seen(x[:3], "none"), Seen(x[3:], "padding", keep[3:, None, None])]
    return style.read(layer), style.shape(layer), calls


def test_moments_leave_padding_out() -> None:
    dense, shape, calls = made()
    got = moments_of(dense, shape, calls)
    rows = torch.cat([calls[0].x.flatten(0, 1), calls[1].x[:, :6].flatten(0, 1)])
    assert torch.allclose(got.mean, rows.mean(0))
    assert torch.allclose(got.covariance, rows.mT.cov(correction=0))
    short = [calls[0], Seen(calls[1].x[:, :6], "none")]
    assert torch.allclose(got.values, moments_of(dense, shape, short).values)
    layer = packed(dense, shape).double()
    out = layer.outward(attended_values(dense, shape, calls[0]))
    assert torch.allclose(out, layer(calls[0].x))


def scores(dense: Projections, shape: Shape, x: Tensor) -> tuple[Tensor, Tensor]:
    q = (x @ dense.q.mT + dense.bq).unflatten(-1, (shape.heads, -1)).movedim(-2, 0)
    k = (x @ dense.k.mT + dense.bk).unflatten(-1, (shape.heads, -1)).movedim(-2, 0)
    return q, k


def test_balanced_scores_are_the_best_cut_of_the_product() -> None:
    """Against a truncated SVD of all scores between all tokens, which is the optimum by Eckart and Young."""
    dense, shape, calls = made()
    calls = calls[:1]
    found = of_scores(dense, shape, moments_of(dense, shape, calls))
    q, k = scores(dense, shape, calls[0].x.flatten(0, 1))
    k = k - k.mean(1, keepdim=True)
    for rank in (1, 2, 3):
        p, r = found.left[:, :rank], found.right[:, :rank]
        cut = (q @ p.mT) @ (k @ r.mT).mT
        error = (q @ k.mT - cut).square().sum()
        best = torch.linalg.svdvals(q @ k.mT)[:, rank:].square().sum()
        assert error <= best * (1 + 1e-4) + 1e-6
    assert torch.allclose(found.left.mT @ found.right, torch.eye(4, dtype=torch.float64).expand(3, 4, 4), atol=1e-6)


def test_balanced_outputs_beat_the_weights_alone() -> None:
    dense, shape, calls = made()
    seen = moments_of(dense, shape, calls)
    values = torch.cat([attended_values(dense, shape, c)[:, :6].flatten(0, 1) for c in calls])

    def error(found: Any, rank: int, solve: bool) -> float:
        o = dense.o.unflatten(1, (3, 4)).movedim(1, 0)
        cut = found.right[:, :rank]
        few = torch.einsum("hrd,nhd->nhr", cut, values.unflatten(1, (3, 4))).flatten(1)
        back = solved_output(dense.o, found.left[:, :rank], cut, seen.values) if solve else torch.cat(
            [o[h] @ found.left[h, :rank].mT for h in range(3)], 1
        )  # fmt: skip
        return float((values @ dense.o.mT - few @ back.mT).square().sum())

    with_data, without = of_outputs(dense, shape, seen), of_outputs(dense, shape, no_moments(shape))
    assert error(with_data, 2, False) < error(without, 2, False)
    assert error(with_data, 2, True) < error(with_data, 2, False)
    assert error(with_data, 4, True) < 1e-10 * float(values.square().sum())


def test_weighted_svd_is_optimal() -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 5, dtype=torch.float64)
    g = torch.randn(2, 3, 3, dtype=torch.float64)
    m = torch.randn(5, 5, dtype=torch.float64)
    g, m = g @ g.mT, m @ m.mT
    first, last, energy = weighted_svd(w, g, m)
    assert torch.allclose(last @ first, w, atol=1e-6)
    for rank in (1, 2, 4):
        d = w - last[:, :rank] @ first[:rank]
        error = torch.trace(torch.block_diag(*g) @ d @ m @ d.mT)
        assert torch.allclose(error, energy[rank:].sum(), rtol=1e-3)
        _u, s, _vh = torch.linalg.svd(torch.linalg.cholesky(torch.block_diag(*g)).mT @ w @ torch.linalg.cholesky(m))
        assert torch.allclose(s[rank:].square().sum(), error, rtol=1e-3)


def test_balancing_survives_heads_without_energy() -> None:
    gram = torch.zeros(2, 3, 3, dtype=torch.float64)
    gram[0] = torch.eye(3)
    found = balanced(gram, gram)
    assert found.left.isfinite().all()
    assert found.right.isfinite().all()
    assert torch.allclose(found.left.mT @ found.right, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), atol=1e-6)
