from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from rankopt.errors import DataError, RankoptError, StudyFileError
from rankopt.study_file import StudyFile, load_study, storage_url

STUDIES = Path(__file__).parent.parent / "studies"
CODE = """
import torch
from torch import nn
from sibling import WIDTH
from rankopt.errors import DataError

class Net(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.fc1 = nn.Linear(6, width)
        self.fc2 = nn.Linear(width, 3)
    def forward(self, x):
        return self.fc2(self.fc1(x).relu())

def model(width=WIDTH): return Net(width)
def not_a_model(): return 3
def failing(): raise RuntimeError("no weights\\nat all")
def missing(): raise DataError("weights.pt: there is no such file")
def data(n=40):
    x, y = torch.randn(n, 6), torch.arange(n) % 3
    return {"calibration": (x, y), "validation": lambda: (x + 1, y)}
def other_split(): return {"calibration": [torch.zeros(2, 6)], "trial": []}
def no_calibration(): return {"test": [torch.zeros(2, 6)]}
def no_mapping(): return [torch.zeros(2, 6)]
def empty(): return {"calibration": []}
def score(module, batches): return 1.0
def example(): return (torch.zeros(1, 6),), {"flag": True}
def example_text(): return "x"
CONSTANT = 3
"""
GOOD: dict[str, Any] = {"model": "code.py:model", "data": "code.py:data"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "sibling.py").write_text("WIDTH = 5\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(3)\n")
    return tmp_path


def write(folder: Path, content: Any, name: str = "study.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def study(folder: Path, **keys: Any) -> StudyFile:
    return load_study(write(folder, {**GOOD, **keys}))


def test_defaults(folder: Path) -> None:
    loaded = study(folder)
    assert loaded.name == "study"
    assert loaded.goals == ["accuracy", "macs"]
    assert study(folder, metric="kl").goals == ["kl", "macs"]
    assert loaded.limits == []
    assert loaded.target == []
    assert loaded.storage_url == f"sqlite:///{folder.resolve() / 'runs' / 'study.db'}"
    assert loaded.metric_function() is None
    assert loaded.recovery.bn == "auto"
    assert loaded.load_space().description


def test_model_data_and_example(folder: Path) -> None:
    loaded = study(
        folder, model={"call": "code.py:model", "args": {"width": 7}}, calibration={"samples": 30, "batch": 8}
    )
    net = loaded.build_model()
    splits = loaded.splits()
    assert {key: sum(map(len, batches)) for key, batches in splits.items()} == {"calibration": 30, "validation": 40}
    args, kwargs = loaded.example()
    assert net(*args, **kwargs).shape == (1, 3)
    assert loaded.splits() is splits


def test_metric_and_module_shared_by_all_callables(folder: Path) -> None:
    loaded = study(folder, metric="code.py:score")
    metric = loaded.metric_function()
    assert metric is not None
    assert metric(nn.Identity(), []) == 1.0
    assert type(loaded.build_model()).__module__ == metric.__module__


def test_a_package_and_a_nested_callable(folder: Path) -> None:
    loaded = study(folder, model={"call": "torch.nn:Linear", "args": {"in_features": 6, "out_features": 2}})
    assert isinstance(loaded.build_model(), nn.Linear)
    assert loaded.base_dir == folder.resolve()
    assert str(folder.resolve()) not in sys.path


@pytest.mark.parametrize(
    ("given", "shape", "dtype"),
    [
        ([1, 6], (1, 6), torch.float32),
        ({"shape": [2, 6], "dtype": "int64"}, (2, 6), torch.int64),
        ({"shape": [2, 6]}, (2, 6), torch.float32),
        ("code.py:example", (1, 6), torch.float32),
    ],
)
def test_example_input(folder: Path, given: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args, _ = study(folder, example_input=given).example()
    assert args[0].shape == shape
    assert args[0].dtype == dtype


def test_yaml_on_and_off(folder: Path) -> None:
    text = "model: 'code.py:model'\ndata: 'code.py:data'\nrecovery: {bn: off}\n"
    assert load_study(write(folder, text)).recovery.bn == "off"


def test_spaces(folder: Path) -> None:
    write(folder, {"methods": ["svd"]}, "mine.yaml")
    assert study(folder, space="mine.yaml").load_space().methods == ["svd"]
    assert study(folder, space={"methods": ["svd"]}).load_space().methods == ["svd"]
    assert study(folder, space="vgg").load_space().keep.min < 0.1


def test_storage() -> None:
    assert storage_url("postgresql://host/db", Path("/x")) == "postgresql://host/db"
    assert storage_url("runs/a.db", Path("/x")) == "sqlite:////x/runs/a.db"


@pytest.mark.parametrize("name", ["digits", "cifar10_resnet20"])
def test_shipped_studies_load(name: str) -> None:
    loaded = load_study(STUDIES / f"{name}.yaml")
    assert loaded.name == name
    assert str(loaded.limits[0]) == "macs<=50%"


def test_reading_a_study_needs_no_torch() -> None:
    read = "from rankopt.study_file import load_study; load_study(sys.argv[1])"
    code = f"import sys; {read}; assert 'torch' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": str(STUDIES.parent)}
    subprocess.run([sys.executable, "-c", code, str(STUDIES / "digits.yaml")], check=True, env=env)


WRONG: dict[str, tuple[Any, str]] = {
    "no model": ({"data": "a:b"}, "model: is needed"),
    "unknown key": ({**GOOD, "trails": 3}, "unknown key 'trails'; did you mean 'trials'?"),
    "unknown nested key": ({**GOOD, "calibration": {"sample": 3}}, "calibration: unknown key 'sample'; did you mean"),
    "trials 0": ({**GOOD, "trials": 0}, "trials: input should be greater than or equal to 1, got 0"),
    "trials text": ({**GOOD, "trials": "many"}, "trials: input should be a valid integer, got 'many'"),
    "trials true": ({**GOOD, "trials": True}, "trials: "),
    "trials half": ({**GOOD, "trials": 1.5}, "trials: "),
    "seed negative": ({**GOOD, "seed": -1}, "seed: "),
    "threads 0": ({**GOOD, "threads": 0}, "threads: "),
    "samples 0": ({**GOOD, "validation": {"samples": 0}}, "validation.samples: "),
    "limit": ({**GOOD, "limits": ["macs<=50%", "macs=50%"]}, "limits.1: limit 'macs=50%': needs QUANTITY<=NUMBER"),
    "limit number": ({**GOOD, "limits": [0.5]}, "limits.0: a limit is a text such as 'macs<=50%', got 0.5"),
    "limits text": ({**GOOD, "limits": "macs<=50%"}, "limits: input should be a valid list"),
    "objective": ({**GOOD, "objectives": ["kl", "speed"]}, "objectives.1: "),
    "objective twice": ({**GOOD, "objectives": ["kl", "kl"]}, "objectives: one stands there twice: kl, kl"),
    "only costs": ({**GOOD, "objectives": ["macs"]}, "objectives: accuracy or kl must be among them"),
    "accuracy of kl": ({**GOOD, "metric": "kl", "objectives": ["accuracy"]}, "objectives: accuracy needs a metric"),
    "metric": ({**GOOD, "metric": "f1"}, "metric: needs 'package.module:callable' or 'file.py:callable', got 'f1'"),
    "model number": ({**GOOD, "model": 3}, "model: needs a mapping of call, args"),
    "model without colon": ({**GOOD, "model": "code.model"}, "model.call: needs 'package.module:callable'"),
    "model args list": ({**GOOD, "model": {"call": "a:b", "args": [1]}}, "model.args: "),
    "bn": ({**GOOD, "recovery": {"bn": "sometimes"}}, "recovery.bn: "),
    "output": ({**GOOD, "output": {"kind": "boxes"}}, "output.kind: "),
    "name": ({**GOOD, "name": "../up"}, "name: a name is a short text without slashes"),
    "space name": ({**GOOD, "space": "resnett"}, "space: no ready search space is called 'resnett'"),
    "space key": ({**GOOD, "space": {"keep": {"min": 2.0}}}, "space.keep.min: input should be less than or equal to 1"),
    "space file": ({**GOOD, "space": "gone.yaml"}, "space: "),
    "not yaml": ("model: [", "not valid YAML in line 1"),
    "key twice": ("trials: 1\ntrials: 2\n", "not valid YAML in line 2: the key 'trials' stands there twice"),
    "python object": ("model: !!python/object/apply:os.system ['true']\n", "not valid YAML in line 1"),
    "empty": ("", "needs the keys of a study, got nothing"),
    "a list": ("- 1\n", "needs the keys of a study, got [1]"),
    "number as key": ("1: 2\n", "the key 1 must be text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_line_that_names_the_key(folder: Path, case: str) -> None:
    content, expected = WRONG[case]
    path = write(folder, content)
    with pytest.raises(StudyFileError) as caught:
        load_study(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match=r"gone\.yaml: can't be read: No such file"):
        load_study(tmp_path / "gone.yaml")
    with pytest.raises(StudyFileError, match="can't be read: Is a directory"):
        load_study(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(StudyFileError, match="not a text file"):
        load_study(tmp_path / "bytes.yaml")


USED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no file": ({"model": "gone.py:model"}, "build_model", "model.call: 'gone.py:model': there is no file"),
    "no module": ({"model": "gone_pkg.sub:model"}, "build_model", "can't be imported: ModuleNotFoundError"),
    "no attribute": ({"model": "code.py:modle"}, "build_model", "code.py has no 'modle'"),
    "not callable": ({"model": "code.py:CONSTANT"}, "build_model", "CONSTANT can't be called, it is of type int"),
    "import fails": ({"model": "broken.py:f"}, "build_model", "'broken.py:f': can't be imported: ModuleNotFoundError"),
    "syntax": ({"model": "syntax.py:f"}, "build_model", "can't be imported: SyntaxError"),
    "import exits": ({"model": "quits.py:f"}, "build_model", "can't be imported: SystemExit"),
    "raises": ({"model": "code.py:failing"}, "build_model", "model.call: raised RuntimeError: no weights"),
    "no module returned": ({"model": "code.py:not_a_model"}, "build_model", "must return a torch.nn.Module, got int"),
    "unknown argument": (
        {"model": {"call": "code.py:model", "args": {"widht": 3}}},
        "build_model",
        "model.args: got an unexpected keyword argument 'widht'",
    ),
    "data unknown split": ({"data": "code.py:other_split"}, "splits", "data.call: returned an unknown split 'trial'"),
    "data no calibration": (
        {"data": "code.py:no_calibration"},
        "splits",
        "must return the split 'calibration'",
    ),
    "data no mapping": ({"data": "code.py:no_mapping"}, "splits", "must return a mapping of splits, got list"),
    "metric missing": ({"metric": "code.py:sccore"}, "metric_function", "metric: 'code.py:sccore': code.py has no"),
    "shape 0": ({"example_input": [0, 6]}, "example", "example_input: needs a shape of whole numbers"),
    "shape text": ({"example_input": "1,6"}, "example", "example_input: needs a shape such as [1, 3, 32, 32]"),
    "shape huge": ({"example_input": [10**6, 10**6]}, "example", "has more than"),
    "dtype": ({"example_input": {"shape": [1], "dtype": "f32"}}, "example", "example_input.dtype: needs a torch dtype"),
    "shape key": ({"example_input": {"size": [1]}}, "example", "example_input: unknown key 'size'"),
    "example text": ({"example_input": "code.py:example_text"}, "example", "must return a tensor"),
}


@pytest.mark.parametrize("case", USED)
def test_what_a_file_names_may_be_wrong_too(folder: Path, case: str) -> None:
    keys, method, expected = USED[case]
    loaded = study(folder, **keys)
    with pytest.raises(StudyFileError) as caught:
        getattr(loaded, method)()
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(loaded.path))
    assert "\n" not in str(caught.value)


def test_errors_of_the_projects_own_kind_pass(folder: Path) -> None:
    with pytest.raises(DataError, match=r"^weights\.pt: there is no such file$"):
        study(folder, model="code.py:missing").build_model()
    with pytest.raises(RankoptError, match=r"^calibration: no batches"):
        study(folder, data="code.py:empty").splits()


def test_missing_data_of_cifar10(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANKOPT_DATA", str(tmp_path))
    with pytest.raises(DataError, match="set RANKOPT_DATA"):
        load_study(STUDIES / "cifar10_resnet20.yaml").build_model()
