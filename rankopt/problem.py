"""The integer program's side of a search: which quantities are summed, what bounds them, and what the budget is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rankopt.candidates import Group
from rankopt.cost import Cost
from rankopt.devices import Devices
from rankopt.goals import EXACT
from rankopt.limits import Limit
from rankopt.plan import Fingerprint
from rankopt.space import SearchSpace


def space_of(
    groups: Sequence[Group],
    cost: Cost,
    devices: Devices,
    limits: Sequence[Limit],
    objectives: Sequence[str],
    fingerprint: Fingerprint | None = None,
    skipped: Mapping[str, str] | None = None,
) -> SearchSpace:
    """What the study proposes from.

    The budget is of the first objective that can be summed over layers: MACs, parameters or a predicted latency; where
    a limit is on something else only, of that.

    Args:
        groups: the candidates.
        cost: of the dense model.
        devices: prepared for these groups.
        limits, objectives: of the search.
        fingerprint, skipped: go into every plan.

    Raises:
        InfeasibleError: nothing can keep the limits; says what is reachable.
    """
    totals = {"macs": float(cost.macs), "params": float(cost.params)}
    fixed = {q: totals[q] - sum(getattr(la, q) for g in groups for la in g.layers) for q in totals}
    bounds = devices.bounds(limits, totals["params"]) if devices else {}
    if "params" in bounds:  # stands for memory, which falls with activations too: it must not rule out every plan
        bounds["params"] = max(bounds["params"], fixed["params"] + sum(float(g.params.min()) for g in groups))
    if devices:
        totals, fixed = totals | devices.totals, fixed | devices.fixed
    for limit in limits:
        if limit.quantity in EXACT:
            bounds[limit.quantity] = min(limit.bound(totals), bounds.get(limit.quantity, float("inf")))
    quantity = next((q for o in objectives if (q := _summed(o, devices)) in totals), "macs")
    if quantity not in bounds and bounds:
        quantity = next(iter(bounds))
    costs = [devices.costs(g) for g in groups]
    return SearchSpace(groups, fixed, totals, bounds, quantity, fingerprint, skipped, costs)


def learn(space: SearchSpace, devices: Devices) -> None:
    """Let the predicted latencies in a space follow what was measured."""
    if devices:
        devices.refit()
        ratios = {q: devices.ratio(q, bound) for q, bound in space.bounds.items() if "@" in q}
        space.update(space.fixed | devices.fixed, [devices.costs(g) for g in space.groups], ratios)


def _summed(objective: str, devices: Devices) -> str:
    """The quantity of the integer program that stands for an objective."""
    name, _, label = objective.partition("@")
    if name == "memory":
        return "params"
    return f"latency_ms@{label or devices.labels[0]}" if name.startswith("latency") and devices else objective
