"""`run`: the trials of a study, carried out by an executor; and the last measurement of its winner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import optuna

from rankopt.errors import InfeasibleError, RankoptError
from rankopt.evaluate import Evaluate
from rankopt.executors.executor import Executor
from rankopt.executors.local import Local
from rankopt.inheriting import inherit
from rankopt.interrupts import handled
from rankopt.ledger import Judged, confirm, result_of, writable
from rankopt.limits import Limit
from rankopt.loop import Loop
from rankopt.result import Entry, Progress
from rankopt.stopping import Stopping
from rankopt.strategies.strategy import Setting


def run(
    study: optuna.Study,
    setting: Setting,
    evaluate: Evaluate,
    progress: Callable[[Progress], None] = lambda p: None,
    learn: Callable[[], None] = lambda: None,
    inherited: Sequence[Judged] = (),
    by: str = "auto",
    executor: Executor | None = None,
    stopping: Stopping = Stopping(),  # noqa: B008  (frozen)
) -> str:
    """Go on until the study has `setting.trials` trials that were not interrupted, or is to be stopped before.

    Args:
        study: from `ledger.open_study`.
        setting: space, limits, seed, how many trials; see `Setting`.
        evaluate: measures a plan.
        progress: told after every trial.
        learn: called after every trial that was measured, e.g. to correct predicted costs.
        inherited: plans whose quality is known from another study; they come first, and only the rest is measured.
        by: the strategy that chooses plans; see `rankopt.strategies`.
        executor: what carries trials out (None: this process, one after the other).
        stopping: what ends the study early.

    Returns:
        Why it was stopped before it had all its trials; else empty.

    Raises:
        RankoptError: after 8 failures in a row, with the reasons.
        InputError: the storage can't be written.
    """
    with handled(), writable(study.study_name):
        loop = Loop(study, setting, by, stopping)

        def told() -> None:
            learn()
            progress(loop.standing_at())

        try:
            for old in inherited:
                if loop.wants(old.plan):
                    progress(loop.standing_at("measuring plans of an earlier study"))
                    inherit(loop, old, evaluate)
                    learn()
            (executor or Local()).run(loop, evaluate, told)
            return loop.stopped
        except (KeyboardInterrupt, RankoptError):
            loop.interrupt()
            raise
        finally:
            loop.close()


def confirm_best(study: optuna.Study, limits: Sequence[Limit], again: Callable[[Entry], Mapping[str, float]]) -> None:
    """Have the best plan measured again; when it breaks a limit then, the next best one, until one keeps them all.

    What is measured here counts instead of what the trial measured, now and when the study goes on.
    """
    while True:
        try:
            best = result_of(study, limits).best()
        except InfeasibleError:
            return
        if best.trial < 0 or "confirmed" in best.notes:
            return
        confirm(study, best.plan, again(best))
