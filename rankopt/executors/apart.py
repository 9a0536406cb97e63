"""`Apart`: plans measured on other machines by a thread, one at a time, while this process goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from rankopt.devices import Devices
from rankopt.measurement import Measurement
from rankopt.plan import Plan

Found = Sequence[Mapping[str, Measurement]] | Exception
Ended = tuple[int, Found, dict[str, str]]
_LAST_S = 10.0


class Apart:
    """See above. Inside of a with statement; what is being measured at its end is given up."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._todo: queue.SimpleQueue[tuple[int, Plan] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._seen: list[Ended] = []
        self._over = False
        self._thread = threading.Thread(target=self._work, name="rankopt measuring", daemon=True)

    def __enter__(self) -> Apart:
        self._devices.unwanted(False)
        self._thread.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._over = True
        self._devices.unwanted(True)
        self._todo.put(None)
        self._thread.join(_LAST_S)
        self._devices.unwanted(False)

    def begin(self, number: int, plan: Plan) -> None:
        """Measure this plan when those before it are done."""
        self._todo.put((number, plan))

    def wait(self, seconds: float) -> None:
        """Until something has ended, at most so long."""
        try:
            self._seen.append(self._done.get(timeout=seconds))
        except queue.Empty:
            return

    def ended(self) -> Ended | None:
        """What ended first and was not given yet: number, what was found or raised, target → node."""
        if self._seen:
            return self._seen.pop(0)
        try:
            return self._done.get_nowait()
        except queue.Empty:
            return None

    def _work(self) -> None:
        while (job := self._todo.get()) is not None and not self._over:
            number, plan = job
            try:
                found: Found = self._devices.apart(plan)
            except Exception as error:
                found = error
            self._done.put((number, found, self._devices.nodes))
