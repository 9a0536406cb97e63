"""`Picks`: plans as the indices of the candidates that they choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rankopt.candidates import Group
from rankopt.plan import Plan


class Picks:
    """Plan → (groups,) the index of every group's choice, or None for a plan that takes what is no candidate, changes
    another layer, or parts layers that choose together.

    Answers are remembered, since strategies ask for every measured plan before every proposal.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._names = [g.name for g in groups]
        self._index = [{choice: n for n, choice in enumerate(g.choices)} for g in groups]
        self._members = {layer.name for g in groups for layer in g.layers}
        self._tied = [[layer.name for layer in g.layers] for g in groups if len(g.layers) > 1]
        self._known: dict[str, NDArray[np.intp] | None] = {}

    def __call__(self, plan: Plan) -> NDArray[np.intp] | None:
        """See above."""
        if plan.digest not in self._known:
            foreign = any(name not in self._members for name in plan.changed())
            parted = any(len({plan[name] for name in names}) > 1 for names in self._tied)
            found = [index.get(plan[name], -1) for name, index in zip(self._names, self._index, strict=True)]
            self._known[plan.digest] = None if foreign or parted or -1 in found else np.array(found, dtype=np.intp)
        return self._known[plan.digest]
