"""A made-up evaluation in two parts, as the Ray executor takes it: a table of losses that workers look plans up in.

Workers load neither torch nor this project's tests for it. What goes wrong there is told by files, which outlive them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from test_space import GROUPS
from test_study import measure

from rankopt.candidates import Group
from rankopt.evaluate import Evaluation
from rankopt.limits import Limit
from rankopt.plan import LayerChoice, Plan


def table() -> dict[str, dict[str, float]]:
    """What each choice of each group adds to `test_study.measure`'s kl."""
    nothing = measure(Plan({})).measurements["kl"]

    def alone(g: Group, choice: LayerChoice) -> float:
        return measure(Plan({la.name: choice for la in g.layers})).measurements["kl"] - nothing

    return {g.name: {str(c): alone(g, c) for c in g.choices} for g in GROUPS}


@dataclass(frozen=True)
class Table:
    """What travels.

    Attributes:
        losses: group → choice → what it adds to kl.
        rest: kl of the plan that changes nothing.
        folder: where notes are left, one file a call.
        faults: number of the call → what goes wrong: killed, exits, raises, nan, sleeps, stuck.
        every: what goes wrong in every call.
        seconds: that every call takes.
        load: bytes that only make it heavy.
    """

    losses: Mapping[str, Mapping[str, float]]
    rest: float
    folder: str = ""
    faults: Mapping[int, str] = field(default_factory=dict)
    every: str = ""
    seconds: float = 0.0
    load: bytes = b""
    device: str = "cpu"

    def judge(self, plan: Plan) -> dict[str, float]:
        number = self.note()
        time.sleep(self.seconds)
        self.go_wrong(self.faults.get(number, self.every))
        kl = self.rest + sum(self.losses[n][str(c)] for n, c in plan.layers.items() if n in self.losses)
        bad = self.faults.get(number, self.every) == "nan"
        return {"kl": float("nan") if bad else kl, "bn": 0.0, "torch": float("torch" in sys.modules)}

    def note(self) -> int:
        """Which call this is, over all workers."""
        number = 0
        while self.folder:
            try:
                file = os.open(Path(self.folder, str(number)), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                number += 1
                continue
            os.write(file, str(os.getpid()).encode())
            os.close(file)
            break
        return number

    def go_wrong(self, how: str) -> None:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "raises":
            raise ValueError("no such\nluck")
        elif how == "sleeps":
            time.sleep(1000)
        elif how == "memory":
            raise MemoryError("no more")
        elif how == "stuck":
            while True:
                try:
                    time.sleep(1000)
                except BaseException:
                    continue


class Parted:
    """What stays."""

    devices: Any = None
    device = "cpu"

    def __init__(self, folder: Path | None = None, **options: Any) -> None:
        self.table = Table(table(), measure(Plan({})).measurements["kl"], str(folder or ""), **options)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def early(self, plan: Plan, limits: Sequence[Limit]) -> Evaluation | None:
        found = measure(plan, limits)
        return found if found.stopped else None

    def to_measure(self, plan: Plan, limits: Any, worth: Any, known: Any) -> bool:
        return False

    def travelling(self) -> Table:
        return self.table

    def __call__(
        self,
        plan: Plan,
        limits: Sequence[Limit] = (),
        worth: Callable[[Mapping[str, float]], bool] = lambda known: True,
        known: Mapping[str, float] | None = None,
    ) -> Evaluation:
        found = measure(plan, limits)
        if found.stopped:
            return found
        values = dict(self.table.judge(plan) if known is None else known)
        return replace(found, measurements=found.measurements | {k: v for k, v in values.items() if k != "bn"})
