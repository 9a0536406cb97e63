"""Non-negative factorizations by multiplicative updates, as functions that autograd can differentiate.

Every update is of the form ``factor · ((pull + ε) / (push + ε))^p``, where pull − push is what the gradient of the
objective leaves when its sign is turned. That ε stands in both keeps the division finite and changes neither objective:
the auxiliary functions by which Lee and Seung ("Algorithms for non-negative matrix factorization", 2001) and Yang and
Oja ("Linear and nonlinear projective nonnegative matrix factorization", 2010) prove that no update raises the objective
take a term ε·Σ factor that is added and subtracted. So the squared error never rises, for any ε.

Leading dimensions are batches. `macs_of_…` count what a step multiplies, as a counter of matrix products finds it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-6

State = tuple[Tensor, ...]


def nmf_step(x: Tensor, codes: Tensor, basis: Tensor) -> State:
    """One sweep for X ≈ codes · basis: the codes, then the basis (Lee and Seung, 2001).

    Args:
        x: (..., n, m), not negative.
        codes: (..., n, r).
        basis: (..., r, m).
    """
    codes = codes * _ratio(x @ basis.transpose(-2, -1), codes @ (basis @ basis.transpose(-2, -1)))
    basis = basis * _ratio(codes.transpose(-2, -1) @ x, (codes.transpose(-2, -1) @ codes) @ basis)
    return codes, basis


def macs_of_nmf_step(n: int, m: int, r: int) -> int:
    """Multiply-accumulates of one sweep."""
    return 2 * n * m * r + 2 * r * r * (n + m)


def pnmf_start(x: Tensor, w: Tensor) -> State:
    """W times the scalar at which ‖X − W Wᵀ X‖ is least: the updates of W alone find its size slowly."""
    seen = w.transpose(-2, -1) @ x
    fitted = w.transpose(-2, -1) @ w @ seen
    square = (seen.square().sum((-2, -1)) + EPSILON) / ((seen * fitted).sum((-2, -1)) + EPSILON)
    return (w * square.sqrt()[..., None, None],)


def macs_of_pnmf_start(n: int, m: int, r: int) -> int:
    """Multiply-accumulates of finding the scalar."""
    return n * m * r + r * r * (n + m)


def pnmf_step(x: Tensor, w: Tensor) -> State:
    """One update for X ≈ W Wᵀ X (Yang and Oja, 2010; the cube root is what their proof asks for).

    Args:
        x: (..., n, m), not negative.
        w: (..., n, r), not negative.
    """
    seen = x.transpose(-2, -1) @ w
    pulled = x @ seen
    push = w @ (seen.transpose(-2, -1) @ seen) + pulled @ (w.transpose(-2, -1) @ w)
    return (w * _ratio(2 * pulled, push) ** (1 / 3),)


def macs_of_pnmf_step(n: int, m: int, r: int) -> int:
    """Multiply-accumulates of one update."""
    return 2 * n * m * r + r * r * (3 * n + m)


def ntf_step(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> State:
    """One sweep for a non-negative canonical polyadic decomposition, X ≈ Σ_r a_r ∘ b_r ∘ c_r: a, then b, then c.

    Welling and Weber ("Positive tensor factorization", 2001): Lee and Seung's updates of the three unfoldings. The
    tensor is contracted twice a sweep, over its last mode for a and b together and over its first for c.

    Args:
        x: (..., I, J, K), not negative.
        a, b, c: (..., I, r), (..., J, r), (..., K, r).
    """
    last = (x @ c.unsqueeze(-3)).movedim(-1, -3)  # (..., r, I, J)
    gram_b, gram_c = b.transpose(-2, -1) @ b, c.transpose(-2, -1) @ c
    a = a * _ratio(_against(last, b), a @ (gram_b * gram_c))
    gram_a = a.transpose(-2, -1) @ a
    b = b * _ratio(_against(last.transpose(-2, -1), a), b @ (gram_a * gram_c))
    _i, j, k = x.shape[-3:]
    first = (a.transpose(-2, -1) @ x.flatten(-2)).unflatten(-1, (j, k))  # (..., r, J, K)
    c = c * _ratio(_against(first.transpose(-2, -1), b), c @ (gram_a * (b.transpose(-2, -1) @ b)))
    return a, b, c


def macs_of_ntf_step(i: int, j: int, k: int, r: int) -> int:
    """Multiply-accumulates of one sweep."""
    return 2 * i * j * k * r + 2 * i * j * r + j * k * r + r * r * (2 * i + 3 * j + 2 * k)


def ntf_sum(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Σ_r a_r ∘ b_r ∘ c_r: (..., I, J, K)."""
    both = b.transpose(-2, -1).unsqueeze(-1) * c.transpose(-2, -1).unsqueeze(-2)  # (..., r, J, K)
    return (a @ both.flatten(-2)).unflatten(-1, both.shape[-2:])


def iterate(step: Callable[..., State], x: Tensor, state: State, steps: int, one_step: bool = False) -> State:
    """Apply a step several times.

    Args:
        step: (x, *state) → state.
        x: what is factorized.
        state: the factors to begin with.
        steps: how often.
        one_step: differentiate the last step alone, with the factors that enter it as constants: the one-step gradient
            of Geng et al. ("Is attention better than matrix decomposition?", 2021), who find it more stable than
            gradients through all steps. The values are the same.
    """
    if not (one_step and torch.is_grad_enabled()):
        for _ in range(steps):
            state = step(x, *state)
        return state
    with torch.no_grad():
        for _ in range(steps - 1):
            state = step(x, *state)
    return step(x, *(factor.detach() for factor in state))


def _ratio(pull: Tensor, push: Tensor) -> Tensor:
    return (pull + EPSILON) / (push + EPSILON)


def _against(unfolded: Tensor, factor: Tensor) -> Tensor:
    """(..., r, I, J) against (..., J, r): every component with its own column, (..., I, r)."""
    return (unfolded @ factor.transpose(-2, -1).unsqueeze(-1)).squeeze(-1).transpose(-2, -1)
