"""Models of timm with random weights: layers found, a uniform plan applied, saved, loaded, verified, exported.

timm's data part imports torchvision, which its models need for nothing; where it can't be imported, an empty stand-in
takes its place while timm is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt.artifact import save
from rankopt.cost import count, other_macs, plan_cost
from rankopt.decompositions import method
from rankopt.exports import exporter
from rankopt.layers import LayerSpec, find_layers, fingerprint
from rankopt.manifest import Manifest
from rankopt.plan import LayerChoice, Plan
from rankopt.verify import verify


class _Named(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Empty(ModuleType):
    """A module in which every name is a class."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class _Finder:
    """Finds torchvision and everything below it."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


@contextmanager
def torchvision_or_nothing() -> Iterator[None]:
    try:
        importlib.import_module("torchvision")
        yield
        return
    except (ImportError, RuntimeError):  # it is not there, or another torch's
        pass
    finder: Any = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]


if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)
with torchvision_or_nothing():
    timm = importlib.import_module("timm")

MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 64},
}
SIZE = 64
LARGE = ("resnet18", "convnext_atto")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=7, **MODELS[name])
    with torch.no_grad():
        for module in model.modules():  # as if trained: statistics that are not 0 and 1
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


def half(layer: LayerSpec, number: int) -> LayerChoice | None:
    """A method that fits, at half of its ranks, and cheaper than the layer."""
    names = [n for n in ("tucker2", "spatial_svd", "svd", "tensor_train") if method(n).why_not(layer) is None]
    for name in names[number % max(len(names), 1) :] + names:
        ranks = {rank: max(1, bound // 3) for rank, bound in method(name).rank_bounds(layer).items()}
        if method(name).macs(layer, ranks) < layer.macs:
            return LayerChoice(name, ranks)
    return None


def plan_for(model: nn.Module, x: Tensor) -> Plan:
    found = find_layers(model, x)
    free = [la for la in found if la.skip is None]
    choices = {la.name: c for n, la in enumerate(free) if (c := half(la, n)) is not None}
    return Plan(choices, fingerprint(model, found), {la.name: la.skip for la in found if la.skip})


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in MODELS])
def made(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor]:
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return request.param, make(request.param), x


def test_layers_are_found_counted_and_decomposed(made: tuple[str, nn.Module, Tensor]) -> None:
    _, model, x = made
    found = find_layers(model, x)
    leaves = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [layer.name for layer in found] == leaves
    plan = plan_for(model, x)
    assert len(plan.changed()) >= len([la for la in found if la.skip is None]) - 16
    small = rankopt.apply(model, plan)
    assert type(small) is type(model)
    whole = count(model, x)
    assert plan_cost(found, plan, whole.params, other_macs(whole, found)) == count(small, x)
    assert count(small, x).macs < whole.macs
    full = {
        la.name: LayerChoice("svd", method("svd").rank_bounds(la))
        for la in found
        if la.skip is None and method("svd").why_not(la) is None
    }
    same = rankopt.apply(model, Plan(full, fingerprint(model, found)))
    with torch.no_grad():
        torch.testing.assert_close(same(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("formats", [["pt2"], pytest.param(["onnx", "openvino"], marks=pytest.mark.slow)])
def test_compressed_saved_loaded_verified_and_exported(
    made: tuple[str, nn.Module, Tensor], formats: list[str], tmp_path: Path
) -> None:
    name, model, x = made
    plan = plan_for(model, x)
    small = rankopt.apply(model, plan)
    formats = [f for f in formats if exporter(f).missing() is None]
    directory = save(tmp_path / "m", small, plan, measurements={}, exports=formats, example=((x,), {}))
    assert set(Manifest.read(directory).exports) == set(formats)
    assert all(record["any_batch"] for record in Manifest.read(directory).exports.values())
    back = rankopt.load(directory, make(name))
    with torch.no_grad():
        expected = small(x)
        assert torch.equal(back(x), expected)
        if formats == ["pt2"]:
            torch.testing.assert_close(rankopt.load(directory, standalone=True)(x), expected, rtol=1e-3, atol=1e-4)
    checks = verify(directory, make(name), call=((x,), {}))
    assert all(check.ok is not False for check in checks), [c for c in checks if c.ok is False]


@pytest.mark.slow
@pytest.mark.timeout(900)  # eleven million parameters in ResNet-18
def test_a_search(made: tuple[str, nn.Module, Tensor]) -> None:
    _, model, x = made
    images = torch.randn(48, 3, SIZE, SIZE)
    space = {"methods": ["svd", "spatial_svd", "tucker2"], "keep": [0.25, 0.5, 0.75]}
    result = rankopt.search(model, x[:1], calibration=images, limits=["macs<=70%"], trials=3, space=space)
    best = result.best()
    assert float(best.measurements["macs_kept"] or 1) <= 0.7
    assert type(best.build()) is type(model)


def test_from_a_directory_on_disk(tmp_path: Path) -> None:
    name = "mobilenetv3_small_050"
    model = make(name)
    timm.models.save_for_hf(model, tmp_path / "hf")
    read = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True).eval()
    x = torch.randn(2, 3, SIZE, SIZE)
    plan = plan_for(model, x)
    with torch.no_grad():
        assert torch.equal(rankopt.apply(read, plan)(x), rankopt.apply(model, plan)(x))
