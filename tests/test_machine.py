"""The machine: its conditions, its load by others, and the lock that lets one process measure at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rankopt import machine
from rankopt.machine import OthersLoad, cpu_conditions, device_lock

HOLDER = """
import sys, tempfile
from rankopt.machine import device_lock
tempfile.tempdir = sys.argv[1]
with device_lock(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The locks of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that measures on the device "a/b"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), "a/b"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def waiting() -> threading.Event:
    """Set when this process has the device."""
    got = threading.Event()

    def measure() -> None:
        with device_lock("a/b"):
            got.set()

    threading.Thread(target=measure, daemon=True).start()
    return got


def test_a_device_waits_for_the_process_that_measures_on_it(holder: subprocess.Popen[str]) -> None:
    got = waiting()
    assert not got.wait(0.5)
    with device_lock("another"):
        pass
    assert holder.stdin is not None
    holder.stdin.write("done\n")
    holder.stdin.flush()
    assert got.wait(30)


def test_the_lock_of_a_killed_process_is_free(holder: subprocess.Popen[str]) -> None:
    got = waiting()
    assert not got.wait(0.2)
    holder.kill()
    assert got.wait(30)


def test_a_device_can_be_locked_again_by_who_holds_it(folder: Path) -> None:
    with device_lock("cpu"), device_lock("cpu"):
        pass
    assert {p.name for p in folder.iterdir()} <= {"rankopt-measuring-cpu.lock", "rankopt-next-cpu.lock"}


def test_conditions_are_texts() -> None:
    found = cpu_conditions()
    assert found["device"] == "cpu"
    assert all(isinstance(v, str) and v for v in found.values())
    assert found == cpu_conditions()


def test_the_load_of_others_is_what_is_not_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    readings = iter([(10.0, 5.0, 100.0), (18.0, 7.0, 116.0)])  # busy, own, all: 4 s of 4 cores, 2 s of them one's own
    monkeypatch.setattr(OthersLoad, "_read", staticmethod(lambda: next(readings)))
    assert OthersLoad()() == pytest.approx((8 - 2) / 4)


def test_a_time_too_short_to_tell_has_no_load_by_others() -> None:
    assert OthersLoad()() == 0


def test_a_load_that_can_not_be_read_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "cpu_times", refused)
    assert OthersLoad()() == 0


def test_the_load_is_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(10.0, 5.0, 100.0), (11.0, 17.0, 200.0)])
    monkeypatch.setattr(OthersLoad, "_read", staticmethod(lambda: next(readings)))
    assert OthersLoad()() == 0


FAULTS = """
import resource, sys
import torch
from rankopt.machine import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def run():
    blocks = [torch.ones(100 * 256) for _ in range(500)]  # 100 KiB each
for _ in range(5):
    run()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not machine.keep_freed_memory(), reason="the C library has no such setting")
def test_freed_memory_stays_in_the_process() -> None:
    """Counted by the system: pages that a run had to be given anew."""
    own = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"}  # its default, which it leaves for the first large block

    def faults(how: str) -> int:
        asked = subprocess.run([sys.executable, "-c", FAULTS, how], env=own, capture_output=True, text=True)
        assert asked.returncode == 0, asked.stderr
        return int(asked.stdout)

    assert faults("kept") < 100
    assert any(faults("left") > 100 for _ in range(8))  # what lies at the heap's end decides, which is chance


def test_where_there_is_no_such_setting_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: object())
    assert machine.keep_freed_memory.__wrapped__() is False
