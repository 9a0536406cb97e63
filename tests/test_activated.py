"""Chains with an activation between their stages: equal to the linear ones at first, and right when they are not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankopt
from rankopt import artifact
from rankopt.batches import as_batches
from rankopt.chains import balance, chains, merged
from rankopt.decompositions import method, table
from rankopt.errors import InputError, LayerError, PlanError
from rankopt.factors import Factors
from rankopt.iterated import compress
from rankopt.layers import find_layers
from rankopt.nn.slopes import Slopes
from rankopt.plan import LayerChoice, Plan
from rankopt.recover import recover
from rankopt.refit import Refit, RefitOptions
from rankopt.study_file import load_study
from rankopt.surgery import apply
from rankopt.testing import GEOMETRIES, DecompositionContract, specify

ACTIVATED = ("svd_act", "spatial_svd_act", "tucker2_act", "cp_act")


class TestSvdAct(DecompositionContract):
    method = "svd_act"


class TestSpatialSvdAct(DecompositionContract):
    method = "spatial_svd_act"


class TestTucker2Act(DecompositionContract):
    method = "tucker2_act"
    geometries = GEOMETRIES[::2]  # the rest is the linear method's


class TestCpAct(DecompositionContract):
    method = "cp_act"
    geometries = GEOMETRIES[::2]


class Net(nn.Module):
    """Convolutions, one of them pointwise, and a linear layer on positions: for (n, 3, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.c, self.fc = nn.Conv2d(8, 6, 3, stride=2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.fc(x.flatten(2).transpose(1, 2)).mean(1)


PLAN = Plan(
    {
        "a": LayerChoice("spatial_svd_act", {"rank": 5}),
        "b": LayerChoice("svd_act", {"rank": 8}),
        "c": LayerChoice("tucker2_act", {"rank_out": 4, "rank_in": 3}),
        "fc": LayerChoice("svd_act", {"rank": 3}),
    }
)
LINEAR = Plan({n: LayerChoice(c.method.removesuffix("_act"), c.ranks) for n, c in PLAN.layers.items()})


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def inputs(n: int = 40) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def moved(model: nn.Module) -> nn.Module:
    """With slopes anywhere between −1 and 2."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Slopes):
                module.weight.copy_(3 * torch.rand(module.weight.shape, generator=generator) - 1)
    return model


def test_the_start_is_the_linear_factorization_to_the_last_bit(net: nn.Module) -> None:
    bent, straight = apply(net, PLAN), apply(net, LINEAR)
    for x in (inputs(), inputs(1), inputs(0), inputs().to(memory_format=torch.channels_last)):
        with torch.no_grad():
            assert torch.equal(bent(x), straight(x))


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (nn.Linear(6, 5), [(6,), (0, 6), (4, 6), (2, 3, 6), (2, 3, 4, 6)]),
        (nn.Conv1d(6, 4, 3, groups=2), [(6, 7), (2, 6, 7)]),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), [(4, 3, 3), (2, 4, 3, 3)]),
        (nn.Conv3d(3, 4, 2), [(3, 3, 3, 3), (2, 3, 3, 3, 3)]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_slopes_against_torch(layer: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    """nn.PReLU with the channels brought where it wants them."""
    spec = specify(layer, torch.randn(shapes[-1]))
    built = moved(apply(nn.Sequential(layer), Plan({"0": LayerChoice("svd_act", {"rank": 2})})))
    first, slopes, last = built[0]  # type: ignore[index]
    reference = nn.PReLU(len(slopes.weight))
    reference.weight = slopes.weight
    for shape in shapes:
        x = torch.randn(shape)
        z = first(x)
        if spec.dims == 0:
            between = reference(z.reshape(-1, z.shape[-1])).reshape(z.shape)
        else:
            between = reference(z if z.dim() == spec.dims + 2 else z[None]).reshape(z.shape)
        assert torch.equal(built(x), last(between))


@pytest.mark.parametrize("name", ACTIVATED)
def test_costs(name: str) -> None:
    """The MACs of the linear twin, its parameters and a slope a channel; the built model is what was counted."""
    model, x = nn.Sequential(nn.Conv2d(8, 6, 3)), torch.randn(1, 8, 7, 7)
    (layer,) = find_layers(model, x)
    way, twin = table()[name], table()[name.removesuffix("_act")]
    ranks = {n: max(1, bound // 2) for n, bound in way.rank_bounds(layer).items()}
    built = apply(model, Plan({"0": LayerChoice(name, ranks)}))
    counted = rankopt.count(built, x)
    slopes = sum(m.weight.numel() for m in built.modules() if isinstance(m, Slopes))
    assert counted.macs == way.macs(layer, ranks) == twin.macs(layer, ranks)
    assert counted.params == way.params(layer, ranks) == twin.params(layer, ranks) + slopes
    assert slopes > 0
    assert rankopt.cost.count_thop(built, x).macs == counted.macs


def test_factors_are_shared_with_the_linear_twin(net: nn.Module) -> None:
    (layer, *_) = find_layers(net, inputs(1))
    factors = Factors(net)
    factors(layer, LayerChoice("cp_act", {"rank": 3}))
    bent, straight = (factors(layer, LayerChoice(name, {"rank": 3})) for name in ("cp_act", "cp"))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(bent, straight, strict=True))


def test_slopes_are_saved_and_loaded(net: nn.Module, tmp_path: Path) -> None:
    small = moved(apply(net, PLAN))
    artifact.save(tmp_path / "saved", small, PLAN, measurements={})
    back = artifact.load(tmp_path / "saved", Net)
    assert list(back.state_dict()) == list(small.state_dict())
    assert torch.equal(back(inputs()), small(inputs()))
    assert not torch.equal(back(inputs()), apply(net, LINEAR)(inputs()))


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_exports_keep_the_activation(net: nn.Module, name: str, tmp_path: Path) -> None:
    """Pointwise pairs go into one layer where nothing is between them, and not across slopes."""
    if name == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    x = inputs(3)
    small = moved(apply(net, PLAN))
    record = rankopt.export(small, tmp_path / "bent", [name], x)[name]
    straight = rankopt.export(apply(net, LINEAR), tmp_path / "straight", [name], x)[name]
    assert straight["folded"]["pointwise pair"] == 2  # b and fc, at large ranks
    assert "pointwise pair" not in record["folded"]
    assert record["macs"] == rankopt.count(small, x).macs
    if name == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "bent" / "model.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.as_tensor(found), small(x), rtol=1e-4, atol=1e-5)


def test_refit_is_that_of_the_linear_twin(net: nn.Module) -> None:
    batches = as_batches(inputs(), batch_size=40)
    refit = Refit(net, find_layers(net, inputs(1)), batches, RefitOptions())
    built = []
    for plan in (PLAN, LINEAR):
        model = apply(net, plan).eval()
        modules = dict(model.named_modules())
        refit(model, {n: modules[n][-1] for n in plan.changed()})  # type: ignore[index]
        built.append(model)
    assert torch.equal(built[0](inputs()), built[1](inputs()))


def test_refit_behind_slopes_is_least_squares() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6)).eval(), torch.randn(60, 8)
    small = moved(apply(model, Plan({"0": LayerChoice("svd_act", {"rank": 3})}))).eval()
    refit = Refit(model, find_layers(model, x), as_batches(x, batch_size=60), RefitOptions(ridge=1e-9))
    refit(small, {"0": small[0][-1]})  # type: ignore[index]
    first, slopes, last = small[0]  # type: ignore[index]
    with torch.no_grad():
        z = F.prelu(first(x), slopes.weight)
        design = torch.cat([z, torch.ones(60, 1)], 1)
        solution = torch.linalg.lstsq(design.double(), model(x).double()).solution.T
    torch.testing.assert_close(last.weight.double(), solution[:, :3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last.bias.double(), solution[:, 3], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"decay_on": "product", "orthogonality": 0.1}], ids=["factors", "product"])
def test_recovery_moves_the_slopes(net: nn.Module, options: dict[str, Any]) -> None:
    small, x = apply(net, PLAN), inputs(64)
    before = float((small(x) - net(x)).detach().square().mean())
    trained = recover(small, net, x, plan=PLAN, steps=60, batch=32, lr=0.02, ema=0, timing=False, **options).model
    assert float((trained(x) - net(x)).detach().square().mean()) < before
    for chain in chains(net, trained, PLAN):
        assert chain.bent
        linear = LINEAR[chain.layer.name]
        weights = [w.detach() for w in chain.weights()]
        assert torch.equal(chain.product(), method(linear.method).reconstruct(chain.layer, weights))
        assert len(chain.components()) == len(weights)


def test_slopes_do_not_decay() -> None:
    """Only weight decay acts: there is nothing to learn."""
    net = nn.Sequential(nn.Linear(6, 6)).eval()
    plan = Plan({"0": LayerChoice("svd_act", {"rank": 6})})
    small = apply(net, plan)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
        for parameter in (small[0][2].weight, small[0][2].bias):  # type: ignore[index]
            parameter.zero_()
    x = torch.randn(20, 6)
    trained = recover(small, net, x, steps=5, lr=0.1, weight_decay=0.5, ema=0, timing=False, distill=1.0).model
    assert torch.equal(trained[0][1].weight, torch.ones(6))  # type: ignore[index]
    assert not torch.equal(trained[0][0].weight, small[0][0].weight)  # type: ignore[index]


def test_back_to_the_dense_shape_while_slopes_are_1_and_refused_after(net: nn.Module) -> None:
    small = apply(net, PLAN)
    torch.testing.assert_close(merged(net, small, PLAN)(inputs()), small(inputs()), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        LayerError, match=r"^a: no dense layer computes what spatial_svd_act\(rank=5\) does now: .* moved 5 slopes"
    ):
        merged(net, moved(small), PLAN)
    with pytest.raises(PlanError, match=r"^a: the plan says spatial_svd.* the model has no chain of 2 stages there"):
        merged(net, small, LINEAR)
    with pytest.raises(
        PlanError, match=r"^a: the plan says spatial_svd_act.* the model has no chain with activations there"
    ):
        merged(net, apply(net, LINEAR), PLAN)


def test_balance_keeps_the_function(net: nn.Module) -> None:
    """Chains that are not linear are left alone."""
    small = moved(apply(net, PLAN))
    with torch.no_grad():
        for chain in chains(net, small, PLAN):
            chain.weights()[0].mul_(7)
    before = copy.deepcopy(small)(inputs())
    balance(chains(net, small, PLAN))
    torch.testing.assert_close(small(inputs()), before, rtol=1e-4, atol=1e-5)


STUDY = """
model: code.py:model
data: code.py:data
metric: kl
space: {methods: [svd, svd_act], keep: [0.5]}
limits: ["macs<=60%"]
trials: 2
recovery: {final_steps: 10}
"""
CODE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()

def data():
    return {"calibration": torch.randn(60, 8)}
"""


def test_stages_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    file = load_study(tmp_path / "study.yaml")
    with pytest.raises(InputError, match="svd_act"):
        compress(file, tmp_path / "out", stages=2)
    assert not (tmp_path / "out").exists()
    assert compress(file, tmp_path / "out", stages=1)["stages"][0]["costs"]["macs_kept"] <= 0.6
