"""`free` and `plain`: every layer's method and share of its MACs as independent parameters of Optuna's sampler.

`free` begins with the solved plans, `plain` with nothing. Both are there for comparison, and for people who want it so.
"""

from __future__ import annotations

from typing import ClassVar

from rankopt.sampling import Sampling, Told
from rankopt.strategies.solved import Solved
from rankopt.strategies.strategy import Proposal, Setting, Standing, Strategy


class Free(Strategy):
    """Twice as many numbers as layers that choose. Plans may break limits; the sampler learns that as a constraint."""

    name: ClassVar[str] = "free"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.solved = Solved(setting)
        ranges = self.space.layer_parameters()
        sampler = "tpe" if setting.sampler == "auto" else setting.sampler
        self.sampling = Sampling(sampler, ranges, len(setting.objectives), setting.trials, setting.seed)

    def propose(self, standing: Standing) -> Proposal:
        """Solved plans first, told in the sampler's numbers; then the sampler's own."""
        if standing.number < self.first:
            plan = self.solved.at(standing.number)
            return Proposal(plan, self.name, self.space.layer_numbers(plan))
        numbers, marks = self.sampling.ask(standing.number)
        return Proposal(self.space.plan_by_layer(numbers), self.name, numbers, marks)

    @property
    def first(self) -> int:
        """How many solved plans come first."""
        return self.setting.first

    def told(self, proposal: Proposal, outcome: Told) -> None:
        """Every plan of the space can be told in the sampler's numbers, whoever proposed it."""
        numbers = proposal.numbers
        if set(numbers) != set(self.sampling.ranges):
            numbers = self.space.layer_numbers(proposal.plan)
        if numbers:
            self.sampling.tell(Told(numbers, outcome.values, outcome.excess, outcome.marks))


class Plain(Free):
    """`free` from nothing: what an Optuna study over the layers does by itself."""

    name: ClassVar[str] = "plain"

    @property
    def first(self) -> int:
        """No solved plans."""
        return 0
