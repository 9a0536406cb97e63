"""`Nystrom`: attention by landmarks, whose cost is linear in tokens.

Xiong et al., "Nyströmformer: a Nyström-based algorithm for approximating self-attention" (2021): with Q̃, K̃ the means of
a few segments of the queries and keys,

    softmax(Q Kᵀ) V ≈ softmax(Q K̃ᵀ) · softmax(Q̃ K̃ᵀ)⁺ · (softmax(Q̃ Kᵀ) V)

and the pseudo-inverse comes from a few matrix products (their third-order iteration). Segments are cut from the tokens
that are kept, so padding changes nothing. The convolution that their network adds is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ITERATIONS = 6


class Nystrom(nn.Module):
    """Self-attention by landmarks.

    Args:
        inward: (..., in) → (..., 3 · heads · size), queries, keys and values behind each other.
        outward: (..., heads · size) → (..., out).
        heads, scale: as in `Attention`.
        landmarks: segments.
    """

    def __init__(self, inward: nn.Module, outward: nn.Module, heads: int, landmarks: int, scale: float) -> None:
        super().__init__()
        self.inward, self.outward = inward, outward
        self.heads, self.landmarks, self.scale = heads, landmarks, scale

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(batch, tokens, in) → (batch, tokens, out); `keep` (batch, tokens) is False at padding."""
        given = self.inward(x)
        # The iteration for the inverse squares what it rounds, so half precision is too coarse for it.
        if torch.is_autocast_enabled(given.device.type):
            with torch.autocast(given.device.type, enabled=False):
                mixed = self.mixed(given.float(), keep)
            return self.outward(mixed)
        half = given.dtype in (torch.float16, torch.bfloat16)
        return self.outward(self.mixed(given.float() if half else given, keep).to(given.dtype))

    def mixed(self, given: Tensor, keep: Tensor | None) -> Tensor:
        """(batch, tokens, 3 · heads · size), what `inward` gives → (batch, tokens, heads · size)."""
        q, k, v = given.unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        q = q * self.scale
        few_q, few_k = (segment_means(t, self.landmarks, keep) for t in (q, k))
        there = segments_there(given.shape[1], self.landmarks, keep)
        by_token = _softmax(q @ few_k.transpose(-2, -1), there)
        among = _softmax(few_q @ few_k.transpose(-2, -1), there)
        if there is not None:
            both = there[:, None, :, None] & there[:, None, None, :]
            among = among * both
        seen = _softmax(few_q @ k.transpose(-2, -1), keep) @ v
        mixed = by_token @ (pseudo_inverse(among) @ seen)
        return mixed.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"heads={self.heads}, landmarks={self.landmarks}, scale={self.scale:.4g}"


def segment_means(x: Tensor, count: int, keep: Tensor | None = None) -> Tensor:
    """Means over `count` equal runs of the kept tokens; 0 where a run is empty.

    Args:
        x: (batch, heads, tokens, size).
        count: runs; their lengths differ by one at most.
        keep: (batch, tokens), False at padding.
    """
    batch, heads, tokens, size = x.shape
    if keep is None and tokens % count == 0:
        return x.unflatten(2, (count, tokens // count)).mean(3)
    run = _runs(tokens, count, keep, x.device)
    weight = x.new_ones(batch, tokens) if keep is None else keep.to(x.dtype)
    index = run[:, None, :, None].expand(batch, heads, tokens, size)
    total = x.new_zeros(batch, heads, count, size).scatter_add(2, index, x * weight[:, None, :, None])
    length = x.new_zeros(batch, count).scatter_add(1, run.expand(batch, tokens), weight)
    return total / length.clamp_min(1)[:, None, :, None]


def segments_there(tokens: int, count: int, keep: Tensor | None) -> Tensor | None:
    """Which runs are not empty, (batch or 1, count); None where all are."""
    if keep is None:
        if tokens >= count:
            return None
        keep = torch.ones(1, tokens, dtype=torch.bool)
    run = _runs(tokens, count, keep, keep.device)
    length = torch.zeros(keep.shape[0], count, dtype=torch.int64, device=keep.device)
    return length.scatter_add(1, run.expand(keep.shape[0], tokens), keep.to(torch.int64)) > 0


def _runs(tokens: int, count: int, keep: Tensor | None, device: torch.device) -> Tensor:
    """The run that each token belongs to, (batch or 1, tokens); at padding any."""
    if keep is None:
        return (torch.arange(tokens, device=device) * count // tokens)[None]
    place = keep.to(torch.int64).cumsum(1) - 1
    return (place * count // keep.sum(1, keepdim=True).clamp_min(1)).clamp(0, count - 1)


def pseudo_inverse(a: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """The Moore-Penrose inverse of matrices (..., n, n) by products alone (Razavi et al., 2014; Xiong et al., eq. 11).

    It converges for any matrix, since it begins with Aᵀ over the product of A's largest row and column sums.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    sums = a.abs()
    largest = sums.sum(-1).amax(-1) * sums.sum(-2).amax(-1)
    z = a.transpose(-2, -1) / largest.clamp_min(torch.finfo(a.dtype).tiny)[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


def macs_of_nystrom(tokens: int, size: int, landmarks: int) -> int:
    """Multiply-accumulates of one head on one sample, without the projections."""
    m = landmarks
    return 4 * tokens * m * size + 2 * m * m * size + 4 * ITERATIONS * m**3


def _softmax(scores: Tensor, there: Tensor | None) -> Tensor:
    """Over the last dimension; `there` (batch or 1, that dimension) is False at what must not be seen."""
    if there is not None:
        scores = scores.masked_fill(~there[:, None, None, :], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1)
