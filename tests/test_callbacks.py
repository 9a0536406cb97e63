from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from recorded import recorded
from test_history import history_of

from rankopt.callbacks import MLflow, TensorBoard, scalars, together
from rankopt.errors import InputError
from rankopt.log_file import logged
from rankopt.result import Progress


def told(tmp_path: Path) -> list[Progress]:
    """What a search of four trials tells, the third of which failed."""
    entries = history_of(recorded(tmp_path)).result.entries[:4]
    best = entries[0].measurements
    out = [Progress(0, 0, 1.0, text="calibrating")]
    out += [Progress(n + 1, 4, float(n), best, 2.0 + n, entry=None if n == 2 else e) for n, e in enumerate(entries)]
    return out


def test_scalars(tmp_path: Path) -> None:
    first, *rest = told(tmp_path)
    assert scalars(first) == {}
    assert scalars(rest[0])["trial/kl"] == rest[0].entry.measurements["kl"]  # type: ignore[union-attr]
    assert scalars(rest[0])["best/kl"] == rest[0].best["kl"]  # type: ignore[index]
    assert set(scalars(rest[2])) == {k for k in scalars(rest[0]) if not k.startswith("trial/")}
    assert scalars(rest[3])["hypervolume"] == 5.0


def test_tensorboard_files_hold_what_was_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs tensorboardX: pip install 'rankopt[tensorboard]'")
    events = told(tmp_path)
    with TensorBoard(tmp_path / "board") as board:
        for event in events:
            board(event)
    found = read_events(tmp_path / "board")
    wanted = {}
    for event in events[1:]:
        step = event.done if event.entry is None else event.entry.trial
        wanted |= {(key, step): pytest.approx(value, rel=1e-6) for key, value in scalars(event).items()}
    assert found == wanted


def read_events(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) → value, read by TensorBoard where it is installed, else record by record."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return read_records(folder)
    reader = EventAccumulator(str(folder)).Reload()
    return {(tag, e.step): e.value for tag in reader.Tags()["scalars"] for e in reader.Scalars(tag)}


def read_records(folder: Path) -> dict[tuple[str, int], float]:
    """A record is a length (8 bytes), its checksum (4), an Event message, and its checksum (4)."""
    import struct

    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            data = data[12 + length + 4 :]
    return found


def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs MLflow: pip install 'rankopt[mlflow]'")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, events = (tmp_path / "mlruns").as_uri(), told(tmp_path)
    with MLflow(uri, name="made up", params={"limits": "macs<=80%"}) as flow:
        for event in events:
            flow(event)
    client = MlflowClient(uri)
    run = client.get_run(flow.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"limits": "macs<=80%"}
    values = client.get_metric_history(flow.run_id, "trial/latency_ms.device")
    assert [m.value for m in values] == [
        e.entry.measurements["latency_ms@device"] for e in events if e.entry is not None
    ]
    with MLflow(uri, run_id=flow.run_id) as more:
        more(events[-1])


class FakeClient:
    """Answers as the methods of MLflow's client that are called; it can't tell whether MLflow would take the values."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012

    def __init__(self, uri: str | None) -> None:
        self.calls.append(("client", uri))

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        self.calls.append(("experiment", name))
        return "7"

    def create_run(self, experiment: str, run_name: str | None = None) -> Any:
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run of {experiment}"))

    def log_param(self, run: str, key: str, value: Any) -> None:
        self.calls.append(("param", run, key, value))

    def log_batch(self, run: str, metrics: Any) -> None:
        self.calls += [("metric", run, m.key, m.value, m.step) for m in metrics]

    def set_terminated(self, run: str, status: str) -> None:
        self.calls.append(("end", run, status))


def test_how_mlflow_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for its client, so that the order of calls is checked where MLflow is not installed."""
    modules = {name: types.ModuleType(name) for name in ("mlflow", "mlflow.tracking", "mlflow.entities")}
    modules["mlflow.tracking"].MlflowClient = FakeClient  # type: ignore[attr-defined]
    modules["mlflow.entities"].Metric = lambda key, value, timestamp, step: types.SimpleNamespace(  # type: ignore[attr-defined]
        key=key, value=value, step=step
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    FakeClient.calls = []
    events = told(tmp_path)

    def interrupted() -> None:
        with MLflow("http://there", params={"limits": "none"}) as flow:
            together(*[lambda p, e=e: flow(e) for e in events])(events[0])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    calls = FakeClient.calls
    assert calls[:3] == [("client", "http://there"), ("experiment", "rankopt"), ("param", "run of 7", "limits", "none")]
    assert calls[-1] == ("end", "run of 7", "FAILED")
    assert ("metric", "run of 7", "hypervolume", 5.0, 3) in calls
    assert not any("@" in str(call[2]) for call in calls if call[0] == "metric")


@pytest.mark.parametrize(
    ("package", "make"), [("tensorboardX", lambda p: TensorBoard(p)), ("mlflow.tracking", lambda p: MLflow(p))]
)
def test_what_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, make: Any
) -> None:
    monkeypatch.setitem(sys.modules, package.split(".")[0], None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match="pip install 'rankopt"):
        make(str(tmp_path / "x"))


def test_together(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    tell = together(lambda p: seen.append(("a", p.done)), lambda p: seen.append(("b", p.done)))
    tell(Progress(3, 4, 1.0))
    assert seen == [("a", 3), ("b", 3)]


def test_the_log(tmp_path: Path) -> None:
    import warnings

    path = tmp_path / "logs" / "run.log"
    with logged(path) as tell:
        for event in told(tmp_path):
            tell(event)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("something is odd", stacklevel=1)
    with pytest.raises(ValueError, match="broken"), logged(path):
        raise ValueError("broken")
    with pytest.raises(KeyboardInterrupt), logged(path):
        raise KeyboardInterrupt
    text = path.read_text(encoding="utf-8")
    for expected in (
        "calibrating",
        "trial 0: keeps the limits; plan ",
        "kl 0.",
        "something is odd",
        "Traceback",
        "interrupted",
    ):
        assert expected in text
    assert text.count(" INFO done") == 1
    assert not logging.getLogger("rankopt").handlers
    with logged(None) as tell:
        tell(Progress(1, 2, 1.0))
    with pytest.raises(InputError, match="can't be written"), logged(tmp_path):
        pass
