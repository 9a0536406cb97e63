"""Measurements against direct computation, and the order of cheap and dear."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt import evaluate
from rankopt.batches import Batch, as_batches
from rankopt.bn import has_batch_norm, recalibrate
from rankopt.cost import count
from rankopt.divergence import Divergence
from rankopt.errors import DataError
from rankopt.evaluate import Evaluator
from rankopt.factors import Factors
from rankopt.layers import find_layers, inference
from rankopt.limits import parse_limit
from rankopt.plan import LayerChoice, Plan
from rankopt.refit import Refit, RefitOptions
from rankopt.surgery import apply

PLAN = Plan({"0": LayerChoice("svd", {"rank": 2}), "5": LayerChoice("svd", {"rank": 2})})


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 4)
    )
    with torch.no_grad():
        for _ in range(50):
            model(torch.randn(16, 3, 5, 5) + 0.5)
    return model.eval()


def data(n: int = 30, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 5, 5, generator=generator) + 0.5
    return as_batches((x, torch.randint(-1, 4, (n,), generator=generator)), batch_size=11)


def evaluator(model: nn.Module | None = None, **options: Any) -> Evaluator:
    model = model or net()
    x = torch.zeros(1, 3, 5, 5)
    batches = options.pop("batches", data())
    with inference(model):
        divergence = Divergence.of(model(x))
    return Evaluator(model, find_layers(model, x), Factors(model), count(model, x), batches, divergence, **options)


def whole(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    return torch.cat([b.args[0] for b in batches]), torch.cat([b.labels for b in batches])


@torch.no_grad()
def test_measurements_are_what_they_say() -> None:
    measuring = evaluator(metric="accuracy")
    found = measuring(PLAN)
    model, built = measuring.model, apply(measuring.model, PLAN).eval()
    x, labels = whole(data())
    p, q = model(x).double().log_softmax(1), built(x).double().log_softmax(1)
    assert found.measurements["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    known = labels >= 0  # negative labels are left out
    accuracy = (q.argmax(1) == labels)[known].double().mean()
    assert found.measurements["accuracy"] == pytest.approx(100 * float(accuracy))
    error = math.sqrt(float(accuracy * (1 - accuracy)) / int(known.sum()))
    assert found.measurements["accuracy_se"] == pytest.approx(100 * error)
    counted = rankopt.count(built, x[:1])
    dense = rankopt.count(model, x[:1])
    assert (found.measurements["macs"], found.measurements["params"]) == (counted.macs, counted.params)
    assert found.measurements["macs_kept"] == counted.macs / dense.macs
    assert found.measurements["params_kept"] == counted.params / dense.params
    assert measuring.dense["macs"] == dense.macs
    assert measuring.dense["kl"] == 0
    assert found.stopped is None
    assert found.notes["seconds"] > 0


def test_token_labels_and_other_class_dimensions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 5, 3, padding=1)).eval()
    x = torch.randn(6, 3, 7)
    labels = torch.randint(0, 5, (6, 7))
    batches = as_batches((x, labels))
    divergence = Divergence.of(model(x).detach(), class_dim=1)
    layers = find_layers(model, x[:1])
    measuring = Evaluator(model, layers, Factors(model), count(model, x[:1]), batches, divergence, metric="accuracy")
    with torch.no_grad():
        expected = 100 * float((model(x).argmax(1) == labels).double().mean())
    assert measuring.dense["accuracy"] == pytest.approx(expected)
    wrong = Divergence.of(model(x).detach(), class_dim=-1)
    with pytest.raises(DataError, match=r"predictions have shape \(6, 5\), labels \(6, 7\)"):
        Evaluator(model, layers, Factors(model), count(model, x[:1]), batches, wrong, metric="accuracy")


def test_a_limit_on_exact_costs_stops_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = evaluator()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("built")

    share = measuring.costs(PLAN)["macs_kept"]
    for name in ("apply", "recalibrate"):
        monkeypatch.setattr(evaluate, name, never)
    for text in (f"macs<={share * 99:.6f}%", "params<=1%"):
        found = measuring(PLAN, [parse_limit(text), parse_limit("kl<=5")])
        assert found.stopped == text
        assert found.violations[text] > 0
        assert set(found.measurements) == {"macs", "params", "macs_kept", "params_kept"}
        assert "kl<=5" not in found.violations
    with pytest.raises(AssertionError, match="built"):
        measuring(PLAN, [parse_limit(f"macs<={measuring.costs(PLAN)['macs']:.0f}")])  # exactly on the limit


def test_limits_on_quality_are_judged_after() -> None:
    measuring = evaluator(metric="accuracy")
    found = measuring(PLAN, [parse_limit("kl<=1e-9"), parse_limit("accuracy>=-100"), parse_limit("macs<=100%")])
    assert found.stopped == "kl<=1e-9"
    assert found.violations["accuracy>=-100"] <= 0
    assert {"kl", "accuracy"} <= set(found.measurements)


def test_the_dense_model_and_an_empty_plan() -> None:
    measuring = evaluator(metric="accuracy")
    found = measuring(Plan({}))
    assert found.measurements["kl"] == 0
    assert found.measurements["macs_kept"] == 1
    assert found.measurements["accuracy"] == measuring.dense["accuracy"]


# batch norm ----------------------------------------------------------------------------------------------------------


def test_bn_auto_keeps_the_better() -> None:
    outcomes = set()
    plan = Plan({"0": LayerChoice("svd_in", {"rank": 2})})
    shifted = as_batches(data()[0].args[0] * 5 - 9)
    for bn_batches in (data(), shifted):  # on the data that plans are judged by, and on others
        values = {}
        for bn in ("off", "on", "auto"):
            measuring = evaluator(bn=bn, bn_batches=bn_batches)
            found = measuring(plan)
            values[bn] = found
            again = measuring.quality(measuring.build(plan, bn=bool(found.notes["bn"])))
            assert again["kl"] == pytest.approx(found.measurements["kl"], rel=1e-5)
        kl = {bn: found.measurements["kl"] for bn, found in values.items()}
        assert kl["auto"] == pytest.approx(min(kl["on"], kl["off"]), rel=1e-6)
        assert (values["on"].notes["bn"], values["off"].notes["bn"]) == (1, 0)
        assert values["auto"].notes["bn"] == float(kl["on"] < kl["off"])
        outcomes.add(values["auto"].notes["bn"])
    assert outcomes == {0.0, 1.0}


def test_bn_without_batch_norm_is_off() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 3)).eval()
    measuring = evaluator(model, bn="on")
    assert measuring.bn == "off"
    assert measuring(Plan({"0": LayerChoice("svd", {"rank": 2})})).notes["bn"] == 0
    assert not has_batch_norm(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))


def test_recalibration_is_the_average_of_the_batches() -> None:
    model, batches = net().train(), data()
    model[3].eval()
    recalibrate(model, batches)
    with torch.no_grad():
        outs = [model[0](b.args[0]) for b in batches]
    norm: Any = model[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([o.var((0, 2, 3)) for o in outs]).mean(0))
    assert norm.momentum == 0.1
    assert model.training


def test_recalibration_on_single_samples() -> None:
    """A sample alone has no variance in a layer of one position, so samples are taken together."""
    x = torch.randn(4, 3, 5, 5)
    singles, together, alone = net(), net(), net()
    recalibrate(singles, as_batches(x, batch_size=1))
    recalibrate(together, as_batches(x))
    recalibrate(alone, as_batches(x[:1]))
    for found, expected in ((singles, together), (alone, net())):
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


# refit ---------------------------------------------------------------------------------------------------------------


def test_refit_is_part_of_building() -> None:
    model = net()
    refit = Refit(model, find_layers(model, torch.zeros(1, 3, 5, 5)), data(200, 5), RefitOptions())
    plain, fitted = evaluator(model), evaluator(model, refit=refit)
    assert fitted(PLAN).measurements["kl"] < plain(PLAN).measurements["kl"]
    built = fitted.build(PLAN)
    assert not built.training
    assert fitted.quality(built)["kl"] == fitted(PLAN).measurements["kl"]


# the user's metric ---------------------------------------------------------------------------------------------------


def test_a_metric_of_ones_own_sees_the_module_in_eval_mode() -> None:
    seen: list[bool] = []

    def metric(module: nn.Module, batches: Sequence[Batch]) -> Tensor:
        seen.append(module.training or torch.is_grad_enabled())
        return torch.tensor(sum(len(b) for b in batches) / 10)

    measuring = evaluator(metric=metric)
    assert measuring(PLAN).measurements["accuracy"] == pytest.approx(3.0)
    assert seen == [False, False]


def raising(module: nn.Module, batches: Sequence[Batch]) -> float:
    raise KeyError("label\nmore")


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (lambda module, batches: float("nan"), "finite number, got nan"),
        (lambda module, batches: math.inf, "finite number, got inf"),
        (lambda module, batches: "good", "must return a number, got str"),
        (lambda module, batches: None, "must return a number, got NoneType"),
        (lambda module, batches: torch.zeros(2), "must return a number, got Tensor"),
        (raising, "metric: raised KeyError"),
        (lambda module: 1.0, "metric: raised TypeError"),
    ],
)
def test_metrics_that_are_no_numbers(metric: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        evaluator(metric=metric)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (None, "needs labels as a tensor"),
        (["a"] * 30, "needs labels as a tensor"),
        (torch.zeros(30, 4), "predictions have shape"),
        (torch.full((30,), -1), "no label is 0 or above"),
    ],
)
def test_accuracy_needs_fitting_labels(labels: Any, says: str) -> None:
    x, _ = whole(data())
    batches = as_batches([x if labels is None else (x, labels)])
    with pytest.raises(DataError, match=says):
        evaluator(metric="accuracy", batches=batches)


def test_outputs_that_are_no_numbers() -> None:
    model = net()
    measuring = evaluator(model)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[5].weight.fill_(float("inf"))  # type: ignore[union-attr, operator]
        with pytest.raises(DataError, match="NaN or infinity"):
            measuring.quality(broken)
    with pytest.raises(DataError, match=r"validation: the dense model's output holds NaN"):
        evaluator(broken)
    with pytest.raises(DataError, match=r"^validation data: Sequential does not run on it: RuntimeError"):
        evaluator(batches=as_batches(torch.zeros(3, 2, 5, 5)))


def test_the_model_is_left_alone() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    measuring = evaluator(model, metric="accuracy", bn="auto", bn_batches=data())
    measuring(PLAN)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
