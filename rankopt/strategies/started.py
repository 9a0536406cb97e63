"""`Started`: plans that are given come first, then those of another strategy, which learns from both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from rankopt.plan import Plan
from rankopt.sampling import Told
from rankopt.strategies.strategy import Proposal, Setting, Standing, Strategy

START = "start"  # stands in the ledger as what proposed the plan


class Started(Strategy):
    """See above. A given plan that was measured or failed before is not proposed again.

    Args:
        setting: its plans `Setting.start` are those that come first.
        way: makes the other strategy, for the trials that are left and numbered as if there were no others.
    """

    name: ClassVar[str] = START

    def __init__(self, setting: Setting, way: type[Strategy]) -> None:
        super().__init__(setting)
        self._waiting = {plan.digest: plan for plan in setting.start}
        self._first: set[str] = set()  # those of them that were proposed
        self.then = way(replace(setting, trials=max(1, setting.trials - len(self._waiting)), start=()))

    def propose(self, standing: Standing) -> Proposal:
        """The next given plan, or whatever the other strategy proposes."""
        while self._waiting:
            plan = self._waiting.pop(next(iter(self._waiting)))
            if plan.digest not in standing.known:
                self._first.add(plan.digest)
                return Proposal(plan, self.name)
        return self.then.propose(replace(standing, number=max(0, standing.number - len(self._first))))

    def told(self, proposal: Proposal, outcome: Told) -> None:
        """Pass it on, and note which given plans are done."""
        self._note(proposal.plan, proposal.by)
        self.then.told(proposal, outcome)

    def unused(self, proposal: Proposal) -> None:
        """A given plan comes next then."""
        if proposal.by != self.name:
            self.then.unused(proposal)
            return
        self._first.discard(proposal.plan.digest)
        self._waiting = {proposal.plan.digest: proposal.plan, **self._waiting}

    def recall(self, history: Sequence[tuple[Proposal, Told]]) -> None:
        """Pass on what was measured in earlier runs."""
        for proposal, _ in history:
            self._note(proposal.plan, proposal.by)
        self.then.recall(history)

    def _note(self, plan: Plan, by: str) -> None:
        self._waiting.pop(plan.digest, None)
        if by == self.name:
            self._first.add(plan.digest)
