"""The verbs recover and compress, and what they are made of, on a study of seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rankopt
from rankopt.cli import main
from rankopt.errors import InfeasibleError, InputError, StudyFileError
from rankopt.iterated import compress, stage_limits
from rankopt.layers import find_layers
from rankopt.limits import parse_limit
from rankopt.plan import LayerChoice, Plan
from rankopt.recovering import finalists
from rankopt.result import Entry, Result
from rankopt.study_file import load_study

CODE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.5)
    return net

class Loader:
    def __iter__(self):
        x, y = everything()
        for _ in range(8):
            index = torch.randint(0, 300, (64,))
            yield x[index] + 0.05 * torch.randn(64, 12), y[index]

def everything():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(900, 12, generator=generator)
    with torch.no_grad():
        return x, model()(x).argmax(1)

def data():
    x, y = everything()
    return {"calibration": (x[:300], y[:300]), "validation": (x[300:600], y[300:600]), "test": (x[600:], y[600:]),
            "train": Loader}

def ones_own(model, dense, batches, steps):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
"""
STUDY: dict[str, Any] = {
    "model": "code.py:model",
    "data": "code.py:data",
    "space": {"methods": ["svd"], "keep": {"min": 0.1, "max": 0.8, "levels": 5}},
    "limits": ["macs<=40%"],
    "objectives": ["kl", "macs"],
    "trials": 6,
    "recovery": {
        "final_steps": 60,
        "lr": 0.01,
        "distill": 1,
        "temperature": 1,
        "checkpoint": 10,
        "precision": "float32",
        "device": "cpu",
    },
}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "code.py").write_text(CODE)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*args: object, code: int = 0) -> str:
        assert main([str(a) for a in args]) == code, capsys.readouterr().err
        text = capsys.readouterr()
        return text.out if code == 0 else text.err

    return call


def changed(path: Path, **keys: Any) -> Path:
    path.write_text(yaml.safe_dump({**STUDY, **keys}))
    return path


def test_a_saved_model_is_recovered_and_loads(study: Path, run: Any) -> None:
    run("search", study, "--out", "small")
    found = json.loads(run("recover", "small", "--study", study, "--out", "better", "--json"))
    for split in ("validation", "test"):
        assert found["after"][split]["kl"] < 0.9 * found["before"][split]["kl"]
        assert found["dense"][split]["accuracy"] == 100
    assert found["training"]["steps"] == 60
    assert found["training"]["precision"] == "float32"
    file = load_study(study)
    small, better = (rankopt.load(name, file.build_model()) for name in ("small", "better"))
    assert [p.shape for p in small.parameters()] == [p.shape for p in better.parameters()]
    assert Plan.load("small") == Plan.load("better")
    measured = json.loads(Path("better/measurements.json").read_text())
    assert measured["compressed"]["kl"] == pytest.approx(found["after"]["validation"]["kl"])
    assert measured["before_recovery"]["kl"] == pytest.approx(found["before"]["validation"]["kl"])
    assert measured["recovery"]["steps"] == 60
    assert not Path("better.recovery").exists()
    text = run("recover", "small", "--study", study, "--out", "better", "--force", "--steps", 5)
    assert "trained 5 steps" in text
    assert "saved to better" in text
    for head in ("validation: dense", "before", "after"):
        assert head in text


def test_finalists_compete_and_the_winner_is_written(study: Path, run: Any) -> None:
    changed(study, trials=8)
    run("search", study)
    args = ("recover", study, "--finalists", 4, "--eta", 2, "--out", "best", "--checkpoints", "rungs")
    found = json.loads(run(*args, "--json"))
    halving = found["halving"]
    assert halving["rungs"] == [[15, 4], [30, 2], [60, 1]]
    assert len(halving["measured"]) == 4
    assert halving["steps"] < halving["steps_of_all"] == 240
    full = {name: by["60"] for name, by in halving["measured"].items() if "60" in by}
    assert found["winner"] == int(next(iter(full)).split()[1])
    assert found["after"]["validation"]["kl"] == pytest.approx(next(iter(full.values()))["kl"], rel=1e-5)
    assert found["costs"]["macs_kept"] <= 0.4
    assert Path("rungs/halving.json").is_file()
    again = json.loads(run(*args, "--json", "--force"))  # all of it is known
    assert again["halving"] == halving
    assert again["after"] == found["after"]
    text = run("recover", study, "--out", "one", "--steps", 10)
    assert "finalists" not in text
    assert "trained 10 steps" in text


def test_a_short_recovery_in_every_trial_and_in_what_is_saved(study: Path, run: Any) -> None:
    plain = json.loads(run("search", study, "--trials", 2, "--json", "--storage", "plain.db"))
    changed(study, recovery={**STUDY["recovery"], "steps": 30})
    short = json.loads(run("search", study, "--trials", 2, "--json", "--out", "small"))
    assert short["best"]["kl"] < plain["best"]["kl"]
    assert short["validation"]["kl"] == pytest.approx(short["best"]["kl"], rel=1e-4)
    changed(study, recovery={**STUDY["recovery"], "steps": 31})
    assert "was begun with another recovery" in run("search", study, "--trials", 3, code=2)


def test_a_training_of_ones_own_takes_the_place(study: Path, run: Any) -> None:
    changed(study, recovery={"function": "code.py:ones_own"})
    run("search", study, "--out", "small", "--trials", 2)
    run("recover", "small", "--study", study, "--out", "half")
    dense = load_study(study).build_model()
    one, two = rankopt.load("small", dense), rankopt.load("half", dense)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(b, a / 2)
    for wrong, text in (("code.py:nothing", "has no 'nothing'"), ("nonsense", "recovery")):
        changed(study, recovery={"function": wrong})
        assert text in run("recover", "small", "--study", study, "--out", "x", code=2)


def test_what_can_be_refused_is_refused_before_anything_is_done(study: Path, run: Any) -> None:
    assert "nothing was searched yet" in run("recover", study, "--out", "x", code=2)
    Path("empty").mkdir()
    assert "records no data; give --study" in run("recover", "empty", "--out", "x", code=2)
    assert "holds no saved model" in run("recover", "empty", "--study", study, "--out", "x", code=2)
    assert "belong to a study" in run("recover", "empty", "--study", study, "--finalists", 2, "--out", "x", code=2)
    assert "already exists" in run("recover", study, "--out", "empty", code=2)
    assert "--study: belongs to a saved model" in run("recover", study, "--study", study, "--out", "x", code=2)
    assert "stages: needs from 1 to as many" in run("compress", study, "--stages", 99, "--out", "x", code=2)
    assert "stages: need a limit on a cost" in run(
        "compress", study, "--stages", 2, "--limit", "kl<=1", "--out", "x", code=2
    )
    changed(study, recovery={"lr": "fast"})
    assert "recovery.lr: " in run("recover", study, "--out", "x", code=2)
    assert not Path("x").exists()


def test_in_stages_the_limit_is_reached_step_by_step(study: Path, run: Any) -> None:
    options = ("--limit", "macs<=25%", "--trials", 4)
    shot = json.loads(run("compress", study, *options, "--out", "shot", "--json"))
    assert len(shot["stages"]) == 1
    found = json.loads(run("compress", study, "--stages", 2, *options, "--out", "small", "--folder", "kept", "--json"))
    first, second = found["stages"]
    assert first["limits"] == ["macs<=50%"]
    assert second["limits"] == ["macs<=25%"]
    assert first["steps"] + second["steps"] == shot["stages"][0]["steps"] == 60
    assert 0.3 < first["costs"]["macs_kept"] <= 0.5
    assert second["costs"]["macs_kept"] <= 0.25
    dense = load_study(study).build_model()
    loaded = rankopt.load("small", dense)  # the plan is one of the original architecture
    x = torch.randn(1, 12)
    assert rankopt.count(loaded, x).macs <= 0.25 * rankopt.count(dense, x).macs
    assert found["after"]["validation"]["kl"] < second["before"]["validation"]["kl"]
    again = json.loads(
        run("compress", study, "--stages", 2, *options, "--out", "small", "--folder", "kept", "--json", "--force")
    )
    assert again["after"] == found["after"]
    assert [s["costs"] for s in again["stages"]] == [s["costs"] for s in found["stages"]]
    assert "stage 1: macs<=50%; " in run("compress", study, "--stages", 2, *options, "--out", "y", "--steps", 4)
    assert not Path("y.recovery").exists()


def test_what_nothing_can_keep_leaves_nothing(study: Path, run: Any) -> None:
    before = {p.name for p in Path().iterdir()}
    assert "no plan of this search space keeps the limits" in run(
        "compress", study, "--limit", "macs<=0.01%", "--out", "x", code=2
    )
    assert {p.name for p in Path().iterdir()} == before
    limits = ("--limit", "macs<=50%", "--limit", "kl<=1e-9", "--trials", 3)
    run("compress", study, *limits, "--out", "x", code=2)  # known only when it was measured
    assert (Path("x.recovery") / "stage-1-of-1" / "study.db").is_file()
    run("compress", study, *limits[:2], *limits[4:], "--out", "x")  # goes on with what is there
    assert not Path("x.recovery").exists()


def test_a_killed_compression_goes_on(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = load_study(study), Path("small")
    options: dict[str, Any] = {"stages": 2, "trials": 3, "folder": Path("kept")}
    whole = compress(file, Path("whole"), **{**options, "folder": Path("other")})

    class Killed(BaseException):
        pass

    def watching(progress: Any) -> None:
        if progress.text.startswith("stage 2/2 · step 21"):
            raise Killed

    with pytest.raises(Killed):
        compress(load_study(study), out, progress=watching, **options)
    assert not out.exists()
    steps: list[str] = []
    found = compress(load_study(study), out, progress=lambda p: steps.append(p.text), **options)
    assert found["after"] == whole["after"]
    trained = [text for text in steps if "step " in text]
    assert trained[0].startswith("stage 2/2 · step 21")


def test_bounds_of_stages() -> None:
    dense = {"macs": 1000.0, "params": 100.0, "accuracy": 90.0, "latency_ms": 4.0}
    limits = [parse_limit(t) for t in ("macs<=6.25%", "params<=1", "accuracy>=-0.5", "kl<=0.1", "latency<=1ms")]
    first = stage_limits(limits, dense, 1, 2)
    assert [str(li) for li in first] == ["macs<=25%", "params<=10% of dense", "latency<=50% of dense"]
    assert [li.bound(dense) for li in first] == pytest.approx([250, 10, 2])
    last = stage_limits(limits, dense, 2, 2)
    assert [li.bound({**dense, "accuracy": 50.0}) for li in last] == pytest.approx([62.5, 1, 89.5, 0.1, 1])
    loose = stage_limits([parse_limit("macs<=150%"), parse_limit("memory<=1MiB")], dense, 1, 2)
    assert [li.bound(dense) for li in loose] == [1000]


def test_finalists_are_the_best_one_and_then_the_front() -> None:
    def entry(trial: int, kl: float, macs: float) -> Entry:
        return Entry(trial, Plan({"a": LayerChoice("svd", {"rank": trial + 1})}), {"kl": kl, "macs": macs}, True)

    entries = [entry(0, 0.5, 30), entry(1, 0.1, 60), entry(2, 0.2, 39), entry(3, 0.3, 35), entry(4, 0.6, 31)]
    result = Result(entries, ("kl", "macs"), (parse_limit("macs<=40"),), {"macs": 100.0})
    assert [e.trial for e in finalists(result, 3)] == [2, 0, 3] or [e.trial for e in finalists(result, 3)] == [2, 3, 0]
    assert [e.trial for e in finalists(result, 9)][-1] == 4
    assert [e.trial for e in finalists(result, 1, [])] == [1]
    with pytest.raises(InfeasibleError):
        finalists(result, 3, [parse_limit("macs<=1")])
    nothing = Result([Entry(0, Plan({}), {"kl": 0.0, "macs": 30.0}, True)], ("kl", "macs"), (), {"macs": 100.0})
    with pytest.raises(InputError, match="only the dense model"):
        finalists(nothing, 3)


def test_training_data_of_a_study(study: Path) -> None:
    file = load_study(study)
    assert "train" not in file.splits()
    assert type(file.training_data()).__name__ == "Loader"
    assert file.training_data() is file.training_data()
    assert file.short_recovery() is None
    (study.parent / "code.py").write_text(CODE.replace('"train": Loader', '"trains": Loader'))
    with pytest.raises(StudyFileError, match="unknown split 'trains'; did you mean 'train'"):
        load_study(study).splits()
    (study.parent / "code.py").write_text(CODE.replace(',\n            "train": Loader', ""))
    assert load_study(study).training_data() is None
    assert find_layers(file.build_model(), torch.zeros(1, 12))
