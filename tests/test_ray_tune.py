"""Trials on Ray's workers: one Ray instance for all of them, and evaluations that are looked up in a table."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from optuna.trial import TrialState
from parted import Parted
from test_carrying import loop_of, trials_of
from test_latency_search import EXAMPLE, SPACE, Net, data
from test_study import trials_of as stored
from torch import nn

from rankopt.batches import as_batches
from rankopt.cli import main
from rankopt.errors import InputError, RankoptError, StudyFileError
from rankopt.executors.chosen import chosen
from rankopt.executors.local import Local
from rankopt.limits import parse_limit
from rankopt.loop import Loop
from rankopt.result import Result
from rankopt.search import Search
from rankopt.study_file import load_study

ROOT = Path(__file__).parent.parent
ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    """Two processors, one small object store."""
    ray.shutdown()  # other tests stay connected to a cluster of theirs
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=150 * 2**20, log_to_driver=False,
            logging_level="ERROR",
        )  # fmt: skip
        yield
        ray.shutdown()


def carried_out(evaluate: Any, trials: int = 6, workers: int = 1, loop: Loop | None = None, **options: Any) -> Loop:
    from rankopt.executors.ray_tune import RayTune

    loop = loop or loop_of(trials)
    told: list[int] = []
    RayTune(workers, **options).run(loop, evaluate, lambda: told.append(loop.done))
    assert told == list(range(1, trials + 1))
    return loop


def failed(loop: Loop) -> list[str]:
    return [t.user_attrs["reason"] for t in trials_of(loop) if t.state == TrialState.FAIL]


# what Ray Tune is to do, and what it is not to do --------------------------------------------------------------------


def test_one_worker_gives_what_the_local_executor_gives_and_nothing_is_said(
    started: None, capfd: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Several objectives, a measured limit; no table of Tune's, no folder, no torch in workers."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    here = loop_of(8)
    Local().run(here, Parted(), lambda: None)
    there = carried_out(Parted(), 8, workers=1)
    for mine, theirs in zip(trials_of(here), trials_of(there), strict=True):
        assert mine.user_attrs["plan"] == theirs.user_attrs["plan"]
        assert mine.values == theirs.values
        assert len(theirs.values) == 2
        assert mine.constraints == theirs.constraints
        assert theirs.user_attrs["measurements"]["torch"] == 0
        assert theirs.user_attrs["environment"]["pid"] != str(os.getpid())
    assert capfd.readouterr() == ("", "")
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_the_model_goes_to_the_object_store_once_and_never_with_a_trial(started: None, monkeypatch: Any) -> None:
    from ray._private.serialization import SerializationContext

    sizes: list[int] = []
    serialize = SerializationContext.serialize

    def counting(self: Any, value: Any) -> Any:
        found = serialize(self, value)
        sizes.append(found.total_bytes)
        return found

    monkeypatch.setattr(SerializationContext, "serialize", counting)
    carried_out(Parted(load=os.urandom(20 * 2**20)), 6)
    heavy = [size for size in sizes if size > 2**20]
    assert len(heavy) == 1
    assert heavy[0] > 20 * 2**20
    assert sum(sizes) - heavy[0] < 6 * 40 * 2**10
    assert max(size for size in sizes if size < 2**20) < 20 * 2**10


def test_a_search_of_a_real_model_is_the_same_on_a_worker_with_pinned_threads(started: None) -> None:
    """Also the classes and the metric of this file travel, which is not installed anywhere."""
    here, there = (found(executor, recovery=2) for executor in (None, {"name": "ray", "workers": 1}))
    assert [e.plan for e in here.entries] == [e.plan for e in there.entries]
    for mine, theirs in zip(here.entries, there.entries, strict=True):
        assert mine.measurements == pytest.approx(dict(theirs.measurements), rel=1e-6)
    assert {e.measurements["accuracy"] for e in there.entries} == {1.0}
    assert [e.trial for e in here.front] == [e.trial for e in there.front]


def threads(module: nn.Module, batches: Any) -> float:
    return float(torch.get_num_threads())


def found(executor: Any, trials: int = 5, **options: Any) -> Result:
    torch.manual_seed(0)
    model = Net().eval()
    limits = [parse_limit("macs<=50%")]
    search = Search(
        model, EXAMPLE, calibration=as_batches([data(48)]), limits=limits, space=SPACE, trials=trials, threads=1,
        metric=threads, objectives=["kl", "macs"], executor=executor, **options,
    )  # fmt: skip
    return search.run()


@pytest.mark.slow
def test_factors_that_wait_on_disk_travel_too(started: None) -> None:
    assert len(found({"name": "ray", "workers": 1}, 2, memory=1).entries) == 2


# faults --------------------------------------------------------------------------------------------------------------


def test_faults_are_recorded_with_their_reason_and_the_study_goes_on(started: None, tmp_path: Path) -> None:
    """Raised, NaN, out of memory; a worker killed once is another one's work."""
    faults = {0: "raises", 1: "nan", 2: "memory", 3: "killed"}
    loop = carried_out(Parted(tmp_path / "calls", faults=faults), 7)
    assert sorted(failed(loop))[:2] == ["MemoryError: no more", "ValueError: no such luck"]
    assert sorted(failed(loop))[2].startswith("measured {'kl': nan")
    assert [t.state for t in trials_of(loop)].count(TrialState.COMPLETE) == 4
    died = [t for t in trials_of(loop) if "died" in t.user_attrs]
    assert [t.state for t in died] == [TrialState.COMPLETE]
    assert died[0].user_attrs["died"] == ["its worker process was killed or crashed; out of memory?"]
    assert len(list((tmp_path / "calls").iterdir())) == 8


def test_a_plan_that_hangs_is_given_up_and_its_worker_goes_on(started: None, tmp_path: Path) -> None:
    loop = carried_out(Parted(tmp_path / "calls", faults={1: "sleeps"}), 4, workers=1, trial_timeout=0.5)
    assert failed(loop) == ["took longer than 0.5 s, the time limit of a trial"]
    pids = {p.read_text() for p in (tmp_path / "calls").iterdir()}
    assert len(pids) == 1


@pytest.mark.slow
def test_a_plan_that_hears_no_alarm_is_killed_with_its_worker(started: None, tmp_path: Path) -> None:
    loop = carried_out(Parted(tmp_path / "calls", faults={1: "stuck"}), 3, trial_timeout=1.0)
    assert failed(loop) == ["took longer than 1 s, the time limit of a trial; it did not end by itself"]


@pytest.mark.slow
def test_a_plan_that_kills_every_worker_is_given_up_and_many_in_a_row_end_the_study(
    started: None, tmp_path: Path
) -> None:
    loop = carried_out(Parted(tmp_path / "calls", faults={0: "killed", 1: "killed", 2: "killed"}), 3, workers=1)
    assert failed(loop) == ["its worker died 3 times: its worker process was killed or crashed; out of memory?"]
    with pytest.raises(RankoptError, match="8 trials failed in a row; the last: trial 7: ValueError: no such luck"):
        carried_out(Parted(every="raises"), 20, workers=1)


# going on ------------------------------------------------------------------------------------------------------------


def test_a_study_goes_on_without_repeating_anything(started: None, tmp_path: Path) -> None:
    """Nothing of Tune's is restored: no seeds enqueued again, no suggestion twice, and what is asked for can change."""
    url = str(tmp_path / "s.db")
    first = carried_out(Parted(), 5, workers=1, loop=loop_of(5, url))
    first.close()
    again = loop_of(9, url)
    from rankopt.executors.ray_tune import RayTune

    RayTune(1).run(again, Parted(), lambda: None)
    plans = [json.dumps(t.user_attrs["plan"]) for t in stored(url)]
    assert len(set(plans)) == len(plans) == 9
    assert {t.state for t in stored(url)} == {TrialState.COMPLETE}


# what is refused -----------------------------------------------------------------------------------------------------


def test_what_no_node_has_is_said_before_anything_runs(started: None) -> None:
    with pytest.raises(InputError) as caught:
        carried_out(Parted(), cpus_per_trial=3.0)
    assert str(caught.value) == "executor ray: no node has the 3 CPU that a trial needs; the nodes have 2 CPU"
    with pytest.raises(InputError, match="no node has the 1 CPU, 1 pi5 that a trial needs"):
        carried_out(Parted(), resources_per_trial={"pi5": 1.0})


def test_what_cant_be_sent_is_said_before_anything_runs(started: None) -> None:
    class Stays(Parted):
        def travelling(self) -> Any:
            return threading.Lock()

    with pytest.raises(InputError, match="executor ray: the model, data or metric can't be sent to workers: TypeError"):
        carried_out(Stays())
    with pytest.raises(InputError, match="function can't be parted"):
        carried_out(threads)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("rey", r"executor: name: input should be 'local' or 'ray', got 'rey'"),
        ({"name": "ray", "workers": 0}, r"executor: workers: .*greater than or equal to 1, got 0"),
        ({"name": "ray", "worker": 2}, r"executor: unknown key 'worker'; did you mean 'workers'\?"),
        ({"name": "local", "workers": 2}, r"executor: workers: belongs to the executor ray"),
        ({"workers": 2}, r"executor: workers: belongs to the executor ray"),
        ({"name": "ray", "cpus_per_trial": -1.0}, r"executor: cpus_per_trial: .*greater than 0"),
        ({"name": "ray", "gpus_per_trial": 1.5}, r"executor: gpus_per_trial: above 1 a whole number, got 1.5"),
        ({"name": "ray", "resources_per_trial": {"GPU": 1.0}}, r"'GPU' is not a resource of your own"),
        ({"name": "ray", "resources_per_trial": {"pi": 0.0}}, r"pi: must be above 0, got 0"),
        ({"name": "ray", "address": "ray://head:10001"}, r"address: the search itself has to run in the cluster"),
    ],
)
def test_options_that_are_wrong_are_one_line(given: Any, fault: str) -> None:
    with pytest.raises(InputError, match=fault) as caught:
        chosen(given)
    assert "\n" not in str(caught.value)


def written(folder: Path, **given: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"model": "mine.py:model", "data": "mine.py:data", **given}))
    return path


def test_the_study_file_and_the_command_line_name_the_executor(tmp_path: Path) -> None:
    file = load_study(written(tmp_path, executor={"name": "ray", "workers": 3, "address": "auto"}))
    assert (file.executor.name, file.executor.workers) == ("ray", 3)
    assert file.carried_out_by(workers=5).executor.workers == 5
    assert file.carried_out_by(workers=5).executor.address == "auto"
    assert file.carried_out_by(name="local").executor.name == "local"
    assert file.carried_out_by(name=None, workers=None) is file
    plain = load_study(written(tmp_path, executor="local"))
    assert plain.carried_out_by(name="ray", gpus_per_trial=0.5).executor.gpus_per_trial == 0.5
    with pytest.raises(StudyFileError, match="--cpus-per-trial: belongs to the executor ray; add --executor ray"):
        plain.carried_out_by(cpus_per_trial=2.0)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--workers", "2"], "--workers: belongs to the executor ray; add --executor ray"),
        (["--executor", "rey"], "executor: name: input should be 'local' or 'ray', got 'rey'"),
        (["--executor", "ray", "--workers", "0"], "--workers"),
        (["--executor", "ray", "--address", "ray://a:1"], "executor: address: the search itself has to run in the"),
    ],
)
def test_the_command_line_refuses_on_one_line(options: list[str], fault: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["search", str(written(tmp_path)), *options]) == 2
    said = capsys.readouterr().err
    assert fault in said
    assert said.count("\n") == 1
