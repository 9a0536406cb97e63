from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import EveryLayer, Net, every_layer, net, saved_net
from torch import Tensor, nn

import rankopt
from rankopt.artifact import load, save
from rankopt.decompositions import table
from rankopt.errors import ArtifactError, InputError
from rankopt.exporting import BATCHES, TOLERANCE, export
from rankopt.exports import FORMATS, exporter
from rankopt.exports.executorch import ExecuTorch
from rankopt.manifest import Manifest
from rankopt.plan import LayerChoice, Plan
from rankopt.testing import GEOMETRIES, MATRICES

pytestmark = pytest.mark.timeout(600)  # thirty layers in three formats are one export, in the setup of a single test
# methods of layers that are in no such model; those are exported in test_capsules.py and test_attention_search.py
PLAIN = [name for name in table() if not name.startswith(("caps_", "attention_"))]
HERE = [name for name, one in FORMATS.items() if one.missing() is None]


def outputs(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


# every decomposition and kind of layer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, tuple[Tensor, ...]]:
    _, small, plan, inputs = every_layer()
    formats = [name for name in ("onnx", "pt2", "openvino") if name in HERE]
    directory = tmp_path_factory.mktemp("every") / "layer"
    save(directory, small, plan, measurements={}, exports=formats, example=(inputs, {}))
    return directory, small, inputs


def test_all_methods_and_kinds_are_there(everything: tuple[Path, nn.Module, tuple[Tensor, ...]]) -> None:
    names = [name for name, _ in everything[1].branches.named_children()]  # type: ignore[union-attr]
    assert {name for name in table() if any(n.endswith(f"_{name}") for n in names)} == set(PLAIN)
    assert len(names) >= 30


def test_reloading_is_exact(everything: tuple[Path, nn.Module, tuple[Tensor, ...]]) -> None:
    directory, small, inputs = everything
    back = load(directory, EveryLayer)
    expected = small.state_dict()
    assert list(back.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in back.state_dict().items())
    with torch.no_grad():
        for a, b in zip(small(*inputs), back(*inputs), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["onnx", "pt2", "openvino"])
def test_exports_of_every_layer(name: str, everything: tuple[Path, nn.Module, tuple[Tensor, ...]]) -> None:
    """The runtimes are called here by themselves, not by rankopt's own check."""
    if name not in HERE:
        pytest.skip(f"{name}: {exporter(name).missing()}")
    directory, small, inputs = everything
    generator = torch.Generator().manual_seed(7)
    for batch in (1, 3, 17):
        given = [torch.randn(batch, *x.shape[1:], generator=generator) for x in inputs]
        with torch.no_grad():
            expected = small(*given)
        arrays = [x.numpy() for x in given]
        if name == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
            found = session.run(None, dict(zip([i.name for i in session.get_inputs()], arrays, strict=True)))
        elif name == "openvino":
            from rankopt.targets.openvino import core

            ready = core().compile_model(directory / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            result = ready(arrays)
            found = [result[o] for o in ready.outputs]
        else:
            found = load(directory, standalone=True)(*given)
        assert len(found) == len(expected)
        for a, b in zip(expected, found, strict=True):
            assert a.shape == tuple(b.shape)
            assert float((a - torch.as_tensor(b)).abs().max()) <= TOLERANCE * float(a.abs().max())


def test_what_is_stated(everything: tuple[Path, nn.Module, tuple[Tensor, ...]]) -> None:
    directory, small, inputs = everything
    for name, record in Manifest.read(directory).exports.items():
        assert record["bytes"] == sum((directory / f).stat().st_size for f in record["files"])
        assert record["macs"] == rankopt.count(small, inputs).macs
        assert record["batches"] == list(BATCHES)
        assert record["any_batch"]
        assert 0 <= record["difference"] <= record["tolerance"] == TOLERANCE
        assert exporter(name).runtime() == record["checked_with"]
    onnx = pytest.importorskip("onnx")
    model = onnx.load(directory / "model.onnx")
    assert [o.version for o in model.opset_import if o.domain == ""] == [
        Manifest.read(directory).exports["onnx"]["opset"]
    ]
    assert {i.type.tensor_type.shape.dim[0].dim_param for i in model.graph.input} == {"batch"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "pt2", "openvino"])
@pytest.mark.parametrize("method", PLAIN)
def test_the_whole_matrix_of_geometries(name: str, method: str, tmp_path: Path) -> None:
    if name not in HERE:
        pytest.skip(f"{name}: {exporter(name).missing()}")
    from rankopt.layers import fingerprint, static_layers
    from rankopt.surgery import apply

    seen = fitting = 0
    linears = [g for g in MATRICES if g not in GEOMETRIES and isinstance(g.make(), nn.Linear)]
    for geometry in (*GEOMETRIES, *linears):
        dense = nn.Sequential(geometry.make(), nn.Tanh()).eval()
        (layer,) = static_layers(dense)
        way = table()[method]
        if way.why_not(layer) is not None or layer.dtype != "float32" or 0 in geometry.shape:
            continue
        if name == "openvino" and getattr(dense[0], "padding_mode", "") == "circular":
            continue  # see test_what_openvino_lacks_is_named
        fitting += 1
        choice = LayerChoice(method, {k: max(1, v // 2) for k, v in way.rank_bounds(layer).items()})
        plan = Plan({layer.name: choice}, fingerprint(dense))
        try:
            small = apply(dense, plan)
        except rankopt.RankoptError:  # cp refuses some ranks
            continue
        x = torch.randn(geometry.shape)
        directory = save(tmp_path / f"{seen}", small, plan, measurements={}, exports=[name], example=((x,), {}))
        assert torch.equal(load(directory, dense)(x), small(x))
        seen += 1
    assert seen >= min(3, fitting) > 0  # some take few of these layers


# the artifact ---------------------------------------------------------------------------------------------------------


def test_standalone_needs_nothing_of_the_users(tmp_path: Path) -> None:
    saved_net(tmp_path / "net")
    _, small, _ = net()
    x = torch.randn(5, 3, 8, 8)
    torch.save((x, small(x)), tmp_path / "x.pt")
    code = (
        "import sys, torch, rankopt\n"
        "x, y = torch.load('x.pt', weights_only=True)\n"
        "model = rankopt.load('net', standalone=True)\n"
        "assert 'saved_models' not in sys.modules\n"
        "print(float((model(x) - y).abs().max()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(Path(rankopt.__file__).parent.parent), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    assert float(done.stdout) < 1e-5


def test_the_program_is_one_that_torch_reads(tmp_path: Path) -> None:
    directory = saved_net(tmp_path / "net")
    program = torch.export.load(directory / "model.pt2")
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), net()[1](x), rtol=1e-4, atol=1e-5)
    text = (directory / "model.pt2").read_bytes()
    assert str(Path(__file__).parent).encode() not in text  # nothing of where the sources lie
    assert b"stack_trace" not in text


def test_the_card_says_how_to_load_it_alone(tmp_path: Path) -> None:
    directory = saved_net(tmp_path / "net")
    card = (directory / "README.md").read_text()
    assert "| pt2 | model.pt2 |" in card
    assert 'rankopt.load("net", standalone=True)' in card


def test_standalone_where_there_is_no_program(tmp_path: Path) -> None:
    directory = saved_net(tmp_path / "net", exports=())
    with pytest.raises(ArtifactError, match=r"holds no exported program; write it with --export pt2"):
        load(directory, standalone=True)
    with pytest.raises(ArtifactError, match="needs no model"):
        load(directory, Net, standalone=True)


def test_exports_need_an_example(tmp_path: Path) -> None:
    _, small, plan = net()
    with pytest.raises(ArtifactError, match="need an example input"):
        save(tmp_path / "x", small, plan, measurements={}, exports=["pt2"])
    assert list(tmp_path.iterdir()) == []


# the function ---------------------------------------------------------------------------------------------------------


def test_the_model_is_not_changed_and_files_are_not_replaced(tmp_path: Path) -> None:
    model = net()[1].train()
    before = copy.deepcopy(model.state_dict())
    found = export(model, tmp_path / "out", ["pt2"], torch.randn(1, 3, 8, 8))
    assert found["pt2"]["folded"] == {"batch norm": 1}
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.pt2"]
    with pytest.raises(ArtifactError, match=r"model\.pt2: already exists"):
        export(model, tmp_path / "out", ["pt2"], torch.randn(1, 3, 8, 8))
    export(model, tmp_path / "out", ["pt2"], torch.randn(1, 3, 8, 8), force=True)
    with pytest.raises(InputError, match=r"export 'torchscript': is not known; known: onnx, pt2, openvino, executorch"):
        export(model, tmp_path / "none", ["torchscript"], torch.randn(1, 3, 8, 8))
    assert not (tmp_path / "none").exists()


def test_executorch_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "executorch" else known(name))
    with pytest.raises(InputError, match="export executorch: needs the package executorch; pip install executorch"):
        export(net()[1], tmp_path / "out", ["executorch"], torch.randn(1, 3, 8, 8))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(ExecuTorch().missing() is not None, reason="executorch is not installed")
def test_executorch(tmp_path: Path) -> None:
    found = export(net()[1], tmp_path, ["executorch"], torch.randn(1, 3, 8, 8))
    assert found["executorch"]["backend"] == "XNNPACK"


class Named(nn.Module):
    """Two named inputs, one that is no tensor, and an output of a class of its own that holds one that is none."""

    class Output(dict):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Any:
        x = self.table(tokens)
        x = x if mask is None else x * mask[..., None].float()
        return Named.Output(logits=self.head(x) * scale, hidden=(x, x.mean(1)), cache=object(), none=None)


@pytest.mark.parametrize("name", [n for n in HERE if n != "executorch"])
def test_keyword_inputs_and_outputs_of_a_class(name: str, tmp_path: Path) -> None:
    model = Named().eval()
    kwargs = {"tokens": torch.randint(0, 11, (2, 7)), "mask": torch.ones(2, 7, dtype=torch.int64), "scale": 2.0}
    found = export(model, tmp_path, [name], (), kwargs)
    assert found[name]["difference"] <= TOLERANCE
    if "inputs" in found[name]:
        assert found[name]["inputs"] == ["tokens", "mask"]


class OnlyOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1) @ torch.ones(x.numel() if x.shape[0] == 1 else 48, 2)


def test_a_fixed_batch_size_is_stated(tmp_path: Path) -> None:
    found = export(OnlyOne(), tmp_path, ["pt2"], torch.randn(1, 3, 16))
    assert found["pt2"]["batches"] == [1]
    assert not found["pt2"]["any_batch"]
    assert found["pt2"]["fixed_because"]


# who is to blame ---------------------------------------------------------------------------------------------------


class Choosy(nn.Module):
    """Can't be traced: what it computes depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x.cos()


class Deep(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), odd)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_layer_that_can_not_be_traced_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"export: layer blocks\.1\.1 \(Choosy\): torch\.export: ") as caught:
        export(Deep(Choosy()), tmp_path / "x", ["pt2"], torch.randn(2, 4))
    assert "\n" not in caught.value.message
    assert not list((tmp_path / "x").iterdir())


class Drifting(nn.Module):
    """Every call gives something else, so no export can be equal."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_a_layer_that_computes_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"export pt2: layer blocks\.1\.1 \(Drifting\): computes something else"):
        export(Deep(Drifting()), tmp_path / "x", ["pt2"], torch.randn(2, 4))


class Complex(nn.Module):
    """Traced, but not among what ONNX has."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


@pytest.mark.slow
@pytest.mark.skipif("onnx" not in HERE, reason="onnx is not installed")
def test_a_layer_that_a_format_can_not_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"export onnx: layer blocks\.1\.1 \(Complex\): ") as caught:
        export(Deep(Complex()), tmp_path / "x", ["onnx"], torch.randn(2, 4, 4))
    assert "\n" not in caught.value.message


@pytest.mark.skipif("openvino" not in HERE, reason="openvino is not installed")
def test_what_openvino_lacks_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"))
    with pytest.raises(
        InputError, match=r"export openvino: layer 1 \(Conv2d\): RuntimeError: Unsupported padding mode"
    ):
        export(model, tmp_path / "x", ["openvino"], torch.randn(2, 4, 6, 6))


def test_a_failed_export_leaves_no_artifact(tmp_path: Path) -> None:
    model = Deep(Drifting())
    with pytest.raises(InputError, match="Drifting"):
        save(tmp_path / "x", model, Plan({}), measurements={}, exports=["pt2"], example=((torch.randn(2, 4),), {}))
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_lists_everything(tmp_path: Path) -> None:
    directory = saved_net(tmp_path / "net")
    names = {p.name for p in directory.iterdir()} - {"manifest.json"}
    assert set(json.loads((directory / "manifest.json").read_text())["files"]) == names
