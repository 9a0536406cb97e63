"""`Carrying`: the trials that workers carry out, from asking for them to telling what became of them.

It knows no Ray: somebody else takes plans from `next` to workers and says how that ended. The quality comes from there;
what is measured on a device comes after it, one plan at a time: targets on other machines by a thread, so that workers
go on meanwhile; targets on this machine here and now, while the trials that run on it are waited for.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from rankopt.devices import Devices
from rankopt.errors import KilledError, reason_of
from rankopt.evaluate import Evaluation
from rankopt.executors.apart import Apart
from rankopt.executors.deaths import cause_of
from rankopt.executors.time_limit import too_long
from rankopt.executors.worker import Judge
from rankopt.limits import Limit
from rankopt.loop import Asked, Loop
from rankopt.plan import Plan

_MOMENT_S = 0.2
_UNANSWERED = "it ended without an answer"


@runtime_checkable
class InTwoParts(Protocol):
    """What can be carried out by this executor; see `Evaluator`."""

    devices: Devices | None
    device: str

    def early(self, plan: Plan, limits: Sequence[Limit]) -> Evaluation | None:
        """What comes out if nothing has to be built."""

    def to_measure(
        self,
        plan: Plan,
        limits: Sequence[Limit],
        worth: Callable[[Mapping[str, float]], bool],
        known: Mapping[str, float],
    ) -> bool:
        """Whether devices are asked."""

    def travelling(self) -> Judge:
        """What is sent to the workers."""

    def __call__(
        self,
        plan: Plan,
        limits: Sequence[Limit],
        worth: Callable[[Mapping[str, float]], bool] = ...,
        known: Mapping[str, float] | None = None,
    ) -> Evaluation:
        """All that is left to do when the quality is known."""


class Carrying:
    """See above. For one thread.

    Args:
        loop: asks and is told.
        evaluate: all but the quality is evaluated here.
        told: called after every trial that the loop was told of.
        room: how many plans may be with workers at once.
        seconds: the time limit of a trial, which its worker keeps.
    """

    def __init__(
        self,
        loop: Loop,
        evaluate: InTwoParts,
        told: Callable[[], None],
        room: Callable[[], int],
        seconds: float | None,
    ) -> None:
        self.loop, self.evaluate, self.told, self.room, self.seconds = loop, evaluate, told, room, seconds
        self._running: dict[str, Asked] = {}  # by the name that workers know it by
        self._started: dict[str, float] = {}
        self._deaths: dict[str, str] = {}
        self._ended: deque[tuple[str, str | None]] = deque()
        self._again: deque[Asked] = deque()
        self._judged: dict[int, tuple[Asked, dict[str, Any]]] = {}  # what is being measured apart
        self._apart: Apart | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around all of it; a measurement that is under way at the end is given up."""
        devices = self.evaluate.devices
        if not devices or not devices.elsewhere:
            yield
            return
        with Apart(devices) as self._apart:
            yield

    # what workers do --------------------------------------------------------------------------------------------------

    def takes(self, name: str, asked: Asked) -> None:
        """A worker is to get this plan."""
        self._running[name] = asked

    def started(self, name: str) -> None:
        """It has it."""
        self._started[name] = time.monotonic()

    def died(self, name: str, text: str) -> None:
        """It is gone, or could not be made; what is said of it."""
        self._deaths[name] = text

    def ended(self, name: str, answer: str | None) -> None:
        """It gave what `carried_out` gives, or is gone without. Only noted; see `settle`."""
        if name in self._running:  # else it had nothing to do
            self._ended.append((name, answer))

    # asking ----------------------------------------------------------------------------------------------------------

    def next(self) -> Asked | None:
        """A plan for a worker; None if there is none while others are with workers, or at all (`loop.finished`)."""
        while True:
            self.settle()
            asked = self._again.popleft() if self._again else None if self._full() else self.loop.ask()
            if asked is not None and (asked.died or not self._known_already(asked)):
                return asked
            if asked is None:
                if self._running or self.loop.finished:
                    return None
                if self._apart is not None and self._judged:
                    self._apart.wait(_MOMENT_S)
                elif not self._full():
                    self.loop.wait()
                else:
                    time.sleep(_MOMENT_S)  # no node is there now

    def _full(self) -> bool:
        """Whether all workers have a trial, or too many plans wait for the device to think of more."""
        room = self.room()
        return len(self._running) >= room or len(self.loop.pending) >= max(2 * room - 1, 1)

    def _known_already(self, asked: Asked) -> bool:
        """Tell at once what needs no worker."""
        found: Evaluation | str | None
        try:
            plan, limits = asked.proposal.plan, self.loop.limits_of(asked)
            found = self.loop.recalled(asked) or self.evaluate.early(plan, limits)
        except Exception as error:
            found = reason_of(error)
        if found is None:
            return False
        self._tell(asked, found)
        return True

    # telling ---------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Tell the loop of all that ended."""
        while self._ended:
            name, answer = self._ended.popleft()
            asked = self._running.pop(name)
            took = time.monotonic() - self._started.pop(name, math.inf)
            if answer is None:
                self._dead(asked, took, self._deaths.pop(name, _UNANSWERED))
                continue
            told = json.loads(answer)
            if "failed" in told:
                self._tell(asked, told["failed"], told)
            else:
                self._measured(asked, told)
        while self._apart is not None and (ended := self._apart.ended()) is not None:
            number, found, nodes = ended
            asked, told = self._judged.pop(number)
            told["ran"] |= {f"measured_on@{label}": node for label, node in nodes.items()}
            if isinstance(found, KilledError):
                self._measure_again(asked, told, found.message)
            elif isinstance(found, Exception):
                self._tell(asked, reason_of(found), told)
            else:
                assert self.evaluate.devices is not None
                self.evaluate.devices.keep(asked.proposal.plan, found)
                self._rest(asked, told, lambda known: True)

    def _dead(self, asked: Asked, took: float, text: str) -> None:
        """Of a worker that is gone nothing is known but when it went, and what Ray says."""
        if self.seconds is not None and took >= self.seconds:
            self._tell(asked, f"{too_long(self.seconds)}; it did not end by itself")
            return
        why, again = cause_of(text)
        if not again:
            self._tell(asked, why)
        elif (retried := self.loop.retry(asked, why)) is not None:
            self._again.append(retried)
        else:
            self.told()

    def _measured(self, asked: Asked, told: dict[str, Any]) -> None:
        """The quality is known: the devices come next, if they are asked at all."""
        plan, limits = asked.proposal.plan, self.loop.limits_of(asked)
        if self._apart is not None:
            try:
                go_on = self.evaluate.to_measure(plan, limits, self.loop.worth, told["known"])
            except Exception as error:
                self._tell(asked, reason_of(error), told)
                return
            if go_on:
                self._judged[asked.trial.number] = asked, told
                self._apart.begin(asked.trial.number, plan)
                return
        self._rest(asked, told, self.loop.worth)

    def _rest(self, asked: Asked, told: dict[str, Any], worth: Callable[[Mapping[str, float]], bool]) -> None:
        """All that is left to do, here and now."""
        found: Evaluation | str
        try:
            plan, limits = asked.proposal.plan, self.loop.limits_of(asked)
            found = self.evaluate(plan, limits, worth, told["known"])
            if self._apart is None and any(k.startswith("latency_ms") for k in found.measurements):
                told["ran"].setdefault("measured_on", platform.node())
            notes = {**found.notes, "seconds": found.notes.get("seconds", 0.0) + told["seconds"]}
            found = replace(found, notes=notes)
        except KilledError as error:
            self._measure_again(asked, told, error.message)
            return
        except Exception as error:
            found = reason_of(error)
        self._tell(asked, found, told)

    def _measure_again(self, asked: Asked, told: dict[str, Any], why: str) -> None:
        retried = self.loop.retry(asked, why)
        if retried is None:
            self.told()
        else:
            self._measured(retried, told)

    def _tell(self, asked: Asked, found: Evaluation | str, told: Mapping[str, Any] | None = None) -> None:
        self.loop.tell(asked, found, told["ran"] if told else None)
        self.told()
