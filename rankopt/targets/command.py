"""``command``: a program of yours that times a model wherever it likes: over ssh or adb, with trtexec, on a board.

The program gets a file with the model and prints, as the last line of its standard output,

    {"times_ms": [1.92, 1.95, ...], "conditions": {"runtime": "onnxruntime 1.20"}}

with the time of every run in milliseconds; the conditions are optional. ``examples/onnx_timer.py`` is such a program.
"""

from __future__ import annotations

import hashlib
import json
import string
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from rankopt.errors import ConditionsError, InputError, KilledError
from rankopt.machine import device_lock
from rankopt.measurement import Measurement
from rankopt.targets.target import Subject, Target
from rankopt.targets.torch_cpu import converted, first_line
from rankopt.timing import Effort

ROUNDS = 6  # the fewest that give a confidence interval
FIRST_RUNS = 10  # in the first round; later ones take as many as fit the time
_MOST_RUNS = 1000
_LONGEST = 1e12  # ms; what is above is no time
_KNOWN = ("onnx", "pt2", "inputs", "runs", "shapes")
_MODELS = ("onnx", "pt2")


class Command(Target):
    """A program.

    Each of the rounds runs it once for each subject, so that a drift of the device cancels in the ratios.

    Attributes:
        run: the program and its arguments; no shell reads them. {onnx} stands for the path of the exported ONNX file,
            {pt2} for that of a program saved by torch.export.save, {inputs} for an .npz file with input_0, input_1, …,
            {runs} for how often to run the model (at least so many times are wanted back), {shapes} for the inputs'
            shapes and dtypes: 1x3x32x32:float32,1x8:int64 (a number is "scalar"). A brace is written twice.
        timeout: seconds for one call of the program.
        stated: conditions that you state: device, processor, clock, ... Times of different ones are not mixed.
        device: what is locked meanwhile: commands that use one device should name it alike. None: by the command.
    """

    name: ClassVar[str] = "command"
    run: list[str] = Field(min_length=1)
    timeout: float = Field(120.0, gt=0, allow_inf_nan=False)
    stated: dict[str, str] = Field(default_factory=dict)
    device: str | None = Field(None, min_length=1)

    @field_validator("run")
    @classmethod
    def _placeholders(cls, run: list[str]) -> list[str]:
        used = {name for part in run for name in _fields(part)}
        if not used & set(_MODELS):
            raise ValueError("needs {onnx} or {pt2} among its arguments, where the model's path is put in")
        return run

    @property
    def from_onnx(self) -> bool:
        """Whether {pt2} is not asked for."""
        return "pt2" not in self._used

    def conditions(self) -> dict[str, str]:
        """What is stated, and the command; nothing is run. Measurements add what the program reports."""
        return {**self.stated, "target": self.name, "command": json.dumps(self.run, ensure_ascii=False)}

    def measure(self, subjects: Sequence[Subject], effort: Effort = Effort()) -> list[Measurement]:
        """See `Target.measure`.

        Raises:
            InputError: a module can't be exported, or the program fails, takes too long or prints something else.
            ConditionsError: the program reports other conditions than before, or than those that are stated.
        """
        if not subjects:
            return []
        rounds: list[list[list[float]]] = [[] for _ in subjects]
        reported: dict[str, str] | None = None
        with tempfile.TemporaryDirectory(prefix="rankopt-command-") as folder, device_lock(self._locked):
            files = self._files(subjects, Path(folder))
            for number in range(ROUNDS):
                order = list(range(len(subjects)))
                for i in order if number % 2 == 0 else reversed(order):
                    runs = _runs(rounds[i], effort)
                    times, now = self._times(files[i], runs)
                    if reported is not None and now != reported:
                        raise ConditionsError(f"target {self.called}: {self._program} {_differing(reported, now)}")
                    reported = now
                    rounds[i].append(times)
        conditions = self._together(reported or {})
        return [Measurement.of(r, conditions, rounds[0]) for r in rounds]

    @property
    def _used(self) -> set[str]:
        return {name for part in self.run for name in _fields(part)}

    @property
    def _program(self) -> str:
        return self.run[0]

    @property
    def _locked(self) -> str:
        return f"command-{self.device or hashlib.sha256(json.dumps(self.run).encode()).hexdigest()[:16]}"

    def _together(self, reported: Mapping[str, str]) -> dict[str, str]:
        own = self.conditions()
        for key, value in reported.items():
            if own.get(key, value) != value:
                raise ConditionsError(
                    f"target {self.called}: {self._program} reports {key} {value!r}, stated is {own[key]!r}"
                )
        return {**reported, **own}

    def _files(self, subjects: Sequence[Subject], folder: Path) -> list[dict[str, str]]:
        """Write what is asked for; what each placeholder stands for, but for {runs}."""
        import numpy as np

        from rankopt.onnx_file import arrays, exported

        models = exported(subjects) if "onnx" in self._used else [b""] * len(subjects)
        found = []
        for n, (subject, model) in enumerate(zip(subjects, models, strict=True)):
            inputs = arrays(subject)
            stands = {k: str(folder / f"{n}.{'npz' if k == 'inputs' else k}") for k in ("onnx", "pt2", "inputs")}
            if "onnx" in self._used:
                Path(stands["onnx"]).write_bytes(model)
            if "pt2" in self._used:
                self._save_program(subject, stands["pt2"])
            if "inputs" in self._used:
                np.savez(stands["inputs"], **{f"input_{i}": a for i, a in enumerate(inputs)})
            stands["shapes"] = ",".join(f"{'x'.join(map(str, a.shape)) or 'scalar'}:{a.dtype}" for a in inputs)
            found.append(stands)
        return found

    def _save_program(self, subject: Subject, path: str) -> None:
        import warnings

        import torch

        module, args, kwargs = converted(subject, "float32", "contiguous")
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of the exporter's own internals
                torch.export.save(torch.export.export(module, args, kwargs, strict=False), path)
        except Exception as error:
            raise InputError(
                f"target {self.called}: {type(subject.module).__name__} can't be exported: {first_line(error)}"
            ) from error

    def _times(self, stands: Mapping[str, str], runs: int) -> tuple[list[float], dict[str, str]]:
        """One call of the program."""
        where = f"target {self.called}: {self._program}"
        arguments = [part.format(**stands, runs=runs) for part in self.run]
        try:
            done = subprocess.run(
                arguments,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self.timeout,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"{where} did not end within {self.timeout:g} s; raise timeout if it needs more") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{where} can't be started: {getattr(error, 'strerror', None) or error}") from None
        if done.returncode != 0:
            said = next((line.strip() for line in done.stderr.splitlines() if line.strip()), "nothing on stderr")
            kind = KilledError if done.returncode < 0 else InputError
            raise kind(f"{where} ended with status {done.returncode}: {said[:200]}")
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        return _answer(lines[-1] if lines else "", runs, where)


def _fields(part: str) -> list[str]:
    """The placeholders in an argument; raises ValueError, with the argument, where they are not known."""
    try:
        pieces = list(string.Formatter().parse(part))
    except ValueError as error:
        raise ValueError(f"{part!r}: {error}; a brace that is meant is written twice") from None
    names = []
    for _, name, form, conversion in pieces:
        if name is None:
            continue
        if name not in _KNOWN or form or conversion:
            raise ValueError(
                f"{part!r}: unknown placeholder {{{name}{'!' + conversion if conversion else ''}"
                f"{':' + form if form else ''}}}; known: {', '.join(f'{{{k}}}' for k in _KNOWN)}; "
                "a brace that is meant is written twice"
            )
        names.append(name)
    return names


def _runs(rounds: Sequence[Sequence[float]], effort: Effort) -> int:
    """How many runs the next round takes, so that all rounds together take `effort.seconds`."""
    if not rounds:
        return FIRST_RUNS
    best = min(min(times) for times in rounds)
    return max(FIRST_RUNS, min(_MOST_RUNS, int(1000 * effort.seconds / ROUNDS / best)))


def _answer(line: str, runs: int, where: str) -> tuple[list[float], dict[str, str]]:
    """Times and conditions from the program's last line, checked."""
    needed = 'its last line must be {"times_ms": [...]}'
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: {needed}, got {line[:80]!r}") from None
    if not isinstance(value, dict) or "times_ms" not in value or set(value) - {"times_ms", "conditions"}:
        raise InputError(f'{where}: {needed}, with "conditions" or without, got {line[:80]!r}')
    times, conditions = value["times_ms"], value.get("conditions", {})
    if not isinstance(times, list):
        raise InputError(f"{where}: times_ms must be a list of times in ms, got {str(times)[:80]!r}")
    for n, time in enumerate(times):
        if not isinstance(time, int | float) or isinstance(time, bool) or not 0 < time < _LONGEST:
            raise InputError(f"{where}: times_ms[{n}] must be a time in ms above 0, got {str(time)[:40]!r}")
    if len(times) < runs:
        raise InputError(f"{where}: times_ms must have at least {runs} times, as {{runs}} said, got {len(times)}")
    if not isinstance(conditions, dict) or not all(isinstance(v, str) for v in conditions.values()):
        raise InputError(f"{where}: conditions must be an object of texts, got {str(conditions)[:80]!r}")
    return [float(t) for t in times], conditions


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    key = next(k for k in [*before, *now] if before.get(k) != now.get(k))
    return f"reports another {key} than before ({before.get(key, 'none')}, now {now.get(key, 'none')})"
