"""Finalists trained on Ray's workers: several at once, begun again when one dies, and the same as in one process."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_ray_tune import started
from test_recovering import changed, run, study

from rankopt.errors import InputError, RankoptError, TrainingError
from rankopt.executors.chosen import chosen, trainings
from rankopt.halving import Rung, halve, one_by_one

ray = pytest.importorskip("ray")
__all__ = ["run", "started", "study"]  # fixtures


@dataclass
class Noting:
    """A training that notes in files where it was begun, and does what its name says."""

    folder: Path
    deaths: Mapping[str, int] = field(default_factory=dict)
    company: int = 0  # wait until so many were begun

    def __call__(self, name: str, steps: int) -> dict[str, float]:
        before = len(list(self.folder.glob(f"{name}-*")))
        (self.folder / f"{name}-{before}").write_text(str(os.getpid()))
        if before < self.deaths.get(name, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "loose":
            raise TrainingError("recovery: loss was not finite")
        if name == "wrong":
            raise InputError("checkpoints: of another training")
        if name == "odd":
            raise ZeroDivisionError("of its own")
        end = time.monotonic() + 60
        while len(list(self.folder.glob("*-0"))) < self.company and time.monotonic() < end:
            time.sleep(0.05)
        return {"kl": steps + len(name) / 100, "alone": float(len(list(self.folder.glob("*-0"))) < self.company)}


def outcomes(train: Any, names: list[str], workers: int = 2) -> dict[str, tuple[Any, str]]:
    with trainings(chosen({"name": "ray", "workers": workers})) as executor:
        return {name: (values, reason) for name, values, reason in executor(train, [(n, 5) for n in names])}


def test_several_are_trained_at_once_in_processes_of_their_own(started: None, tmp_path: Path) -> None:
    found = outcomes(Noting(tmp_path, company=2), ["a", "bb", "ccc"])
    assert {name: values["kl"] for name, (values, _) in found.items()} == {"a": 5.01, "bb": 5.02, "ccc": 5.03}
    assert not any(values["alone"] for values, _ in found.values())
    assert str(os.getpid()) not in {path.read_text() for path in tmp_path.iterdir()}


def test_a_training_whose_worker_is_killed_is_begun_again(started: None, tmp_path: Path) -> None:
    found = outcomes(Noting(tmp_path, {"a": 2}), ["a", "b"])
    assert [reason for _, reason in found.values()] == ["", ""]
    assert len(list(tmp_path.glob("a-*"))) == 3


def test_one_that_dies_again_and_again_is_given_up_and_the_others_go_on(started: None, tmp_path: Path) -> None:
    found = outcomes(Noting(tmp_path, {"a": 99}), ["a", "b"])
    assert found["a"] == (None, "its worker process was killed or crashed; out of memory?; it was begun 4 times")
    assert found["b"][0]["kl"] == 5.01
    assert len(list(tmp_path.glob("a-*"))) == 4


def test_what_a_training_raises(started: None, tmp_path: Path) -> None:
    assert outcomes(Noting(tmp_path), ["loose", "b"])["loose"] == (None, "recovery: loss was not finite")
    with pytest.raises(InputError, match="of another training"):
        outcomes(Noting(tmp_path), ["wrong"])
    with pytest.raises(RankoptError, match=r"odd: its training ended: ZeroDivisionError: of its own"):
        outcomes(Noting(tmp_path), ["odd"])
    with pytest.raises(InputError, match="can't be sent to workers"):
        outcomes(Noting(tmp_path, {"a": threading.Lock()}), ["a"])  # type: ignore[dict-item]
    assert outcomes(Noting(tmp_path), []) == {}


def test_what_is_under_way_ends_with_an_interruption(started: None, tmp_path: Path) -> None:
    with trainings(chosen({"name": "ray", "workers": 2})) as executor:
        found = executor(Noting(tmp_path, company=3), [("a", 5), ("b", 5), ("c", 5), ("d", 5)])
        assert isinstance(found, Iterator)
        (tmp_path / "other-0").write_text("")  # so that two have company
        next(found)
        found.close()  # type: ignore[attr-defined]
    begun = len(list(tmp_path.iterdir()))
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == begun


def test_the_seam_is_that_of_one_process(started: None, tmp_path: Path) -> None:
    finalists = {name: {"kl": 9.0} for name in ("a", "bb", "ccc", "loose")}
    rungs = [Rung(5, 4), Rung(10, 2), Rung(20, 1)]
    alone = halve(finalists, Noting(tmp_path), ["kl"], rungs, executor=one_by_one)
    with trainings(chosen({"name": "ray", "workers": 2})) as executor:
        found = halve(finalists, Noting(tmp_path), ["kl"], rungs, executor=executor)
    assert (found.measured, found.stopped, found.winners) == (alone.measured, alone.stopped, alone.winners)
    with trainings(chosen("local")) as executor:
        assert executor is one_by_one


def test_a_study_is_recovered_to_the_same_models(started: None, study: Path, run: Any) -> None:
    changed(study, trials=8, threads=1)
    run("search", study)
    args = ("recover", study, "--finalists", 4, "--eta", 2, "--json")
    here = json.loads(run(*args, "--out", "here"))
    there = json.loads(run(*args, "--out", "there", "--executor", "ray", "--workers", 2, "--checkpoints", "rungs"))
    assert there["winner"] == here["winner"]
    assert there["after"] == here["after"]
    assert there["halving"] == here["halving"]
    assert len(list(Path("rungs").glob("trial-*/start.safetensors"))) == 4
    again = json.loads(run(*args, "--out", "there", "--force", "--executor", "ray", "--checkpoints", "rungs"))
    assert again["halving"] == here["halving"]
    run("search", study, "--out", "small")
    text = run("recover", "small", "--study", study, "--out", "x", "--executor", "ray", code=2)
    assert "belong to a study's finalists" in text


@pytest.mark.slow
def test_a_training_moves_when_its_node_dies(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0, "include_dashboard": False})
        try:
            nodes = [cluster.add_node(**small) for _ in range(2)]
            with trainings(chosen({"name": "ray", "address": cluster.address})) as executor:
                running = executor(Placed(tmp_path), [("a", 5), ("b", 6)])
                name, values, _ = next(running)  # "b": "a" waits
                assert (name, values) == ("b", {"kl": 6.0})
                while not (tmp_path / "a-0").is_file() or not (tmp_path / "a-0").read_text():
                    time.sleep(0.1)
                place = (tmp_path / "a-0").read_text()
                (node,) = [n for n in nodes if n.node_id == place]
                cluster.remove_node(node, allow_graceful=False)
                assert list(running) == [("a", {"kl": 5.0}, "")]
            assert (tmp_path / "a-1").read_text() not in ("", place)
        finally:
            ray.shutdown()
            cluster.shutdown()


@dataclass
class Placed:
    """Notes the node; the first time that "a" is begun it never ends."""

    folder: Path

    def __call__(self, name: str, steps: int) -> dict[str, float]:
        before = len(list(self.folder.glob(f"{name}-*")))
        (self.folder / f"{name}-{before}").write_text(ray.get_runtime_context().get_node_id())
        while name == "a" and before == 0:
            time.sleep(0.1)
        return {"kl": float(steps)}
