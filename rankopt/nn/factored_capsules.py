"""`FactoredCapsules`: a capsule layer whose votes are a product of small tensors and, as a rule, are never formed.

Routing needs the votes û = W u in two products only: their sum weighted by the coupling, and their agreement with the
capsules above. With W a product of factors, each is a sum of products that can be taken in any order. So what is done
once is a choice: nothing, the input times some of the factors, or the votes themselves (all of them); and what is left
is done in every iteration. `routing_orders` finds the cheapest choice, with the cheapest order of steps for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.nn.capsules import RoutedCapsules
from rankopt.nn.contraction import Order, cheapest


@dataclass(frozen=True)
class Network:
    """The factors of W[i, j, d, e] by the letters of their dimensions.

    j, d and e are the capsules above, the dimension above and the one below; n is kept for the batch. All other letters
    are ranks, or `below`: the letters that stand for the input capsules, "i", or several whose sizes multiply to them.
    """

    factors: tuple[str, ...]
    below: str = "i"


@dataclass(frozen=True)
class Orders:
    """What is done once, and what in every iteration.

    Attributes:
        macs: multiply-accumulates of one sample, in all iterations together.
        once: factors that the input is multiplied with before the routing.
        opening: from the input and these factors to what the routing starts from.
        total, agreement: from that, the coupling or the capsules above, and the other factors, in every iteration.
    """

    macs: Any
    once: tuple[int, ...]
    opening: Order
    total: Order
    agreement: Order


def routing_orders(network: Network, sizes: Mapping[str, Any], iterations: Any) -> Orders:
    """The cheapest way to route through a network.

    Args:
        network: the factors.
        sizes: letter → size, whole numbers or arrays of them; without n.
        iterations: of the routing, a whole number or an array.

    Returns:
        The orders; `macs` is an array where sizes are, and then the rest says nothing.
    """
    sizes = {**sizes, "n": 1}
    u, c, v, agreed = f"n{network.below}e", f"nj{network.below}", "njd", f"nj{network.below}"
    best: tuple[Any, Orders] | None = None
    every = range(len(network.factors))
    for once in (chosen for size in range(len(network.factors) + 1) for chosen in combinations(every, size)):
        rest = [network.factors[n] for n in every if n not in once]
        opened = _opened(network, once, u + c + v)
        opening = cheapest([u, *(network.factors[n] for n in once)], [0], opened, sizes)
        total = cheapest([opened, c, *rest], [0, 1], v, sizes)
        agreement = cheapest([opened, v, *rest], [0, 1], agreed, sizes)
        products, macs = (
            first + iterations * second + (iterations - 1) * third
            for first, second, third in (
                (opening.products, total.products, agreement.products),
                (opening.macs, total.macs, agreement.macs),
            )
        )
        if best is None:
            best = products, Orders(macs, once, opening, total, agreement)
        elif np.ndim(products):
            better = products < best[0]
            best = np.where(better, products, best[0]), replace(best[1], macs=np.where(better, macs, best[1].macs))
        elif products < best[0]:
            best = products, Orders(macs, once, opening, total, agreement)
    assert best is not None
    return best[1]


def _opened(network: Network, once: Sequence[int], outside: str) -> str:
    """The letters that the input still has once it was multiplied with these factors."""
    have = dict.fromkeys(f"n{network.below}e" + "".join(network.factors[n] for n in once))
    if not once:
        return "".join(have)
    rest = {letter for n, factor in enumerate(network.factors) if n not in once for letter in factor}
    needed = rest | set(outside) - {"e"}
    return "".join(letter for letter in have if letter in needed)


class FactoredCapsules(RoutedCapsules):
    """Routing through a network of factors.

    Args:
        sizes: in_caps, out_caps, d_out, d_in, iterations.
        network: the letters.
        factors: the tensors, copied.
        places: where `below` has places for more capsules than there are: for every input capsule its place.
            The places between stay empty.
    """

    places: Tensor
    sources: Tensor

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        network: Network,
        factors: Sequence[Tensor],
        below: Mapping[str, int] | None = None,
        places: Tensor | None = None,
    ) -> None:
        super().__init__(*sizes)
        self.network = network
        copies = [nn.Parameter(f.detach().clone(memory_format=torch.contiguous_format)) for f in factors]
        self.factors = nn.ParameterList(copies)
        known = {"j": self.out_caps, "d": self.d_out, "e": self.d_in, **(below or {"i": self.in_caps})}
        for letters, factor in zip(network.factors, factors, strict=True):
            known |= dict(zip(letters, factor.shape, strict=True))
        self.orders = routing_orders(network, known, self.iterations)
        self._below = tuple(known[letter] for letter in network.below)
        self._places = int(np.prod(self._below))
        self.padded = places is not None
        if places is not None:
            sources = torch.full((self._places,), self.in_caps, dtype=torch.int64)
            sources[places] = torch.arange(self.in_caps)
            device = factors[0].device
            self.register_buffer("places", places.to(device), persistent=False)
            self.register_buffer("sources", sources.to(device), persistent=False)

    def products(self, u: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """See the class."""
        orders, factors = self.orders, list(self.factors)
        opened = orders.opening.run([self._placed(u, 1), *(factors[n] for n in orders.once)])
        rest = [factor for n, factor in enumerate(factors) if n not in orders.once]

        def total(coupling: Tensor) -> Tensor:
            return orders.total.run([opened, self._placed(coupling, 2), *rest])

        def agreement(v: Tensor) -> Tensor:
            flat = orders.agreement.run([opened, v, *rest]).reshape(u.shape[0], self.out_caps, self._places)
            return flat.index_select(2, self.places) if self.padded else flat

        return total, agreement

    def _placed(self, x: Tensor, dim: int) -> Tensor:
        """Dimension `dim`, the input capsules, as the letters `below`; empty places are 0."""
        if self.padded:
            pad = [0, 0] * (x.dim() - 1 - dim) + [0, 1]
            x = F.pad(x, pad).index_select(dim, self.sources)
        return x.unflatten(dim, self._below)

    def extra_repr(self) -> str:
        """Shown by print."""
        once = ", ".join(self.network.factors[n] for n in self.orders.once) or "nothing"
        return f"{super().extra_repr()}, factors {', '.join(self.network.factors)}, multiplied once: {once}"
