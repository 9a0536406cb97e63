import json
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from saved_models import rehash
from torch import Tensor, nn

from rankopt.artifact import load, read_measurements, save
from rankopt.decompositions import method
from rankopt.errors import ArtifactError, PlanError
from rankopt.layers import fingerprint
from rankopt.plan import LayerChoice, Plan
from rankopt.surgery import apply

torch.set_num_threads(1)


class Net(nn.Module):
    """Tied parameters, a shared module, buffers of several kinds, a buffer that is a view of another."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(width, 6)
        self.again = self.fc
        self.emb, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
        self.head.weight = self.emb.weight
        table = torch.arange(12.0)
        self.register_buffer("table", table)
        self.register_buffer("part", table[3:7])
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.bf = nn.Linear(6, 6, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        x = self.bf(self.fc(x).bfloat16()).float()
        return self.head(x) + self.table[:5]


def make_net() -> Net:
    return Net()


def unclear():  # type: ignore[no-untyped-def]
    return Net()


def wrong() -> int:
    return 3


def breaks() -> nn.Module:
    raise RuntimeError("no weights\nhere")


PLAN_LAYERS = {
    "conv": LayerChoice("svd", {"rank": 3}),
    "fc": LayerChoice("svd", {"rank": 2}),
    "bf": LayerChoice("svd", {"rank": 4}),
}
MEASURED = {"dense": {"accuracy": 91.0, "macs": 1234567}, "compressed": {"accuracy": 90.6, "macs": 400000}}


def compressed() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    dense = Net()
    plan = Plan(PLAN_LAYERS, fingerprint(dense))
    model = apply(dense, plan)
    model.train()(torch.randn(4, 3, 6, 6))  # BatchNorm's statistics are no longer those of a new model
    return model, plan


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, plan = compressed()
    return save(tmp_path / "small", model, plan, measurements=MEASURED, source=f"{__name__}:Net")


@pytest.mark.parametrize(
    "given", [Net, make_net, Net(), f"{__name__}:make_net", f"{__name__}:unclear", None, lambda: Net()]
)
def test_round_trip_is_exact(saved: Path, given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("loading must not decompose or unpickle")

    for name in ("factorize", "stage_weights"):
        monkeypatch.setattr(type(method("svd")), name, never)
    monkeypatch.setattr(torch, "load", never)
    model: Any = compressed_without_patches
    back: Any = load(saved, given)
    expected = model.state_dict()
    assert list(back.state_dict()) == list(expected)
    for name, value in back.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name])
    assert not any(m.training for m in back.modules())
    assert back.head.weight is back.emb.weight
    assert back.fc is back.again
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(back(x), model.eval()(x))


compressed_without_patches = compressed()[0]


def test_the_given_dense_model_is_not_changed(saved: Path) -> None:
    dense = Net()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    load(saved, dense)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert dense.training


def test_files(saved: Path) -> None:
    names = {p.name for p in saved.iterdir()}
    assert names == {"plan.json", "model.safetensors", "measurements.json", "environment.json", "README.md"} | {
        "manifest.json"
    }
    assert list(saved.parent.iterdir()) == [saved]
    assert Plan.load(saved).layers == PLAN_LAYERS
    assert read_measurements(saved) == MEASURED
    record = json.loads((saved / "environment.json").read_text())
    assert record["torch"] == torch.__version__
    assert {"rankopt", "python", "platform", "processor", "source", "schema"} <= set(record)
    card = (saved / "README.md").read_text()
    assert "| accuracy | 91 | 90.6 |" in card
    assert "| macs | 1,234,567 | 400,000 |" in card
    assert 'load("small")' in card
    assert str(saved.parent) not in card


def test_the_models_own_code_in_the_card_runs(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (saved / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(saved.parent)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert isinstance(scope["model"], Net)


@dataclass
class Measured:
    value: float
    unit: str


def test_measurements_of_several_forms(tmp_path: Path) -> None:
    model, plan = compressed()
    given = {
        "dense": {"latency": Measured(4.25, "ms"), "kl": float("nan")},
        "compressed": {"latency": {"value": torch.tensor(2.5), "unit": "ms"}, "a|b": "x"},
        "front": [(1, 2.0), None, True],
    }
    directory = save(tmp_path / "m", model, plan, measurements=given)
    back = read_measurements(directory)
    assert back["dense"] == {"latency": {"value": 4.25, "unit": "ms"}, "kl": None}
    assert back["front"] == [[1, 2.0], None, True]
    card = (directory / "README.md").read_text()
    assert "| latency | 4.25 ms | 2.5 ms |" in card
    assert "model=YourDenseModel()" in card
    save(tmp_path / "none", model, plan, measurements={})
    with pytest.raises(ArtifactError, match=r"measurements.dense.x: needs numbers"):
        save(tmp_path / "bad", model, plan, measurements={"dense": {"x": object()}})
    assert not (tmp_path / "bad").exists()


# where to ----------------------------------------------------------------------------------------------------------


def test_an_existing_directory(saved: Path, tmp_path: Path) -> None:
    model, plan = compressed()
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="already exists"):
        save(saved, model, plan, measurements={})
    with torch.no_grad():
        model.get_parameter("conv.0.weight").add_(1)
    save(saved, model, plan, measurements={}, force=True)
    assert (saved / "model.safetensors").read_bytes() != before
    assert list(tmp_path.iterdir()) == [saved]
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="holds no saved model, so force does not replace it"):
        save(precious, model, plan, measurements={}, force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="holds no saved model"):
        save(tmp_path / "file", model, plan, measurements={}, force=True)
    with pytest.raises(ArtifactError, match="can't be written"):
        save(tmp_path / "file" / "below", model, plan, measurements={})


def test_nothing_is_left_after_a_failure(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = compressed()
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankopt.artifact.write_tensors", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        save(saved, model, plan, measurements={}, force=True)
    monkeypatch.undo()
    renamed = os.rename
    monkeypatch.setattr(
        os, "rename", lambda a, b: full() if Path(b) == saved and ".old" not in str(a) else renamed(a, b)
    )
    with pytest.raises(ArtifactError, match="No space"):
        save(saved, model, plan, measurements={}, force=True)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert list(tmp_path.iterdir()) == [saved]


def test_models_that_the_plan_did_not_make(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="conv: the plan says"):
        save(tmp_path / "x", Net(), Plan(PLAN_LAYERS), measurements={})
    with pytest.raises(ArtifactError, match="gone: the plan says"):
        save(tmp_path / "x", Net(), Plan({"gone": PLAN_LAYERS["fc"]}), measurements={})


class Extra(nn.Module):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(Extra()), "0._extra_state: is a dict"),
        (nn.Linear(2, 2).to("meta"), "weight: is on the meta device"),
    ],
)
def test_values_that_can_not_be_saved(tmp_path: Path, model: nn.Module, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        save(tmp_path / "x", model, Plan({}), measurements={})
    assert list(tmp_path.iterdir()) == []


def test_a_lone_layer(tmp_path: Path) -> None:
    layer = nn.Linear(6, 5)
    plan = Plan({"": LayerChoice("svd", {"rank": 2})}, fingerprint(layer))
    model = apply(layer, plan)
    save(tmp_path / "x", model, plan, measurements={})
    x = torch.randn(2, 6)
    assert torch.equal(load(tmp_path / "x", lambda: nn.Linear(6, 5))(x), model(x))


# the dense model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: 3, "must make a torch.nn.Module, got int"),
        (breaks, "breaks did not make the dense model: RuntimeError: no weights;"),
        (nn.Linear, "Linear did not make the dense model: TypeError"),
        (3, "must be a module or a callable"),
        ("nowhere.at_all:Net", "can't be imported: ModuleNotFoundError"),
        (f"{__name__}:Nothing", "can't be imported: AttributeError"),
        ("model.py:Net/../x", "needs package.module:Name"),
        ("/etc/model.py", "needs package.module:Name"),
    ],
)
def test_dense_models_that_are_none(saved: Path, given: Any, says: str) -> None:
    with pytest.raises(ArtifactError, match=says) as caught:
        load(saved, given)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "source", ["/tmp/evil.py:Net", "evil.py", "a b:c", "os:system()", "..x:Y", "x:", ":x", "x:y:z", "x:y\n", 3, ["a"]]
)
def test_recorded_sources_are_addresses_only(saved: Path, source: Any) -> None:
    record = json.loads((saved / "environment.json").read_text())
    (saved / "environment.json").write_text(json.dumps({**record, "source": source}))
    rehash(saved)
    with pytest.raises(ArtifactError, match="pass model="):
        load(saved)
    with pytest.raises(ArtifactError, match=r"needs package\.module:Name"):
        save(saved.parent / "y", nn.Linear(2, 2), Plan({}), measurements={}, source=source)


@pytest.mark.parametrize(
    "source",
    ["os:getcwd", "os:system", f"{__name__}:unclear", f"{__name__}:wrong", f"{__name__}:PLAN_LAYERS", "no.such:Net"],
)
def test_recorded_sources_are_modules_only(saved: Path, source: str) -> None:
    record = json.loads((saved / "environment.json").read_text())
    (saved / "environment.json").write_text(json.dumps({**record, "source": source}))
    rehash(saved)
    with pytest.raises(ArtifactError, match="pass model="):
        load(saved)
    (saved / "environment.json").write_text(json.dumps({**record, "source": f"{__name__}:make_net"}))
    rehash(saved)
    assert isinstance(load(saved), Net)


def test_annotations_written_as_text(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("a_zoo_of_models")
    exec("from __future__ import annotations\ndef net() -> Net: return Net()\ndef lost() -> Gone: ...", vars(module))
    vars(module)["Net"] = Net
    monkeypatch.setitem(sys.modules, "a_zoo_of_models", module)
    record = json.loads((saved / "environment.json").read_text())
    (saved / "environment.json").write_text(json.dumps({**record, "source": "a_zoo_of_models:net"}))
    rehash(saved)
    assert isinstance(load(saved), Net)
    (saved / "environment.json").write_text(json.dumps({**record, "source": "a_zoo_of_models:lost"}))
    rehash(saved)
    with pytest.raises(ArtifactError, match=r"neither an nn\.Module class nor"):
        load(saved)


def test_no_source(tmp_path: Path) -> None:
    model, plan = compressed()
    save(tmp_path / "x", model, plan, measurements={})
    with pytest.raises(ArtifactError, match=r"records no source.*pass model="):
        load(tmp_path / "x")
    load(tmp_path / "x", Net)


def test_another_architecture(saved: Path) -> None:
    with pytest.raises(PlanError, match="another architecture"):
        load(saved, lambda: Net(16))


def test_a_dense_model_without_memory(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="is on the meta device"):
        load(saved, Net().to("meta"))


# damage --------------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Any) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, m: t.pop("bn.running_mean"), "lacks bn.running_mean"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "holds extra, which the model does not have"),
        (
            lambda t, m: t.update({"fc.0.weight": torch.zeros(3, 8)}),
            r"fc.0.weight needs the shape \(2, 8\), got \(3, 8\)",
        ),
        (lambda t, m: t.update({"fc.0.weight": torch.zeros(2, 8).half()}), "fc.0.weight needs the dtype torch.float32"),
        (lambda t, m: m.update(aliases="{"), "table of shared tensors"),
        (lambda t, m: m.update(aliases='{"head.weight": 3}'), "table of shared tensors"),
        (lambda t, m: m.update(aliases="[" * 100_000), "table of shared tensors"),
        (lambda t, m: m.update(aliases="{}"), "lacks "),
        (lambda t, m: m.update(aliases=json.dumps({**json.loads(m["aliases"]), "x": "table"})), "holds x"),
    ],
)
def test_entries_that_do_not_fit(saved: Path, change: Any, says: str) -> None:
    rewrite(saved / "model.safetensors", change)
    rehash(saved)
    with pytest.raises(ArtifactError, match=says) as caught:
        load(saved)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "content",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:5],
        lambda b: b"",
        lambda b: struct.pack("<Q", 2**62) + b[8:],
        lambda b: struct.pack("<Q", 10) + b'{"a":[[[[[' + b[18:],
        lambda b: b + b"more",
        lambda b: b"\x80\x04" + b[2:],
    ],
    ids=["half", "five bytes", "empty", "huge header", "broken header", "trailing bytes", "pickle"],
)
def test_damaged_tensors(saved: Path, content: Any) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    rehash(saved)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: is damaged") as caught:
        load(saved)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"source": ' + b"1" * 10_000 + b"}"]
)
@pytest.mark.parametrize("name", ["plan.json", "environment.json"])
def test_damaged_json(saved: Path, name: str, content: bytes) -> None:
    (saved / name).write_bytes(content)
    rehash(saved)
    with pytest.raises(ArtifactError, match=name) as caught:
        load(saved)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["plan.json", "environment.json", "model.safetensors"])
def test_missing_files(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: can't be read: No such file"):
        load(saved)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a directory"):
        load(tmp_path / "nothing", Net)
