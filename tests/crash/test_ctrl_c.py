"""Ctrl-C at a real process: once, and twice while it hangs in compiled code."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from programs import CODE, Programs, check, seen, small_study, trials_of

HANG = """
import ctypes
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, (ctypes.c_char * 64).from_buffer(bytearray(64))

calls = []

def wait(folder=os.path.dirname(__file__)):
    calls.append(1)  # the dense model is the first
    if len(calls) == 4 and os.path.exists(os.path.join(folder, "slow")):
        open(os.path.join(folder, "waiting"), "w").close()
        WAIT
"""


@pytest.mark.parametrize(
    ("wait", "twice"),
    [("time.sleep(60)", False), ("lock(mutex), lock(mutex)", True)],  # the second one never comes back
)
def test_ctrl_c_ends_a_search_and_twice_at_once(programs: Programs, tmp_path: Path, wait: str, twice: bool) -> None:
    study = small_study(tmp_path, trials=8)
    code = CODE.replace("time.sleep(SECONDS)", "time.sleep(0.02); wait()")
    (tmp_path / "code.py").write_text(code.replace("import os", f"import os, time{HANG.replace('WAIT', wait)}", 1))
    url = f"sqlite:///{tmp_path / 's.db'}"
    (tmp_path / "slow").touch()
    program = programs.start("search", study, "--storage", url)
    while not (tmp_path / "waiting").exists():
        assert program.poll() is None, program.log.read_text()
        time.sleep(0.02)
    before, start = seen(url), time.monotonic()
    assert before
    program.send(signal.SIGINT)
    if twice:
        time.sleep(0.3)
        assert program.poll() is None  # it hangs
        program.send(signal.SIGINT)
    assert program.wait(30) == 130
    assert time.monotonic() - start < 30
    said = "rankopt: interrupted; what was measured is kept, the same command goes on" in program.log.read_text()
    assert said == (not twice)
    cut_off = trials_of(url)[-1]
    assert (cut_off.state.name, cut_off.user_attrs.get("reason")) == (
        ("RUNNING", None) if twice else ("FAIL", "interrupted")
    )
    (tmp_path / "slow").unlink()
    program = programs.start("search", study, "--quiet", "--storage", url)
    assert program.wait() == 0, program.log.read_text()
    check(url, before, 8)
    assert cut_off.user_attrs["plan"] in [t.user_attrs["plan"] for t in trials_of(url)[cut_off.number + 1 :]]
