"""The refit against NumPy's least squares, on layers of every kind, in one piece and batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rankopt.batches import Batch, as_batches
from rankopt.layers import find_layers
from rankopt.plan import LayerChoice, Plan
from rankopt.refit import Refit, RefitOptions
from rankopt.surgery import apply

ALL = RefitOptions(max_rows=2**30, ridge=1e-9)


def chains(built: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    modules = dict(built.named_modules())
    return {n: m[-1] for n in plan.changed() if isinstance(m := modules[n], nn.Sequential)}


def refitted(
    model: nn.Module, plan: Plan, batches: Sequence[Batch], options: RefitOptions = ALL
) -> tuple[nn.Module, nn.Module]:
    """The compressed model before and after."""
    first = batches[0].take(slice(0, 1))
    refit = Refit(model, find_layers(model, first.args, first.kwargs), batches, options)
    before = apply(model, plan).eval()
    after = copy.deepcopy(before)
    refit(after, chains(after, plan))
    return before, after


def svd(**ranks: int) -> Plan:
    return Plan({n.replace("_", "."): LayerChoice("svd", {"rank": r}) for n, r in ranks.items()})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(60, 8), (20, 3, 8)])
def test_a_linear_layer_is_least_squares(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=bias)).eval()
    x = torch.randn(shape) @ torch.randn(8, 8) + 1
    before, after = refitted(model, Plan({"0": LayerChoice("svd", {"rank": 3})}), as_batches(x, batch_size=16))
    with torch.no_grad():
        z = after[0][0](x).reshape(-1, 3).double().numpy()  # type: ignore[index]
        y = model(x).reshape(-1, 6).double().numpy()
    design = np.concatenate([z, np.ones((len(z), 1))], 1) if bias else z
    solution = np.linalg.lstsq(design, y, rcond=None)[0].T
    last: Any = after[0][1]  # type: ignore[index]
    np.testing.assert_allclose(last.weight.detach().numpy(), solution[:, :3], rtol=1e-3, atol=1e-4)
    if bias:
        np.testing.assert_allclose(last.bias.detach().numpy(), solution[:, 3], rtol=1e-3, atol=1e-4)
    assert torch.equal(after[0][0].weight, before[0][0].weight)  # type: ignore[index]


KINDS: dict[str, tuple[Any, tuple[int, ...], str, dict[str, int]]] = {
    "linear": (lambda: nn.Linear(8, 6), (30, 8), "svd", {"rank": 2}),
    "linear, tokens": (lambda: nn.Linear(8, 6), (30, 4, 8), "svd", {"rank": 2}),
    "conv": (lambda: nn.Conv2d(4, 8, 3, 2, 1), (12, 4, 7, 6), "svd", {"rank": 3}),
    "conv, no bias, kernel last": (lambda: nn.Conv2d(4, 8, 3, bias=False), (12, 4, 7, 6), "svd_in", {"rank": 2}),
    "conv, reflect, dilated": (
        lambda: nn.Conv2d(4, 8, 3, 1, 2, 2, padding_mode="reflect"),
        (12, 4, 7, 6),
        "spatial_svd",
        {"rank": 4},
    ),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (12, 4, 7, 6), "tucker2", {"rank_out": 2, "rank_in": 1}),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (12, 4, 7, 6), "spatial_svd", {"rank": 1}),
    "conv1d same": (lambda: nn.Conv1d(4, 8, 4, padding="same"), (12, 4, 9), "svd_in", {"rank": 2}),
    "conv3d": (lambda: nn.Conv3d(3, 6, 2), (9, 3, 4, 4, 4), "tucker", {}),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (12, 4, 4, 5), "svd_in", {"rank": 2}),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(4, 6, 4, 3, groups=2), (12, 4, 7), "svd", {"rank": 1}),
    "cp": (lambda: nn.Conv2d(4, 8, 3), (12, 4, 7, 6), "cp", {"rank": 4}),
    "ring": (lambda: nn.Conv2d(6, 8, 3), (12, 6, 7, 6), "tensor_ring", {"rank_1": 2, "rank_2": 2, "rank_3": 2}),
    "train": (lambda: nn.Conv2d(6, 8, 3), (12, 6, 7, 6), "tensor_train", {}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", KINDS)
def test_never_worse_on_its_data_and_at_a_stationary_point(name: str) -> None:
    make, shape, method, ranks = KINDS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    x = torch.randn(shape).abs()
    (layer,) = find_layers(model, x[:1])
    from rankopt.decompositions import method as named

    way = named(method)
    if way.why_not(layer):
        pytest.fail(str(way.why_not(layer)))
    ranks = ranks or {n: max(1, b // 3) for n, b in way.rank_bounds(layer).items()}
    before, after = refitted(model, Plan({"0": LayerChoice(method, ranks)}), as_batches(x, batch_size=5))

    def error(module: nn.Module) -> Tensor:
        return (module(x) - model(x)).square().mean()

    assert float(error(after).detach()) < float(error(before).detach())
    last: Any = after[0][-1]  # type: ignore[index]
    (gradient,) = torch.autograd.grad(error(after), last.weight)
    (gradient_before,) = torch.autograd.grad(error(before), before[0][-1].weight)  # type: ignore[index]
    assert float(gradient.norm()) < 1e-2 * float(gradient_before.norm())


def test_the_ridge_pulls_to_the_weights_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6)).eval(), torch.randn(40, 8)
    plan = Plan({"0": LayerChoice("svd", {"rank": 3})})
    distance = []
    for ridge in (1e-9, 1.0, 1e9):
        before, after = refitted(model, plan, as_batches(x), RefitOptions(ridge=ridge))
        distance.append(float((after[0][1].weight - before[0][1].weight).detach().norm()))  # type: ignore[index]
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 1e-6


def test_too_few_samples_and_dead_inputs_do_no_harm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    plan = svd(**{"0": 3, "2": 2})
    for x in (torch.randn(1, 8), torch.zeros(5, 8)):
        before, after = refitted(model, plan, as_batches(x), RefitOptions())
        assert all(torch.isfinite(p).all() for p in after.parameters())
        with torch.no_grad():
            assert (after(x) - model(x)).norm() <= (before(x) - model(x)).norm() + 1e-5


# several layers ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers that are declared in another order than they run; one of them twice; a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.twice, self.first = nn.Linear(10, 3), nn.Linear(10, 10), nn.Conv1d(3, 10, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x)).mean(2)
        h = h + torch.relu_(self.twice(torch.relu_(self.twice(h))))
        return self.out(h)


def net() -> tuple[Net, Tensor, Plan]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(40, 3, 8), svd(first=4, twice=4, out=2)


def test_one_piece_equals_batch_by_batch() -> None:
    model, x, plan = net()
    options = RefitOptions(max_rows=2**30)
    _, whole = refitted(model, plan, as_batches(x, batch_size=40), options)
    # different lengths: batches that can't be joined, of the same rows when the positions are taken together
    ragged = [Batch((x[:20],), {}, None), Batch((x[20:],), {"unused": None}, None)]
    model_any: Any = model
    forward = model_any.forward
    model_any.forward = lambda x, unused=None: forward(x)
    refit = Refit(model, find_layers(model, x[:1]), ragged, options)
    assert len(refit.batches) == 2
    built: Any = apply(model, plan).eval()
    built.forward = lambda x, unused=None: type(built).forward(built, x)
    refit(built, chains(built, plan))
    for (name, a), (_, b) in zip(whole.named_parameters(), built.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_sequences_of_different_lengths() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = as_batches([torch.randn(4, length, 6) for length in (3, 7, 5)])
    before, after = refitted(model, svd(**{"0": 3, "2": 2}), batches)
    error = [
        sum(float((m(b.args[0]) - model(b.args[0])).square().sum().detach()) for b in batches) for m in (before, after)
    ]
    assert error[1] < error[0]


def test_a_layer_that_runs_twice_is_left_alone_and_the_order_is_that_of_the_run() -> None:
    model, x, plan = net()
    batches = as_batches(x)
    refit = Refit(model, find_layers(model, x[:1]), batches, ALL)
    assert refit.order == ["first", "out"]
    before, after = refitted(model, plan, batches)
    assert torch.equal(after.twice[1].weight, before.twice[1].weight)  # type: ignore[union-attr, index]
    assert not torch.equal(after.out[1].weight, before.out[1].weight)  # type: ignore[union-attr, index]


def test_the_next_layer_sees_the_refitted_one() -> None:
    """Each layer is solved on what the layers before it give after their own refit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    x = torch.randn(60, 8)
    _, after = refitted(model, svd(**{"0": 3, "2": 2}), as_batches(x))
    with torch.no_grad():
        z = after[2][0](after[1](after[0](x))).double().numpy()  # type: ignore[index]
        y = model(x).double().numpy()
    solution = np.linalg.lstsq(np.concatenate([z, np.ones((60, 1))], 1), y, rcond=None)[0].T
    np.testing.assert_allclose(after[2][1].weight.detach().numpy(), solution[:, :2], rtol=2e-3, atol=1e-3)  # type: ignore[index]


def test_only_what_the_plan_changes_and_only_its_last_stage() -> None:
    model, x, _ = net()
    before, after = refitted(model, svd(out=2), as_batches(x))
    changed = {
        n for (n, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True) if not a.equal(b)
    }
    assert changed == {"out.1.weight", "out.1.bias"}
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in [*after.modules(), *model.modules()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval().to(dtype)
    x = torch.randn(64, 3, 4, 4).to(dtype)
    before, after = refitted(model, svd(**{"0": 3, "3": 2}), as_batches(x), RefitOptions())
    assert all(p.dtype == dtype for p in after.parameters())
    with torch.no_grad():
        errors = [float((m(x) - model(x)).double().norm()) for m in (before, after)]
    assert errors[1] < errors[0]


def test_fewer_rows_and_repeatable() -> None:
    model, x, plan = net()
    options = RefitOptions(max_rows=60, seed=4)
    refit = Refit(model, find_layers(model, x[:1]), as_batches(x), options)
    assert {n: sum(len(t) for t in ts) for n, ts in refit._targets.items()} == {"first": 40, "out": 40}
    (_, one), (_, two) = (refitted(model, plan, as_batches(x), options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_training_mode_comes_back_and_frozen_weights_may_move() -> None:
    model, x, plan = net()
    refit = Refit(model.train(), find_layers(model, x[:1]), as_batches(x), ALL)
    assert model.training
    built = apply(model, plan)
    for p in built.parameters():
        p.requires_grad_(False)
    refit(built, chains(built, plan))
    assert built.training
    assert not any(p.requires_grad for p in built.parameters())
