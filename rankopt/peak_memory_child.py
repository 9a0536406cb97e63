"""The process of `rankopt.peak_memory`: ``python -m rankopt.peak_memory_child TARGET OPTIONS FOLDER``.

It runs a small model first, so that the runtime's own memory (modules imported late, kernels, the threads' buffers) is
there already, reads what it holds, loads the model, sets the peak back to what it holds then (loading has peaks of its
own), and runs the model. One line of JSON is printed: ``{"mib": 64.1}``, ``{"out_of_memory": true}`` or
``{"error": "..."}``.

The system counts the peak of all resident pages. Pages of files are code that is loaded when it is first used; they
only get more, and their number at the end of a run is taken off that run's peak.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankopt.peak_memory import MODEL, WARM_UP
from rankopt.targets import make

_RUNS = 4  # the first one counts too: some runtimes need more for it
_PAGE = 4 / 1024
_REFUSED = ("not enough memory", "allocate memory", "bad_alloc", "bad allocation", "failed to allocate")


def main(name: str, options: str, folder: str) -> dict[str, Any]:
    """What is printed."""
    try:
        target: Any = make(name, json.loads(options))
        with target.running():
            for _ in range(2):
                _run(target.loaded(Path(folder) / WARM_UP), 2)
            _settle()
            before = _held()
            call = target.loaded(Path(folder) / MODEL)
            _settle()
            most = max([_held(), *(_peak(call) for _ in range(_RUNS))])
        return {"mib": max(most - before, _PAGE)}
    except MemoryError:
        return {"out_of_memory": True}
    except Exception as error:
        text = " ".join(str(error).split())
        if any(sign in text.lower() for sign in _REFUSED):
            return {"out_of_memory": True}
        return {"error": f"{type(error).__name__}: {text[:300]}"}


def _run(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def _settle() -> None:
    """Give what is no longer used back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _peak(call: Callable[[], Any]) -> float:
    """MiB that were held at most during one call, without pages of files."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # VmHWM becomes VmRSS; see proc_pid_clear_refs(5)
    call()
    now = _status()
    return now["VmHWM"] - now["RssFile"]


def _held() -> float:
    now = _status()
    return now["RssAnon"] + now["RssShmem"]


def _status() -> dict[str, float]:
    """What the system says of this process, in MiB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[2:] == ["kB"]}


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    sys.stdout.write("\n" + json.dumps(found) + "\n")
