"""What is inside of `rebuilt`'s functions: a product of two factors, a Tucker or a CP tensor, each with a linear start.

A form says the product's modes, the shapes of its factors and what multiplying them costs, how the linear method gets
factors, and how a block step of ReLU-NMD goes on from some. Factors are in the order of `nn.rebuilt.multiplied`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankopt.decompositions import nmd
from rankopt.decompositions.cp import Cp
from rankopt.decompositions.decomposition import Factors, Ranks, channels_and_kernel, one_channel
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.multilinear import corner_energy, leading, mode_gram, mode_products, mode_roots, outside
from rankopt.decompositions.svd import Svd
from rankopt.layer_spec import LayerSpec


class _Matrix:
    """(out, in·kernel) = (out, rank) (rank, in·kernel)."""

    names = ("rank",)
    step = staticmethod(nmd.matrix_step)

    def why_not(self, layer: LayerSpec) -> str | None:
        return one_channel(layer)

    def modes(self, layer: LayerSpec) -> tuple[int, ...]:
        _, o, i, *k = layer.group_shape
        return o, i * math.prod(k)

    def bounds(self, modes: Sequence[int], doubled: Sequence[int]) -> list[int]:
        most = (math.prod(modes) - 1) // sum(doubled)
        return [max(1, min(*modes, most))]

    def shapes(self, modes: Sequence[Any], ranks: Sequence[Any]) -> list[tuple[Any, ...]]:
        (r,) = ranks
        return [(modes[0], r), (r, modes[1])]

    def macs(self, modes: Sequence[int], ranks: Sequence[Any]) -> Any:
        return modes[0] * ranks[0] * modes[1]

    def ranks(self, factors: Sequence[Tensor]) -> list[int]:
        return [factors[0].shape[2]]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        return Svd().factorize(layer, weight, metric)

    def start(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        first, last = Svd().stage_weights(layer, factors, ranks)
        return [last, first.flatten(2)]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        return Svd().lost(factors, ranks)

    def doubled(self, factors: Sequence[Tensor], side: int) -> list[Tensor]:
        found = list(factors)
        found[side - 1] = torch.cat([factors[side - 1], -factors[side - 1]], side)
        return found


class _Tensor:
    """What Tucker and CP have in common: the modes out, in, and the whole kernel."""

    def why_not(self, layer: LayerSpec) -> str | None:
        return channels_and_kernel(layer, "relu_svd")

    def modes(self, layer: LayerSpec) -> tuple[int, ...]:
        _, o, i, *k = layer.group_shape
        return o, i, math.prod(k)

    def doubled(self, factors: Sequence[Tensor], side: int) -> list[Tensor]:
        found, at = list(factors), len(factors) - 4 + side  # behind the core, where there is one
        found[at] = torch.cat([factors[at], -factors[at]], 1)
        return found


class _Tucker(_Tensor):
    """A core and a factor for each mode."""

    names = ("rank_out", "rank_in", "rank_kernel")
    step = staticmethod(nmd.tucker_step)

    def bounds(self, modes: Sequence[int], doubled: Sequence[int]) -> list[int]:
        total = math.prod(modes)
        return [min(n, total // n) for n in modes]

    def shapes(self, modes: Sequence[Any], ranks: Sequence[Any]) -> list[tuple[Any, ...]]:
        return [tuple(ranks), *zip(modes, ranks, strict=True)]

    def macs(self, modes: Sequence[int], ranks: Sequence[Any]) -> Any:
        found: list[Any] = []
        for order in itertools.permutations(range(3)):
            shape, total = list(ranks), 0
            for mode in order:
                shape[mode] = modes[mode]
                total = total + shape[0] * shape[1] * shape[2] * ranks[mode]
            found.append(total)
        return np.minimum.reduce(found)

    def ranks(self, factors: Sequence[Tensor]) -> list[int]:
        return list(factors[0].shape[1:])

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        roots = mode_roots(metric, weight, [tuple(range(layer.dims))])
        modes = weight.flatten(3)
        white = mode_products(modes, [half for half, _ in roots])
        bounds = self.bounds(modes.shape[1:], ())
        bases = [leading(mode_gram(white, n), bound)[0] for n, bound in enumerate(bounds)]
        core = mode_products(white, [basis.mT for basis in bases])
        sides = {f"side_{n}": inverse @ basis for n, ((_, inverse), basis) in enumerate(zip(roots, bases, strict=True))}
        return {"core": core, "energy": corner_energy(core.square().sum(0)), **sides}

    def start(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        p, q, s = (ranks[name] for name in self.names)
        sides = [factors[f"side_{n}"][:, :, :r] for n, r in enumerate((p, q, s))]
        return [factors["core"][:, :p, :q, :s], *sides]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        return outside(factors["energy"], *(ranks[name] for name in self.names))


class _Cp(_Tensor):
    """A factor for each mode, all of one rank."""

    names = ("rank",)
    step = staticmethod(nmd.cp_step)

    def bounds(self, modes: Sequence[int], doubled: Sequence[int]) -> list[int]:
        o, i, k = modes
        most = (math.prod(modes) - 1) // sum(doubled)
        return [max(1, min(most, o * i, o * k, i * k))]

    def shapes(self, modes: Sequence[Any], ranks: Sequence[Any]) -> list[tuple[Any, ...]]:
        return [(n, ranks[0]) for n in modes]

    def macs(self, modes: Sequence[int], ranks: Sequence[Any]) -> Any:
        return math.prod(modes) * ranks[0]

    def ranks(self, factors: Sequence[Tensor]) -> list[int]:
        return [factors[0].shape[2]]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        return Cp().factorize(layer, weight, metric)

    def start(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        first, kernel, last = Cp().stage_weights(layer, factors, ranks)
        return [last, first.mT, kernel.flatten(2).mT]

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        return Cp().lost(factors, ranks)


FORMS: dict[str, Any] = {"svd": _Matrix(), "tucker": _Tucker(), "cp": _Cp()}
