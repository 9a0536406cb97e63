from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from saved_models import Net
from torch import nn

from rankopt.artifact import load
from rankopt.checkpoint import load_checkpoint
from rankopt.cli import main
from rankopt.errors import ArtifactError
from rankopt.plan import LayerChoice, Plan
from rankopt.plan_file import read_plan, write_plan

FORMS: dict[str, Any] = {
    "a state dict": lambda s: s,
    "an ordered one": OrderedDict,
    "under state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "under model, twice": lambda s: {"model": {"state_dict": s}},
    "of DataParallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled and distributed": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
}


@pytest.fixture
def tuned() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return dict(Net().state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_files_of_torch(tmp_path: Path, tuned: dict[str, torch.Tensor], form: str) -> None:
    torch.save(FORMS[form](tuned), tmp_path / "c.pt")
    model = load_checkpoint(Net(), tmp_path / "c.pt")
    assert all(torch.equal(v, tuned[k]) for k, v in model.state_dict().items())


def test_safetensors_alone_in_a_folder_and_in_shards(tmp_path: Path, tuned: dict[str, torch.Tensor]) -> None:
    save_file(tuned, tmp_path / "c.safetensors")
    (tmp_path / "one").mkdir()
    save_file(tuned, tmp_path / "one" / "model.safetensors")
    (tmp_path / "two").mkdir()
    names = list(tuned)
    for n, part in enumerate((names[::2], names[1::2])):
        save_file({k: tuned[k] for k in part}, tmp_path / "two" / f"s{n}.safetensors")
    index = {"weight_map": {k: f"s{n % 2}.safetensors" for n, k in enumerate(names)}}
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in ("c.safetensors", "one", "two"):
        model = load_checkpoint(Net(), tmp_path / path)
        assert all(torch.equal(v, tuned[k]) for k, v in model.state_dict().items())
    index["weight_map"][names[0]] = "../c.safetensors"
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="files in this directory"):
        load_checkpoint(Net(), tmp_path / "two")


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda s: {**s, "head.weight": torch.zeros(6, 12)}, r"head\.weight has the shape \(6, 12\), this model's is"),
        (lambda s: {k: v for k, v in s.items() if k != "head.bias"}, "lacks head.bias; it was saved from another"),
        (lambda s: {**s, "more": torch.zeros(1)}, "holds more, which this model does not have"),
        (lambda s: {"state_dict": s, "args": argparse.Namespace(lr=1)} | {"x": 1}, "holds Python objects besides"),
        (lambda s: nn.Linear(2, 2), "holds Python objects besides tensors"),
        (lambda s: torch.zeros(3), "needs a mapping of names to tensors, got Tensor"),
        (lambda s: {**s, "epoch": 3}, "'epoch' is a int, not a tensor"),
        (lambda s: {}, "needs a mapping"),
    ],
)
def test_what_is_refused(tmp_path: Path, tuned: dict[str, torch.Tensor], made: Any, says: str) -> None:
    torch.save(made(tuned), tmp_path / "c.pt")
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=says) as caught:
        load_checkpoint(model, tmp_path / "c.pt")
    assert "\n" not in caught.value.message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"\x80\x02garbage", b"text"])
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        load_checkpoint(Net(), tmp_path / "c.pt")
    assert "\n" not in caught.value.message
    with pytest.raises(ArtifactError, match="no such file"):
        load_checkpoint(Net(), tmp_path / "gone.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="holds neither"):
        load_checkpoint(Net(), tmp_path / "empty")


def test_a_plan_on_other_weights(
    tmp_path: Path, tuned: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rankopt.layers import fingerprint

    monkeypatch.chdir(tmp_path)
    plan = Plan({"second": LayerChoice("svd", {"rank": 12})}, fingerprint(Net()))
    write_plan(plan, tmp_path / "plan.yaml")
    save_file(tuned, tmp_path / "tuned.safetensors")
    call = ["apply", "plan.yaml", "--model", "saved_models:Net", "--weights", "tuned.safetensors", "--out", "small"]
    assert main([*call, "--input", "1x3x8x8", "--export", "pt2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compressed"]["params"] != found["dense"]["params"]
    small = load(tmp_path / "small")
    dense = Net().eval()
    dense.load_state_dict(tuned)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)  # full rank gives the layer back
    assert read_plan(tmp_path / "small").fingerprint == fingerprint(dense)
    assert main(["apply", "plan.yaml", "--model", "torch.nn:Identity", "--out", "other"]) == 2
    err = capsys.readouterr().err
    assert "made for another architecture" in err
    assert "'second': the model has no linear, convolutional or other layer of that name" in err
    assert not (tmp_path / "other").exists()
