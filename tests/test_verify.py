from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import Net, edit, net, rehash, saved_net
from torch import nn

import rankopt
from rankopt.artifact import load, save
from rankopt.cli import main
from rankopt.errors import ArtifactError, PlanError
from rankopt.measurement import Measurement
from rankopt.plan import LayerChoice, Plan
from rankopt.plan_diff import diff
from rankopt.plan_file import read_plan, write_plan
from rankopt.saving import memory_target
from rankopt.targets import make
from rankopt.targets.target import Subject
from rankopt.targets.torch_cpu import TorchCpu
from rankopt.verify import Check, verify


def failed(checks: list[Check]) -> list[str]:
    return [check.what for check in checks if check.ok is False]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return saved_net(tmp_path / "net")


def test_what_was_saved_is_in_order(saved: Path) -> None:
    checks = verify(saved)
    assert failed(checks) == []
    done = {check.what for check in checks if check.ok}
    assert {"plan fits the weights", "reload equals what was saved", "export pt2", "params", "macs"} <= done
    assert {f"file {p.name}" for p in saved.iterdir() if p.name != "manifest.json"} <= done


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def other_weights(saved: Path) -> None:
    torch.manual_seed(9)
    small = load(saved, Net)
    with torch.no_grad():
        small.get_parameter("head.weight").add_(0.01)
    from rankopt.tensor_file import write_tensors

    write_tensors(saved / "model.safetensors", small)


def other_program(saved: Path) -> None:
    from rankopt.exporting import export

    torch.manual_seed(9)
    (saved / "model.pt2").unlink()
    export(Net().eval(), saved, ["pt2"], torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("change", "again", "what"),
    [
        (lambda d: flip(d / "model.pt2"), False, "file model.pt2"),
        (lambda d: flip(d / "README.md"), False, "file README.md"),
        (lambda d: (d / "measurements.json").unlink(), False, "file measurements.json"),
        (lambda d: (d / "more.txt").write_text("x"), False, "file more.txt"),
        (other_weights, True, "reload equals what was saved"),
        (other_program, True, "export pt2"),
        (lambda d: edit(d, "measurements.json", lambda m: m["compressed"].update(macs=7)), True, "macs"),
        (lambda d: edit(d, "measurements.json", lambda m: m["compressed"].update(params=7)), True, "params"),
        (
            lambda d: edit(d, "plan.json", lambda p: p["layers"]["second"]["ranks"].update(rank=4)),
            True,
            "plan fits the weights",
        ),
        (lambda d: edit(d, "manifest.json", lambda m: m["exports"]["pt2"].update(tolerance=1e9)), False, "export pt2"),
        (
            lambda d: edit(d, "manifest.json", lambda m: m["exports"]["pt2"].update(batches=[10**9])),
            False,
            "export pt2",
        ),
        (
            lambda d: edit(d, "manifest.json", lambda m: m["inputs"]["args"][0]["tensor"].update(shape=[2**20] * 4)),
            False,
            "export pt2",
        ),
    ],
)
def test_what_is_not_in_order_is_named(saved: Path, change: Any, again: bool, what: str) -> None:
    change(saved)
    if again:
        rehash(saved)
    checks = verify(saved)
    assert what in failed(checks)
    assert all("\n" not in check.text for check in checks)


def test_quality_and_times_are_measured_again(saved: Path) -> None:
    edit(
        saved,
        "measurements.json",
        lambda m: m["compressed"].update(
            {"accuracy": 91.0, "kl": 0.02, "latency_kept": 0.7, "latency_kept@torch": 0.7}
        ),
    )
    edit(saved, "measurements.json", lambda m: m.update(compressed_test={"accuracy": 90.0, "accuracy_se": 0.4}))
    edit(saved, "measurements.json", lambda m: m["compressed"].update(peak_memory_mib=8.0, memory_kept=0.5))
    rehash(saved)
    unseen = [check for check in verify(saved) if check.ok is None]
    assert [check.what for check in unseen] == ["kl; accuracy; latency_kept; memory_kept; accuracy, test"]
    good = verify(
        saved,
        Net,
        measure=lambda m: {"accuracy": 91.0, "kl": 0.02, "accuracy_se": 0.5},
        test=lambda m: {"accuracy": 90.0},
        devices=lambda m: {"latency_kept@torch": 0.73, "peak_memory_mib": 8.1, "memory_kept": 0.51},
    )
    assert [check.what for check in good if not check.ok] == []
    assert {"accuracy, test", "memory_kept", "peak_memory_mib"} <= {check.what for check in good}
    lost = verify(saved, Net, test=lambda m: {"accuracy": 89.0}, devices=lambda m: {"peak_memory_mib": 9.5})
    assert failed(lost) == ["accuracy, test", "peak_memory_mib"]
    bad = verify(saved, Net, measure=lambda m: {"accuracy": 90.9}, devices=lambda m: {"latency_kept@torch": 0.9})
    assert failed(bad) == ["accuracy", "latency_kept@torch"]


def test_numbers_of_another_target_are_not_compared(saved: Path) -> None:
    """What a runtime needs is no fault of a model that was measured in another one; the check says which it was."""
    edit(saved, "measurements.json", lambda m: m["compressed"].update(peak_memory_mib=8.0, memory_kept=0.5))
    edit(saved, "measurements.json", lambda m: m["compressed"].update({"latency_kept": 0.7, "latency_kept@torch": 0.7}))
    edit(saved, "measurements.json", lambda m: m.update(memory_on="openvino"))
    rehash(saved)
    there = {"latency_kept@onnxruntime": 0.3, "peak_memory_mib@torch": 99.0, "memory_kept@torch": 0.9}
    checks = verify(saved, Net, devices=lambda m: there)
    assert failed(checks) == []
    (unseen,) = [check for check in checks if check.ok is None]
    assert "latency_kept; memory_kept" in unseen.what
    assert unseen.text.endswith("on what was measured then (--target): openvino, torch")
    there = {"latency_kept@torch": 0.3, "peak_memory_mib@openvino": 8.1, "memory_kept@openvino": 0.9}
    assert failed(verify(saved, Net, devices=lambda m: there)) == ["latency_kept@torch", "memory_kept@openvino"]


def test_memory_is_recorded_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first target that measures it, or torch; the processes themselves are those of test_peak_memory.py."""

    def held(self: TorchCpu, subject: Subject) -> Measurement:
        kib = sum(p.numel() for p in subject.module.parameters()) / 256
        return Measurement.of([[kib / 1024]] * 3, self.conditions(), unit="MiB")

    monkeypatch.setattr(TorchCpu, "peak_memory", held)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)).eval()
    data = torch.randn(48, 32)
    result = rankopt.search(dense, data[:1], calibration=data, limits=["macs<=60%"], trials=2)
    best = result.best()
    best.save(tmp_path / "without")
    best.save(tmp_path / "m", memory=True)
    assert "memory_kept" not in json.loads((tmp_path / "without" / "measurements.json").read_text())["compressed"]
    said = json.loads((tmp_path / "m" / "measurements.json").read_text())
    assert said["memory_on"] == "torch"
    assert said["conditions"]["torch"]["target"] == "torch"
    kept = said["compressed"]["params"] / said["dense"]["params"]
    assert said["compressed"]["memory_kept"] == pytest.approx(kept)
    assert said["dense"]["peak_memory_mib"] == pytest.approx(said["dense"]["params"] / 2**18)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| peak_memory_mib |" in card
    assert re.search(r"^Measured on torch: cpu, .*threads 1, float32", card, re.MULTILINE)
    again = [c for c in verify(tmp_path / "m", dense, devices=lambda m: {"memory_kept": kept}) if c.ok is None]
    assert [c.what for c in again] == ["kl"]
    replay = make("replay", {"ms_per_mmac": 1.0})
    assert memory_target([replay]).called == "torch"
    assert memory_target([replay, make("torch", {"threads": 2, "label": "mine"})]).called == "mine"


def test_without_the_dense_model(tmp_path: Path) -> None:
    dense, small, plan = net()
    example = ((torch.randn(2, 3, 8, 8),), {})
    saved = save(tmp_path / "x", small, plan, measurements={}, exports=["pt2"], example=example)
    checks = {check.what: check for check in verify(saved)}
    assert checks["plan fits the weights"].ok is None
    assert checks["export pt2"].ok is None
    assert failed(verify(saved, dense)) == []
    assert failed(verify(saved, nn.Linear(2, 2))) == ["plan fits the weights"]
    with pytest.raises(ArtifactError, match="is not a directory"):
        verify(tmp_path / "nothing")


def test_the_verb(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(saved)]) == 0
    assert "all that was checked is as stated" in capsys.readouterr().out
    flip(saved / "model.pt2")
    assert main(["verify", str(saved), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert [c["what"] for c in found["checks"] if c["ok"] is False] == ["file model.pt2"]
    assert main(["verify", str(saved), "--latency"]) == 2
    assert main(["verify", str(saved), "--memory"]) == 2
    capsys.readouterr()
    assert main(["verify", str(saved), "--target", "torch"]) == 2
    assert "--target: says where --latency and --memory measure again" in capsys.readouterr().err
    assert main(["verify", str(saved), "--model", "saved_models:Net", "--study", "x.yaml"]) == 2


# plans as files, and their differences -------------------------------------------------------------------------------


PLAN = Plan({"a": LayerChoice("svd", {"rank": 3}), "b": LayerChoice("dense")}, None, {"c": "shares its weight: b's"})


@pytest.mark.parametrize("name", ["p.json", "p.yaml", "sub/p.yml"])
def test_plans_as_files(tmp_path: Path, name: str) -> None:
    path = write_plan(PLAN, tmp_path / name)
    assert read_plan(path) == PLAN
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(PlanError, match="already exists"):
        write_plan(PLAN, path)
    write_plan(Plan({}), path, force=True)
    assert read_plan(path) == Plan({})


@pytest.mark.parametrize(
    "content",
    [
        "schema: 1\nlayers: {a: {method: svd, ranks: {rank: 0}}}",
        "schema: 1\nlayers: {}\nlayers: {}",
        "!!python/object/apply:os.system ['x']",
        "a: &a [*a]",
        "- 1",
        "",
        "schema: 1\nlayers: {a: {method: svd, ranks: {rank: .nan}}}",
        "\x00",
    ],
)
def test_plans_in_yaml_that_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(PlanError) as caught:
        read_plan(tmp_path / "p.yaml")
    assert "\n" not in caught.value.message


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Plan({"a": LayerChoice("svd", {"rank": 4}), "d": LayerChoice("cp", {"rank": 1})}, None, PLAN.skipped)
    a, b = write_plan(PLAN, tmp_path / "a.json"), write_plan(other, tmp_path / "b.yaml")
    found = diff(a, b)
    assert found.layers == {
        "a": ("svd(rank=3)", "svd(rank=4)"),
        "b": ("dense", "not named (dense)"),
        "d": ("not named (dense)", "cp(rank=1)"),
    }
    assert found.same == 1
    assert diff(a, a).layers == {}
    assert main(["diff", str(a), str(b)]) == 1
    assert "a: svd(rank=3) → svd(rank=4)" in capsys.readouterr().out
    assert main(["diff", str(a), str(a), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == {}
    assert main(["diff", str(a), str(tmp_path / "none.json")]) == 2


def test_diff_of_saved_models(tmp_path: Path) -> None:
    a, b = saved_net(tmp_path / "a", exports=()), saved_net(tmp_path / "b", exports=())
    found = diff(a, b)
    assert not found.layers
    assert found.measurements["macs"][0] == found.measurements["macs"][1] > 0
    edit(b, "plan.json", lambda p: p["fingerprint"].update(weights="x"))
    rehash(b)
    assert "made for different weights" in diff(a, b).model
    edit(b, "plan.json", lambda p: p["fingerprint"].update(architecture="y"))
    rehash(b)
    assert "made for different architectures" in diff(a, b).model
