from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from rankopt.cli import main
from rankopt.errors import InfeasibleError
from rankopt.plan import LayerChoice, Plan
from rankopt.progress import line
from rankopt.tables import compact

ROOT = Path(__file__).parent.parent
CODE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 12, generator=generator)
    with torch.no_grad():
        y = model()(x).argmax(1)
    return {"calibration": (x[:100], y[:100]), "validation": (x[100:200], y[100:200]), "test": (x[200:], y[200:])}
"""
STUDY = {
    "model": "code.py:model",
    "data": "code.py:data",
    "space": {"methods": ["svd"], "keep": {"min": 0.2, "max": 0.8, "levels": 4}},
    "limits": ["macs<=70%"],
    "objectives": ["kl", "macs"],
    "trials": 6,
}
KEYS = {
    "trial",
    "accuracy",
    "kl",
    "macs_kept",
    "params_kept",
    "latency_ms",
    "latency_kept",
    "feasible",
    "methods",
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(CODE)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


@dataclass
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def call(*args: object) -> Ran:
        code = main([str(a) for a in args])
        text = capsys.readouterr()
        return Ran(code, text.out, text.err)

    return call


# A stand-in for the engine, to test the verbs alone.


@dataclass
class FakeEntry:
    trial: int
    measurements: dict[str, float | None]
    feasible: bool
    plan: Plan = field(default_factory=lambda: Plan({"a": LayerChoice("svd", {"rank": 3}), "b": LayerChoice("dense")}))


class FakeResult:
    entries: ClassVar = [
        FakeEntry(0, {"accuracy": 97.5, "kl": 0.02, "macs_kept": 0.48, "params_kept": 0.5, "latency_ms": None}, True),
        FakeEntry(3, {"accuracy": 98.5, "kl": 0.01, "macs_kept": 0.81, "params_kept": 0.9, "latency_ms": None}, False),
    ]
    front = entries
    notes: ClassVar[list[str]] = []
    dense: ClassVar = {"accuracy": 98.75, "macs": 1.8e6, "params": 7e4}

    def best(self, limits: Any = None) -> FakeEntry:
        if limits and limits[0].value < 0.3:
            raise InfeasibleError("no plan keeps macs<=1%;\n  reachable: macs 12.5%", {"macs": 0.125})
        return self.entries[0]


class FakeSearch:
    model = "dense model"
    calls: ClassVar[list[tuple[Any, ...]]] = []

    @classmethod
    def from_study(cls, file: Any, **options: Any) -> FakeSearch:
        cls.calls.append(("from_study", file.name, options))
        return cls()

    def run(self, progress: Callable[[Any], None]) -> FakeResult:
        best = {"accuracy": 97.5, "kl": 0.02, "macs_kept": 0.48}
        for done in range(3):
            progress(types.SimpleNamespace(done=done, total=2, seconds=1.0, best=best, hypervolume=2.5, text=""))
        return FakeResult()

    def notes(self) -> list[str]:
        return []

    def evaluate(self, plan: Plan) -> FakeEntry:
        return FakeEntry(-1, {"accuracy": 90.0}, True, plan)

    def save(self, entry: FakeEntry, directory: Path, force: bool, exports: Any, memory: bool) -> dict[str, Any]:
        self.calls.append(("save", entry.trial, str(directory), force))
        return {"validation": {"accuracy": 97.5, "macs": 9e5}, "test": {"accuracy": 97.0, "macs": 9e5}}

    def measure(self, module: Any, split: str = "validation") -> dict[str, float]:
        assert (module, split) == ("dense model", "test")
        return {"accuracy": 98.0, "macs": 1.8e6}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeSearch]:
    FakeSearch.calls = []
    search, study = types.ModuleType("rankopt.search"), types.ModuleType("rankopt.ledger")
    search.Search = FakeSearch  # type: ignore[attr-defined]
    study.read_result = lambda url, name, limits=None: FakeResult()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rankopt.search", search)
    monkeypatch.setitem(sys.modules, "rankopt.ledger", study)
    return FakeSearch


def test_help_lists_the_verbs_and_is_fast(run: Callable[..., Ran]) -> None:
    for args in ([], ["--help"]):
        ran = run(*args)
        assert ran.code == 0
        for verb in ("layers", "search", "front", "export", "apply"):
            assert f"\n  {verb} " in ran.out
    code = (
        "import sys; from rankopt.cli import main; main(['--help']); assert not {'torch', 'optuna'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    )


@pytest.mark.parametrize("verb", ["layers", "search", "front", "export", "apply", "report", "plot", "trials"])
def test_every_verb_has_an_example_and_json(run: Callable[..., Ran], verb: str) -> None:
    ran = run(verb, "--help")
    assert ran.code == 0
    assert f"\n  rankopt {verb} " in ran.out
    assert ("--json " in ran.out) == (verb not in ("report", "plot"))  # those write files


def test_layers(run: Callable[..., Ran], study: Path) -> None:
    ran = run("layers", study)
    assert ran.code == 0
    assert "3 layers" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    rows = json.loads(run("layers", study, "--json").out)
    assert [row["name"] for row in rows] == ["0", "2", "4"]
    assert sum(row["macs_share"] for row in rows) == pytest.approx(1)
    assert rows[1]["methods"] == ["svd"]
    assert rows[1]["weight_shape"] == [32, 32]


def test_layers_says_why_one_is_left_alone(run: Callable[..., Ran], study: Path) -> None:
    study.write_text(yaml.safe_dump(STUDY | {"space": {"rules": [{"match": "2", "dense": True}]}}))
    assert "2: the search space leaves it dense" in run("layers", study).out


def test_front(run: Callable[..., Ran], study: Path, engine: type[FakeSearch]) -> None:
    rows = json.loads(run("front", study, "--json").out)
    assert set(rows[0]) == KEYS
    assert rows[0]["methods"] == {"dense": 1, "svd": 1}
    assert rows[0]["latency_ms"] is None
    ran = run("front", study)
    assert "48.0%" in ran.out
    assert " ms" not in ran.out  # nothing was measured, so there is no column
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "\x1b" not in ran.out


def test_search_shows_progress_front_and_what_was_saved(
    run: Callable[..., Ran], study: Path, engine: type[FakeSearch], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run("search", study, "--limit", "macs<=40%", "--trials", 9, "--seed", 3, "--storage", "x.db", "--out", out)
    assert ran.code == 0
    assert "trial 2/2 · 1 s · best: accuracy 97.50, kl 0.0200, macs_kept 48.0% · hypervolume 2.500" in ran.err
    assert len(ran.err.splitlines()) == 2  # not one a trial
    assert "best" in ran.out
    assert f"saved trial 0 to {out}" in ran.out
    assert "test, dense" in ran.out
    (_, name, options), saved = engine.calls
    assert name == "tiny"
    assert [str(limit) for limit in options.pop("limits")] == ["macs<=40%"]
    assert options == {"targets": None, "trials": 9, "seed": 3, "storage": f"sqlite:///{Path('x.db').resolve()}"}
    assert saved == ("save", 0, str(out), False)


def test_quiet(run: Callable[..., Ran], study: Path, engine: type[FakeSearch], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(Plan({"0": LayerChoice("svd", {"rank": 2})}).to_json())
    for args in (
        ["search", study, "--out", tmp_path / "a"],
        ["export", study, "--out", tmp_path / "b"],
        ["apply", plan, "--study", study, "--out", tmp_path / "c"],
    ):
        ran = run(*args, "--quiet")
        assert (ran.code, ran.out, ran.err) == (0, "", "")
        ran = run(*args, "--quiet", "--json")
        assert (ran.code, ran.err) == (0, "")
        assert json.loads(ran.out)
    assert [call[2] for call in engine.calls if call[0] == "save"] == [str(tmp_path / x) for x in "aabbcc"]
    failed = run("search", study, "--quiet", "--limit", "macs<=1%")
    assert (failed.code, failed.out, failed.err.count("\n")) == (2, "", 1)


def test_the_log_of_a_search(run: Callable[..., Ran], study: Path, engine: type[FakeSearch], tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert run("search", study, "--log", log).code == 0
    assert "INFO trial 2/2" in log.read_text()
    assert run("search", study, "--log", log, "--limit", "macs<=1%").code == 2
    assert "reachable: macs 12.5%" in log.read_text()
    assert log.read_text().count("INFO done") == 1
    assert "--log" in run("search", study, "--log", tmp_path).err


def test_search_json_is_all_of_stdout(
    run: Callable[..., Ran], study: Path, engine: type[FakeSearch], tmp_path: Path
) -> None:
    found = json.loads(run("search", study, "--json").out)
    assert found["out"] is None
    assert found["best"]["trial"] == 0
    found = json.loads(run("search", study, "--json", "--out", tmp_path / "o").out)
    assert found["dense_test"]["accuracy"] == 98.0
    assert [set(row) for row in found["front"]] == [KEYS, KEYS]
    assert engine.calls[0][2]["limits"] is None


def test_export_the_best_or_a_named_trial(
    run: Callable[..., Ran], study: Path, engine: type[FakeSearch], tmp_path: Path
) -> None:
    assert run("export", study, "--out", tmp_path / "a").code == 0
    assert run("export", study, "--trial", 3, "--out", tmp_path / "b", "--json").code == 0
    assert [call[1] for call in engine.calls if call[0] == "save"] == [0, 3]


def test_force_replaces_a_saved_model_only(
    run: Callable[..., Ran], study: Path, engine: type[FakeSearch], tmp_path: Path
) -> None:
    out = tmp_path / "a"
    out.mkdir()
    assert "holds no saved model" in run("export", study, "--out", out, "--force").err
    (out / "plan.json").write_text("{}")
    assert "already exists" in run("export", study, "--out", out).err
    assert not engine.calls
    assert run("export", study, "--out", out, "--force").code == 0


def test_apply(run: Callable[..., Ran], study: Path, engine: type[FakeSearch], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(Plan({"0": LayerChoice("svd", {"rank": 2})}).to_json())
    ran = run("apply", plan, "--study", study, "--out", tmp_path / "o", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["methods"] == {"svd": 1}


BAD: dict[str, tuple[list[str], str]] = {
    "no such verb": (["serach", "{study}"], "serach"),
    "no study": (["search"], "Missing argument 'STUDY'"),
    "unknown option": (["search", "{study}", "--trails", "3"], "--trails"),
    "trials 0": (["search", "{study}", "--trials", "0"], "--trials"),
    "trials text": (["search", "{study}", "--trials", "x"], "--trials"),
    "seed negative": (["search", "{study}", "--seed", "-1"], "--seed"),
    "missing file": (["layers", "{dir}/gone.yaml"], "gone.yaml: can't be read"),
    "limit": (["search", "{study}", "--limit", "macs=50%"], "limit 'macs=50%'"),
    "limit unit": (["front", "{study}", "--limit", "latency<=4"], "limit 'latency<=4'"),
    "limit quantity": (["export", "{study}", "--limit", "speed<=4", "--out", "{dir}/o"], "unknown quantity 'speed'"),
    "out is needed": (["export", "{study}"], "Missing option '--out'"),
    "out exists": (["search", "{study}", "--out", "{dir}"], "already exists"),
    "out is a file": (["search", "{study}", "--out", "{study}", "--force"], "holds no saved model"),
    "no such trial": (["export", "{study}", "--trial", "7", "--out", "{dir}/o"], "--trial 7: the study tiny has no"),
    "nothing meets it": (["search", "{study}", "--limit", "macs<=1%"], "reachable: macs 12.5%"),
    "missing plan": (["apply", "{dir}/p.json", "--study", "{study}", "--out", "{dir}/o"], "p.json: can't be read"),
    "truncated plan": (["apply", "{dir}/cut.json", "--study", "{study}", "--out", "{dir}/o"], "not valid JSON"),
    "plan rank 0": (
        ["apply", "{dir}/zero.json", "--study", "{study}", "--out", "{dir}/o"],
        "layers.0: svd: rank",
    ),
    "plan schema": (
        ["apply", "{dir}/old.json", "--study", "{study}", "--out", "{dir}/o"],
        "schema must be 1 or 2, got 7",
    ),
    "not a plan": (["apply", "{study}", "--study", "{study}", "--out", "{dir}/o"], "unknown key 'data'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(
    run: Callable[..., Ran], study: Path, engine: type[FakeSearch], tmp_path: Path, case: str
) -> None:
    args, expected = BAD[case]
    (tmp_path / "cut.json").write_text('{"schema": 1, "layers": {"0":')
    (tmp_path / "zero.json").write_text('{"schema": 1, "layers": {"0": {"method": "svd", "ranks": {"rank": 0}}}}')
    (tmp_path / "old.json").write_text('{"schema": 7, "layers": {}}')
    ran = run(*(arg.format(study=study, dir=tmp_path) for arg in args))
    assert ran.code == 2
    errors = [text for text in ran.err.splitlines() if not text.startswith("trial ")]
    assert len(errors) == 1
    assert errors[0].startswith("rankopt: error: ")
    assert expected in errors[0]
    assert ran.out == ""
    assert not (tmp_path / "o").exists()


WRONG_STUDY: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"modle": "x"}, "unknown key 'modle'; did you mean 'model'?"),
    "model": ({"model": "code.py:nothing"}, "model.call: 'code.py:nothing': code.py has no 'nothing'"),
    "example shape": ({"example_input": [1, 13]}, "does not run on it"),
    "rule": (
        {"space": {"rules": [{"match": "conv9", "dense": True}]}},
        "space.rules.0.match.0: 'conv9' matches",
    ),
    "method": ({"space": {"methods": ["svdd"]}}, "space.methods.0: unknown method 'svdd'; did you mean 'svd'?"),
}


@pytest.mark.parametrize("case", WRONG_STUDY)
def test_wrong_studies(run: Callable[..., Ran], study: Path, case: str) -> None:
    change, expected = WRONG_STUDY[case]
    study.write_text(yaml.safe_dump(STUDY | change))
    ran = run("layers", study)
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert expected in ran.err
    assert ran.out == ""


def test_interruption(
    run: Callable[..., Ran], study: Path, engine: type[FakeSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, progress: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeSearch, "run", interrupted)
    assert run("search", study).code == 130


def test_numbers() -> None:
    assert [compact(n) for n in (0, 640, 1804928, 999_600, 40_551_040)] == ["0", "640", "1.8M", "1M", "40.6M"]
    told = types.SimpleNamespace(done=0, total=0, seconds=2.4, best=None, hypervolume=None, text="calibrating")
    assert line(told) == "2 s · calibrating"


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    code = "import sys; from rankopt.cli import main; sys.exit(main())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def call(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=250, check=False)

    return call


def test_end_to_end(shell: Callable[..., subprocess.CompletedProcess[str]], study: Path, tmp_path: Path) -> None:
    out = tmp_path / "best"
    ran = shell("search", study, "--out", out, "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (out / "plan.json").is_file()
    assert found["best"]["macs_kept"] <= 0.7
    for key in ("accuracy", "kl"):
        assert found["validation"][key] == pytest.approx(found["best"][key], abs=1e-6)

    rows = json.loads(shell("front", study, "--json").stdout)
    assert all(set(row) == KEYS for row in rows)
    assert rows == found["front"]
    again = shell("search", study, "--out", out, "--force", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["front"] == rows  # all trials were there already

    exported = shell("export", study, "--trial", rows[-1]["trial"], "--out", tmp_path / "other", "--json")
    assert exported.returncode == 0, exported.stderr
    applied = shell("apply", out / "plan.json", "--study", study, "--out", tmp_path / "third", "--json")
    assert applied.returncode == 0, applied.stderr
    third = json.loads(applied.stdout)
    assert third["validation"]["accuracy"] == pytest.approx(found["validation"]["accuracy"], abs=1e-6)
    assert (tmp_path / "third" / "plan.json").read_text() == (out / "plan.json").read_text()

    refused = shell("export", study, "--limit", "macs<=1%", "--out", tmp_path / "none")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_as_a_module(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "rankopt", "layers", "none.yaml"], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr == "rankopt: error: none.yaml: can't be read: No such file or directory\n"
