"""What a study asks for next: the sampler, and budgets near the limit, where the answer lies."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import optuna

from rankopt.limits import Limit
from rankopt.result import Entry, minimized
from rankopt.space import MARGIN, SearchSpace

_TIGHT = 0.05  # how far beyond the limit a measured plan may be to have its budget corrected


def sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """TPE for the trial after `number` others.

    The sampler's random state is not stored, so every trial has a sampler of its own, seeded by how many were done
    before: a study that was interrupted and goes on proposes what it would have proposed without the interruption.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate is marked experimental
        return optuna.samplers.TPESampler(
            seed=(seed * 1_000_003 + number) % 2**32, multivariate=True, n_startup_trials=8, n_ei_candidates=48
        )


def tightened(study: optuna.Study, entries: Iterable[Entry], space: SearchSpace) -> dict[str, float] | None:
    """The best plan's corrections again, with the budget that brings its kind of plan just below the limit.

    Where costs are predicted, plans come out some percent beside the budget, and each kind of plan to its own side.
    """
    if space.exact or space.quantity not in space.bounds:
        return None
    near = [e for e in entries if e.trial >= 0 and space.share(e.measurements) <= space.highest * (1 + _TIGHT)]
    trials = study.get_trials(deepcopy=False)
    for entry in sorted(near, key=lambda e: minimized(e.measurements, ["kl"])):
        share, params = space.share(entry.measurements), trials[entry.trial].params
        if 0 <= 1 - share / space.highest <= MARGIN:
            return None  # the best is there already
        budget = space.tightened(entry.plan, share)
        low, high = space.parameters()["budget"]
        if params and low <= budget <= high:
            return {**params, "budget": budget}
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
    return {"budget": space.highest if space.exact else max(space.lowest, space.highest * (1 - MARGIN))}
