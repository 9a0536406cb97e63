"""What crash tests are made of: programs that are started and killed, a small study, and what must hold after all that.

``Programs.start("search", …)`` runs `rankopt` in a process of its own. `seen` says what a storage holds to the end, and
`check` what has to be true of it when the study is whole again; both know nothing of how the trials were carried out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
import yaml

from rankopt import ledger
from rankopt.plan import Plan
from rankopt.storages import file_of, open_storage

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TRIALS = 12
CODE = """
import os
import time
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, 12, generator=generator)
    return {"calibration": x[:60], "validation": x[60:]}

def metric(module, batches):
    time.sleep(SECONDS)
    with torch.no_grad():
        return -float(sum(module(b.args[0]).square().mean() for b in batches))
"""


class Program:
    """A `rankopt` process."""

    def __init__(self, programs: Programs, pid: int, log: Path) -> None:
        self.programs, self.pid, self.log, self.code = programs, pid, log, None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.programs.order(poll=self.pid)
        return self.code

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """As the system does, or a power cut: no chance to do anything."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 120) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < end, f"still runs after {seconds} s: {self.log.read_text()}"
            time.sleep(0.01)
        return code


class Programs:
    """Starts programs; all that still run are killed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._started = folder, list[Program]()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANKOPT_CACHE": str(folder / "cache")}
        self._zygote = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._zygote.stdout is not None
        assert self._zygote.stdout.readline() == "ready\n"

    def order(self, **order: Any) -> Any:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(order) + "\n")
        self._zygote.stdin.flush()
        return json.loads(self._zygote.stdout.readline())

    def start(self, *arguments: object) -> Program:
        log = self.folder / f"{len(self._started)}.log"
        pid = self.order(start=[str(a) for a in arguments], log=str(log))
        self._started.append(Program(self, pid, log))
        return self._started[-1]

    def close(self) -> None:
        for program in self._started:
            program.kill()
        self._zygote.kill()
        self._zygote.communicate()


@contextmanager
def programs_in(folder: Path) -> Iterator[Programs]:
    programs = Programs(folder)
    try:
        yield programs
    finally:
        programs.close()


def small_study(folder: Path, seconds: float = 0.02, **changes: Any) -> Path:
    """A study file whose trials take about so many seconds."""
    (folder / "code.py").write_text(CODE.replace("SECONDS", str(seconds)))
    content = {
        "model": "code.py:model",
        "data": "code.py:data",
        "metric": "code.py:metric",
        "space": {"methods": ["svd"], "keep": {"levels": 8}},
        "limits": ["macs<=70%"],
        "precision": "float32",
        "trials": TRIALS,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def trials_of(url: str, name: str = "small") -> list[optuna.trial.FrozenTrial]:
    """What a storage holds of a study; nothing where there is none yet."""
    path = file_of(url)
    if path is not None and not path.exists():
        return []
    storage = open_storage(url)
    if name not in optuna.study.get_all_study_names(storage):
        return []
    return optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)


@dataclass(frozen=True)
class Ended:
    """A trial that ended, as it must stay for ever."""

    state: str
    plan: str
    values: tuple[float, ...] | None
    reason: str | None


def seen(url: str, name: str = "small") -> dict[int, Ended]:
    """All trials that have ended."""
    return {
        t.number: Ended(
            t.state.name,
            Plan.from_dict(t.user_attrs["plan"]).digest,
            None if t.values is None else tuple(t.values),
            t.user_attrs.get("reason"),
        )
        for t in trials_of(url, name)
        if t.state.is_finished()
    }


def digest_of(trial: optuna.trial.FrozenTrial) -> str:
    """Of its plan."""
    return Plan.from_dict(trial.user_attrs["plan"]).digest


def check(url: str, before: dict[int, Ended], trials: int = TRIALS, name: str = "small") -> None:
    """No trial that had ended is lost or changed, none was run twice, and every one says what became of it."""
    found, ended = trials_of(url, name), seen(url, name)
    assert {number: ended[number] for number in before} == before
    assert [t.number for t in found] == list(range(len(found)))
    for trial in found:
        assert trial.state.is_finished(), f"trial {trial.number} is {trial.state.name}"
        if trial.state.name == "COMPLETE":
            assert trial.values
            assert trial.user_attrs["measurements"]
        else:
            assert trial.user_attrs.get("reason"), f"trial {trial.number} says not why it {trial.state.name}"
    assert sum(ledger.counts(t) for t in found) == trials
    measured = [digest_of(t) for t in found if ledger.counts(t)]
    # proposed twice, measured once; one that was cut off while that was being written does not count
    again = [t for t in found if "same_as" in t.user_attrs and ledger.counts(t)]
    twice = [(t.number, t.state.name, t.user_attrs) for t in found if measured.count(digest_of(t)) > 1]
    assert len(set(measured)) == len(measured) - len(again), twice


def front_of(url: str, name: str = "small") -> list[tuple[str, tuple[float, ...]]]:
    """The front: plans and what they measured."""
    result = ledger.read_result(url, name)
    return [(e.plan.digest, tuple(round(float(v or 0), 6) for v in e.measurements.values())) for e in result.front]


MEASURE = """
import json, sys, time, zipfile
runs, parts = int(sys.argv[1]), zipfile.ZipFile(sys.argv[2]).infolist()
time.sleep(0.03)
size = sum(p.file_size for p in parts if "weight" in p.filename and not p.filename.endswith(".json"))
print(json.dumps({"times_ms": [0.1 + size / 1000] * runs}))
"""


def measured_study(folder: Path, **changes: Any) -> Path:
    """The same, with a latency that a program of its own measures, and which is always the same for the same plan."""
    (folder / "measure.py").write_text(MEASURE)
    run = [sys.executable, str(folder / "measure.py"), "{runs}", "{pt2}"]
    target = {"name": "command", "label": "board", "run": run}
    limits = {"limits": ["latency<=0.97x"], "space": {"methods": ["svd"], "keep": [0.3, 0.6]}, "trials": 8}
    return small_study(folder, 0.0, **limits, target=target, cache="cache", **changes)


def measuring(program: Program) -> list[psutil.Process]:
    """The processes in which latency is being measured."""
    try:
        children = psutil.Process(program.pid).children(recursive=True)
        return [c for c in children if any(part.endswith("measure.py") for part in c.cmdline())]
    except psutil.Error:
        return []
