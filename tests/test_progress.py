from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from rankopt.progress import Pace, duration, line, shown
from rankopt.result import Progress

BEST = {"accuracy": 98.25, "kl": 0.0056, "macs_kept": 0.5, "params_kept": 0.684, "latency_ms": 1.25}


def steps(seconds: list[float], total: int = 100, first: int = 1) -> list[Progress]:
    return [Progress(first + n, total, s, BEST, 2.25) for n, s in enumerate(seconds)]


def test_pace_is_of_this_run_alone() -> None:
    pace = Pace()
    for step in steps([10.0, 12.0, 14.0], first=51):  # 50 trials were there before
        pace.add(step)
    assert pace.seconds == pytest.approx(2.0)
    assert pace.texts(steps([14.0], first=53)[0]) == ["2.0 s/trial", "1 min 34 s left"]


def test_pace_follows_the_last_trials() -> None:
    pace = Pace(window=5)
    for step in steps([n * 10.0 for n in range(20)] + [200.0 + n for n in range(20)]):
        pace.add(step)
    assert pace.seconds == pytest.approx(1.0)


def test_pace_is_not_made_up() -> None:
    pace = Pace()
    assert pace.texts(Progress(0, 0, 3.0, text="calibrating")) == []
    pace.add(Progress(1, 5, 3.0))
    assert pace.texts(Progress(1, 5, 3.0)) == []
    pace.add(Progress(2, 5, 3.0))
    assert pace.texts(Progress(2, 5, 3.0)) == []
    pace.add(Progress(5, 5, 5.0))
    assert pace.texts(Progress(5, 5, 5.0)) == ["2.0 trials/s"]  # nothing is left


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (8.4, "8 s"), (59.6, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (7200, "2 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_line() -> None:
    pace = Pace()
    for step in steps([1.0, 1.5], total=12):
        pace.add(step)
    assert line(steps([1.5], total=12, first=2)[0], pace) == (
        "trial 2/12 · 2 s · 2.0 trials/s · 5 s left · best: accuracy 98.25, kl 0.0056, macs_kept 50.0%, "
        "params_kept 68.4%, latency_ms 1.250 · hypervolume 2.250"
    )


def run(**options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, highlight=False, markup=False, **options)
    with shown(console) as tell:
        tell(Progress(0, 0, 0.5, text="calibrating"))
        for step in steps([1.0, 1.5, 2.0, 2.5], total=4):
            tell(step)
    return out.getvalue()


def test_on_a_terminal_there_are_two_lines_of_80_columns() -> None:
    text = run(force_terminal=True, color_system="truecolor")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    last = [part for part in re.split(r"[\r\n]+", plain) if part.strip()][-2:]
    assert last[0].startswith("trial 4/4 ━")
    assert "2.0 trials/s" in last[0]
    assert last[1].startswith("best: accuracy 98.25, kl 0.0056, macs_kept 50.0%")
    assert all(len(part) <= 80 for part in re.split(r"[\r\n]+", plain))
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", text)  # the bar has a colour


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = run(force_terminal=True, color_system="truecolor")
    assert "trial 4/4" in text
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9](;|m)", text)


def test_elsewhere_there_are_plain_lines() -> None:
    text = run(force_terminal=False)
    assert "\x1b" not in text
    assert text.splitlines()[0] == "0 s · calibrating" or text.splitlines()[0] == "1 s · calibrating"
    assert text.splitlines()[-1].startswith("trial 4/4 · 2 s · 2.0 trials/s · best: accuracy 98.25")
    assert len(text.splitlines()) == 2


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in run(force_terminal=True)
