"""Budgets near the limit, where the answer lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rankopt.limits import Limit
from rankopt.result import Entry, minimized
from rankopt.space import MARGIN, SearchSpace

_TIGHT = 0.05  # how far beyond the limit a measured plan may be to have its budget corrected


def tightened(
    entries: Iterable[Entry], numbers: Mapping[str, Mapping[str, float | str]], space: SearchSpace
) -> dict[str, float] | None:
    """The best plan's numbers again, with the budget that brings its kind of plan just below the limit.

    Where costs are predicted, plans come out some percent beside the budget, and each kind of plan to its own side.

    Args:
        entries: the measured plans.
        numbers: plan digest → what was proposed for it.
        space: of the study.
    """
    if space.exact or space.quantity not in space.bounds:
        return None
    near = [e for e in entries if e.trial >= 0 and space.share(e.measurements) <= space.highest * (1 + _TIGHT)]
    for entry in sorted(near, key=lambda e: minimized(e.measurements, ["kl"])):
        share, own = space.share(entry.measurements), numbers.get(entry.plan.digest)
        if 0 <= 1 - share / space.highest <= MARGIN:
            return None  # the best is there already
        budget = space.tightened(entry.plan, share)
        low, high = space.parameters()["budget"]
        if own and low <= budget <= high:
            return {**{name: float(value) for name, value in own.items()}, "budget": budget}
    return None


def focus(entries: Iterable[Entry], space: SearchSpace, limits: Sequence[Limit]) -> dict[str, float] | None:
    """The budget at which the answer is expected: the limit on cost, or between the cheapest plan that keeps a limit on
    quality and the next one below that does not."""
    if any(li.quantity in ("accuracy", "kl") for li in limits):
        entries = list(entries)
        kept = [space.share(e.measurements) for e in entries if e.feasible]
        broken = [space.share(e.measurements) for e in entries if not e.feasible]
        top = min(kept, default=space.highest)
        below = max((b for b in broken if b < top), default=space.lowest)
        return {"budget": min(max(below + 0.7 * (top - below), space.lowest), space.highest)}
    if space.quantity not in space.bounds:
        return None
    return {"budget": space.top}
