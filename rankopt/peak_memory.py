"""`MemoryTarget`: how much memory a process needs for a model's inference on this machine, in MiB.

What counts is all that a process holds at most while it runs the model, beyond what it held before the model was
loaded: weights (in whatever form the runtime keeps them), inputs, activations and the runtime's work space, but neither
Python nor the runtime and its libraries. What loading needs for a moment is not counted.

It is measured in processes of their own, because a peak can't be told apart from what else a process does, and several
times; see `rankopt.peak_memory_child` for how. Known weights and activations are hit to 0.1 MiB with torch and ONNX
Runtime; OpenVINO keeps about 1 MiB of its own for every model, and a second copy of the weights of linear layers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.errors import InputError, KilledError
from rankopt.machine import device_lock
from rankopt.measurement import Measurement
from rankopt.targets.target import LocalTarget, Subject

if TYPE_CHECKING:
    from torch import nn

PROCESSES = 3
TIMEOUT = 900.0  # seconds for one process; it runs the model four times
# glibc's own default, but held: left to itself it adapts to what was freed, and how much of the freed memory a process
# keeps (up to 64 MiB) would be left to chance.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
MODEL, WARM_UP, INPUTS = "model", "warm_up", "inputs.npz"


class MemoryTarget(LocalTarget):
    """A target on this machine whose models can be written to files and run from there by another process."""

    @abstractmethod
    def write(self, subject: Subject, folder: Path) -> None:
        """Write the model and its inputs; raises `InputError` where the module can't be written."""

    @abstractmethod
    def loaded(self, folder: Path) -> Callable[[], Any]:
        """Load what `write` wrote, without running it; the function that is returned runs it."""

    def peak_memory(self, subject: Subject) -> Measurement:
        """Peak memory of inference: the median of some processes, one after the other, with the target's threads.

        Raises:
            InputError: this is not Linux, the target's device is not the CPU, the module can't be exported or run, or
                needs more memory or time than there is.
        """
        if not sys.platform.startswith("linux"):
            raise InputError(
                f"target {self.called}: memory is measured on Linux only, by /proc; this is {sys.platform}"
            )
        if self.device != "cpu":
            raise InputError(f"target {self.called}: memory is measured on the CPU only, not on {self.device}")
        conditions = self.conditions()
        with tempfile.TemporaryDirectory(prefix="rankopt-memory-") as name:
            folder = Path(name)
            for part, one in ((MODEL, subject), (WARM_UP, warm_up_subject())):
                (folder / part).mkdir()
                self.write(one, folder / part)
            with device_lock(self.device):  # it would disturb the times that others take
                runs = [_one(self, folder) for _ in range(PROCESSES)]
        return Measurement.of([[run] for run in runs], conditions, unit="MiB")


def warm_up_subject() -> Subject:
    """A small model of the usual kinds of layers, which makes a runtime load and prepare what it will need anyhow."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(
            nn.Conv2d(8, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=32),
            nn.Conv2d(32, 32, 1),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, 256),
            nn.LayerNorm(256),
            nn.GELU(),
            nn.Linear(256, 16),
            nn.Softmax(-1),
        )
        return Subject(model.eval(), (torch.randn(2, 8, 32, 32),))


def _one(target: MemoryTarget, folder: Path) -> float:
    options = json.dumps(target.model_dump(mode="json", exclude_none=True))
    command = [sys.executable, "-P", "-m", "rankopt.peak_memory_child", target.name, options, str(folder)]
    package = str(Path(__file__).resolve().parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(target.threads), **_MALLOC}
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"target {target.called}: the model did not run within {TIMEOUT:g} s in a process of its own"
        ) from None
    return outcome(target.called, done.returncode, done.stdout, done.stderr)


def outcome(called: str, code: int, out: str, err: str) -> float:
    """MiB from what the other process printed, or an `InputError` that says what went wrong in it."""
    told: Any = None
    for line in reversed(out.splitlines()):  # runtimes may print too
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict):
            break
    told = told if isinstance(told, dict) else {}
    if code == 0 and isinstance(told.get("mib"), float):
        return told["mib"]
    if told.get("out_of_memory"):
        raise InputError(f"target {called}: running the model needed more memory than there is")
    if code == -9:  # by the system, most likely
        raise KilledError(f"target {called}: running the model needed more memory than there is")
    if "error" in told:
        raise InputError(f"target {called}: the model can't be run in a process of its own: {told['error']}")
    last = (err.strip().splitlines() or [""])[-1]
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    kind = KilledError if code < 0 else InputError
    raise kind(f"target {called}: the process that ran the model {ended}{': ' + last[:200] if last else ''}")
