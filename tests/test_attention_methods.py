"""Ways to write an attention layer: full rank against the dense layer, costs against a counter, distillation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rankopt.attention_moments import moments_of, no_moments
from rankopt.attention_parts import Projections, Seen, Shape, packed, unpacked
from rankopt.attention_styles import style_of
from rankopt.decompositions.attention_low_rank import AttentionApart, AttentionFused, AttentionHeads
from rankopt.decompositions.attention_method import AttentionMethod, filled
from rankopt.decompositions.attention_mixers import (
    AttentionNmf,
    AttentionNtf,
    AttentionNtfGrid,
    AttentionNystrom,
    AttentionPnmf,
)
from rankopt.distill_block import DistillOptions, Example, block_error, distill

EXACT: list[AttentionMethod] = [AttentionHeads(), AttentionApart(), AttentionFused()]
MIXERS: list[AttentionMethod] = [
    AttentionNystrom(), AttentionNmf(), AttentionPnmf(), AttentionNtf(), AttentionNtfGrid()
]  # fmt: skip


def dense_layer(
    channels: int, heads: int, size: int, bias: bool, bias_out: bool, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Projections, Shape]:
    g = torch.Generator().manual_seed(seed)
    width = heads * size

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) / shape[-1] ** 0.5

    b = [made(width) if bias else None for _ in range(3)]
    dense = Projections(
        made(width, channels), made(width, channels), made(width, channels), made(channels, width),
        *b, made(channels) if bias_out else None,
    )  # fmt: skip
    return dense, Shape(channels, heads, size, size**-0.5, bias, bias_out)


def written_out(dense: Projections, shape: Shape, x: Tensor, shown: Tensor) -> Tensor:
    """Attention by loops over samples and heads; `shown` (batch, tokens, tokens) is True where a token may look."""
    out = torch.zeros_like(x)
    for n in range(len(x)):
        for h in range(shape.heads):
            rows = slice(h * shape.size, (h + 1) * shape.size)
            q, k, v = (
                x[n] @ w[rows].mT + (0 if b is None else b[rows])
                for w, b in ((dense.q, dense.bq), (dense.k, dense.bk), (dense.v, dense.bv))
            )
            scores = (q @ k.mT * shape.scale).masked_fill(~shown[n], float("-inf"))
            out[n] += scores.softmax(-1) @ v @ dense.o[:, rows].mT
    return out if dense.bo is None else out + dense.bo


@pytest.mark.parametrize("way", EXACT, ids=lambda w: w.name)
@settings(max_examples=15)
@example(channels=7, heads=2, size=4, bias=False, bias_out=False, data=True, masks="none", seed=0)
@given(
    channels=st.sampled_from([3, 7, 8]), heads=st.integers(1, 3), size=st.integers(1, 5), bias=st.booleans(),
    bias_out=st.booleans(), data=st.booleans(), masks=st.sampled_from(["none", "causal", "padding"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_full_rank_is_the_dense_layer_with_all_masks(
    way: AttentionMethod, channels: int, heads: int, size: int, bias: bool, bias_out: bool, data: bool, masks: str,
    seed: int,
) -> None:  # fmt: skip
    dense, shape = dense_layer(channels, heads, size, bias, bias_out, seed)
    torch.manual_seed(seed)
    x = torch.randn(2, 6, channels, dtype=torch.float64)
    few = [Seen(x[:1, :4], "none")]  # fewer tokens than channels: the data leave directions open
    moments = moments_of(dense, shape, few) if data else no_moments(shape)
    factors = way.prepare(shape, dense, moments)
    ranks = way.bounds_of(shape, 6)
    core = filled(way.core(shape, ranks, dtype=torch.float64), way.tensors_of(shape, factors, ranks))
    shown = torch.ones(2, 6, 6, dtype=torch.bool)
    mask: Tensor | None = None
    if masks == "causal":
        shown = shown.tril()
    elif masks == "padding":
        shown[1, :, 4:] = False
        mask = shown[:, None]
    got = core(x, mask, masks == "causal")
    assert torch.allclose(got, written_out(dense, shape, x, shown), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("way", EXACT, ids=lambda w: w.name)
def test_gradients_of_inputs_are_those_of_the_dense_layer(way: AttentionMethod) -> None:
    dense, shape = dense_layer(8, 2, 4, True, True)
    factors = way.prepare(shape, dense, no_moments(shape))
    ranks = way.bounds_of(shape, 5)
    core = filled(way.core(shape, ranks, dtype=torch.float64), way.tensors_of(shape, factors, ranks))
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(core(x).square().sum(), x)[0]
    wanted = torch.autograd.grad(written_out(dense, shape, x, torch.ones(2, 5, 5).bool()).square().sum(), x)[0]
    assert torch.allclose(got, wanted, atol=1e-6)
    core(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in core.parameters())


@pytest.mark.parametrize("way", EXACT, ids=lambda w: w.name)
def test_data_help_and_the_error_falls_with_the_rank(way: AttentionMethod) -> None:
    dense, shape = dense_layer(16, 2, 8, True, True)
    torch.manual_seed(0)
    x = torch.randn(40, 12, 16, dtype=torch.float64) * torch.linspace(3, 0.1, 16).double() + 0.3
    call = Seen(x, "none")
    truth = written_out(dense, shape, x, torch.ones(40, 12, 12).bool())

    def errors(moments: Any) -> list[float]:
        factors = way.prepare(shape, dense, moments)
        found = []
        for share in (0.25, 0.5, 0.75, 1.0):
            ranks = {n: max(1, round(share * b)) for n, b in way.bounds_of(shape, 12).items()}
            core = filled(way.core(shape, ranks, dtype=torch.float64), way.tensors_of(shape, factors, ranks))
            found.append(float((core(x) - truth).detach().square().sum()))
        return found

    with_data, without = errors(moments_of(dense, shape, [call])), errors(no_moments(shape))
    assert with_data == sorted(with_data, reverse=True)
    assert with_data[0] < without[0]
    assert with_data[1] < without[1]


@pytest.mark.parametrize("way", [*EXACT, *MIXERS], ids=lambda w: w.name)
@settings(max_examples=12)
@given(
    heads=st.integers(1, 3), size=st.integers(1, 4), tokens=st.sampled_from([1, 4, 9]), bias=st.booleans(),
    share=st.floats(0, 1), seed=st.integers(0, 9),
)  # fmt: skip
def test_costs_are_what_is_counted_and_arrays_agree(
    way: AttentionMethod, heads: int, size: int, tokens: int, bias: bool, share: float, seed: int
) -> None:
    _, shape = dense_layer(6, heads, size, bias, bias, seed)
    if way.why_not_of(shape, "none", tokens):
        return
    ranks = {n: max(1, round(share * b)) for n, b in way.bounds_of(shape, tokens).items()}
    ranks |= way.fixed_of(shape, tokens)
    core = way.core(shape, ranks, dtype=torch.float32)
    with torch.no_grad():
        for p in core.parameters():
            p.normal_()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        core(torch.randn(2, tokens, 6))
    assert way.macs_of(shape, tokens, ranks) * 2 == counter.get_total_flops() // 2
    assert way.params_of(shape, ranks) == sum(p.numel() for p in core.parameters())
    many = {n: np.array([1, r]) for n, r in ranks.items()}
    assert way.macs_of(shape, tokens, many)[1] == way.macs_of(shape, tokens, ranks)
    assert way.params_of(shape, many)[1] == way.params_of(shape, ranks)


@pytest.mark.parametrize("way", MIXERS, ids=lambda w: w.name)
def test_distillation_lowers_the_error_and_repeats(way: AttentionMethod) -> None:
    dense, shape = dense_layer(8, 2, 4, True, True, dtype=torch.float32)
    torch.manual_seed(0)
    x = torch.randn(48, 9, 8)
    y = written_out(dense, shape, x, torch.ones(48, 9, 9).bool())
    examples = [Example(x, y)]
    ranks = dict.fromkeys(way.rank_names_of(shape), 3)
    factors = way.prepare(shape, dense, no_moments(shape))
    blocks = [filled(way.core(shape, ranks), way.tensors_of(shape, factors, ranks)) for _ in range(2)]
    before = block_error(blocks[0], examples)
    for block in blocks:
        distill(block, examples, DistillOptions(steps=60, lr=3e-3 * way.pace))
    assert block_error(blocks[0], examples) < 0.99 * before
    assert all(torch.equal(a, b) for a, b in zip(blocks[0].parameters(), blocks[1].parameters(), strict=True))


def test_distillation_never_leaves_a_block_worse() -> None:
    block = nn.Linear(3, 3)
    x = torch.randn(8, 4, 3)
    perfect = [Example(x, block(x).detach())]

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
            return self.block(x)

    before = {k: v.clone() for k, v in block.state_dict().items()}
    assert distill(Called(), perfect, DistillOptions(steps=20, lr=0.1)) < 1e-10
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


@pytest.mark.parametrize("way", MIXERS, ids=lambda w: w.name)
def test_what_mixers_refuse(way: AttentionMethod) -> None:
    _, shape = dense_layer(6, 2, 3, True, True)
    assert "causal" in (way.why_not_of(shape, "causal", 9) or "")
    assert "pairs" in (way.why_not_of(shape, "pairs", 9) or "")
    assert way.why_not_of(shape, "none", 9) is None
    grid = way.name == "attention_ntf_grid"
    assert (way.why_not_of(shape, "padding", 9) is not None) == grid
    assert (way.why_not_of(shape, "none", 10) is not None) == grid


@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_holds_all_projections(bias: bool) -> None:
    dense, shape = dense_layer(6, 2, 4, bias, bias)
    again = unpacked(shape, packed(dense))
    for name, value in vars(dense).items():
        other = getattr(again, name)
        assert (other is None) == (value is None)
        assert value is None or torch.equal(other, value)


def test_styles_are_known() -> None:
    assert style_of(nn.Linear(2, 2)) is None
    style = style_of(nn.MultiheadAttention(4, 2, add_zero_attn=True))
    assert style is not None
    assert "add_zero_attn" in (style.why_not(nn.MultiheadAttention(4, 2, add_zero_attn=True)) or "")
