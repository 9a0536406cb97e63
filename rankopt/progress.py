"""How a running search is shown: a bar and the best so far on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from rankopt.tables import quantity

_EVERY_S = 5.0
_WINDOW = 20  # trials that the rate is taken over


class Pace:
    """How fast trials are done in this run: over the last of them, since the first ones may take longer or shorter."""

    def __init__(self, window: int = _WINDOW) -> None:
        self._told: deque[tuple[int, float]] = deque(maxlen=window + 1)  # (trials done, seconds)

    def add(self, progress: Any) -> None:
        """Take note of a trial that was done."""
        if progress.total and (not self._told or progress.done > self._told[-1][0]):
            self._told.append((progress.done, progress.seconds))

    @property
    def seconds(self) -> float | None:
        """Seconds a trial; None as long as that is not known."""
        if len(self._told) < 2:
            return None
        (first, began), (last, now) = self._told[0], self._told[-1]
        return (now - began) / (last - first) if now > began else None

    def texts(self, progress: Any) -> list[str]:
        """The rate, and the time left unless all is done."""
        each = self.seconds
        if each is None or not progress.total:
            return []
        rate = (
            f"{1 / each:.1f} trials/s"
            if each < 1
            else f"{each:.1f} s/trial"
            if each < 60
            else f"{duration(each)}/trial"
        )
        left = max(progress.total - progress.done, 0)
        return [rate, f"{duration(left * each)} left"] if left else [rate]


@contextmanager
def shown(console: Console) -> Iterator[Callable[[Any], None]]:
    """Give a callback for `Search.run` that shows what it is told on `console`."""
    pace = Pace()
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(Text(""), console=console, refresh_per_second=4, transient=False) as live:
            bar = Bar(TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[after]}"))
            task = bar.add_task("", total=None, after="")

            def draw(progress: Any) -> None:
                pace.add(progress)
                live.update(_drawn(progress, pace, bar, task))

            yield draw
        return
    last, text = -_EVERY_S, ""

    def show(progress: Any) -> None:
        nonlocal last, text
        pace.add(progress)
        text, now = line(progress, pace), time.monotonic()
        ended = bool(progress.total) and progress.done >= progress.total
        if now - last >= _EVERY_S or ended:
            console.print(text, soft_wrap=True, markup=False)
            last, text = now, ""

    yield show
    if text:
        console.print(text, soft_wrap=True, markup=False)


def line(progress: Any, pace: Pace | None = None) -> str:
    """``trial 12/40 · 8 s · 1.5 trials/s · 19 s left · best: accuracy 98.50, kl 0.0120 · hypervolume 2.104``."""
    parts = [_trial(progress)] if progress.total else []
    parts.append(duration(progress.seconds))
    parts += pace.texts(progress) if pace else []
    if progress.text:
        parts.append(progress.text)
    if progress.best:
        parts.append(f"best: {_best(progress)}")
    if progress.hypervolume is not None:
        parts.append(f"hypervolume {progress.hypervolume:.3f}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _drawn(progress: Any, pace: Pace, bar: Bar, task: Any) -> Group:
    """Two lines of at most 80 columns: how far it is, and what was found."""
    after = [duration(progress.seconds), *pace.texts(progress)]
    total = progress.total or None
    bar.update(task, completed=progress.done, total=total, description=_trial(progress) if total else "preparing")
    bar.update(task, after=" · ".join(after))
    found = [f"best: {_best(progress)}"] if progress.best else []
    found += [f"hypervolume {progress.hypervolume:.3f}"] if progress.hypervolume is not None else []
    found = [progress.text] if progress.text else found
    return Group(bar, Text(" · ".join(found), no_wrap=True, overflow="ellipsis"))


def _trial(progress: Any) -> str:
    return f"trial {progress.done}/{progress.total}"


def _best(progress: Any) -> str:
    keys = ("accuracy", "kl", "macs_kept", "params_kept", "latency_ms")
    values = [f"{key} {quantity(key, progress.best[key])}" for key in keys if progress.best.get(key) is not None]
    return ", ".join(values)
