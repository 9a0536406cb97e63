"""The verb `rankopt bench`, on a study that was really searched and on models that were really saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from saved_models import rehash

from rankopt.cli import main
from rankopt.timing import Effort

CODE = """
import torch
from torch import nn


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator)
    with torch.no_grad():
        y = Net()(x).argmax(1)
    return {"calibration": (x[:100], y[:100]), "validation": (x[100:], y[100:])}
"""
STUDY = {
    "model": "tinynet:Net",
    "data": "tinynet:data",
    "space": {"methods": ["svd"], "keep": {"min": 0.2, "max": 0.8, "levels": 4}},
    "limits": ["macs<=70%"],
    "objectives": ["kl", "macs"],
    "trials": 5,
}
MADE_UP = "replay:ms_per_mmac=1000"  # a millisecond for a thousand multiply-accumulates
MACS = 12 * 32 + 32 * 32 + 32 * 4


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict]:  # type: ignore[type-arg]
        return json.loads(self.out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that was searched (tiny.yaml), its best model (best) and the dense plan's (whole)."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "tinynet.py").write_text(CODE)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    (folder / "new.yaml").write_text(yaml.safe_dump(STUDY))
    (folder / "named.yaml").write_text(
        yaml.safe_dump(STUDY | {"name": "tiny", "target": {"name": "replay", "label": "pi", "ms_per_mmac": 2.0}})
    )
    (folder / "empty").mkdir()
    sys.path.insert(0, str(folder))
    try:
        assert main(["search", str(folder / "tiny.yaml"), "--out", str(folder / "best")]) == 0
    finally:
        sys.path.remove(str(folder))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path) -> Callable[..., Ran]:
    monkeypatch.syspath_prepend(str(place))
    capsys.readouterr()

    def call(*args: object) -> Ran:
        code = main(["bench", *map(str, args)])
        text = capsys.readouterr()
        return Ran(code, text.out, text.err)

    return call


@pytest.fixture
def kept(place: Path) -> float:
    """The share of MACs that the best model keeps, as it was saved."""
    return json.loads((place / "best" / "measurements.json").read_text())["compressed"]["macs_kept"]


def test_the_best_of_a_study(run: Callable[..., Ran], place: Path, kept: float) -> None:
    ran = run(place / "tiny.yaml", "--target", MADE_UP, "--json")
    assert ran.code == 0, ran.err
    dense, small = ran.rows
    assert dense["model"] == "dense"
    assert small["model"].startswith("trial ")
    assert dense["latency_ms"] == pytest.approx(MACS / 1000, rel=1e-6)
    assert small["latency_kept"] == pytest.approx(kept, rel=1e-6)
    assert small["memory_mib"] is None


def test_a_trial_of_a_study(run: Callable[..., Ran], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", str(place / "tiny.yaml"), "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        ran = run(place / "tiny.yaml", "--trial", row["trial"], "--target", MADE_UP, "--json")
        assert ran.rows[1]["model"] == f"trial {row['trial']}"
        assert ran.rows[1]["latency_kept"] == pytest.approx(row["macs_kept"], rel=1e-6)


def test_the_targets_of_the_study_file(run: Callable[..., Ran], place: Path) -> None:
    ran = run(place / "best", "--study", place / "named.yaml", "--json")
    assert ran.code == 0, ran.err
    assert [row["target"] for row in ran.rows] == ["pi", "pi"]
    assert ran.rows[0]["latency_ms"] == pytest.approx(2 * MACS / 1e6, rel=1e-6)
    replaced = run(place / "best", "--study", place / "named.yaml", "--target", MADE_UP, "--json")
    assert [row["target"] for row in replaced.rows] == ["replay", "replay"]


def test_a_saved_model(run: Callable[..., Ran], place: Path, kept: float) -> None:
    by_study = run(place / "best", "--study", place / "tiny.yaml", "--target", MADE_UP, "--json")
    by_source = run(place / "best", "--input", "1x12", "--target", MADE_UP, "--json")
    assert by_study.rows == by_source.rows
    assert by_study.rows[1]["model"] == "best"
    assert by_study.rows[1]["latency_kept"] == pytest.approx(kept, rel=1e-6)


def test_batches_and_inputs(run: Callable[..., Ran], place: Path) -> None:
    more = [MADE_UP + ",label=a", MADE_UP + ",label=b,batch=3"]
    ran = run(place / "tiny.yaml", "--batch", 8, *(part for t in more for part in ("--target", t)), "--json")
    assert [row["conditions"]["input"] for row in ran.rows[::2]] == ["8x12 float32", "3x12 float32"]
    assert ran.rows[0]["latency_ms"] == pytest.approx(8 * MACS / 1000, rel=1e-6)
    ran = run(place / "tiny.yaml", "--input", "5x12", "--target", MADE_UP, "--json")
    assert ran.rows[0]["conditions"]["input"] == "5x12 float32"


def test_what_is_printed(run: Callable[..., Ran], place: Path) -> None:
    ran = run(place / "tiny.yaml", "--target", MADE_UP + ",label=a", "--target", MADE_UP + ",label=b")
    assert ran.code == 0
    first, head, dense, small, gap, second, *_ = ran.out.splitlines()
    assert first.startswith("a: ")
    assert first.endswith("1x12 float32")
    assert second.startswith("b: ")
    assert not gap.strip()
    assert head.split()[:2] == ["model", "ms"]
    assert "100.0%" in dense
    assert small.startswith("trial ")
    assert small.rstrip().endswith("×")
    assert "\x1b" not in ran.out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real measurements, but short ones."""
    monkeypatch.setattr("rankopt.bench.EFFORT", Effort(seconds=0.05, rounds=7, longest=1, repeats=0, warmup=0.05))
    monkeypatch.setattr("rankopt.peak_memory.PROCESSES", 1)


def test_a_real_target_with_memory(run: Callable[..., Ran], place: Path, quick: None) -> None:
    ran = run(place / "best", "--study", place / "tiny.yaml", "--target", "onnxruntime", "--memory", "--json")
    assert ran.code == 0, ran.err
    for row in ran.rows:
        assert row["latency_ms"] > 0
        assert 0 < row["memory_mib"] < 5
        assert row["conditions"]["threads"] == "1"
    assert ran.rows[1]["speedup"] == pytest.approx(1 / ran.rows[1]["latency_kept"])


def test_torch_is_the_default(run: Callable[..., Ran], place: Path, quick: None) -> None:
    before = torch.get_num_threads()
    ran = run(place / "tiny.yaml", "--json")
    assert {row["target"] for row in ran.rows} == {"torch"}
    assert torch.get_num_threads() == before


BAD: dict[str, tuple[list[str], str]] = {
    "nothing there": (["{dir}/gone"], "gone: can't be read"),
    "no study": (["{dir}/tinynet.py"], "tinynet.py"),
    "not searched": (["{dir}/new.yaml"], "study new: nothing was searched yet"),
    "no such trial": (["{dir}/tiny.yaml", "--trial", "99"], "--trial 99: the study tiny has no finished trial"),
    "not a saved model": (["{dir}/empty", "--input", "1x12"], "empty: holds no saved model"),
    "no input": (["{dir}/best"], "a saved model records no input; give --study STUDY, or --input 1x3x32x32"),
    "input": (["{dir}/best", "--input", "1,12"], "--input: needs a shape of whole numbers"),
    "input 0": (["{dir}/best", "--input", "0x12"], "--input: needs a shape of whole numbers"),
    "input dtype": (["{dir}/best", "--input", "1x12:int77"], "--input.dtype: needs a torch dtype"),
    "trial of a saved model": (["{dir}/best", "--trial", "1", "--input", "1x12"], "--trial and --storage belong to"),
    "study of a study": (["{dir}/tiny.yaml", "--study", "{dir}/tiny.yaml"], "--study: belongs to a saved model"),
    "study is none": (["{dir}/best", "--study", "{dir}/none.yaml"], "none.yaml: can't be read"),
    "target": (["{dir}/tiny.yaml", "--target", "torhc"], "target: 'torhc' is not known; did you mean 'torch'?"),
    "target option": (["{dir}/tiny.yaml", "--target", "torch:threads=0"], "target torch: threads"),
    "target text": (["{dir}/tiny.yaml", "--target", "torch:2"], "options are written NAME:KEY=VALUE"),
    "two of one name": (["{dir}/tiny.yaml", "--target", "torch", "--target", "torch:threads=2"], "two are called"),
    "no memory": (["{dir}/tiny.yaml", "--memory", "--target", MADE_UP], "memory is not measured there"),
    "batch 0": (["{dir}/tiny.yaml", "--batch", "0"], "--batch"),
    "shape that does not fit": (["{dir}/best", "--input", "1x13"], "can't be run"),
    "no model": ([], "Missing argument 'MODEL_DIR|STUDY'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(run: Callable[..., Ran], place: Path, case: str) -> None:
    args, expected = BAD[case]
    ran = run(*(arg.format(dir=place) for arg in args))
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("rankopt: error: ")
    assert expected in ran.err
    assert ran.out == ""


def test_a_saved_model_without_a_source(run: Callable[..., Ran], place: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (place / "best").iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    record = json.loads((bare / "environment.json").read_text())
    (bare / "environment.json").write_text(json.dumps(record | {"source": None}))
    rehash(bare)
    ran = run(bare, "--input", "1x12", "--target", MADE_UP)
    assert ran.code == 2
    assert "records no source of the dense model; give --study STUDY" in ran.err
    assert "model=" not in ran.err
    assert run(bare, "--study", place / "tiny.yaml", "--target", MADE_UP).code == 0


def test_help(run: Callable[..., Ran]) -> None:
    ran = run("--help")
    assert ran.code == 0
    assert "\n  rankopt bench " in ran.out
    assert "--json" in ran.out
