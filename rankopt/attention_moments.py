"""What the data say of an attention layer, and the truncations that follow: balanced, by the products it computes.

A head's scores are q·k = xᵀ(Wqᵀ Wk)y, and what it adds to the output is (Wo Wv) of a mean of tokens. Neither product
changes when an invertible matrix goes into one side and its inverse into the other, so both can be rotated such that
their d channels matter less and less, and cut: with Gramians A = E[a aᵀ] and B = E[b bᵀ] of the two sides, the best
rank-r replacement of aᵀb in the mean square over independent a and b is the balanced truncation of (A, B), as in model
reduction (Moore, 1981). Keys enter centred: what all keys share cancels in the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankopt.attention_parts import Projections, Seen, Shape
from rankopt.nn.attention import masked

_PULL = 1e-9
_RIDGE = 1e-6  # of the mean eigenvalue: keeps directions that the data never visit invertible


@dataclass(frozen=True)
class Moments:
    """Second moments in float64.

    Attributes:
        tokens: (channels + 1, channels + 1), of the inputs with a 1 behind them; its last row holds the mean.
        values: (width, width), of the attended values of all heads, what the output projection is fed with.
    """

    tokens: Tensor
    values: Tensor

    @property
    def mean(self) -> Tensor:
        """(channels,) of the tokens."""
        return self.tokens[-1, :-1]

    @property
    def second(self) -> Tensor:
        """(channels, channels), of the tokens."""
        return self.tokens[:-1, :-1]

    @property
    def covariance(self) -> Tensor:
        """(channels, channels), of the tokens."""
        return self.second - torch.outer(self.mean, self.mean)


def no_moments(shape: Shape) -> Moments:
    """Those of independent channels of unit variance, which stand for no data."""
    return Moments(torch.eye(shape.channels + 1, dtype=torch.float64), torch.eye(shape.width, dtype=torch.float64))


def moments_of(dense: Projections, shape: Shape, calls: Sequence[Seen]) -> Moments:
    """Moments over the tokens of these calls, padding left out.

    Args:
        dense: the weights, in any precision.
        shape: the layer's sizes.
        calls: what it was given.
    """
    tokens = torch.zeros(shape.channels + 1, shape.channels + 1, dtype=torch.float64)
    values = torch.zeros(shape.width, shape.width, dtype=torch.float64)
    count = 0
    for call in calls:
        keep = call.keep
        attended = attended_values(dense, shape, call)
        x = call.x if keep is None else call.x[keep]
        rows = x.reshape(-1, shape.channels).double().cpu()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        out = (attended if keep is None else attended[keep]).reshape(-1, shape.width).double().cpu()
        tokens += rows.mT @ rows
        values += out.mT @ out
        count += len(rows)
    return Moments(tokens / max(count, 1), values / max(count, 1))


def attended_values(dense: Projections, shape: Shape, call: Seen) -> Tensor:
    """(batch, tokens, width): the values of all heads, averaged by the attention weights."""
    x = call.x.to(dense.q.dtype)
    heads = [
        (x @ w.mT + (0 if b is None else b)).unflatten(-1, (shape.heads, -1)).transpose(1, 2)
        for w, b in ((dense.q, dense.bq), (dense.k, dense.bk), (dense.v, dense.bv))
    ]
    q, k, v = heads
    causal = call.masking == "causal" and call.mask is None
    weights = torch.softmax(masked(q @ k.mT * shape.scale, call.mask, causal), -1)
    return (weights @ v).transpose(1, 2).flatten(2)


def outputs_of(dense: Projections, shape: Shape, calls: Sequence[Seen]) -> list[Tensor]:
    """What the dense layer makes of each call, (batch, tokens, channels)."""
    bias = 0 if dense.bo is None else dense.bo
    return [attended_values(dense, shape, call) @ dense.o.mT + bias for call in calls]


@dataclass(frozen=True)
class Balanced:
    """A product aᵀb of d channels a head, rotated so that its channels matter less and less.

    Attributes:
        left, right: (heads, d, d); with rows cut to r, (left a)ᵀ(right b) is the best aᵀb of r channels, all of them
            give aᵀb itself.
        energy: (heads, d), what each channel contributes to the mean square.
    """

    left: Tensor
    right: Tensor
    energy: Tensor


def balanced(left: Tensor, right: Tensor) -> Balanced:
    """Balance Gramians (heads, d, d) of the two sides of a product."""
    (half_left, _), (half_right, _) = _roots(left), _roots(right)
    u, s, vh = torch.linalg.svd(half_left @ half_right.mT)
    scale = s.clamp_min(torch.finfo(s.dtype).tiny).rsqrt()[..., None]
    return Balanced(scale * (vh @ half_right), scale * (u.mT @ half_left), s.square())


def of_scores(dense: Projections, shape: Shape, moments: Moments) -> Balanced:
    """The scores' product, a = q and b = k."""
    q, k = _gram(dense.q, dense.bq, shape, moments.tokens), _gram(dense.k, dense.bk, shape, _centred(moments.tokens))
    return balanced(q, k)


def of_outputs(dense: Projections, shape: Shape, moments: Moments) -> Balanced:
    """The outputs' product, a = the rows of Wo and b = the attended values."""
    return balanced(output_gram(dense, shape), _blocks(moments.values, shape))


def query_gram(dense: Projections, shape: Shape, moments: Moments) -> Tensor:
    """(heads, d, d), E[q qᵀ]: how much an error in a key matters."""
    return _gram(dense.q, dense.bq, shape, moments.tokens)


def key_gram(dense: Projections, shape: Shape, moments: Moments) -> Tensor:
    """(heads, d, d), the covariance of the keys: how much an error in a query matters."""
    return _gram(dense.k, dense.bk, shape, _centred(moments.tokens))


def output_gram(dense: Projections, shape: Shape) -> Tensor:
    """(heads, d, d), Woᵀ Wo: how much an error in a value matters."""
    o = dense.o.double().cpu().unflatten(1, (shape.heads, shape.size)).movedim(1, 0)
    return o.mT @ o


def solved_output(o: Tensor, left: Tensor, right: Tensor, values: Tensor) -> Tensor:
    """The output projection that fits best behind cut values, over all heads at once: (channels, heads · r).

    Args:
        o: (channels, width), the dense one.
        left, right: (heads, r, d), what it and the values are cut with. Where the data leave the solution open, it
            stays at what `left` makes of the dense one; so nothing changes at full rank.
        values: (width, width), second moment of the values before the cut.
    """
    heads, _, d = right.shape
    present = (o.unflatten(1, (heads, d)).movedim(1, 0) @ left.mT).movedim(0, 1).flatten(1)
    cut = torch.block_diag(*right)  # (heads · r, width)
    gram = cut @ values @ cut.mT
    pull = gram.diagonal().mean().clamp_min(1e-300) * _PULL
    system = gram + pull * torch.eye(len(gram), dtype=gram.dtype)
    return present + torch.linalg.solve(system, cut @ values @ (o - present @ cut).mT).mT


def weighted_svd(weight: Tensor, out: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Truncations of W (rows × in) by trace(G ΔW M ΔWᵀ): `first` (k × in) and `last` (rows × k), and their energies.

    Args:
        weight: float64.
        out: G, (blocks, d, d) on the diagonal, blocks · d = rows.
        moment: M, (in, in).
    """
    half, inverse = (torch.block_diag(*r) for r in _roots(out))
    seen = half @ weight
    # of the product with a root, not of its square: directions that neither the data nor G know are small in both
    root = torch.block_diag(*_roots(moment[None])[0])
    vectors, values, _ = torch.linalg.svd(seen @ root, full_matrices=False)
    energy = values.square()
    return vectors.mT @ seen, inverse @ vectors, energy


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of (blocks, d, d) and their inverses, the blocks in proportion to each other."""
    values, vectors = torch.linalg.eigh((moments + moments.mT) / 2)
    mean = values.mean().clamp_min(0)
    values = values.clamp_min(0) + (_RIDGE * mean if mean > 0 else 1.0)
    half = values.sqrt()[:, None, :]
    return (vectors * half) @ vectors.mT, (vectors / half) @ vectors.mT


def _gram(weight: Tensor, bias: Tensor | None, shape: Shape, tokens: Tensor) -> Tensor:
    column = torch.zeros(len(weight), 1) if bias is None else bias[:, None]
    full = torch.cat([weight.double().cpu(), column.double().cpu()], 1).unflatten(0, (shape.heads, shape.size))
    return full @ tokens @ full.mT


def _centred(tokens: Tensor) -> Tensor:
    mean = tokens[-1]
    return tokens - torch.outer(mean, mean)


def _blocks(moment: Tensor, shape: Shape) -> Tensor:
    """The diagonal blocks of the heads."""
    blocks = moment.unflatten(0, (shape.heads, shape.size)).unflatten(2, (shape.heads, shape.size))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
