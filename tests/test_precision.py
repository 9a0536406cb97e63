"""Trials that run in bfloat16 or channels-last give what float32 gives, within what they promise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt.batches import Batch
from rankopt.divergence import Divergence
from rankopt.errors import InputError
from rankopt.precision import EXACT, Precision, chosen, device_of
from rankopt.search import Search

ALL = [Precision(b, last) for b in (False, True) for last in (False, True)]


class Net(nn.Module):
    """Convolutions, batch norm, a residual, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.last((x + self.second(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made = Net()
    made(torch.randn(64, 3, 8, 8))
    return made.eval()


@pytest.mark.parametrize("one", ALL, ids=str)
def test_outputs_are_those_of_float32(net: nn.Module, one: Precision) -> None:
    x = torch.randn(20, 3, 8, 8)
    (batch,) = one.batches([Batch((x,), {}, torch.arange(20))])
    assert torch.equal(batch.args[0], x)
    assert torch.equal(batch.labels, torch.arange(20))
    with torch.no_grad(), one.on(device_of(net)):
        output = one.module_(copy.deepcopy(net))(*batch.args)
    assert output.float() == pytest.approx(net(x).detach(), abs=0.05 if one.bfloat16 else 1e-5)
    assert output.dtype == (torch.bfloat16 if one.bfloat16 else torch.float32)


@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16"])
def test_what_was_asked_for_is_chosen(net: nn.Module, wanted: str) -> None:
    batch = Batch((torch.randn(20, 3, 8, 8),))
    found = chosen(wanted, net, batch, Divergence())
    if wanted != "auto":
        assert found.bfloat16 == (wanted == "bfloat16")
    linear = nn.Sequential(nn.Linear(8, 4))
    assert not chosen(wanted, linear, Batch((torch.randn(4, 8),)), Divergence()).channels_last


def test_bfloat16_is_refused_where_the_dense_model_comes_out_different() -> None:
    class Fragile(nn.Module):
        """A difference of large numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)
            nn.init.constant_(self.a.bias, 3e4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).float() - 3e4

    assert not chosen("auto", Fragile(), Batch((torch.randn(32, 8),)), Divergence()).bfloat16


def test_a_model_that_can_not_run_in_it_stays_in_float32() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.a(x)
            if out.dtype != torch.float32:
                raise TypeError("float32 only")
            return out

    assert chosen("auto", Strict(), Batch((torch.randn(32, 8),)), Divergence()) == EXACT


def test_an_unknown_word_is_named(net: nn.Module) -> None:
    with pytest.raises(InputError, match="precision: must be one of auto, float32, bfloat16, got 'half'"):
        chosen("half", net, Batch((torch.randn(2, 3, 8, 8),)), Divergence())


def search(net: nn.Module, **options: Any) -> Search:
    torch.manual_seed(1)
    x = torch.randn(96, 3, 8, 8)
    return Search(
        net, x[:1], calibration=[Batch((x[:64],))], validation=[Batch((x[64:],))], trials=4,
        space={"methods": ["svd", "tucker2"]}, **options,
    )  # fmt: skip


def test_trials_in_bfloat16_are_judged_nearly_as_in_float32(net: nn.Module) -> None:
    exact, quick = (search(net, precision=p) for p in ("float32", "bfloat16"))
    for budget in (0.8, 0.5, 0.3):
        plan = exact.space.solve(exact.space.losses, budget)
        a, b = (s.evaluator(plan).measurements["kl"] for s in (exact, quick))
        assert b == pytest.approx(a, rel=0.15, abs=1e-4)


def test_what_is_handed_over_is_built_in_float32(net: nn.Module) -> None:
    quick, exact = search(net, precision="bfloat16"), search(net, precision="float32")
    plan = exact.space.solve(exact.space.losses, 0.5)
    a, b = (dict(s.build(plan).named_parameters()) for s in (exact, quick))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(p.dtype == torch.float32 for p in b.values())


def test_what_comes_out_lost_is_judged_again(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    run = search(net, precision="bfloat16")
    plan = run.space.solve(run.space.losses, 0.5)
    evaluator = run.evaluator
    whole = evaluator.quality

    def lost(module: nn.Module, batches: Any = None, quick: bool = False) -> dict[str, float]:
        return {"kl": 45.0} if quick else whole(module, batches)

    monkeypatch.setattr(evaluator, "quality", lost)
    assert evaluator(plan).measurements["kl"] == whole(evaluator.build(plan))["kl"]


def test_one_call_takes_the_precision_of_trials(net: nn.Module) -> None:
    x = torch.randn(32, 3, 8, 8)
    kwargs: dict[str, Any] = {"calibration": x, "limits": ["macs<=60%"], "trials": 1}
    with pytest.raises(InputError, match="precision: must be one of auto, float32, bfloat16, got 'half'"):
        rankopt.search(net, x[:1], precision="half", **kwargs)
    for wanted in ("float32", "bfloat16"):
        (entry,) = rankopt.search(net, x[:1], precision=wanted, **kwargs).entries
        assert entry._owner.evaluator.fast.bfloat16 == (wanted == "bfloat16")
