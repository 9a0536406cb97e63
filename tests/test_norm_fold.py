"""Batch norms folded into the layers before them: which are, and that the folded model says the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankopt.batches import Batch
from rankopt.cost import count
from rankopt.divergence import Divergence
from rankopt.evaluate import Evaluator
from rankopt.factors import Factors
from rankopt.layers import find_layers
from rankopt.norm_fold import fold_, followers
from rankopt.plan import LayerChoice, Plan
from rankopt.precision import Precision
from rankopt.refit import Refit, RefitOptions


def trained(model: nn.Module) -> Any:
    """Norms with statistics and weights that are not the identity."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


class Block(nn.Module):
    """A convolution whose output is normed, and another one whose output is needed as it is too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False)
        self.used_twice = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.norm1(self.conv1(x)).relu())
        return self.norm2(y) + (y if self.used_twice else 0)


def test_the_folded_model_says_the_same() -> None:
    model, x = trained(Block()), torch.randn(4, 3, 8, 8)
    pairs = followers(model, ["conv1", "conv2"], Batch((x,)))
    assert pairs == {"conv1": "norm1", "conv2": "norm2"}
    folded = copy.deepcopy(model)
    assert all(fold_(folded.get_submodule(a), folded, b) for a, b in pairs.items())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
        assert not torch.equal(folded.conv1(x), model.conv1(x))


def test_an_output_that_is_used_elsewhere_forbids_it() -> None:
    model, x = trained(Block()), torch.randn(4, 3, 8, 8)
    model.used_twice = True
    assert followers(model, ["conv1", "conv2"], Batch((x,))) == {}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.norm(self.linear(x))))


@pytest.mark.parametrize("refitted", [True, False])
@pytest.mark.parametrize("parted", [True, False])
def test_a_trial_in_bfloat16_goes_without_norms_and_comes_to_the_same(refitted: bool, parted: bool) -> None:
    torch.manual_seed(0)
    model = trained(
        nn.Sequential(Block(), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(5))
    )
    x = torch.randn(48, 3, 8, 8)
    layers = find_layers(model, x[:1])
    batches = [Batch((part,)) for part in x.split([30, 18] if parted else [48])]
    refit = Refit(model, layers, batches, RefitOptions(), Precision(False, True)) if refitted else None
    cost = count(model, x[:1])
    evaluator = Evaluator(
        model, layers, Factors(model), cost, batches, Divergence("logits"), refit=refit, fast=Precision(True, True)
    )
    assert evaluator._followers == {"0.conv1": "0.norm1", "0.conv2": "0.norm2", "2": "3"}
    plan = Plan(
        {"0.conv1": LayerChoice("tucker2", {"rank_out": 3, "rank_in": 2}), "2": LayerChoice("svd", {"rank": 4})}
    )
    built = evaluator.build(plan, quick=True)
    exact = evaluator.build(plan)
    with torch.no_grad():
        torch.testing.assert_close(built(x), exact(x), rtol=1e-3, atol=1e-3)
    assert evaluator.judge(plan)["kl"] == pytest.approx(evaluator.quality(exact)["kl"], rel=0.1)


@pytest.mark.parametrize(
    ("model", "names", "x", "wanted"),
    [
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), ["0"], torch.randn(9, 5), {"0": "1"}),
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(7)), ["0"], torch.randn(9, 7, 5), {}),  # of another dimension
        (nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4)), ["0"], torch.randn(9, 5), {}),
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)), ["0"], torch.randn(9, 5), {}),
        (nn.Sequential(nn.ConvTranspose1d(3, 3, 2), nn.BatchNorm1d(3)), ["0"], torch.randn(2, 3, 5), {}),
        (nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), ["0"], torch.randn(2, 4, 9), {"0": "1"}),
        (Twice(), ["linear"], torch.randn(9, 5), {}),
    ],
    ids=["linear", "other dimension", "not behind", "no statistics", "transposed", "grouped", "twice"],
)
def test_which_norms_follow(model: nn.Module, names: list[str], x: Tensor, wanted: dict[str, str]) -> None:
    model = trained(model)
    with torch.no_grad():
        before = model(x)
    assert followers(model, names, Batch((x,))) == wanted
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_a_layer_that_can_not_take_it_over_is_left_alone() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    before = copy.deepcopy(model.state_dict())
    assert not fold_(None, model, "1")
    assert not fold_(nn.Conv2d(3, 5, 1), model, "1")
    assert not fold_(nn.ReLU(), model, "1")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
