"""Dense and compressed models side by side: the rows, against targets whose times are known, and one real target."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn

from rankopt.bench import bench, bench_table, described
from rankopt.errors import InputError
from rankopt.measurement import Measurement
from rankopt.targets import make
from rankopt.targets.target import Subject, Target
from rankopt.timing import Effort

QUICK = Effort(seconds=0.05, rounds=7, error=1.0, longest=1, repeats=0, warmup=0.05)
ROW = {
    "target", "model", "latency_ms", "latency_low_ms", "latency_high_ms", "latency_p95_ms", "runs", "latency_kept",
    "latency_kept_low", "latency_kept_high", "speedup", "memory_mib", "memory_kept", "noisy", "conditions",
}  # fmt: skip


class Told(Target):
    """Says what it is told to: the runs and processes of the model of each name."""

    name: ClassVar[str] = "told"
    runs: Mapping[str, list[float]] = {}
    mib: Mapping[str, list[float]] = {}
    others: float = 0.0
    missing: bool = False

    def conditions(self) -> dict[str, str]:
        if self.missing:
            raise InputError("target told: is not there")
        return {"target": self.name, "device": "paper", "threads": "1", "memory_format": "none"}

    def measure(self, subjects: Sequence[Subject], effort: Effort = QUICK) -> list[Measurement]:
        rounds = [[[run] for run in self.runs[s.key]] for s in subjects]
        return [Measurement.of(r, self.conditions(), rounds[0], others=self.others) for r in rounds]

    def peak_memory(self, subject: Subject) -> Measurement:
        if not self.mib:
            return super().peak_memory(subject)
        return Measurement.of([[m] for m in self.mib[subject.key]], self.conditions(), unit="MiB")


def linear(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.Linear(width, 64)).eval()


X = (torch.randn(2, 64),)
CALM = {"dense": [10.0, 10.1, 9.9], "small": [5.0, 5.05, 4.95]}


def shown(table: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_row_for_every_target_and_model() -> None:
    targets = [Told(runs=CALM, mib={"dense": [8.0] * 3, "small": [2.0] * 3}), Told(label="second", runs=CALM)]
    rows = bench(linear(8), {"small": linear(4)}, X, targets=targets[:1], memory=True)
    assert [set(row) for row in rows] == [ROW, ROW]
    assert [(row["target"], row["model"]) for row in rows] == [("told", "dense"), ("told", "small")]
    small = rows[1]
    assert small["latency_ms"] == 5
    assert small["latency_kept"] == pytest.approx(0.5)
    assert small["latency_kept_low"] <= small["latency_kept"] <= small["latency_kept_high"]
    assert small["speedup"] == pytest.approx(2)
    assert (small["memory_mib"], small["memory_kept"], rows[0]["memory_kept"]) == (2, 0.25, 1)
    assert small["noisy"] is None
    assert small["conditions"]["input"] == "2x64 float32"
    assert json.loads(json.dumps(rows)) == rows
    both = bench(linear(8), {"small": linear(4)}, X, targets=targets)
    assert [row["target"] for row in both] == ["told", "told", "second", "second"]
    assert all(row["memory_mib"] is None for row in both)


def test_times_that_follow_from_the_work() -> None:
    # 2 samples × 64 × width × 2 multiply-accumulates
    target = make("replay", {"ms_per_mmac": 1000.0})
    rows = bench(linear(32), {"half": linear(16), "more": linear(64)}, X, targets=[target])
    assert [row["latency_kept"] for row in rows] == pytest.approx([1, 0.5, 2], rel=1e-6)
    assert rows[0]["latency_ms"] == pytest.approx(2 * 64 * 32 * 2 / 1000, rel=1e-6)


def test_the_batch_size_of_a_target() -> None:
    options = {"ms_per_mmac": 1000.0}
    one = bench(linear(32), {}, X, targets=[make("replay", options)])
    many = bench(linear(32), {}, X, targets=[make("replay", options | {"batch": 10})])
    assert many[0]["latency_ms"] == pytest.approx(5 * one[0]["latency_ms"], rel=1e-6)
    assert many[0]["conditions"]["input"] == "10x64 float32"


def test_a_real_target_sees_who_is_slower() -> None:
    dense = nn.Sequential(*[nn.Linear(512, 512) for _ in range(6)]).eval()
    small = nn.Sequential(nn.Linear(512, 8), nn.Linear(8, 512)).eval()  # a two-hundredth of the work
    rows = bench(dense, {"small": small}, (torch.randn(32, 512),), targets=[make("torch")], effort=QUICK)
    assert rows[0]["latency_kept"] == 1
    assert rows[1]["latency_kept"] < 0.7
    for row in rows:
        assert row["latency_low_ms"] <= row["latency_ms"] <= row["latency_high_ms"] <= row["latency_p95_ms"]
        assert row["conditions"]["threads"] == "1"
        assert row["runs"] >= QUICK.rounds


def test_models_run_in_turns_and_stay_as_they_are() -> None:
    order: list[str] = []

    class Noting(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            return x

    models = {name: Noting(name).eval() for name in ("dense", "a", "b")}
    bench(models["dense"], {"a": models["a"], "b": models["b"]}, X, targets=[make("torch")], effort=QUICK)
    blocks = [name for n, name in enumerate(order) if n == 0 or order[n - 1] != name]
    assert all(blocks.count(name) >= QUICK.rounds // 2 for name in models)
    assert not any(module.training for module in models.values())


def test_what_is_noisy_is_said() -> None:
    wild = {"dense": [10.0, 14.0, 7.0], "small": [5.0, 5.0, 5.0]}
    mib = {"dense": [8.0, 8.0, 8.0], "small": [2.0, 9.0, 4.0]}
    rows = bench(linear(8), {"small": linear(4)}, X, targets=[Told(runs=wild, mib=mib)], memory=True)
    assert rows[0]["noisy"].startswith("the middle half of the runs spreads over 35%")
    assert rows[1]["noisy"] == "memory is 3.0 to 6.5 MiB in the middle half of its processes"
    line, notes = described(rows)
    assert line == "told: paper, threads 1, memory format none, 2x64 float32"
    assert [note.split(":")[1].strip() for note in notes] == ["dense on told", "small on told"]
    busy = bench(linear(8), {}, X, targets=[Told(runs=CALM, others=0.8)])
    assert busy[0]["noisy"] == "other processes kept 0.8 cores busy"


def test_memory_that_is_small_is_not_noisy() -> None:
    mib = {"dense": [0.01, 0.03, 0.02]}
    assert bench(linear(8), {}, X, targets=[Told(runs=CALM, mib=mib)], memory=True)[0]["noisy"] is None


def test_what_is_refused() -> None:
    told = Told(runs=CALM)
    with pytest.raises(InputError, match="two are called 'told'"):
        bench(linear(8), {}, X, targets=[told, Told(runs=CALM)])
    with pytest.raises(InputError, match="can't be called 'dense'"):
        bench(linear(8), {"dense": linear(4)}, X, targets=[told])
    with pytest.raises(InputError, match="is not there"):  # and the first one, which would fail, is not even begun
        bench(linear(8), {}, X, targets=[Told(), Told(label="gone", missing=True)])
    with pytest.raises(InputError, match="memory is not measured there"):
        bench(linear(8), {}, X, targets=[Told(), Told(label="second")], memory=True)


def test_the_table_fits() -> None:
    name = "a-rather-long-name-of-a-model"
    runs = {"dense": [12345.6, 12346.0, 12345.0], name: [1234.5, 1235.0, 1230.0]}
    mib = {"dense": [2000.25] * 3, name: [20.5] * 3}
    rows = bench(linear(8), {name: linear(4)}, X, targets=[Told(runs=runs, mib=mib)], memory=True)
    lines = shown(bench_table(rows))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in ("speedup", "MiB", "of dense", "10.0%", "10.00×", "20.50", "1.0%"):
        assert part in text
    assert "MiB" not in "\n".join(shown(bench_table(bench(linear(8), {}, X, targets=[Told(runs=CALM)]))))


def test_memory_of_real_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankopt.peak_memory.PROCESSES", 1)
    dense = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)]).eval()
    small = nn.Sequential(nn.Linear(1024, 64), nn.Linear(64, 1024)).eval()
    targets = [make("onnxruntime")]
    rows = bench(dense, {"small": small}, (torch.randn(1, 1024),), targets=targets, effort=QUICK, memory=True)
    assert rows[0]["memory_mib"] == pytest.approx(16, abs=1)
    assert rows[1]["memory_kept"] < 0.15
