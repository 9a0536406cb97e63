"""How a search is shown while it runs: one live line on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rankopt.tables import quantity

_EVERY_S = 5.0


@contextmanager
def shown(console: Console) -> Iterator[Callable[[Any], None]]:
    """Give a callback for `Search.run` that shows what it is told on `console`."""
    if console.is_terminal:
        with Live(Text(""), console=console, refresh_per_second=4, transient=False) as live:
            yield lambda progress: live.update(Text(line(progress), no_wrap=True, overflow="ellipsis"))
        return
    last, text = -_EVERY_S, ""

    def show(progress: Any) -> None:
        nonlocal last, text
        text, now = line(progress), time.monotonic()
        ended = bool(progress.total) and progress.done >= progress.total
        if now - last >= _EVERY_S or ended:
            console.print(text, soft_wrap=True, markup=False)
            last, text = now, ""

    yield show
    if text:
        console.print(text, soft_wrap=True, markup=False)


def line(progress: Any) -> str:
    """``trial 12/40 · 8 s · best: accuracy 98.50, kl 0.0120, macs_kept 48.2% · hypervolume 2.104``."""
    parts = [f"trial {progress.done}/{progress.total}"] if progress.total else []
    parts.append(f"{progress.seconds:.0f} s")
    if progress.text:
        parts.append(progress.text)
    if progress.best:
        keys = ("accuracy", "kl", "macs_kept", "params_kept", "latency_ms")
        values = [f"{key} {quantity(key, progress.best[key])}" for key in keys if progress.best.get(key) is not None]
        parts.append(f"best: {', '.join(values)}")
    if progress.hypervolume is not None:
        parts.append(f"hypervolume {progress.hypervolume:.3f}")
    return " · ".join(parts)
