"""Mode-wise algebra on weights with the groups in front, by TensorLy: products, unfoldings, spectra, whitening."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankopt.decompositions.metric import Metric, root


@contextmanager
def tensorly() -> Iterator[Any]:
    """The TensorLy module, computing on torch tensors inside; the caller's backend comes back after.

    TensorLy is imported here, at first use, because it takes half a second.
    """
    import tensorly as module
    import tensorly.decomposition

    # Thread-local: entering must not change the default that other threads see.
    with module.backend_context("pytorch", local_threadsafe=True):
        yield module


def mode_products(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply the leading modes of (groups, n1, n2, ...), as many as there are matrices (groups, m, n), with them."""
    with tensorly() as tl:
        per_group = zip(tensor, *matrices, strict=True)
        return torch.stack([tl.tenalg.multi_mode_dot(t, list(m)) for t, *m in per_group])


def mode_gram(tensor: Tensor, mode: int) -> Tensor:
    """(groups, n, n): each group's mode-n unfolding times its transpose."""
    with tensorly() as tl:
        unfolded = torch.stack([tl.unfold(t, mode) for t in tensor])
    return unfolded @ unfolded.mT


def leading(moment: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """The `bound` leading eigenvectors of a batch of moments as columns, and the spectra summed over the groups."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    return vectors.flip(-1)[..., :bound], values.flip(-1)[..., :bound].clamp_min(0).sum(0)


def tail(energy: Tensor, rank: Any) -> Any:
    """Share of `energy` (a descending spectrum of squares) behind the first `rank` entries; `rank` may be an array."""
    kept = torch.cat([energy.new_zeros(1), energy.cumsum(0)]).double().cpu().numpy()
    share = kept[np.minimum(rank, len(kept) - 1)] / max(kept[-1], 1e-300)
    return np.maximum(1 - share, 0.0)


def mode_roots(metric: Metric, weight: Tensor, modes: Sequence[tuple[int, ...]] = ()) -> list[tuple[Tensor, Tensor]]:
    """Square roots (and inverses) of the moments of the output channels, the input channels and each of `modes`.

    The product of the modes' moments stands in for the full patch moment. Only a method that cuts spatial modes down
    to a few vectors should name them: where the channels do most of the work, a common spatial moment (one strong
    channel can make it nearly flat) costs more than it gains.

    Args:
        metric: the second moments.
        weight: (groups, out, in, *kernel).
        modes: tuples of spatial dimensions, counted from 0.
    """
    shape = tuple(weight.shape[2:])
    roots = [root(metric.side, weight.shape[1], weight)]
    for keep in [(0,), *(tuple(d + 1 for d in mode) for mode in modes)]:
        roots.append(root(metric.over_modes(shape, keep), math.prod(shape[m] for m in keep), weight))
    return roots


def corner_energy(energy: Tensor) -> Tensor:
    """Energy of every leading corner of a core: the cumulative sum along all modes, in double precision."""
    total = energy.double()
    for mode in range(energy.dim()):
        total = total.cumsum(mode)
    return total


def outside(corners: Tensor, *ranks: Any) -> Any:
    """Share of the energy outside the leading corner of these ranks (or arrays of them), by a `corner_energy` table."""
    table = corners.cpu().numpy()
    kept = table[tuple(np.asarray(r) - 1 for r in ranks)] / max(float(table[(-1,) * table.ndim]), 1e-300)
    return np.maximum(1 - kept, 0.0)
