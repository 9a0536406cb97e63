"""What a worker process does with a plan: text in, text out. Nothing heavy is imported before a plan needs it."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from rankopt.errors import reason_of
from rankopt.executors.time_limit import OutOfTime, at_most, too_long
from rankopt.machine import here, working
from rankopt.plan import Plan

GRACE_S = 5.0  # after the time limit, until a process is killed that does not return from compiled code
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Judge(Protocol):
    """What is sent to the workers, once.

    Attributes:
        device: what it runs on, "cpu" or "cuda".
    """

    device: str

    def judge(self, plan: Plan) -> dict[str, float]:
        """See `Evaluator.judge`."""


def threads_of(threads: int) -> dict[str, str]:
    """The environment in which libraries that are loaded from now on use so many threads."""
    return dict.fromkeys(_THREADS, str(threads))


def pin(threads: int) -> None:
    """Use so many threads in this process."""
    os.environ.update(threads_of(threads))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def order(number: int, plan: Plan) -> str:
    """The text that stands for "judge this plan"."""
    return json.dumps({"trial": number, "plan": plan.to_dict()})


def carried_out(judge: Judge, text: str, seconds: float | None, node: str) -> str:
    """Judge the plan of an `order`.

    Nothing is measured on this machine meanwhile, and this waits until what is being measured is done.

    Args:
        judge: what judges.
        text: from `order`.
        seconds: the time limit of a trial. A process that does not keep it is killed after a few seconds more.
        node: where this is, for the record.

    Returns:
        JSON: ``known`` (what `judge` gave) or ``failed`` (why it gave nothing), ``seconds``, ``ran``.
    """
    told: dict[str, Any] = {"ran": {**here(), "node": node, "pid": str(os.getpid())}}
    with ExitStack() as held:
        for device in _devices(judge.device):
            held.enter_context(working(device))
        begun = time.perf_counter()
        try:
            with _killed_after(seconds), at_most(seconds):
                told["known"] = judge.judge(Plan.from_dict(json.loads(text)["plan"]))
        except OutOfTime:
            told["failed"] = too_long(seconds)
        except Exception as error:
            told["failed"] = reason_of(error)
        told["seconds"] = time.perf_counter() - begun
    return json.dumps(told)


def _devices(kind: str) -> list[str]:
    """What is busy meanwhile, in the names of `Target.device`."""
    if kind != "cuda":
        return ["cpu"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    return ["cpu", *(f"cuda-{n}" for n in visible if n.isdigit())]


@contextmanager
def _killed_after(seconds: float | None) -> Iterator[None]:
    """End this process when the block takes longer: what is stuck in compiled code hears no alarm."""
    if seconds is None:
        yield
        return
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
