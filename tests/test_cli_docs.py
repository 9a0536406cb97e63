"""docs/cli.md is what the program says, and the exit statuses that it names are those of the program."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recorded import recorded

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, "-c", "import sys; from rankopt.cli import main; sys.exit(main())"]
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}, "PYTHONPATH": str(ROOT)}


def test_the_page_is_what_the_program_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_cli

    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == make_cli.text(), "run: make docs"


def test_the_page_fits_80_columns_and_names_every_verb() -> None:
    import typer

    from rankopt.cli import app

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^## rankopt (\w+)$", text, re.MULTILINE)) == verbs
    for block in re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        assert max(map(len, block.splitlines())) <= 80, block


def documented() -> set[int]:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    return {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}


def test_exit_statuses(tmp_path: Path) -> None:
    study = recorded(tmp_path)
    (tmp_path / "slow.py").write_text(
        "import sys, time\ndef model():\n    print('here', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
    )
    slow = tmp_path / "slow.yaml"
    slow.write_text("model: slow.py:model\ndata: slow.py:model\nexample_input: [1, 2]\n")

    def status(*args: str) -> int:
        return subprocess.run([*PROGRAM, *args], env=ENVIRONMENT, capture_output=True, check=False).returncode

    seen = {0: status("front", str(study)), 2: status("front", str(tmp_path / "none.yaml"))}
    reader = subprocess.Popen(
        [*PROGRAM, "front", str(study), "--json"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert reader.stdout is not None
    reader.stdout.close()  # nobody reads
    seen[1] = reader.wait(60)
    assert reader.stderr is not None
    with reader.stderr:
        assert b"Traceback" not in reader.stderr.read()
    # A shell lets what it runs in the background ignore Ctrl-C, and that is inherited: as if typed at a prompt.
    waiting = subprocess.Popen(
        [*PROGRAM, "layers", str(slow)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert waiting.stderr is not None
    assert waiting.stderr.readline() == b"here\n"
    waiting.send_signal(signal.SIGINT)
    waiting.communicate(timeout=60)
    seen[130] = waiting.returncode
    assert seen == {code: code for code in seen}
    assert set(seen) == documented()


def test_a_fault_of_its_own_ends_with_1_and_a_traceback() -> None:
    code = (
        "import sys, rankopt.cli as c; c.typer.main.get_command = lambda app: 1 / 0; sys.exit(c.main(['front', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"ZeroDivisionError" in done.stderr


def on_terminal(*args: str, **environment: str) -> str:
    """What the program writes on a terminal of 80 columns."""
    main_end, program_end = pty.openpty()
    env = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    process = subprocess.Popen([*PROGRAM, *args], env=env, stdin=program_end, stdout=program_end, stderr=program_end)
    os.close(program_end)
    text, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if not select.select([main_end], [], [], 0.2)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            read = os.read(main_end, 65536)
        except OSError:  # the other end is closed
            break
        if not read:
            break
        text += read
    os.close(main_end)
    assert process.wait(10) == 0
    return text.decode()


def test_a_real_terminal(tmp_path: Path) -> None:
    study = recorded(tmp_path)
    shown = on_terminal("front", str(study))
    assert "\x1b[" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert max(len(row.rstrip("\r")) for row in plain.split("\n")) <= 80
    colourless = on_terminal("front", str(study), NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*[34][0-7](;|m)", colourless)
    piped = subprocess.run([*PROGRAM, "front", str(study)], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stdout
