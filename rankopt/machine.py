"""What machine this is: the conditions that every measurement on it shares, and the lock that serializes them."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from filelock import FileLock

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # as malloc.h numbers them
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def processor() -> str:
    """The processor's name as the system gives it."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        for key in ("model name", "hardware", "cpu model"):
            if found.get(key):
                return found[key]
    return platform.processor() or platform.machine()


@cache
def here() -> dict[str, str]:
    """This machine's name and processor, and the versions that what a trial measures depends on."""
    found = {"host": platform.node(), "processor": processor(), "python": platform.python_version()}
    for package in ("rankopt", "torch", "optuna"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def cpu_conditions() -> dict[str, str]:
    """Processor, architecture, cores, and the frequency governor where it can be read."""
    found = {
        "device": "cpu",
        "processor": processor(),
        "architecture": platform.machine(),
        "cores": str(os.cpu_count()),
        "system": platform.system(),
    }
    with suppress(OSError):
        found["governor"] = _GOVERNOR.read_text(encoding="utf-8").strip()
    return found


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep the memory that a run frees, for the next run; from then on, in the whole process.

    Left alone, glibc gives large blocks back to the system when they are freed, or not, depending on what else lies in
    the heap and on the largest block that was ever freed. A convolution in PyTorch frees its working memory in every
    call, so that it is chance how many pages one and the same model has to be given anew in every run.
    The thresholds set here are those at which glibc arrives by itself once a block of 32 MiB was freed.

    Returns:
        Whether the C library has such a setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 * 2**20)) and bool(mallopt(_TRIM_THRESHOLD, 64 * 2**20))


@contextmanager
def device_lock(device: str) -> Iterator[None]:
    """Only one process of this machine measures on `device` at a time; the others wait, and so does who is `working`.

    The operating system takes the lock back when its holder is killed.
    """
    gate, lock = (FileLock(_lock(what, device), mode=0o666, is_singleton=True) for what in ("next", "measuring"))
    with gate, lock:  # who is at the gate is next: no work begins any more
        yield


@contextmanager
def working(device: str) -> Iterator[None]:
    """Work that would disturb a measurement on `device`: it begins when none is being taken, and the next one waits.

    Any number of processes may work at once. Only POSIX systems have such locks; elsewhere nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with _opened(_lock("next", device)) as gate, _opened(_lock("measuring", device)) as lock:
        fcntl.flock(gate, fcntl.LOCK_SH)
        fcntl.flock(lock, fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


def _lock(what: str, device: str) -> Path:
    return Path(tempfile.gettempdir()) / f"rankopt-{what}-{re.sub(r'[^A-Za-z0-9_.-]', '-', device)}.lock"


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A lock file; closing it, or being killed, gives the lock back. Everybody may lock it, as with `FileLock`."""
    try:
        file = os.open(path, os.O_RDWR)  # many systems refuse to "make" one that somebody else has made
    except FileNotFoundError:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):
            os.fchmod(file, 0o666)
    try:
        yield file
    finally:
        os.close(file)


class OthersLoad:
    """How many cores other processes keep busy, from `__init__` to `__call__`."""

    def __init__(self) -> None:
        self._before = self._read()

    def __call__(self) -> float:
        """Cores, at least 0; 0 where the system does not say or the time was too short to tell."""
        (busy, own, whole), (busy0, own0, whole0) = self._read(), self._before
        seconds = (whole - whole0) / max(os.cpu_count() or 1, 1)
        if seconds < 0.2:  # the system counts in hundredths of a second
            return 0.0
        return max(0.0, (busy - busy0 - (own - own0)) / seconds)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        try:
            all_cores, own = psutil.cpu_times(), psutil.Process().cpu_times()
        except (psutil.Error, OSError):
            return 0.0, 0.0, 0.0
        whole = float(sum(all_cores)) - float(getattr(all_cores, "guest", 0) + getattr(all_cores, "guest_nice", 0))
        idle = float(all_cores.idle) + float(getattr(all_cores, "iowait", 0))
        return whole - idle, float(own.user + own.system + own.children_user + own.children_system), whole
