"""Divergences against brute force, the scale of their score, and which tensor of an output is judged."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from torch import Tensor

from rankopt.divergence import Divergence, pick
from rankopt.errors import DataError


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "class_dim"), [((5, 4), -1), ((3, 7, 4), -1), ((2, 4, 3, 5), 1), ((2, 4, 6), 1)])
def test_kl_is_what_scipy_finds(shape: tuple[int, ...], class_dim: int) -> None:
    a, b = logits(*shape), logits(*shape, seed=1)
    found = Divergence("logits", class_dim).between(a, b)
    p, q = (t.double().movedim(class_dim, -1).softmax(-1).numpy() for t in (a, b))
    expected = rel_entr(p, q).sum(-1).reshape(shape[0], -1).mean(1)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert Divergence("logits", class_dim).between(a, a).abs().max() == 0


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3, 2)])
def test_regression(shape: tuple[int, ...]) -> None:
    a, b = logits(*shape), logits(*shape, seed=1)
    divergence = Divergence.of(a, "regression")
    relative = ((a - b) ** 2).reshape(6, -1).mean(1) / a.var(correction=0) / 2
    torch.testing.assert_close(divergence.between(a, b), relative)
    assert Divergence.of(torch.zeros(4, 1)).variance > 0  # a constant output divides by nothing


def test_what_is_chosen() -> None:
    assert Divergence.of(logits(2, 5)) == Divergence("logits", -1)
    assert Divergence.of(logits(2, 5, 8, 8)) == Divergence("logits", 1)
    assert Divergence.of(logits(2, 9, 5)) == Divergence("logits", -1)
    assert Divergence.of(logits(2, 1)).kind == "regression"
    assert Divergence.of(logits(6)).kind == "regression"
    assert Divergence.of(logits(2, 5, 3), class_dim=1) == Divergence("logits", 1)
    assert Divergence.of(logits(2, 5), "regression").variance > 0


@pytest.mark.parametrize(("kind", "class_dim"), [("softmax", None), ("auto", 2), ("logits", -4)])
def test_what_does_not_fit(kind: str, class_dim: int | None) -> None:
    with pytest.raises(DataError, match=r"^output: "):
        Divergence.of(logits(2, 5), kind, class_dim)
    with pytest.raises(DataError, match="class_dim"):
        Divergence.of(torch.tensor(1.0))


@settings(max_examples=15, derandomize=True)
@given(
    shape=st.sampled_from([(3, 4), (2, 3, 4), (2, 4, 2, 3)]),
    kind=st.sampled_from(["logits", "regression"]),
    seed=st.integers(0, 5),
)
def test_score_has_the_scale_of_the_divergence(shape: tuple[int, ...], kind: str, seed: int) -> None:
    """Half the mean square of ⟨gradient, tiny change⟩ is the divergence per sample."""
    class_dim, copies = 1 if len(shape) == 4 else -1, 4000
    single = logits(*shape, seed=seed) / 2
    out = single.repeat_interleave(copies, 0).requires_grad_()  # many draws in one call
    divergence = Divergence(kind, class_dim, 2.5)
    (g,) = torch.autograd.grad(divergence.score(out, torch.Generator().manual_seed(seed)), out)
    change = logits(*shape, seed=seed + 10) / 30
    moved = (g * change.repeat_interleave(copies, 0)).flatten(1).sum(1) ** 2
    expected = divergence.between(single, single + change)
    torch.testing.assert_close(moved.reshape(-1, copies).mean(1) / 2, expected, rtol=0.25, atol=1e-6)


@pytest.mark.parametrize("draws", [2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 4), (1, 3, 4)])
def test_draws_together_have_the_scale_of_the_divergence(shape: tuple[int, ...], draws: int) -> None:
    copies, divergence, generator = 3000, Divergence(), torch.Generator().manual_seed(1)
    single = 2 * logits(*shape)
    out = single.expand(copies, *shape[1:]).clone().requires_grad_()
    change = logits(*shape, seed=9) / 30
    squares = []
    for draw in range(draws):
        (g,) = torch.autograd.grad(divergence.score(out, generator, 1.0, draw, draws), out)
        squares.append((g * change).flatten(1).sum(1) ** 2)
    expected = float(divergence.between(single, single + change))
    assert float(torch.stack(squares).mean()) / 2 == pytest.approx(expected, rel=0.15)


def test_a_sure_prediction_needs_few_draws() -> None:
    """With two classes the draws are all there is; with one that is nearly sure they scatter far less than plain ones
    do."""
    p, change = torch.tensor([0.98, 0.012, 0.005, 0.003]), torch.tensor([[0.0, 0.05, 0.02, -0.04]])

    def estimates(draws: int, apart: bool, logits: Tensor, change: Tensor) -> Tensor:
        found = []
        for seed in range(60):
            generator, total = torch.Generator().manual_seed(seed), 0.0
            for draw in range(draws):
                out = logits.expand(50, -1).clone().requires_grad_()
                given = (draw, draws) if apart else ()
                (g,) = torch.autograd.grad(Divergence().score(out, generator, 1.0, *given), out)
                total += float((g * change).sum(1).square().mean()) / draws
            found.append(total)
        return torch.tensor(found)

    plain, ours = (estimates(2, apart, p.log()[None], change) for apart in (False, True))
    assert ours.std() < plain.std() / 2
    assert float(ours.mean()) == pytest.approx(float(plain.mean()), rel=0.2)
    two = estimates(2, True, torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.1]]))
    assert two.std() < 1e-6


def test_a_saturated_prediction_gives_no_gradient_and_no_error() -> None:
    out = torch.tensor([[400.0, 0.0, 0.0]], requires_grad=True)
    for draw in range(3):
        (g,) = torch.autograd.grad(Divergence().score(out, torch.Generator(), 1.0, draw, 3), out)
        assert g.abs().max() == 0


def test_temperature_still_sees_a_saturated_prediction() -> None:
    out = torch.tensor([[40.0, 0.0, 0.0]] * 200, requires_grad=True)
    plain, warm = (
        torch.autograd.grad(Divergence().score(out, torch.Generator().manual_seed(0), t), out)[0] for t in (1.0, 10.0)
    )
    assert plain.abs().max() < 1e-6
    assert warm.abs().max() > 1e-3


def test_score_is_repeatable_and_works_in_half_precision() -> None:
    for kind in ("logits", "regression"):
        out = logits(4, 5).bfloat16().requires_grad_()
        scores = [Divergence(kind).score(out, torch.Generator().manual_seed(3)) for _ in range(2)]
        assert scores[0] == scores[1]
        assert scores[0].dtype == torch.float32


TENSOR = torch.ones(2, 3)
OUTPUTS: dict[str, Any] = {
    "tensor": TENSOR,
    "tuple": (torch.tensor([1, 2]), TENSOR, torch.zeros(1)),
    "list": [None, TENSOR],
    "dict": {"loss": None, "x": TENSOR},
    "dict with logits": {"hidden": torch.zeros(1), "logits": TENSOR},
    "object with logits": types.SimpleNamespace(logits=TENSOR, loss=torch.zeros(1)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_pick(name: str) -> None:
    assert pick(OUTPUTS[name]) is TENSOR


@pytest.mark.parametrize("output", [None, "text", 3, (), {"a": "b"}, [torch.tensor([1])], types.SimpleNamespace()])
def test_nothing_to_pick(output: Any) -> None:
    with pytest.raises(DataError, match="no floating-point tensor"):
        pick(output)
