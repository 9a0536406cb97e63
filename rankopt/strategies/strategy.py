"""`Strategy`: the seam for ways to choose the next plan, from what was measured of all the plans before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rankopt.candidates import Group
from rankopt.errors import RankoptError
from rankopt.limits import Limit
from rankopt.pareto import front, gains
from rankopt.plan import Plan
from rankopt.result import Entry
from rankopt.sampling import Number, Told
from rankopt.space import SearchSpace

Array = NDArray[np.float64]
Sensitivities = Callable[[Plan], Sequence[Array]]  # a plan → for every group, what each choice would change


WORST_KL = 3.0  # nats; a front is judged below it


class Exhausted(RankoptError):
    """A strategy has no more plans to propose."""


@dataclass(frozen=True)
class Proposal:
    """A plan, and how it came about.

    Attributes:
        plan: what is to be measured.
        by: the strategy that proposed it.
        numbers: what Optuna's sampler proposed for it, if it was asked.
        marks: what the sampler remembers with it.
        probe: whether it is measured whatever limits it breaks, since others are made of what is learned.
    """

    plan: Plan
    by: str
    numbers: Mapping[str, Number] = field(default_factory=dict)
    marks: Mapping[str, Any] = field(default_factory=dict)
    probe: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For the ledger; the plan stands elsewhere."""
        found = {"by": self.by, "numbers": dict(self.numbers), "marks": dict(self.marks)}
        return found | ({"probe": True} if self.probe else {})

    @classmethod
    def from_dict(cls, plan: Plan, told: Mapping[str, Any]) -> Proposal:
        """The reverse; of a trial that was not proposed by a strategy all but the plan is empty."""
        return cls(
            plan, told.get("by", ""), told.get("numbers", {}), told.get("marks", {}), bool(told.get("probe", False))
        )


@dataclass(frozen=True)
class Setting:
    """What a strategy is made for.

    Attributes:
        space: the candidates and the integer program over them.
        objectives: names.
        limits: what plans have to keep.
        dense: the dense model's measurements.
        trials: how many the study shall have.
        seed: of everything random.
        seeds: how many solved plans come first (None: a third of the trials, at most 12).
        sampler: of `rankopt.sampling.SAMPLERS`, or auto.
        sensitivities: measures predicted losses anew around a plan; None where that can't be had.
        estimated: a group and a method → the share of its MACs at the ranks that EVBMF estimates.
        start: plans that are measured before any is chosen; see `strategies.started`.
    """

    space: SearchSpace
    objectives: Sequence[str]
    limits: Sequence[Limit]
    dense: Mapping[str, float]
    trials: int
    seed: int = 0
    seeds: int | None = None
    sampler: str = "auto"
    sensitivities: Sensitivities | None = None
    estimated: Callable[[Group, str], float] | None = None
    start: Sequence[Plan] = ()

    @property
    def first(self) -> int:
        """How many solved plans come first."""
        return max(1, min(12, self.trials // 3)) if self.seeds is None else self.seeds


@dataclass(frozen=True)
class Standing:
    """What is known when a plan is asked for.

    Attributes:
        number: how many trials there were, those under way included.
        entries: all measured plans, in order.
        pending: digests of the plans that are being measured.
    """

    number: int
    entries: Sequence[Entry]
    pending: frozenset[str] = frozenset()

    @property
    def known(self) -> set[str]:
        """Digests of the plans that need not be proposed any more."""
        return {e.plan.digest for e in self.entries} | self.pending

    def random(self, seed: int) -> np.random.Generator:
        """The same after the same trials, whether or not the study was interrupted."""
        return np.random.default_rng([seed, self.number])


class Strategy(ABC):
    """A way to choose the next plan.

    All that it knows is in `Standing` and in what it is told, so that one made anew and given the same history goes on
    as the old one would have.

    Attributes:
        name: in study files and in the ledger.
    """

    name: ClassVar[str]

    def __init__(self, setting: Setting) -> None:
        self.setting, self.space = setting, setting.space

    @abstractmethod
    def propose(self, standing: Standing) -> Proposal:
        """The next plan. Raises `Exhausted` when there is none left."""

    def told(self, proposal: Proposal, outcome: Told) -> None:  # noqa: B027  (most have nothing to learn here)
        """What became of a proposal (of this strategy, or of another one before a study was resumed)."""

    def unused(self, proposal: Proposal) -> None:
        """Nothing becomes of a proposal: something else is measured instead, or is being measured already."""
        self.told(proposal, Told(proposal.numbers, None, {}, proposal.marks))

    def recall(self, history: Sequence[tuple[Proposal, Told]]) -> None:
        """Take in the trials of earlier runs, in order."""
        for proposal, outcome in history:
            self.told(proposal, outcome)


@dataclass(frozen=True)
class Line:
    """Measured plans of a space with their kl and their cost, as the strategies compare them.

    The cost is that of the budget's quantity as it is predicted, also where it was measured: what is proposed next is
    predicted too, and a noisy measurement leads to no other proposals.

    Attributes:
        entries: the plans.
        points: (entries, 2) kl in nats, and the share of the dense cost.
    """

    entries: Sequence[Entry]
    points: Array

    @classmethod
    def of(cls, space: SearchSpace, entries: Sequence[Entry]) -> Line:
        """Of those that are in the space and whose kl is known."""
        judged = [e for e in entries if e.measurements.get("kl") is not None]
        pairs = [(e, picks) for e in judged if (picks := space.picks(e.plan)) is not None]
        if not pairs:
            return cls([], np.zeros((0, 2)))
        found, picks = [e for e, _ in pairs], np.stack([p for _, p in pairs])
        costs = space.shares(space.cost_of(picks) - space.fixed[space.quantity])
        return cls(found, np.stack([[float(e.measurements["kl"] or 0.0) for e in found], costs], axis=1))

    def front(self) -> Line:
        """Those that no other one beats, from the most faithful on."""
        chosen = front(self.points)
        return Line([self.entries[i] for i in chosen], self.points[chosen])

    def own(self) -> Array:
        """What each point adds to the area that all of them dominate together."""
        found = np.zeros(len(self.points))
        inside = np.flatnonzero((self.points < (WORST_KL, 1.0)).all(axis=1))
        edge = inside[front(self.points[inside])]
        if len(edge) < len(inside):  # what one of them adds ends where others that it beats begin
            rest = [np.delete(self.points, i, 0) for i in inside]
            reference = (WORST_KL, 1.0)
            for i, others in zip(inside, rest, strict=True):
                found[i] = gains(self.points[[i], 0], self.points[[i], 1], others, reference)[0]
            return found
        losses, costs = self.points[edge].T  # losses rise, costs fall
        found[edge] = (np.append(losses[1:], WORST_KL) - losses) * (np.append(1.0, costs[:-1]) - costs)
        return found
