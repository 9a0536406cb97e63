"""`cause_of`: why a worker died, on one line, out of what Ray says of it on many."""

from __future__ import annotations

import re

_CAUSES = (
    (r"low on memory|OutOfMemory|memory monitor", "its worker was ended by Ray because the node ran out of memory"),
    (r"node has died|node died|node was (?:dead|terminated|marked dead)|NodeDied", "its node went away"),
    (
        r"SIGKILL|connection error|worker process has died|WorkerCrashed|unexpected",
        "its worker process was killed or crashed; out of memory?",
    ),
)


def cause_of(text: str) -> tuple[str, bool]:
    """(why, whether another worker may fare better)."""
    if "creation task" in text and (raised := _raised(text)):
        return f"a worker can't be made: {raised}", False
    for pattern, why in _CAUSES:
        if re.search(pattern, text):
            return why, True
    raised = _raised(text)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Failure #")]
    return f"its worker ended: {raised or (lines[0] if lines else 'no reason was given')}"[:300], not raised


def _raised(text: str) -> str:
    """The last exception that a traceback in the text ends with."""
    found = [line.strip() for line in text.splitlines() if re.match(r"\s*[\w.]*(?:Error|Exception)\b.*:", line)]
    return found[-1][:300] if found else ""
