"""`compare`: every method alone at the same cost, beside all of them together: which way to write a layer loses least.

For each level (a share of the dense MACs, parameters or latency) and each method the integer program gives the plan of
least predicted loss that uses no other method; it is built, refitted and measured as in a trial. Layers that a method
does not fit stay dense, but where there is no kernel to split (linear and 1×1 layers) most methods are the same as a
matrix factorization, which then stands in (`Decomposition.pointwise`). Methods for different kinds of layers can be
taken as one: ``cp+caps_cp`` has the one in convolutions and the other in capsules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rankopt.allocate import Choices, allocate
from rankopt.candidates import Group
from rankopt.decompositions import method, table
from rankopt.errors import InfeasibleError, InputError, RankoptError
from rankopt.plan import DENSE, LayerChoice, Plan
from rankopt.space_file import Space

if TYPE_CHECKING:
    from torch import nn

    from rankopt.search import Search

MIXED = "mixed"
LEVELS = (0.5, 0.35, 0.25)
_CLOSE = 0.02  # how far from its level a measured latency may be
_ROUNDS = 5  # plans that are measured at most to come so close
Train = Callable[["nn.Module", Plan], "nn.Module"]


@dataclass(frozen=True)
class Row:
    """A method at a level.

    Attributes:
        by: what is equal: "macs", "params" or "latency" (of the first target) or "latency@TARGET".
        level: the share of dense that was allowed.
        method: its name, several with + between them, or "mixed".
        plan: None where there is none.
        values: what was measured: macs_kept, params_kept, kl, accuracy, latency_kept …; and with ``trained_`` in front,
            after recovery; with ``test_`` on test data.
        missing: why there is no plan.
    """

    by: str
    level: float
    method: str
    plan: Plan | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they are compared with.

    Attributes:
        rows: by quantity, level and method.
        dense: what the dense model measures.
        chosen: method → in how many layers of all mixed plans it was chosen.
        mixed: how many mixed plans there are.
        notes: of the measurements.
        conditions: target → what its times depend on.
    """

    rows: Sequence[Row]
    dense: Mapping[str, float]
    chosen: Mapping[str, int]
    mixed: int
    notes: Sequence[str] = ()
    conditions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def never(self) -> list[str]:
        """The methods that no mixed plan uses."""
        return [name for name, count in self.chosen.items() if count == 0]


def widened(space: Space, methods: Sequence[str]) -> Space:
    """A search space in which all layers that a rule does not leave dense choose from these methods.

    What stands in for them on layers without a kernel is among them. Raises `LayerError` for an unknown method.
    """
    parts = [part for name in methods for part in parts_of(name)]
    known = [*parts, *(method(part).pointwise for part in parts)]
    rules = [rule if rule.methods is None else rule.model_copy(update={"methods": None}) for rule in space.rules]
    return space.model_copy(update={"methods": list(dict.fromkeys(known)), "rules": rules})


def parts_of(name: str) -> list[str]:
    """The methods that a name joins by +."""
    return name.split("+")


def compare(
    search: Search,
    methods: Sequence[str] | None = None,
    levels: Sequence[float] = LEVELS,
    by: Sequence[str] | None = None,
    *,
    test: bool = False,
    train: Train | None = None,
) -> Comparison:
    """Solve, build and measure every method at every level.

    Args:
        search: gives candidates, refit, data and targets; its limits and trials play no part. For methods that its
            space does not offer, make it with a `widened` one.
        methods: which; all that have candidates when None. Those joined by + count as one.
        levels: shares of the dense model's cost in (0, 1].
        by: "macs", "params", "latency", "latency@TARGET"; macs, params and, where there are targets, the latency of
            the first when None.
        test: measure on the test data too.
        train: fine-tunes a built model; then everything is measured again behind it.

    Raises:
        InputError: a method without candidates, a level outside (0, 1], latency without a target.
    """
    offered = dict.fromkeys(c.method for g in search.groups for c in g.choices if c != DENSE)
    names = [n for n in table() if n in offered] if methods is None else list(dict.fromkeys(methods))
    quantities = _quantities(search, by)
    for level in levels:
        if not 0 < level <= 1:
            raise InputError(f"levels: each is a share of dense above 0 and at most 1, got {level:g}")
    single = list(dict.fromkeys(part for name in names for part in parts_of(name)))
    for part in single:
        if part not in offered:
            raise InputError(f"methods: {part} has no candidate here{_refusal(search.groups, part)}")
    if search.targets:
        search.devices.prepare(search.groups, search.tell)
    search.evaluator.use(search.devices)
    only = {name: _only(search.groups, parts_of(name)) for name in names}
    together = _only(search.groups, single)
    measured: dict[str, dict[str, float]] = {}
    rows: list[Row] = []
    for quantity in quantities:
        for level in levels:
            for name, groups in [*only.items(), (MIXED, together)]:
                search.tell(f"{name} at {level:.0%} of {quantity}")
                rows.append(_row(search, quantity, level, name, groups, measured, test, train))
    plans = [row.plan for row in rows if row.method == MIXED and row.plan is not None]
    uses = [choice.method for plan in plans for choice in plan.changed().values()]
    chosen = {part: uses.count(part) for part in single}
    dense = dict(search.evaluator.dense)
    if test and search.tests is not None:
        dense |= {f"test_{k}": v for k, v in search.measure(search.model, "test").items()}
    return Comparison(rows, dense, chosen, len(plans), [*_missing(rows), *search.notes()], search.devices.conditions)


def _missing(rows: Sequence[Row]) -> list[str]:
    """Why there are no plans, a line for all levels of which the same is true."""
    levels: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.missing:
            levels.setdefault((row.by, row.method, row.missing), []).append(f"{row.level:.0%}")
    return [f"{name} at {', '.join(own)} of {by}: {missing}" for (by, name, missing), own in levels.items()]


def _quantities(search: Search, by: Sequence[str] | None) -> dict[str, str]:
    """What is equal → the quantity of the integer program."""
    labels = [t.called for t in search.targets]
    if by is None:
        by = ["macs", "params", *(["latency"] if labels else [])]
    found = {}
    for name in by:
        what, _, label = name.partition("@")
        if name in ("macs", "params"):
            found[name] = name
        elif what == "latency" and labels and (not label or label in labels):
            found[name] = f"latency_ms@{label or labels[0]}"
        else:
            times = [f"latency@{label}" for label in labels]
            more = "" if labels else " (latency needs a target)"
            raise InputError(f"by: is one of {', '.join(['macs', 'params', *times])}{more}, got {name!r}")
    if not found:
        raise InputError("by: names nothing")
    return found


def _only(groups: Sequence[Group], names: Sequence[str]) -> list[Group]:
    """The groups with the candidates of these methods alone, of what stands in for them, and dense."""
    found = []
    for group in groups:
        layer = group.layers[0]
        fitting = {n for n in names if method(n).why_not(layer) is None}
        if not fitting and all(k == 1 for k in layer.kernel_size):
            fitting = {method(n).pointwise for n in names}
        kept = [n for n, choice in enumerate(group.choices) if choice == DENSE or choice.method in fitting]
        parts: dict[str, Any] = {
            key: values[kept] if len(values := getattr(group, key)) else values
            for key in ("losses", "macs", "params", "energy")
        }
        found.append(replace(group, choices=tuple(group.choices[n] for n in kept), **parts))
    return found


def _row(
    search: Search,
    quantity: str,
    level: float,
    name: str,
    groups: Sequence[Group],
    measured: dict[str, dict[str, float]],
    test: bool,
    train: Train | None,
) -> Row:
    try:
        plan = _latency_plan(search, groups, quantity, level) if quantity.startswith("latency") else None
        plan = plan or _plan(search, groups, quantity, level)
        if plan.digest not in measured:
            measured[plan.digest] = _measured(search, plan, test, train)
    except RankoptError as error:
        return Row(quantity, level, name, missing=error.message)
    return Row(quantity, level, name, plan, measured[plan.digest])


def _program(search: Search, quantity: str) -> tuple[str, float, float]:
    """The quantity of the integer program, what dense takes of it, and what is outside of the groups."""
    if quantity in ("macs", "params"):
        total = float(getattr(search.cost, quantity))
        return quantity, total, total - sum(getattr(la, quantity) for g in search.groups for la in g.layers)
    label = quantity.partition("@")[2] or search.devices.labels[0]
    key = f"latency_ms@{label}"
    return key, search.devices.totals[key], search.devices.fixed[key]


def _plan(search: Search, groups: Sequence[Group], quantity: str, share: float) -> Plan:
    """The plan of least predicted loss within a share of dense; raises `InfeasibleError` that says what is possible."""
    key, total, fixed = _program(search, quantity)
    choices: list[Choices] = []
    for group in groups:
        if not group.choices:
            raise InfeasibleError(f"{group.name} may not stay dense, and the method does not fit it")
        choices.append(group.as_choices(np.maximum(group.losses, 0), search.devices.costs(group)))
    try:
        picks = allocate(choices, {key: share * total - fixed}).picks
    except InfeasibleError as error:
        least = (error.reachable[key] + fixed) / total
        raise InfeasibleError(f"the least that it reaches is {least:.1%} of dense") from None
    layers: dict[str, LayerChoice] = {}
    for group, pick in zip(groups, picks, strict=True):
        layers |= {layer.name: group.choices[pick] for layer in group.layers}
    return Plan(layers, search.fingerprint, {la.name: la.skip for la in search.layers if la.skip})


def _latency_plan(search: Search, groups: Sequence[Group], quantity: str, level: float) -> Plan:
    """The plan whose measured latency comes nearest to the level without being more than a little above it.

    Latency is predicted, so the share that is asked for is corrected by what plans turn out to take.
    """
    label = quantity.partition("@")[2] or search.devices.labels[0]
    asked, seen, found = level, set[str](), list[tuple[bool, float, Plan]]()
    for _ in range(_ROUNDS):
        try:
            plan = _plan(search, groups, quantity, asked)
        except InfeasibleError:
            if not found:
                raise
            break
        kept = search.devices.measured(plan)[f"latency_kept@{label}"]
        off = kept / level - 1
        found.append((off > _CLOSE, abs(off), plan))
        if abs(off) <= _CLOSE or plan.digest in seen:
            break
        seen.add(plan.digest)
        asked *= level / kept
    above, off, plan = min(found, key=lambda entry: entry[:2])
    if above:
        raise InfeasibleError(f"the least that it was measured to take is {level * (1 + off):.1%} of dense")
    return plan


def _measured(search: Search, plan: Plan, test: bool, train: Train | None) -> dict[str, float]:
    """Costs, quality of the refitted model, latency; then the same quality of the trained one."""
    built = search.build(plan)
    values = search.evaluator.costs(plan) | _quality(search, built, test)
    if search.devices:
        values |= search.devices.measured(plan)
    if train is not None:
        values |= {f"trained_{k}": v for k, v in _quality(search, train(built, plan), test).items()}
    return values


def _quality(search: Search, module: nn.Module, test: bool) -> dict[str, float]:
    found = search.measure(module)
    if test and search.tests is not None:
        found |= {f"test_{k}": v for k, v in search.measure(module, "test").items()}
    return found


def _refusal(groups: Sequence[Group], name: str) -> str:
    """Why a method is not offered, by the first layer that says so."""
    for group in groups:
        if name in group.refused:
            return f" ({group.name}: {group.refused[name]})"
    return ", since the search space does not offer it"
