"""`CapsuleLayer`: prediction vectors and dynamic routing by agreement; `squash`, `PrimaryCapsules`, `margin_loss`.

After Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules" (2017). A capsule is a vector whose length says how
certain it is that something is there. Capsule i below predicts every capsule j above by a matrix of its own,
û[i, j] = W[i, j] u[i] (a *vote*), and routing finds how much of each vote counts: starting from equal shares, votes
that agree with what the others add up to get more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def squash(s: Tensor, dim: int = -1) -> Tensor:
    """Shorten vectors to lengths below 1, in their direction: s·|s| / (1 + |s|²) (equation 1).

    Value and gradient are 0 at 0: the norm's gradient there is taken as 0, where the formula as it is written in the
    paper divides by it.
    """
    norm = torch.linalg.vector_norm(s, dim=dim, keepdim=True)
    return s * (norm / (1 + norm * norm))


def route(
    total: Callable[[Tensor], Tensor],
    agreement: Callable[[Tensor], Tensor],
    logits: Tensor,
    iterations: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Dynamic routing (procedure 1), for votes that are known by two products only.

    Args:
        total: coupling coefficients c (n, out_caps, in_caps) → Σ_i c[i, j] û[i, j], (n, out_caps, d_out).
        agreement: capsules v (n, out_caps, d_out) → û[i, j] · v[j], (n, out_caps, in_caps).
        logits: where the coupling starts, (n, out_caps, in_caps); zeros are equal shares.
        iterations: how often the sums are taken; the agreement is taken once less.
        mask: (n, in_caps), true or 1 where an input capsule takes part.

    Returns:
        The output capsules (n, out_caps, d_out).
    """
    v = logits
    for n in range(iterations):
        coupling = torch.softmax(logits, dim=1)
        if mask is not None:
            coupling = coupling * mask.to(coupling.dtype).unsqueeze(1)
        v = squash(total(coupling))
        if n < iterations - 1:
            logits = logits + agreement(v)
    return v


class Votes(nn.Module):
    """û[i, j] = W[i, j] u[i]: input (n, in_caps, d_in), output (n, in_caps, out_caps · d_out)."""

    def __init__(self, in_caps: int, out_caps: int, d_out: int, d_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_caps, out_caps, d_out, d_in))

    def forward(self, u: Tensor) -> Tensor:
        """See the class."""
        by_capsule = torch.matmul(u.transpose(0, 1), self.weight.flatten(1, 2).mT)
        return by_capsule.transpose(0, 1)

    def extra_repr(self) -> str:
        """Shown by print."""
        return "×".join(map(str, self.weight.shape))


class RoutedCapsules(nn.Module):
    """What all capsule layers have in common: any leading dimensions, a mask, routing.

    Args:
        in_caps, out_caps: capsules below and above.
        d_out, d_in: their dimensions.
        iterations: of the routing, at least 1 (then every vote counts the same).
    """

    def __init__(self, in_caps: int, out_caps: int, d_out: int, d_in: int, iterations: int) -> None:
        super().__init__()
        sizes = {"in_caps": in_caps, "out_caps": out_caps, "d_out": d_out, "d_in": d_in, "iterations": iterations}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{type(self).__name__}: needs a whole number {name} >= 1, got {size!r}")
        self.in_caps, self.out_caps, self.d_out, self.d_in = in_caps, out_caps, d_out, d_in
        self.iterations = iterations

    def products(self, u: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The products `total` and `agreement` that `route` takes, for inputs (n, in_caps, d_in)."""
        raise NotImplementedError

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """(*batch, in_caps, d_in) to (*batch, out_caps, d_out).

        `mask` (*batch, in_caps) is true where an input capsule takes part; the votes of the others count nothing. Where
        none takes part the output is 0.
        """
        batch = u.shape[:-2]
        flat = u.reshape(-1, self.in_caps, self.d_in) if len(batch) != 1 else u
        total, agreement = self.products(flat)
        logits = flat.new_zeros(flat.shape[0], self.out_caps, self.in_caps)
        flags = mask.reshape(-1, self.in_caps) if mask is not None else None
        v = route(total, agreement, logits, self.iterations, flags)
        return v.reshape(*batch, self.out_caps, self.d_out) if len(batch) != 1 else v

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"{self.in_caps}×{self.d_in} to {self.out_caps}×{self.d_out}, iterations={self.iterations}"


class CapsuleLayer(RoutedCapsules):
    """Dense votes and routing.

    Args:
        in_caps, out_caps: capsules below and above.
        d_out, d_in: their dimensions.
        iterations: of the routing.
        types: how many kinds of input capsules there are. They stand type after type, in_caps / types positions each,
            as `PrimaryCapsules` gives them; methods that share votes between positions ask for it.

    Attributes:
        votes: holds the weight (in_caps, out_caps, d_out, d_in).
    """

    def __init__(self, in_caps: int, out_caps: int, d_out: int, d_in: int, iterations: int = 3, types: int = 1) -> None:
        super().__init__(in_caps, out_caps, d_out, d_in, iterations)
        if types < 1 or in_caps % types:
            raise ValueError(f"CapsuleLayer: needs types that divide the {in_caps} input capsules, got {types!r}")
        self.types = types
        self.votes = Votes(in_caps, out_caps, d_out, d_in)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with a deviation of 0.1. Larger weights would keep their noise through training, and noise has no low
        rank."""
        nn.init.normal_(self.votes.weight, std=0.1)

    def products(self, u: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """By the votes themselves."""
        votes = self.votes(u).unflatten(2, (self.out_caps, self.d_out)).transpose(1, 2)  # n, out, in, d_out

        def total(coupling: Tensor) -> Tensor:
            return torch.matmul(coupling.unsqueeze(2), votes).squeeze(2)

        def agreement(v: Tensor) -> Tensor:
            return torch.matmul(votes, v.unsqueeze(3)).squeeze(3)

        return total, agreement


class PrimaryCapsules(nn.Module):
    """The first capsules: channels of a convolution cut into vectors, squashed.

    Args:
        channels: of the input.
        types: kinds of capsules; each is found at every position.
        dim: of a capsule.
        kernel_size, stride: of the convolution.
    """

    def __init__(self, channels: int, types: int, dim: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.types, self.dim = types, dim
        self.conv = nn.Conv2d(channels, types * dim, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) to (n, types · h' · w', dim), type after type."""
        y = self.conv(x).flatten(2).unflatten(1, (self.types, self.dim))  # n, types, dim, positions
        return squash(y.transpose(2, 3).flatten(1, 2))


def lengths(capsules: Tensor) -> Tensor:
    """How certain every capsule is: (n, caps, dim) to (n, caps), between 0 and 1. The gradient at 0 is 0."""
    return torch.linalg.vector_norm(capsules, dim=-1)


def margin_loss(scores: Tensor, labels: Tensor, low: float = 0.1, high: float = 0.9, absent: float = 0.5) -> Tensor:
    """Equation 4: the capsule of the class is to be longer than `high`, the others shorter than `low`.

    Args:
        scores: lengths of the output capsules, (n, classes).
        labels: (n,) class numbers, or (n, classes) 0 and 1 where several may be there at once.
        low, high: the two margins.
        absent: weight of the classes that are not there.

    Returns:
        The mean over the samples of the sum over the classes; a scalar.
    """
    there = F.one_hot(labels, scores.shape[1]) if labels.dim() == 1 else labels
    there = there.to(scores.dtype)
    present = F.relu(high - scores).square()
    missing = F.relu(scores - low).square()
    return (there * present + absent * (1 - there) * missing).sum(1).mean()


def log_odds(scores: Tensor) -> Tensor:
    """Lengths of output capsules as logits, log(l / (1 - l)), for losses and divergences that are of distributions.

    Lengths are kept between 1e-6 and 1 - 1e-6, so value and gradient are finite.
    """
    kept = scores.float().clamp(1e-6, 1 - 1e-6)
    return (torch.log(kept) - torch.log1p(-kept)).to(scores.dtype)
