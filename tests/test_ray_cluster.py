"""Two Ray nodes on this machine, of which one is the device: what is measured where, and a node that goes and comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from test_latency_search import EXAMPLE, SPACE, Net, data
from test_study import trials_of as stored

from rankopt.batches import as_batches
from rankopt.limits import parse_limit
from rankopt.search import Search
from rankopt.targets.ray_node import RayNode

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
BOARD = {"num_cpus": 0, "resources": {"board": 1}, "object_store_memory": 80 * 2**20}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head with two processors; the board joins it when a test lets it."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr("ray._private.utils.set_sigterm_handler", lambda handler: None)  # a thread lets nodes join
        head = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        yield made
        ray.shutdown()
        made.shutdown()


def searched(cluster: Any, folder: Path, trials: int, **options: Any) -> Search:
    torch.manual_seed(0)
    target = RayNode(
        resource="board", target="replay", options={"ms_per_mmac": 1.0, "ms_per_module": 0.01}, address=cluster.address,
        label="pi", wait_seconds=120.0,
    )  # fmt: skip
    return Search(
        Net().eval(), EXAMPLE, calibration=as_batches([data(48)]), limits=[parse_limit("latency<=0.7x")], space=SPACE,
        trials=trials, threads=1, targets=[target], cache=folder / "cache", storage=str(folder / "s.db"), name="s",
        executor={"name": "ray", "workers": 2, "address": cluster.address}, **options,
    )  # fmt: skip


def test_latency_is_measured_on_the_device_only_and_the_study_survives_its_death(cluster: Any, tmp_path: Path) -> None:
    boards = [cluster.add_node(**BOARD)]
    head = cluster.head_node.node_id
    went = threading.Event()
    over = threading.Event()
    back: list[threading.Thread] = []

    def join_again() -> None:
        time.sleep(3)
        boards.append(cluster.add_node(**BOARD))
        over.wait()  # Ray's processes die with the thread that began them

    def watch(progress: Any) -> None:
        if progress.done == 4 and progress.total and not went.is_set():
            went.set()
            cluster.remove_node(boards[0], allow_graceful=False)
            back.append(threading.Thread(target=join_again))
            back[0].start()

    try:
        result = searched(cluster, tmp_path, 16).run(watch)
    finally:
        over.set()
    back[0].join()
    trials = stored(str(tmp_path / "s.db"))
    assert went.is_set()
    assert len(trials) == 16
    for trial in trials:
        assert trial.state == TrialState.COMPLETE or trial.user_attrs["reason"]
        assert trial.state != TrialState.RUNNING
    assert sum(t.state == TrialState.COMPLETE for t in trials) >= 10
    where = [t.user_attrs["environment"] for t in trials if "node" in t.user_attrs["environment"]]
    assert {w["node"] for w in where} == {head}
    measured = {w["measured_on@pi"] for w in where if "measured_on@pi" in w}
    assert measured == {board.node_id for board in boards}
    assert result.best().measurements["latency_kept"] <= 0.7  # type: ignore[operator]


def test_a_study_goes_on_in_another_cluster(cluster: Any, tmp_path: Path) -> None:
    cluster.add_node(**BOARD)
    searched(cluster, tmp_path, 5).run()
    first = stored(str(tmp_path / "s.db"))
    searched(cluster, tmp_path, 9).run()
    both = stored(str(tmp_path / "s.db"))
    assert [t.user_attrs["plan"] for t in both[:5]] == [t.user_attrs["plan"] for t in first]
    assert len(both) == 9
