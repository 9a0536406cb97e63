"""Multiplicative updates: objectives that never rise, signs, gradients against a loop written out, and their costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rankopt.nn import multiplicative as mu
from rankopt.nn.factor_mixing import NmfMixing, NtfMixing, PnmfMixing, macs_of_nmf, macs_of_ntf, macs_of_pnmf

SIZES = st.integers(1, 7)


def positive(generator: torch.Generator, *shape: int, zeros: float = 0.0) -> Tensor:
    x = torch.rand(*shape, generator=generator, dtype=torch.float64) * 3
    return torch.where(torch.rand(*shape, generator=generator) < zeros, torch.zeros_like(x), x)


def objective(name: str, x: Tensor, state: mu.State) -> Tensor:
    """‖x − what the factors stand for‖², written with einsum and not with the code under test."""
    if name == "nmf":
        fitted = torch.einsum("...nr,...rm->...nm", *state)
    elif name == "pnmf":
        fitted = torch.einsum("...nr,...kr,...km->...nm", state[0], state[0], x)
    else:
        fitted = torch.einsum("...ir,...jr,...kr->...ijk", *state)
    return (x - fitted).square().flatten(1).sum(1)


def begun(
    name: str, generator: torch.Generator, n: int, m: int, k: int, r: int, zeros: float
) -> tuple[Tensor, mu.State]:
    if name == "nmf":
        return positive(generator, 2, n, m, zeros=zeros), (
            positive(generator, 2, n, r, zeros=zeros), positive(generator, 2, r, m, zeros=zeros)
        )  # fmt: skip
    if name == "pnmf":
        return positive(generator, 2, n, m, zeros=zeros), (positive(generator, 2, n, r, zeros=zeros),)
    factors = tuple(positive(generator, 2, size, r, zeros=zeros) for size in (n, m, k))
    return positive(generator, 2, n, m, k, zeros=zeros), factors


STEPS: dict[str, Callable[..., mu.State]] = {"nmf": mu.nmf_step, "pnmf": mu.pnmf_step, "ntf": mu.ntf_step}


@pytest.mark.parametrize("name", STEPS)
@settings(max_examples=40)
@given(n=SIZES, m=SIZES, k=SIZES, r=st.integers(1, 5), zeros=st.sampled_from([0.0, 0.3, 0.9]), seed=st.integers(0, 999))
def test_the_objective_never_rises_and_no_factor_gets_negative(
    name: str, n: int, m: int, k: int, r: int, zeros: float, seed: int
) -> None:
    x, state = begun(name, torch.Generator().manual_seed(seed), n, m, k, r, zeros)
    before = objective(name, x, state)
    for _ in range(6):
        state = STEPS[name](x, *state)
        after = objective(name, x, state)
        assert (after <= before * (1 + 1e-9) + 1e-12).all()
        assert all((f >= 0).all() and f.isfinite().all() for f in state)
        before = after


@pytest.mark.parametrize("name", STEPS)
def test_many_steps_find_an_exact_factorization(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    _, truth = begun(name, generator, 6, 5, 4, 2, 0.0)
    if name == "pnmf":  # two blocks of tokens that look alike: X = W Wᵀ X for W their normalized indicators
        x = torch.cat([positive(generator, 2, 1, 5).expand(2, 3, 5), positive(generator, 2, 1, 5).expand(2, 3, 5)], 1)
    elif name == "nmf":
        x = truth[0] @ truth[1]
    else:
        x = mu.ntf_sum(*truth)
    _, state = begun(name, generator, 6, 5, 4, 2, 0.0)
    left = objective(name, x, mu.iterate(STEPS[name], x, state, 2000))
    assert (left < 2e-3 * x.square().flatten(1).sum(1)).all()


def test_ntf_sum_is_the_sum_of_outer_products() -> None:
    a, b, c = (torch.randn(2, n, 3, dtype=torch.float64) for n in (4, 5, 6))
    assert torch.allclose(mu.ntf_sum(a, b, c), torch.einsum("bir,bjr,bkr->bijk", a, b, c))


def test_pnmf_starts_at_the_best_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x, (w,) = positive(generator, 2, 6, 5), (positive(generator, 2, 6, 3),)
    (best,) = mu.pnmf_start(x, w)
    least = objective("pnmf", x, (best,))
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert (objective("pnmf", x, (best * factor,)) >= least - 1e-9).all()


@pytest.mark.parametrize("name", STEPS)
def test_gradients_through_all_steps_pass_gradcheck(name: str) -> None:
    x, state = begun(name, torch.Generator().manual_seed(1), 4, 3, 2, 2, 0.0)
    inputs = (x.requires_grad_(), *(f.requires_grad_() for f in state))
    assert torch.autograd.gradcheck(lambda x, *s: mu.iterate(STEPS[name], x, s, 3), inputs)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("steps", [1, 4])
def test_the_one_step_gradient_is_that_of_the_last_step_with_constants(name: str, steps: int) -> None:
    x, state = begun(name, torch.Generator().manual_seed(2), 5, 4, 3, 2, 0.0)
    x = x.requires_grad_()
    state = tuple(f.requires_grad_() for f in state)
    weights = [torch.randn_like(f) for f in state]
    got = mu.iterate(STEPS[name], x, state, steps, one_step=True)
    grads = torch.autograd.grad(
        sum((g * w).sum() for g, w in zip(got, weights, strict=True)), [x, *state], allow_unused=True
    )
    fixed = tuple(f.detach() for f in state)
    for _ in range(steps - 1):
        fixed = tuple(f.detach() for f in STEPS[name](x.detach(), *fixed))
    wanted = STEPS[name](x, *fixed)
    (truth,) = torch.autograd.grad(sum((g * w).sum() for g, w in zip(wanted, weights, strict=True)), [x])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert torch.allclose(grads[0], truth)
    assert all(g is None for g in grads[1:])


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_finite_where_tokens_are_all_zero(name: str) -> None:
    x, state = begun(name, torch.Generator().manual_seed(4), 5, 4, 3, 2, 0.5)
    x[:, 2] = 0
    x = x.float().requires_grad_()
    state = tuple(f.float().requires_grad_() for f in state)
    out = mu.iterate(STEPS[name], x, state, 5)
    grads = torch.autograd.grad(sum(f.square().sum() for f in out), [x, *state])
    assert all(g.isfinite().all() for g in grads)


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2


@settings(max_examples=25)
@given(n=SIZES, m=SIZES, k=SIZES, r=st.integers(1, 4), steps=st.integers(1, 3))
def test_costs_are_what_a_counter_finds(n: int, m: int, k: int, r: int, steps: int) -> None:
    linear, batch = torch.nn.Identity(), 2
    x = torch.rand(batch, n, m * k)
    nmf = NmfMixing(linear, linear, r, steps, torch.randn(r, m * k))
    pnmf = PnmfMixing(linear, linear, r, steps, torch.randn(m * k, r))
    heads = NtfMixing(linear, linear, r, steps, torch.randn(m + k, r), (m, k))
    grid = NtfMixing(linear, linear, r, steps, torch.randn(n + m + k, r), (n, m, k))
    assert counted(lambda: nmf(x)) == batch * macs_of_nmf(n, m * k, r, steps)
    assert counted(lambda: pnmf(x)) == batch * macs_of_pnmf(n, m * k, r, steps)
    assert counted(lambda: heads(x)) == batch * macs_of_ntf((n, m, k), r, steps)
    assert counted(lambda: grid(torch.rand(batch, n * m, k))) == batch * macs_of_ntf((n, m, k), r, steps)


@pytest.mark.parametrize("kind", ["nmf", "pnmf", "ntf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_padding_changes_nothing_and_gradients_reach_all(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inward, outward = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
    start = {"nmf": (3, 8), "pnmf": (8, 3), "ntf": (6, 3)}[kind]
    make = {"nmf": NmfMixing, "pnmf": PnmfMixing}.get(kind)
    layer = (
        make(inward, outward, 3, 4, torch.randn(start), one_step=False)
        if make
        else NtfMixing(inward, outward, 3, 4, torch.randn(start), (4, 2), one_step=False)
    ).to(dtype)
    x = torch.randn(2, 7, 6, dtype=dtype)
    keep = torch.tensor([[True] * 5 + [False] * 2, [False] + [True] * 5 + [False]])
    got = layer(x, keep)
    assert got.dtype == dtype
    alone = torch.cat([layer(x[n : n + 1, keep[n]]) for n in range(2)])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 3e-2
    assert torch.allclose(got[keep].reshape(alone.shape), alone, atol=tolerance, rtol=tolerance)
    got.square().sum().backward()
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


def test_one_step_changes_gradients_and_not_values() -> None:
    torch.manual_seed(0)
    layer = NmfMixing(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6), 3, 4, torch.randn(3, 8), one_step=True).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    got = layer(x)
    got.square().sum().backward()
    one = layer.inward.weight.grad.clone()
    assert layer.start.grad is None
    layer.zero_grad()
    layer.one_step = False
    assert torch.equal(layer(x), got)
    layer(x).square().sum().backward()
    assert not torch.allclose(layer.inward.weight.grad, one)
    assert layer.start.grad.abs().sum() > 0
