"""Bad input of every kind: one clear line, exit status 2, and nothing written.

The command line runs in this process on a small study; Python cases call the API. `SAYS` is a part of the message that
names the culprit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import rankopt
from rankopt.cli import main
from rankopt.errors import InputError, RankoptError
from rankopt.plan import LayerChoice, Plan

CODE = """
import torch
from torch import nn

def net(inputs=12, width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

def other_weights():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    return model

def wider(): return net(width=40)

def nan():
    model = net()
    with torch.no_grad():
        model[2].weight[3, 3] = float("nan")
    return model

def no_layers(): return nn.Sequential(nn.Softmax(1))
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 4)
    def forward(self, x):
        return self.fc(self.rnn(x[:, None])[0][:, -1])
def lstm(): return Recurrent().eval()
def tied():
    model = net()
    model[4].weight = nn.Parameter(model[4].weight.detach())
    emb = nn.Linear(32, 4); emb.weight = model[4].weight
    model.append(nn.Identity()); model[5].emb = emb
    return model
def table(): return {"weight": 1}
def broken(): raise FileNotFoundError("weights.pt: no such file\\nat all")
def text_output():
    class Text(nn.Module):
        def __init__(self):
            super().__init__(); self.fc = nn.Linear(12, 4)
        def forward(self, x): self.fc(x); return "text"
    return Text()

def _xy(n=120, inputs=12):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, inputs, generator=g)
    return x, torch.arange(n) % 4

def data(): return {"calibration": _xy(), "validation": _xy(60)}
def no_calibration(): return {"validation": _xy()}
def empty(): return {"calibration": []}
def unlabelled(): return {"calibration": _xy()[0], "validation": _xy(60)[0]}
def inf(): return {"calibration": (_xy()[0] / 0, _xy()[1])}
def wrong_shape(): return {"calibration": _xy(inputs=13)}
def wrong_validation(): return {"calibration": _xy(), "validation": _xy(30, inputs=7)}
def ragged(): return {"calibration": [_xy(10), _xy(10, inputs=7)]}
def few_labels(): return {"calibration": (_xy()[0], _xy()[1][:7])}
def label_shape(): return {"calibration": _xy(), "validation": (_xy()[0], torch.zeros(120, 4))}
def one(): return {"calibration": _xy(1)}
def unknown_split(): return {"calibration": _xy(), "valid": _xy()}
def dies(): raise ConnectionError("host\\nunreachable")

def score(module, batches): return 1.0
def word(module, batches): return "good"
def nothing(module, batches): return None
def nan_score(module, batches): return float("nan")
def raises(module, batches): raise KeyError("label")
def one_argument(module): return 1.0
value = 3
def example(): return torch.zeros(1, 12)
def example_number(): return 3
"""
STUDY: dict[str, Any] = {
    "model": "code.py:net",
    "data": "code.py:data",
    "space": {"methods": ["svd"], "keep": {"min": 0.2, "max": 0.8, "levels": 4}},
    "limits": ["macs<=70%"],
    "objectives": ["kl", "macs"],
    "trials": 3,
}


@dataclass
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> Ran:
        capsys.readouterr()
        code = main([str(a) for a in args])
        text = capsys.readouterr()
        return Ran(code, text.out, text.err)

    return call


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that was searched, and an exported model."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "code.py").write_text(CODE)
    (folder / "s.yaml").write_text(yaml.safe_dump(STUDY))
    assert main(["search", str(folder / "s.yaml"), "--out", str(folder / "saved"), "--json"]) == 0
    return folder


@pytest.fixture
def folder(searched: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "f"
    shutil.copytree(searched, copied)
    return copied


def write(folder: Path, change: Mapping[str, Any], name: str = "s.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(STUDY | dict(change)))
    return folder / name


def check(ran: Ran, says: str) -> None:
    errors = [line for line in ran.err.splitlines() if line.startswith("rankopt: error: ")]
    assert ran.code == 2, ran
    assert len(errors) == 1
    assert ran.err.rstrip("\n").splitlines()[-1] == errors[0]
    assert "Traceback" not in ran.err
    assert says in errors[0]
    assert ran.out == ""


# a study file that is wrong, searched --------------------------------------------------------------------------------

STUDIES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"limit": ["macs<=50%"]}, "unknown key 'limit'; did you mean 'limits'?"),
    "limits of the wrong type": ({"limits": "macs<=50%"}, "limits"),
    "a limit that is no text": ({"limits": [0.5]}, "limits.0"),
    "trials of the wrong type": ({"trials": "many"}, "trials"),
    "no trials": ({"trials": 0}, "trials"),
    "a negative seed": ({"seed": -1}, "seed"),
    "unknown limit quantity": ({"limits": ["speed<=50%"]}, "unknown quantity 'speed'"),
    "unknown limit unit": ({"limits": ["macs<=50ms"]}, "unit 'ms'"),
    "unknown limit operator": ({"limits": ["macs>=50%"]}, "macs can only be limited with <="),
    "limit without a number": ({"limits": ["macs<="]}, "limit 'macs<='"),
    "latency without a target": ({"limits": ["latency<=4ms"]}, "latency is not measured without a target"),
    "memory without a target": ({"limits": ["memory<=4MiB"]}, "memory is not measured without a target"),
    "unknown target": ({"target": "onnxruntim"}, "target: 'onnxruntim' is not known; did you mean 'onnxruntime'?"),
    "unknown option of a target": ({"target": {"name": "torch", "thread": 2}}, "unknown key 'thread'"),
    "unknown label": (
        {"target": "torch", "limits": ["latency@pi<=4ms"]},
        "limit 'latency@pi<=4ms': no target is called 'pi'; there are torch",
    ),
    "accuracy limit with kl": ({"metric": "kl", "limits": ["accuracy>=-1"]}, "accuracy needs a metric other than kl"),
    "a limit that nothing meets": ({"limits": ["macs<=1%"]}, "the least is macs 17.7% of dense (272)"),
    "two limits of which one fails": ({"limits": ["macs<=90%", "params<=100"]}, "the least is macs "),
    "quality that nothing reaches": ({"limits": ["accuracy>=101"], "trials": 2}, "accuracy>=101 (reached: "),
    "unknown objective": ({"objectives": ["speed"]}, "objectives.0"),
    "unknown space": (
        {"space": "resnest"},
        "no ready search space is called 'resnest' (a path ends in .yaml); did you mean 'resnet'?",
    ),
    "missing space file": ({"space": "mine.yaml"}, "mine.yaml"),
    "unknown key in the space": ({"space": {"method": ["svd"]}}, "unknown key 'method'"),
    "unknown method": ({"space": {"methods": ["svdd"]}}, "unknown method 'svdd'; did you mean 'svd'?"),
    "rule that matches nothing": ({"space": {"rules": [{"match": "conv9", "dense": True}]}}, "'conv9' matches"),
    "explicit rank too large": (
        {"space": {"rules": [{"match": "0", "explicit": [{"method": "svd", "ranks": {"rank": 13}}]}]}},
        "1 <= rank <= 12",
    ),
    "everything left dense": (
        {"space": {"rules": [{"match": "*", "dense": True}]}},
        "the search space leaves them dense",
    ),
    "missing model": ({"model": "code.py:nett"}, "code.py has no 'nett'; did you mean 'net'?"),
    "missing file": ({"model": "cod.py:net"}, "there is no file"),
    "missing package": ({"model": "no_such_package:net"}, "can't be imported: ModuleNotFoundError"),
    "model that is no callable": ({"model": "code.py:value"}, "can't be called"),
    "model that is no address": ({"model": "net"}, "needs 'package.module:callable' or 'file.py:callable'"),
    "model that is no module": ({"model": "code.py:table"}, "must return a torch.nn.Module, got dict"),
    "model that raises": ({"model": "code.py:broken"}, "raised FileNotFoundError: weights.pt: no such file"),
    "model argument": ({"model": {"call": "code.py:net", "args": {"widht": 3}}}, "unexpected keyword argument 'widht'"),
    "NaN weights": ({"model": "code.py:nan"}, "NaN or infinity"),
    "no decomposable layer": ({"model": "code.py:no_layers"}, "none of its 0 layers can be decomposed"),
    "uncounted operation": ({"model": "code.py:lstm"}, "Recurrent.rnn runs aten::"),
    "output that is no tensor": ({"model": "code.py:text_output", "metric": "kl"}, "the model returns str"),
    "data that raise": ({"data": "code.py:dies"}, "raised ConnectionError: host"),
    "data without calibration": ({"data": "code.py:no_calibration"}, "must return the split 'calibration'"),
    "unknown split": ({"data": "code.py:unknown_split"}, "unknown split 'valid'; did you mean 'validation'?"),
    "empty loader": ({"data": "code.py:empty"}, "no batches"),
    "one sample": ({"data": "code.py:one"}, "at least 2 samples"),
    "infinite inputs": ({"data": "code.py:inf"}, "an input holds NaN or infinity"),
    "data of the wrong shape": ({"data": "code.py:wrong_shape"}, "does not run on it: RuntimeError"),
    "validation data of the wrong shape": (
        {"data": "code.py:wrong_validation"},
        "validation data: Sequential does not",
    ),
    "a batch of the wrong shape": ({"data": "code.py:ragged"}, "data: Sequential does not run on it"),
    "too few labels": ({"data": "code.py:few_labels"}, "120 inputs but 7 labels"),
    "no labels": ({"data": "code.py:unlabelled"}, "metric accuracy: needs labels"),
    "labels of the wrong shape": ({"data": "code.py:label_shape"}, "predictions have shape (120,), labels (120, 4)"),
    "metric that is no number": ({"metric": "code.py:word"}, "metric: must return a number, got str"),
    "metric that is nothing": ({"metric": "code.py:nothing"}, "metric: must return a number, got NoneType"),
    "metric that is NaN": ({"metric": "code.py:nan_score"}, "metric: must return a finite number, got nan"),
    "metric that raises": ({"metric": "code.py:raises"}, "metric: raised KeyError"),
    "metric with other arguments": ({"metric": "code.py:one_argument"}, "metric: raised TypeError"),
    "missing metric": ({"metric": "code.py:scor"}, "has no 'scor'"),
    "example input that does not fit": ({"example_input": [1, 13]}, "example input: Sequential does not run on it"),
    "example input that is no shape": ({"example_input": [1, "x"]}, "example_input: needs a shape"),
    "example input of another type": ({"example_input": {"shape": [1, 12], "dtype": "floot"}}, "example_input.dtype"),
    "example callable": ({"example_input": "code.py:example_number"}, "must return a tensor"),
    "output kind": ({"output": {"kind": "softmax"}}, "output.kind"),
    "class dimension": ({"output": {"class_dim": 3}}, "class_dim 3 does not fit an output of shape"),
    "storage that can't be reached": ({"storage": "code.py/x.db"}, "its storage can't be written"),
    "storage scheme": ({"storage": "nosuch://x"}, "storage nosuch://x: can't be opened"),
}


@pytest.mark.parametrize("case", STUDIES)
def test_wrong_studies(run: Run, folder: Path, case: str) -> None:
    change, says = STUDIES[case]
    path = write(folder, {"storage": "fresh.db"} | change, "wrong.yaml")
    check(run("search", path, "--out", folder / "out"), says)
    assert not (folder / "out").exists()


BROKEN_YAML = {
    "empty": ("", "s.yaml"),
    "a list": ("- a\n- b\n", "s.yaml"),
    "not YAML": ("model: [1, 2\nb: }", "s.yaml"),
    "twice the same key": ("model: a.py:b\nmodel: a.py:b\n", "stands there twice"),
    "not text": (b"\xff\xfe\x00\x01", "s.yaml"),
}


@pytest.mark.parametrize("case", BROKEN_YAML)
def test_files_that_are_no_study(run: Run, tmp_path: Path, case: str) -> None:
    content, says = BROKEN_YAML[case]
    path = tmp_path / "s.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for verb in ("layers", "search", "front"):
        check(run(verb, path), says)


# arguments -----------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "missing study": (["search", "{f}/none.yaml"], "none.yaml: can't be read"),
    "a folder as the study": (["search", "{f}"], "can't be read"),
    "trials 0": (["search", "{s}", "--trials", "0"], "--trials"),
    "trials text": (["search", "{s}", "--trials", "ten"], "--trials"),
    "bad seed": (["search", "{s}", "--seed", "-3"], "--seed"),
    "bad limit": (["search", "{s}", "--limit", "macs<50%"], "limit 'macs<50%'"),
    "existing --out": (["search", "{s}", "--out", "{f}/saved"], "already exists"),
    "--force where no model is": (["search", "{s}", "--out", "{f}", "--force"], "holds no saved model"),
    "--out is a file": (["export", "{s}", "--out", "{s}"], "already exists"),
    "unknown trial": (["export", "{s}", "--trial", "99", "--out", "{f}/o"], "--trial 99: the study s has no finished"),
    "front before search": (["front", "{s}", "--storage", "{f}/new.db"], "nothing was searched yet"),
    "export before search": (
        ["export", "{s}", "--storage", "{f}/new.db", "--out", "{f}/o"],
        "nothing was searched yet",
    ),
    "bad storage": (["front", "{s}", "--storage", "nosuch://x"], "storage nosuch://x: can't be opened"),
    "storage is no database": (["front", "{s}", "--storage", "{f}/code.py"], "storage sqlite:///"),
    "nothing exported keeps it": (
        ["export", "{s}", "--limit", "macs<=5%", "--out", "{f}/o"],
        "macs<=5% (reached: ",
    ),
    "limit of an unmeasured quantity": (
        ["export", "{s}", "--limit", "latency<=3ms", "--out", "{f}/o"],
        "latency<=3ms (never measured)",
    ),
    "missing plan": (["apply", "{f}/none.json", "--study", "{s}", "--out", "{f}/o"], "none.json: can't be read"),
    "folder without a plan": (["apply", "{f}/runs", "--study", "{s}", "--out", "{f}/o"], "plan.json: can't be read"),
    "apply without a study": (["apply", "{f}/saved/plan.json", "--out", "{f}/o"], "--study"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments(run: Run, folder: Path, case: str) -> None:
    args, says = ARGUMENTS[case]
    check(run(*(a.format(f=folder, s=folder / "s.yaml") for a in args)), says)
    assert not (folder / "o").exists()
    assert not (folder / "new.db").exists()


# plans ---------------------------------------------------------------------------------------------------------------


def layers(**choice: Any) -> dict[str, Any]:
    return {"schema": 1, "layers": {"0": {"method": "svd", "ranks": {"rank": 3}} | choice}}


PLANS: dict[str, tuple[Any, str]] = {
    "truncated": ('{"schema": 1, "layers": {"0": {"method"', "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "binary": (b"\x93NUMPY\xff", "not a text file"),
    "a list": ([], "needs an object, got list"),
    "another schema": (layers() | {"schema": 3}, "schema must be 1 or 2, got 3"),
    "unknown key": (layers() | {"layer": {}}, "unknown key 'layer'"),
    "unknown layer": ({"schema": 1, "layers": {"00": {"method": "svd", "ranks": {"rank": 3}}}}, "the closest is '0'"),
    "unknown method": (layers(method="sdv"), "unknown decomposition 'sdv'; known: dense, svd"),
    "rank 0": (layers(ranks={"rank": 0}), "rank must be a whole number from 1, got 0"),
    "negative rank": (layers(ranks={"rank": -2}), "got -2"),
    "float rank": (layers(ranks={"rank": 2.5}), "got 2.5"),
    "boolean rank": (layers(ranks={"rank": True}), "got True"),
    "text rank": (layers(ranks={"rank": "3"}), "got '3'"),
    "rank too large": (layers(ranks={"rank": 13}), "1 <= rank <= 12"),
    "huge rank": (layers(ranks={"rank": 10**30}), "rank must be a whole number"),
    "unknown rank": (layers(ranks={"rang": 3}), "needs the ranks rank, got {'rang': 3}"),
    "no ranks": (layers(ranks={}), "needs the ranks rank"),
    "method that does not fit": (
        layers(method="tucker2", ranks={"rank_out": 1, "rank_in": 1}),
        "0: tucker2 does not fit",
    ),
    "dense with ranks": (layers(method="dense"), "dense takes no ranks"),
    "infinity": ('{"schema": 1, "layers": {"0": {"method": "svd", "ranks": {"rank": Infinity}}}}', "Infinity"),
    "the same layer twice": ('{"schema": 1, "layers": {"0": {"method": "dense"}, "0": {"method": "dense"}}}', "twice"),
}


@pytest.mark.parametrize("case", PLANS)
def test_wrong_plans(run: Run, folder: Path, case: str) -> None:
    content, says = PLANS[case]
    raw = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
    (folder / "p.json").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    check(run("apply", folder / "p.json", "--study", folder / "s.yaml", "--out", folder / "o"), says)
    assert not (folder / "o").exists()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("wider", "made for another architecture"),
        ("tied", "made for another architecture"),
    ],
)
def test_plans_for_another_model(run: Run, folder: Path, model: str, says: str) -> None:
    path = write(folder, {"model": f"code.py:{model}"})
    check(run("apply", folder / "saved", "--study", path, "--out", folder / "o"), says)
    assert not (folder / "o").exists()


def test_a_plan_for_other_weights_is_carried_out(run: Run, folder: Path) -> None:
    path = write(folder, {"model": "code.py:other_weights"})
    assert run("apply", folder / "saved", "--study", path, "--out", folder / "o").code == 0
    old, new = Plan.load(folder / "saved"), Plan.load(folder / "o")
    assert new.layers == old.layers
    assert old.fingerprint is not None
    assert new.fingerprint is not None
    assert new.fingerprint.architecture == old.fingerprint.architecture
    assert new.fingerprint.weights != old.fingerprint.weights


# a study that goes on with something else ----------------------------------------------------------------------------

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"model": "code.py:other_weights"}, "begun with another weights"),
    "architecture": ({"model": "code.py:wider"}, "begun with another model"),
    "data": ({"calibration": {"samples": 60}}, "begun with another calibration data"),
    "validation data": ({"validation": {"samples": 20}}, "begun with another validation data"),
    "space": ({"space": {"methods": ["svd"], "keep": {"levels": 3}}}, "begun with another search space"),
    "objectives": ({"objectives": ["kl", "params"]}, "begun with another objectives"),
    "metric": ({"metric": "code.py:score"}, "begun with another metric"),
    "refit": ({"refit": {"enabled": False}}, "begun with another refit"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_study_that_changed_since(run: Run, folder: Path, case: str) -> None:
    change, says = CHANGES[case]
    before = run("front", folder / "s.yaml", "--json").out
    path = write(folder, change)
    check(run("search", path, "--trials", 9, "--out", folder / "out"), says)
    assert not (folder / "out").exists()
    write(folder, {})
    assert run("front", folder / "s.yaml", "--json").out == before


def test_export_notices_it_too(run: Run, folder: Path) -> None:
    """The plans of a study belong to the weights that it was searched with."""
    path = write(folder, {"model": "code.py:other_weights"})
    check(run("export", path, "--out", folder / "o"), "made for other weights")
    assert not (folder / "o").exists()


# Python --------------------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4)).eval()


X = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))


def search(**options: Any) -> Any:
    given: dict[str, Any] = {
        "model": net(),
        "example_input": X[:1],
        "calibration": [X],
        "trials": 2,
        "space": {"methods": ["svd"], "keep": {"levels": 3}},
        **options,
    }
    return rankopt.search(given.pop("model"), given.pop("example_input"), **given)


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("first line\nsecond line")


def failing(module: nn.Module) -> float:
    raise OSError("disk\nfull")


PYTHON: dict[str, tuple[Callable[[], Any], str]] = {
    "no module": (lambda: search(model=3), "model: needs a torch.nn.Module, got int"),
    "a class for a module": (lambda: search(model=nn.Linear), "model: needs a torch.nn.Module"),
    "find_layers of no module": (lambda: rankopt.find_layers("net", X), "needs a torch.nn.Module, got str"),  # type: ignore[arg-type]
    "example input that does not fit": (lambda: search(example_input=torch.zeros(1, 5)), "example input: Sequential"),
    "example arguments": (lambda: search(example_kwargs={"y": 1}), "example input: Sequential"),
    "model that raises": (lambda: search(model=Reads()), "RuntimeError: first line"),
    "no batches": (lambda: search(calibration=[]), "calibration: no batches"),
    "calibration text": (lambda: search(calibration="train.npz"), "needs an iterable of batches, got str"),
    "calibration inf": (lambda: search(calibration=[X / 0]), "NaN or infinity"),
    "calibration of another shape": (lambda: search(calibration=[X[:, :5]]), "calibration data: Sequential"),
    "one sample": (lambda: search(calibration=[X[:1]]), "at least 2 samples"),
    "samples 0": (lambda: search(samples=0), "samples must be at least 1"),
    "trials 0": (lambda: search(trials=0), "trials: must be a whole number from 1, got 0"),
    "trials text": (lambda: search(trials="many"), "trials: must be a whole number from 1, got 'many'"),
    "seed": (lambda: search(seed=-1), "seed: must be a whole number from 0, got -1"),
    "seed text": (lambda: search(seed="a"), "seed: must be a whole number"),
    "limit": (lambda: search(limits=["macs=50%"]), "limit 'macs=50%'"),
    "limit number": (lambda: search(limits=[0.5]), "limit 0.5"),
    "limits number": (lambda: search(limits=0.5), "limits: needs a list"),
    "limit nothing meets": (lambda: search(limits=["params<=2%"]), "the least is params "),
    "latency": (lambda: search(limits=["latency<=3ms"]), "latency is not measured without a target"),
    "accuracy without a metric": (lambda: search(limits=["accuracy>=-1"]), "accuracy needs a metric"),
    "target": (lambda: search(target="gpu"), "target: 'gpu' is not known"),
    "storage": (lambda: search(storage="nosuch://x"), "storage nosuch://x: can't be opened"),
    "storage number": (lambda: search(storage=3), "storage: must be a text, got 3"),
    "space": (lambda: search(space="resnst"), "no ready search space is called 'resnst'"),
    "space key": (lambda: search(space={"ranks": 3}), "unknown key 'ranks'"),
    "space path": (lambda: search(space=Path("gone.yaml")), "gone.yaml"),
    "objective": (lambda: search(objectives=["speed"]), "objectives: needs a list out of kl, macs, params"),
    "objectives text": (lambda: search(objectives="macs"), "objectives: needs a list"),
    "only costs": (lambda: search(objectives=["macs", "params"]), "accuracy or kl is among them"),
    "accuracy without metric": (lambda: search(objectives=["accuracy", "macs"]), "objectives: needs a list out of kl"),
    "evaluate": (lambda: search(evaluate=3), "evaluate: needs a callable"),
    "evaluate raises": (lambda: search(evaluate=failing), "metric: raised OSError: disk"),
    "evaluate is no number": (lambda: search(evaluate=lambda m: [1]), "metric: must return a number, got list"),
    "evaluate is NaN": (lambda: search(evaluate=lambda m: float("nan")), "finite number, got nan"),
    "plan rank": (lambda: LayerChoice("svd", {"rank": 0}), "rank must be a whole number from 1, got 0"),
    "plan layer": (lambda: rankopt.apply(net(), Plan({"9": LayerChoice("svd", {"rank": 1})})), "no linear, conv"),
    "plan too large": (lambda: rankopt.apply(net(), Plan({"0": LayerChoice("svd", {"rank": 99})})), "1 <= rank <= 12"),
    "apply to NaN": (
        lambda: rankopt.apply(
            nn.Sequential(nn.Linear(4, 4, bias=False)).requires_grad_(False).apply(poisoned),
            Plan({"0": LayerChoice("svd", {"rank": 2})}),
        ),
        "holds NaN or infinite values",
    ),
    "load nothing": (lambda: rankopt.load("no/such/folder"), "is not a directory"),
    "count": (lambda: rankopt.count(nn.LSTM(3, 4), torch.zeros(1, 2, 3)), "LSTM runs aten::"),
    "study file": (lambda: rankopt.load_study("gone.yaml"), "gone.yaml: can't be read"),
    "best of a limit": (lambda: search().best(["speed<=1"]), "unknown quantity 'speed'"),
}


def poisoned(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight[0, 0] = float("nan")


@pytest.mark.parametrize("case", PYTHON)
def test_python(case: str) -> None:
    action, says = PYTHON[case]
    with pytest.raises(RankoptError) as caught:
        action()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# saved models that are damaged ---------------------------------------------------------------------------------------


def sized() -> nn.Module:
    """Of the study's architecture."""
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: can't be read"),
    "truncated plan": (lambda f: cut(f / "plan.json"), "plan.json: is damaged"),
    "no plan": (lambda f: (f / "plan.json").unlink(), "plan.json: can't be read"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_models(folder: Path, case: str) -> None:
    damage, says = DAMAGES[case]
    damage(folder / "saved")
    with pytest.raises(InputError) as caught:
        rankopt.load(folder / "saved", sized())
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
