"""What a record says of where it was made, and writing it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from rankopt.machine import processor


def described(threads: int, *runtimes: str) -> str:
    """Versions, processor and threads on one line; `runtimes` are further packages."""
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "optuna", "tensorly", "scipy", "numpy", *runtimes))
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} ({processor()}, {os.cpu_count()} cores)"
    return (
        f"Python {platform.python_version()}, {packages}; {machine}, "
        f"{threads} thread{'s' if threads > 1 else ''}; rankopt at {commit()}."
    )


def headed(title: str, *text: str, runtimes: Sequence[str] = ()) -> list[str]:
    """How the record of a script that runs on one thread begins: what it is, its command, where it ran."""
    command = ["", "```", f"python {shlex.join(sys.argv)}", "```", ""]
    return [f"# {title}", "", *text, *command, described(1, *runtimes), ""]


def merged(path: Path, rows: Sequence[Sequence[str]], key: int) -> list[str]:
    """The rows of a record's table with these in the place of those whose first `key` cells are the same."""
    table: dict[tuple[str, ...], str] = {}
    body = False
    for line in path.read_text().splitlines() if path.is_file() else []:
        if body and line.startswith("|"):
            table[tuple(cell.strip() for cell in line.strip("|").split("|")[:key])] = line
        body = body or line.startswith("|---")
    for row in rows:
        table[tuple(row[:key])] = f"| {' | '.join(row)} |"
    return [line for _, line in sorted(table.items())]


def write_record(lines: list[str], path: Path | None) -> None:
    """Print, and write to `path` where one is given."""
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def commit() -> str:
    """The short name of the commit that runs."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "an unknown commit"
