"""The plans that a prediction of latency is fitted on: random ones, and such as the integer program proposes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from rankopt.allocate import allocate
from rankopt.candidates import Group
from rankopt.errors import InfeasibleError
from rankopt.plan import DENSE, LayerChoice, Plan

_GAP = 3e-3  # to the proven optimum; times are predicted far less closely


def random_plans(groups: Sequence[Group], count: int, seed: int) -> list[Plan]:
    """Plans that change a random part of the layers to random candidates of a few random methods.

    From few layers to all of them, and from a single method to all of them: a search ends in plans that are much of one
    kind, and what many layers of one kind have in common (a layout that the runtime need not change between them) is
    seen in such plans only.
    """
    generator = np.random.default_rng(seed)
    methods = sorted({c.method for g in groups for c in g.choices if c != DENSE})
    out = []
    for _ in range(count):
        share = generator.uniform(0.4, 1.0)
        few = int(generator.integers(1, len(methods) + 1)) if methods else 0
        offered = set(generator.permutation(methods)[:few])
        layers: dict[str, LayerChoice] = {}
        for group in groups:
            choices = [c for c in group.choices if c.method in offered]
            if choices and generator.random() < share:
                choice = choices[int(generator.integers(len(choices)))]
                layers |= {layer.name: choice for layer in group.layers}
        out.append(Plan(layers))
    return out


def solved_plans(groups: Sequence[Group], costs: Sequence[NDArray[np.float64]], dense: float, count: int) -> list[Plan]:
    """Plans of least predicted loss at budgets between the fastest plan and dense.

    Of all plans that seem to keep a limit the integer program picks those that are predicted too fast, so its plans are
    farther from their prediction than random ones. Measured before any study, at any limit, they teach them all.

    Args:
        groups: the candidates.
        costs: for every group, the predicted time of each choice.
        dense: what the groups of the dense model may take, in the same unit.
        count: how many budgets; fewer plans where they share some, or where none keeps them.
    """
    if not groups:
        return []
    least = sum(float(c.min()) for c in costs)
    choices = [g.as_choices(None, {"time": c}) for g, c in zip(groups, costs, strict=True)]
    out = []
    for part in np.arange(1, count + 1) / (count + 1):
        with suppress(InfeasibleError):  # no plan is faster than dense
            picks = allocate(choices, {"time": least + part * (dense - least)}, _GAP).picks
            chosen = [(g, g.choices[n]) for g, n in zip(groups, picks, strict=True)]
            out.append(Plan({layer.name: choice for group, choice in chosen for layer in group.layers}))
    return list(dict.fromkeys(out))
