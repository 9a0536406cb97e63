"""The Python API end to end on small nets, against counters and direct measurement."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rankopt
from rankopt.errors import InfeasibleError, InputError, LayerError, PlanError
from rankopt.plan import LayerChoice, Plan
from rankopt.result import Progress
from rankopt.search import Search


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.c = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.b(torch.relu(self.bn(self.a(x)))))
        return self.fc(torch.relu(self.c(h)).mean((2, 3)))


def data(n: int = 120, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    return x + x.roll(1, 2) + 0.5, torch.randint(0, 5, (n,), generator=generator)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for seed in range(20):
            net(data(30, seed)[0])
        net.fc.weight.mul_(20)
    return net.eval()


EXAMPLE = torch.zeros(1, 3, 8, 8)
SPACE = {"methods": ["svd", "spatial_svd", "tucker2"], "keep": {"levels": 6}}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in module.state_dict().items()}


def find(model: nn.Module, **options: Any) -> rankopt.Result:
    given: dict[str, Any] = {"calibration": [data()], "trials": 6, "space": SPACE, **options}
    return rankopt.search(model, EXAMPLE, **given)


@pytest.fixture(scope="module")
def found(model: nn.Module) -> rankopt.Result:
    return find(model, trials=10, limits=["macs<=50%", "params<=60%"])


def test_limits_hold_for_the_built_modules(model: nn.Module, found: rankopt.Result) -> None:
    dense = rankopt.count(model, EXAMPLE)
    assert len(found.entries) > 3
    for entry in found.entries:
        cost = rankopt.count(entry.build(), EXAMPLE)
        assert (cost.macs, cost.params) == (entry.measurements["macs"], entry.measurements["params"])
        assert cost.macs <= 0.5 * dense.macs
        assert cost.params <= 0.6 * dense.params
        assert entry.feasible


def test_the_front_is_not_dominated_and_best_is_on_it(found: rankopt.Result) -> None:
    points = [(e.measurements["kl"], e.measurements["macs"]) for e in found.entries]
    for entry in found.front:
        kl, macs = (float(entry.measurements[q] or 0) for q in ("kl", "macs"))
        assert not any(p != (kl, macs) and p[0] <= kl and p[1] <= macs for p in points)  # type: ignore[operator]
    assert found.best().trial in [e.trial for e in found.front]
    assert found.best(["macs<=40%"]).measurements["macs_kept"] <= 0.4  # type: ignore[operator]
    with pytest.raises(InfeasibleError, match=r"macs<=1% \(reached: "):
        found.best(["macs<=1%"])


def test_building_again_reproduces_the_measurements(model: nn.Module, found: rankopt.Result) -> None:
    owner = found.best()._owner
    for entry in found.front[:3]:  # trials may have run in bfloat16, the winner was measured in float32
        exact = entry.trial == found.best().trial or not owner.evaluator.fast.bfloat16
        again = owner.measure(entry.build())["kl"]
        assert again == pytest.approx(entry.measurements["kl"], rel=1e-5 if exact else 0.1)
    x = torch.cat([b.args[0] for b in owner.validation])
    with torch.no_grad():
        p, q = model(x).log_softmax(1), found.best().build()(x).log_softmax(1)
    assert found.best().measurements["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    calibration = torch.cat([b.args[0] for b in owner.calibration])
    assert len(x) == 40
    assert len(calibration) == 80
    assert not any((row == calibration).flatten(1).all(1).any() for row in x)  # held back, not seen


def test_saved_and_loaded_to_the_last_bit(model: nn.Module, found: rankopt.Result, tmp_path: Path) -> None:
    entry = found.best()
    told = entry.save(tmp_path / "out")
    assert told["test"] is None
    assert told["validation"]["kl"] == pytest.approx(entry.measurements["kl"], rel=1e-6)  # in another memory format
    assert told["validation"]["macs"] == entry.measurements["macs"]
    built = entry.build()
    for dense in (model, Net(), Net):
        loaded = rankopt.load(tmp_path / "out", dense)
        assert not loaded.training
        assert all(torch.equal(t, built.state_dict()[n]) for n, t in loaded.state_dict().items())
        x = data(5, 9)[0]
        assert torch.equal(loaded(x), built(x))
    with pytest.raises(InputError, match="already exists"):
        entry.save(tmp_path / "out")
    entry.save(tmp_path / "out", force=True)


def test_the_model_is_unchanged_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().train()
    net.bn.eval()
    net.fc.weight.requires_grad_(False)
    before, modes = state(net), {n: m.training for n, m in net.named_modules()}
    result = find(net, evaluate=lambda module: 1.0, trials=3)
    result.best().build()
    result.best().save(tmp_path / "o")
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert not net.fc.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert not any(vars(m)[key] for m in net.modules() for key in vars(m) if key.endswith("_hooks"))
    assert net.training


def test_the_users_metric_decides(model: nn.Module) -> None:
    """The metric likes what kl does not: outputs with a large mean."""
    seen: list[bool] = []
    x = data(50, 3)[0]

    def evaluate(module: nn.Module) -> float:
        seen.append(module.training)
        return float(module(x).mean())

    result = find(model, evaluate=evaluate, trials=8)
    assert result.objectives == ("accuracy", "macs")
    assert not any(seen)
    best = result.best()
    assert best.measurements["accuracy"] == max(e.measurements["accuracy"] for e in result.entries if e.feasible)  # type: ignore[type-var]
    with torch.no_grad():
        assert evaluate(best.build()) == pytest.approx(best.measurements["accuracy"], rel=1e-5)
        assert result.dense["accuracy"] == pytest.approx(evaluate(model))


class Words(nn.Module):
    """Keyword arguments, a tied embedding, a fused encoder layer, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"hidden": (h := self.encoder(self.emb(ids), src_key_padding_mask=mask)), "logits": self.head(h)}


@pytest.mark.parametrize("form", ["call", "dict", "loader"])
def test_keyword_models_of_every_form_of_data(form: str) -> None:
    torch.manual_seed(0)
    net = Words().eval()
    ids = torch.randint(0, 11, (24, 6))
    mask = torch.zeros(24, 6, dtype=torch.bool)
    mask[::2, 4:] = True
    sources: dict[str, Any] = {
        "call": [((ids[n : n + 8],), {"mask": mask[n : n + 8]}) for n in (0, 8, 16)],
        "dict": [{"ids": ids[n : n + 8], "mask": mask[n : n + 8], "labels": ids[n : n + 8]} for n in (0, 8, 16)],
        "loader": DataLoader(TensorDataset(ids, ids), batch_size=8),
    }
    result = rankopt.search(
        net,
        ids[:1],
        {"mask": mask[:1]},
        calibration=sources[form],
        limits=["params<=90%"],
        trials=3,
        space={"methods": ["svd"], "keep": {"levels": 4}},
    )
    best = result.best()
    assert {n for n in best.plan} == {"emb", "encoder.layers.0.linear1", "encoder.layers.0.linear2"}
    assert "head" in best.plan.skipped
    built = best.build()
    assert built.head.weight is built.emb.weight  # type: ignore[union-attr]
    cost = rankopt.count(built, ids[:1], {"mask": mask[:1]})
    assert cost.params == best.measurements["params"]
    assert cost.macs == best.measurements["macs"]


def test_regression_without_labels_and_a_lone_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 12) @ torch.randn(12, 12)
    result = rankopt.search(
        nn.Linear(12, 12), x[:1], calibration=x, limits=["macs<=60%"], trials=2, space={"methods": ["svd"]}
    )
    assert isinstance(result.best().build(), nn.Sequential)
    assert list(result.best().plan) == [""]


def test_a_limit_out_of_reach_says_what_is_reachable(model: nn.Module) -> None:
    with pytest.raises(InfeasibleError) as caught:
        find(model, limits=["macs<=0.5%"])
    least = caught.value.reachable["macs"]
    assert f"{least / rankopt.count(model, EXAMPLE).macs:.1%} of dense" in str(caught.value)
    result = find(model, limits=[f"macs<={least:.0f}"], trials=1)  # exactly what is reachable
    assert result.best().measurements["macs"] == least
    with pytest.raises(InfeasibleError):
        find(model, limits=[f"macs<={least - 1:.0f}"], trials=1)


def test_the_same_seed_gives_the_same_plans_and_measurements(model: nn.Module) -> None:
    first, again, other = (find(model, seed=s) for s in (3, 3, 4))
    assert [(e.plan, e.measurements) for e in first.entries] == [(e.plan, e.measurements) for e in again.entries]
    assert [e.measurements["kl"] for e in first.entries] != [e.measurements["kl"] for e in other.entries]


def test_storage_goes_on_and_notices_another_model(model: nn.Module, tmp_path: Path) -> None:
    told: list[Progress] = []
    url = str(tmp_path / "s.db")
    first = find(model, storage=url, trials=4)
    more = find(model, storage=url, trials=7, progress=told.append)
    assert [p.done for p in told if p.total] == [5, 6, 7]
    assert any(p.text for p in told)
    assert [e.plan for e in more.entries][: len(first.entries)] == [e.plan for e in first.entries]
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.fc.bias += 1e-3  # type: ignore[operator]
    for options, says in (
        ({}, "another weights"),
        ({"calibration": [data(120, 7)]}, "another calibration data"),
        ({"space": {"methods": ["svd"]}}, "another search space"),
        ({"evaluate": lambda m: 1.0, "objectives": ["kl", "macs"]}, "another metric"),
    ):
        with pytest.raises(InputError, match=says):
            find(changed if not options else model, storage=url, **options)
    assert find(model, storage=url, trials=7, limits=["macs<=70%"]).entries  # limits may change


def test_plans_of_ones_own(model: nn.Module, tmp_path: Path) -> None:
    from rankopt.batches import as_batches

    search = Search(model, EXAMPLE, calibration=as_batches([data()]), limits=[rankopt.parse_limit("macs<=50%")])
    plan = Plan({"b": LayerChoice("svd", {"rank": 4})})
    entry = search.evaluate(plan)
    assert entry.trial == -1
    assert entry.plan.fingerprint == search.fingerprint
    assert entry.measurements["macs"] == rankopt.count(entry.build(), EXAMPLE).macs
    assert entry.feasible == (float(entry.measurements["macs_kept"] or 1) <= 0.5)
    entry.save(tmp_path / "o")
    assert Plan.load(tmp_path / "o") == entry.plan
    with pytest.raises(LayerError):
        search.evaluate(Plan({"d": LayerChoice("svd", {"rank": 4})}))
    other = Search(Net().eval(), EXAMPLE, calibration=as_batches([data()]))
    with pytest.raises(PlanError, match="other weights"):
        other.evaluate(entry.plan)
    with pytest.raises(PlanError, match="other weights"):
        other.build(entry.plan)


def test_batch_norm_and_refit_options(model: nn.Module) -> None:
    from rankopt.batches import as_batches

    def run(**options: Any) -> float:
        search = Search(
            model, EXAMPLE, calibration=as_batches([data()]), limits=[rankopt.parse_limit("macs<=40%")], trials=1,
            space=SPACE, **options,
        )  # fmt: skip
        return float(search.run().best().measurements["kl"] or 9)

    assert run() < run(refit=None)
    assert run(bn="auto", refit=None) <= run(refit=None)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, rankopt; heavy = {'torch', 'optuna', 'ray', 'onnxruntime', 'tensorly', 'thop', 'scipy'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "rankopt.search, rankopt.apply, rankopt.find_layers, rankopt.load;"
        "assert not {'optuna', 'ray', 'onnxruntime', 'tensorly', 'thop'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_function_is_not_hidden_by_the_file_of_its_name() -> None:
    import importlib

    module = importlib.import_module("rankopt.search")
    for _ in range(2):
        assert rankopt.search is importlib.import_module("rankopt.one_call").search
    assert rankopt.Search is module.Search


def test_every_name_is_there() -> None:
    for name in rankopt.__all__:
        assert getattr(rankopt, name) is not None
    assert set(dir(rankopt)) == set(rankopt.__all__)
    with pytest.raises(AttributeError):
        rankopt.nothing  # noqa: B018


def test_loaders_are_read_once(model: nn.Module) -> None:
    reads = 0

    def batches() -> Any:
        nonlocal reads
        reads += 1
        yield data(60)

    assert find(model, calibration=batches(), samples=30, trials=1).entries
    assert reads == 1
