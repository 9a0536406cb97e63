"""The walk-through of docs/distributed.md on two nodes of this machine, and the example files against their schemas."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from test_study import counted, trials_of

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "distributed.md"
CLUSTER = ROOT / "studies" / "cluster"


def commands() -> list[tuple[str, list[str]]]:
    """(machine, words) of all commands that are shown with the name of a machine."""
    found = re.findall(r"^(head|device)\$ (.*)$", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    return [(machine, shlex.split(text)) for machine, text in found]


class Machines:
    """Both of them: Ray's processes in a temporary folder of their own, and commands as the page shows them."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder, self.temporary = folder, temporary
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.before_device: set[int] = set()
        paths = {"PYTHONPATH": str(ROOT), "RANKOPT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.env = {**os.environ, **paths, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

    def words(self, machine: str, words: list[str]) -> list[str]:
        """A command for this machine: other ports, and Ray as it was installed."""
        changed = [w.replace("HEAD:6379", f"127.0.0.1:{self.port}").replace("6379", str(self.port)) for w in words]
        if words[0] == "rankopt":
            return [sys.executable, "-c", "import sys; from rankopt.cli import main; sys.exit(main())", *changed[1:]]
        extra = ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"]
        extra += [f"--temp-dir={self.temporary}"] if machine == "head" else []
        extra += ["--dashboard-agent-listen-port=0"] if machine == "device" else []
        return [str(Path(sys.executable).with_name("ray")), *changed[1:], *extra]

    def run(self, machine: str, words: list[str]) -> str:
        if words[:2] == ["ray", "stop"]:
            self.stop(machine)
            return ""
        if machine == "device":
            self.before_device = self.processes()
        done = subprocess.run(
            self.words(machine, words), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
        return done.stdout

    def begun(self, words: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words("head", words), cwd=self.folder, env=self.env, text=True, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def processes(self) -> set[int]:
        """Of Ray, in this folder; `ray stop` itself would end those of everybody on this machine."""
        found = set()
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.temporary) in word for word in process.info["cmdline"] or []):
                found.add(process.pid)
        return found

    def stop(self, machine: str) -> None:
        gone = self.processes() - (self.before_device if machine == "device" else set())
        for pid in gone:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    pytest.importorskip("sklearn")
    (tmp_path / "studies").mkdir()
    for name in ("digits.py", "digits.yaml"):
        shutil.copy(ROOT / "studies" / name, tmp_path / "studies")
    with tempfile.TemporaryDirectory(prefix="rk", ignore_cleanup_errors=True) as temporary:
        made = Machines(tmp_path, Path(temporary))
        yield made
        made.stop("head")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_walk_through_is_true(machines: Machines) -> None:
    shown = commands()
    kinds = [(machine, words[0], words[1]) for machine, words in shown]
    first = kinds.index(("head", "rankopt", "search"))
    for machine, words in shown[:first]:
        machines.run(machine, words)
    url = str(machines.folder / "studies" / "runs" / "digits.db")
    name = "digits on ray-node"
    search = machines.begun(shown[first][1])
    wait_for(search, lambda: len(counted(url, name)) >= 3, Path(url))
    assert kinds[first + 1] == ("device", "ray", "stop")
    machines.run(*shown[first + 1])  # the plug is pulled
    time.sleep(2)
    assert kinds[first + 2] == ("device", "ray", "start")
    machines.run(*shown[first + 2])
    wait_for(search, lambda: len(counted(url, name)) >= 6, Path(url))
    search.send_signal(signal.SIGINT)
    out, err = search.communicate(timeout=120)
    assert search.returncode in (0, 130), out + err
    assert "raylet" not in out + err  # Ray keeps what it thinks of the node that died to itself
    interrupted = trials_of(url, name)
    assert not any(t.state.name == "RUNNING" for t in interrupted)
    for machine, words in shown[first + 3 :]:
        said = machines.run(machine, words)
        if words[:2] == ["rankopt", "status"]:
            assert "16 of" in said
    trials = counted(url, name)
    assert len(trials) == 16
    kept = {t.number for t in interrupted if t.state.name == "COMPLETE"}
    assert kept <= {t.number for t in trials if t.state.name == "COMPLETE"}
    where = [t.user_attrs["environment"] for t in trials]
    measured = {w["measured_on@ray-node"] for w in where if "measured_on@ray-node" in w}
    judged = {w["node"] for w in where if "node" in w}
    assert measured
    assert len(judged) == 1
    assert not measured & judged
    assert machines.processes() == set()


def wait_for(search: subprocess.Popen[str], there: Any, database: Path) -> None:
    """Until something is in the storage; at most eight minutes, and no longer than the search lives."""
    for _ in range(2400):
        if database.exists():
            try:
                if there():
                    return
            except Exception:  # the study is just being made
                pass
        if search.poll() is not None:
            out, err = search.communicate()
            pytest.fail(f"the search ended with {search.returncode}: {out[-2000:]} {err[-2000:]}")
        time.sleep(0.2)
    pytest.fail("nothing came")


# the example files ---------------------------------------------------------------------------------------------------


def test_the_page_names_files_and_options_that_are_there() -> None:
    from rankopt.executor_options import ExecutorOptions

    text = DOC.read_text(encoding="utf-8")
    for place in re.findall(r"\]\(\.\./([^)]+)\)", text):
        assert (ROOT / place).is_file(), place
    (section,) = re.findall(r"```yaml\n(executor:.*?)```", text, re.DOTALL)
    given = yaml.safe_load(section)["executor"]
    assert set(ExecutorOptions(**given).model_dump()) == set(given)


def test_the_cluster_file_is_what_ray_up_takes() -> None:
    ray = pytest.importorskip("ray")
    jsonschema = pytest.importorskip("jsonschema")
    given = yaml.safe_load((CLUSTER / "ray_cluster.yaml").read_text(encoding="utf-8"))
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(given, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**given, "head_start_commands": []}, schema)


def test_the_job_is_what_kuberay_takes() -> None:
    """By its API reference: `RayJobSpec`, `RayClusterSpec`, `HeadGroupSpec`, `WorkerGroupSpec`."""
    given = yaml.safe_load((CLUSTER / "ray_job.yaml").read_text(encoding="utf-8"))
    assert (given["apiVersion"], given["kind"]) == ("ray.io/v1", "RayJob")
    spec = given["spec"]
    assert set(spec) <= {
        "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec",
    }  # fmt: skip
    groups = spec["rayClusterSpec"]
    assert set(groups) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert set(groups["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in groups["workerGroupSpecs"]:
        assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert set(container["resources"]) == {"limits", "requests"}
    board = groups["workerGroupSpecs"][1]["rayStartParams"]["resources"]
    assert json.loads(shlex.split(board)[0]) == {"board": 1}  # as the start command's shell reads it
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["rankopt", "search"]
    from typer.main import get_command

    from rankopt.cli import app

    known = {option for p in get_command(app).commands["search"].params for option in p.opts}  # type: ignore[attr-defined]
    assert {w for w in words if w.startswith("--")} <= known
