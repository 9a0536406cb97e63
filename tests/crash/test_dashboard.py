"""What optuna-dashboard shows of a study while it runs, asked over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from programs import Programs, small_study, trials_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("optuna_dashboard") is None, reason="optuna-dashboard is not installed (extra dev)"
)


@contextmanager
def dashboard(url: str, folder: Path) -> Iterator[str]:
    """Its address; nothing but this machine can reach it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
    with (folder / "dashboard.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, url, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def asked(address: str, path: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{address}{path}", timeout=10) as answer:
                return json.load(answer)
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.mark.parametrize("file", ["s.db", pytest.param("s.log", marks=pytest.mark.slow)])
def test_a_study_that_runs_is_shown(programs: Programs, tmp_path: Path, file: str) -> None:
    limits = ["macs<=70%", "kl<=1.5"]
    study = small_study(tmp_path, 1.0, limits=limits, objectives=["kl", "macs"], trials=400)
    path = tmp_path / file
    url = f"journal:///{path}" if file.endswith(".log") else f"sqlite:///{path}"
    program = programs.start("search", study, "--quiet", "--storage", path)
    end = time.monotonic() + 60
    while sum(t.state.name == "COMPLETE" for t in trials_of(url)) < 2:
        assert program.poll() is None, program.log.read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    with dashboard(str(path) if file.endswith(".log") else url, tmp_path) as address:
        (summary,) = asked(address, "/api/studies")["study_summaries"]
        assert summary["study_name"] == "small"
        assert summary["directions"] == ["minimize", "minimize"]
        first = asked(address, f"/api/studies/{summary['study_id']}?after=0")
        names = {a["key"]: a["value"] for a in first["user_attrs"]}
        assert json.loads(names["rankopt:limits"]) == limits
        trial = next(t for t in first["trials"] if t["state"] == "Complete")
        attributes = {a["key"]: a["value"] for a in trial["user_attrs"]}
        measured, violations = json.loads(attributes["measurements"]), json.loads(attributes["violations"])
        assert [float(v) for v in trial["values"]] == [measured["kl"], measured["macs"]]
        assert set(violations) == set(limits)
        assert trial["constraints"] == pytest.approx([violations[li] for li in limits])
        params = {p["name"]: p["param_external_value"] for p in trial["params"]}
        layers = json.loads(attributes["plan"])["layers"]
        assert {f"method.{n}" for n in ("0", "2", "4")} <= set(params)
        for name in ("0", "2", "4"):
            assert params[f"method.{name}"] == layers.get(name, "dense").partition("(")[0]
            assert 0 < float(params[f"keep.{name}"]) <= 1
        running = [t["state"] for t in first["trials"]].count("Running")
        assert running <= 1
        while True:  # it goes on
            now = asked(address, f"/api/studies/{summary['study_id']}?after=0")["trials"]
            if len(now) > len(first["trials"]):
                break
            assert program.poll() is None, program.log.read_text()
            assert time.monotonic() < end + 60
            time.sleep(0.3)
        page = urllib.request.urlopen(f"{address}/dashboard/", timeout=10).read()
        assert b"optuna" in page.lower()
    program.kill()
