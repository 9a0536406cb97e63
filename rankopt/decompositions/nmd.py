"""Nonlinear matrix decomposition with ReLU: X ≈ max(0, Θ) for a nonnegative X with zeros, Θ of low rank.

Where X is zero, Θ may be anything below zero; that freedom is what a linear factorization lacks (Saul, "A nonlinear
matrix decomposition for mining the zeros of sparse data", 2022). All algorithms here descend on the latent form

    min ‖Z − Θ‖²   with   max(0, Z) = X,  rank(Θ) ≤ r,

whose best Z for a given Θ is X where X > 0, and min(0, Θ) elsewhere.

- `naive`: Z, then Θ by a truncated SVD (Saul 2022).
- `accelerated`: A-NMD, the same with adaptive extrapolation (Seraghiti, Awari, Vandaele, Porcelli and Gillis,
  "Accelerated algorithms for nonlinear matrix decomposition with the ReLU function", 2023).
- `three_block`: 3B-NMD, Θ = L·R, least squares in place of the SVD, constant momentum (same paper). Without momentum
  it is block coordinate descent.
- `extrapolated`: eBCD-NMD, block coordinate descent with an extrapolation that is given up where the residual does not
  fall (Gillis, Porcelli and Seraghiti, "An extrapolated and provably convergent algorithm for nonlinear matrix
  decomposition with the ReLU function", 2025). It takes any block step, so Θ may be a Tucker or CP tensor too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ENOUGH = 1e-4  # relative fall of the residual over ten steps below which an algorithm stops

Factors = list[Tensor]


@dataclass(frozen=True)
class Found:
    """What an algorithm ends with.

    Attributes:
        factors: of Θ.
        residuals: ‖Z − Θ‖ / ‖X‖ at the start and after every step that was accepted.
    """

    factors: Factors
    residuals: Sequence[float]


def latent(x: Tensor, theta: Tensor) -> Tensor:
    """The best Z for a Θ: X where it is positive, else Θ where that is negative."""
    return torch.where(x > 0, x, theta.clamp_max(0))


def truncated(z: Tensor, rank: int) -> Factors:
    """The best left (m, rank) and right (rank, n) factors, by SVD."""
    u, s, v = torch.linalg.svd(z, full_matrices=False)
    return [u[:, :rank] * s[:rank], v[:rank]]


def naive(x: Tensor, rank: int, steps: int = 200) -> Found:
    """Alternate between the best Z and the best Θ. The residual never rises.

    Args:
        x: (m, n), nonnegative.
        rank: of Θ.
        steps: at most so many.
    """
    factors = truncated(x, rank)
    residuals = [_residual(x, latent(x, factors[0] @ factors[1]), factors[0] @ factors[1])]
    for _ in range(steps):
        factors = truncated(latent(x, factors[0] @ factors[1]), rank)
        theta = factors[0] @ factors[1]
        residuals.append(_residual(x, latent(x, theta), theta))
        if _done(residuals):
            break
    return Found(factors, residuals)


def accelerated(
    x: Tensor, rank: int, steps: int = 200, beta: float = 0.9, eta: float = 0.4, gamma: float = 1.1, bar: float = 1.05
) -> Found:
    """A-NMD: `naive` with momentum on Z and Θ, which grows while the residual falls and shrinks where it does not.

    Args:
        x, rank, steps: as for `naive`.
        beta: the momentum at first; `eta` shrinks it, `gamma` lets it grow, `bar` its upper bound.
    """
    factors = truncated(x, rank)
    theta = factors[0] @ factors[1]
    z = latent(x, theta)
    residuals = [_residual(x, z, theta)]
    best, most, before = factors, 1.0, beta
    for _ in range(steps):
        near = latent(x, theta)
        tried_z = near + beta * (near - z)
        tried = truncated(tried_z, rank)
        product = tried[0] @ tried[1]
        tried_theta = product + beta * (product - theta)
        # judged where it counts: at the product, which has the rank, and its best Z
        residual = _residual(x, latent(x, product), product)
        if residual < residuals[-1]:
            z, theta, best = tried_z, tried_theta, tried
            residuals.append(residual)
            before, beta = beta, min(most, gamma * beta)
            most = min(1.0, bar * most)
            if _done(residuals):
                break
        else:
            most, beta = before, eta * beta
            theta = best[0] @ best[1]
            z = latent(x, theta)
            if beta < 1e-3:
                break
    return Found(best, residuals)


def three_block(x: Tensor, rank: int, steps: int = 200, momentum: float = 0.7) -> Found:
    """3B-NMD: Θ = L·R, one least squares for each, and momentum on Z and Θ. Of all steps the best one counts.

    Args:
        x, rank, steps: as for `naive`.
        momentum: with 0 no step raises the residual; with more it may, and falls faster.
    """
    left, right = truncated(x, rank)
    theta, z = left @ right, x
    residuals = [_residual(x, latent(x, theta), theta)]
    best, least = [left, right], residuals[0]
    for _ in range(steps):
        new = latent(x, theta)
        z, new = new, new + momentum * (new - z)
        left, right = matrix_step(new, [left, right])
        product = left @ right
        theta = product + momentum * (product - theta)
        residuals.append(_residual(x, latent(x, product), product))
        if residuals[-1] < least:
            best, least = [left, right], residuals[-1]
        if _done(residuals):
            break
    return Found(best, residuals)


def extrapolated(
    x: Tensor,
    factors: Factors,
    step: Callable[[Tensor, Factors], Factors],
    product: Callable[[Factors], Tensor],
    steps: int = 200,
) -> Found:
    """eBCD-NMD from given factors: extrapolate Z away from Θ, take a block step, keep what lowers the residual.

    Args:
        x: nonnegative, of any shape.
        factors: where it starts.
        step: (Z, factors) → factors that are nearer to Z.
        product: factors → Θ.
        steps: at most so many.
    """
    theta = product(factors)
    z = latent(x, theta)
    residuals = [_residual(x, z, theta)]
    alpha, growth, most = 1.0, 0.3, 4.0
    for _ in range(steps):
        tried = step(alpha * z + (1 - alpha) * theta, factors)
        near = product(tried)
        z_near = latent(x, near)
        residual = _residual(x, z_near, near)
        if residual < residuals[-1]:
            slow = residual > 0.8 * residuals[-1]
            factors, theta, z = tried, near, z_near
            residuals.append(residual)
            if slow:
                growth = max(growth, 0.25 * (alpha - 1))
                alpha = alpha + growth if alpha + growth < most else 1.0
            if _done(residuals):
                break
        elif alpha == 1.0:  # a plain block step that does not help: it stands at a stationary point
            break
        else:
            alpha = 1.0
    return Found(factors, residuals)


def matrix_step(z: Tensor, factors: Factors) -> Factors:
    """Least squares for the left factor (any basis of it), then for the right one."""
    left, _ = torch.linalg.qr(z @ factors[1].mT)
    return [left, left.mT @ z]


def cp_step(z: Tensor, factors: Factors) -> Factors:
    """Least squares for each factor (n, rank) of a tensor of three modes in turn, with a pull that keeps it regular."""
    found = list(factors)
    letters = "abc"
    for n in range(3):
        others = [m for m in range(3) if m != n]
        first, second = (found[m] for m in others)
        gram = (first.mT @ first) * (second.mT @ second)
        seen = torch.einsum(f"abc,{letters[others[0]]}r,{letters[others[1]]}r->{letters[n]}r", z, first, second)
        pull = 1e-9 * gram.diagonal().mean().clamp_min(1e-30)
        system = gram + pull * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        found[n] = found[n] + torch.linalg.solve(system, (seen - found[n] @ gram).mT).mT
    return found


def tucker_step(z: Tensor, factors: Factors) -> Factors:
    """One sweep of higher-order orthogonal iteration (De Lathauwer et al., 2000): core, then a factor (n, rank) a mode.

    The factors that go in must be what an earlier sweep gave, or any: only their ranges count.
    """
    bases = [torch.linalg.qr(f)[0] for f in factors[1:]]
    for n in range(3):
        seen = z
        for m in range(3):
            # either way the first mode goes to the end
            seen = torch.tensordot(seen, bases[m], dims=([0], [0])) if m != n else seen.movedim(0, -1)
        unfolded = seen.movedim(n, 0).flatten(1)
        _, vectors = torch.linalg.eigh(unfolded @ unfolded.mT)
        bases[n] = vectors[:, -bases[n].shape[1] :]
    core = z
    for basis in bases:
        core = torch.tensordot(core, basis, dims=([0], [0]))
    return [core, *bases]


def _residual(x: Tensor, z: Tensor, theta: Tensor) -> float:
    return float(torch.linalg.vector_norm(z - theta) / torch.linalg.vector_norm(x).clamp_min(1e-300))


def _done(residuals: Sequence[float]) -> bool:
    """Whether it is zero, or fell by next to nothing in the last ten steps."""
    return residuals[-1] < 1e-9 or (len(residuals) > 10 and residuals[-1] > (1 - _ENOUGH) * residuals[-11])
