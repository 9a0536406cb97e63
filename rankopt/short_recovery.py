"""`ShortRecovery`: the few steps of training that a study makes part of every trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rankopt.divergence import Divergence
from rankopt.plan import Plan
from rankopt.recover import Training, read_options, recover
from rankopt.recovery_options import RecoveryOptions

_ELSEWHERE = ("bn", "final_steps", "checkpoint")  # what does not change a trial's weights


@dataclass(frozen=True)
class ShortRecovery:
    """Call it with a compressed model, the dense one and the plan to get the trained model.

    The same seed for every plan, and no timing, so that a trial can be repeated.

    Attributes:
        options: `steps` of them are made.
        batches: training data; None until `on` gives some.
        divergence: what outputs are.
        train: the user's own training.
        seed: of everything random.
    """

    options: RecoveryOptions
    batches: Any = None
    divergence: Divergence | None = None
    train: Training | None = None
    seed: int = 0

    @classmethod
    def of(cls, given: int | Mapping[str, Any] | RecoveryOptions | ShortRecovery | None) -> ShortRecovery | None:
        """From a number of steps, options, or None; None where there are no steps."""
        if given is None or isinstance(given, ShortRecovery):
            return given
        options = read_options({"steps": given} if isinstance(given, int) else given)
        return cls(options) if options.steps > 0 else None

    def on(self, batches: Any, divergence: Divergence) -> ShortRecovery:
        """The same with these data, unless it has its own."""
        return replace(self, batches=batches if self.batches is None else self.batches, divergence=divergence)

    def __call__(self, model: nn.Module, dense: nn.Module, plan: Plan) -> nn.Module:
        """The trained model; one that the plan leaves as it is stays so. Batch norm is left to the evaluation."""
        if not plan.changed():
            return model
        return recover(
            model,
            dense,
            self.batches,
            options=self.options,
            plan=plan,
            divergence=self.divergence,
            train=self.train,
            seed=self.seed,
            timing=False,
            bn="off",
        ).model

    def __str__(self) -> str:
        """What a study is begun with: all that decides what trials are trained to."""
        fixed = {k: v for k, v in self.options.model_dump().items() if k not in _ELSEWHERE}
        return json.dumps({**fixed, "seed": self.seed}, sort_keys=True)
