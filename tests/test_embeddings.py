"""Embeddings and the output heads that are tied to them: kinds, statistics, surgery, files, exports, a search."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt.artifact import load, save
from rankopt.batches import as_batches
from rankopt.calibration import CalibrationOptions, calibrate
from rankopt.chains import chains, merged
from rankopt.cost import count, other_macs, plan_cost
from rankopt.decompositions import method
from rankopt.divergence import Divergence
from rankopt.errors import LayerError
from rankopt.factors import Factors
from rankopt.kinds import kind_named
from rankopt.layers import find_layers, fingerprint, static_layers
from rankopt.plan import LayerChoice, Plan
from rankopt.prediction import predict
from rankopt.surgery import apply, structure
from rankopt.verify import verify

ROWS, WIDTH = 67, 16


class Language(nn.Module):
    """A table, a layer, and a head that may hold the table's weight."""

    def __init__(self, tied: bool = True, bias: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.tok = nn.Embedding(ROWS, WIDTH, padding_idx=padding)
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=bias)
        if tied:
            self.head.weight = self.tok.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids)
        out: Tensor = self.head(x + torch.tanh(self.mid(x)))
        return out


def language(**options: Any) -> Language:
    torch.manual_seed(0)
    return Language(**options).eval()


def ids(samples: int = 6, length: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(samples, length, generator=generator).square() * ROWS).long()


RANKS = {
    "svd": {"rank": 7},
    "tt_matrix": {"rank_1": 9},
    "tucker_matrix": {"rank_out_1": 3, "rank_out_2": 4, "rank_in_1": 6, "rank_in_2": 7},
    "cp_matrix": {"rank": 12},
    "ring_matrix": {"rank_1": 5, "rank_2": 4, "rank_3": 2},
    "block_term": {"blocks": 2, "rank": 5},
    "hierarchical_tucker": {"rank_leaf": 4, "rank_node": 8},
}


def plan(name: str = "svd") -> Plan:
    return Plan({"tok": LayerChoice(name, RANKS[name])})


# the kind


def test_an_embedding_is_listed_with_its_costs() -> None:
    model = language(tied=False)
    tok, _, head = find_layers(model, ids())
    assert (tok.name, tok.kind, tok.macs, tok.params, tok.skip) == ("tok", "embedding", 0, ROWS * WIDTH, None)
    assert tok.weight_shape == (ROWS, WIDTH)
    assert head.kind == "linear"
    weight = kind_named(tok).weight(tok, model.tok)
    assert torch.equal(weight[0], model.tok.weight.mT)


def test_a_tied_head_belongs_to_its_table() -> None:
    model = language(bias=True)
    tok, mid, head = find_layers(model, ids(6, 5))
    assert tok.tied == ("head",)
    assert tok.skip is None
    assert head.skip == "shares its weight with tok.weight, by whose choice it is replaced too"
    assert tok.macs == 30 * ROWS * WIDTH == head.macs
    counted = count(model, ids(6, 5))
    assert other_macs(counted, [tok, mid, head]) == 0
    static = {layer.name: layer for layer in static_layers(model)}
    assert static["tok"].tied == ("head",)
    assert fingerprint(model) == fingerprint(model, [tok, mid, head])


def renormalized() -> nn.Embedding:
    return nn.Embedding(9, 4, max_norm=1.0)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (nn.Embedding(9, 4, max_norm=1.0), "max_norm changes its rows"),
        (nn.Embedding(9, 4, sparse=True), "sparse=True asks for sparse gradients"),
        (nn.Embedding(9, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (type("Own", (nn.Embedding,), {})(9, 4), "Own is a subclass that may do something else"),
    ],
)
def test_tables_that_do_more_are_left_alone(table: nn.Embedding, says: str) -> None:
    (layer,) = find_layers(nn.Sequential(table), torch.tensor([1, 3]))
    assert says in str(layer.skip)
    with pytest.raises(LayerError, match="0: can't be decomposed"):
        apply(nn.Sequential(table), Plan({"0": LayerChoice("svd", {"rank": 2})}))


def test_a_row_of_padding_that_is_filled_is_a_row() -> None:
    """As in pretrained models of transformers; methods whose row of padding is zero don't fit such a table."""
    dense = nn.Sequential(nn.Embedding.from_pretrained(torch.randn(24, 16), freeze=False, padding_idx=2))
    (layer,) = find_layers(dense, torch.tensor([1, 2]))
    (empty,) = find_layers(nn.Sequential(nn.Embedding(24, 16, padding_idx=2)), torch.tensor([1, 2]))
    assert layer.padding_filled
    assert not empty.padding_filled
    fingerprints = [fingerprint(nn.Sequential(m)) for m in (dense[0], nn.Embedding(24, 16, padding_idx=2))]
    assert fingerprints[0].architecture == fingerprints[1].architecture
    small = apply(dense, Plan({"0": LayerChoice("svd", {"rank": 16})}))
    numbers = torch.tensor([[0, 2], [2, 23]])
    torch.testing.assert_close(small(numbers), dense(numbers))
    small(numbers).sum().backward()
    assert not small[0][0].weight.grad[2].any()
    assert "row of padding" in str(method("tt_matrix").why_not(layer))
    assert method("tt_matrix").why_not(empty) is None


def test_weights_that_are_shared_otherwise_are_left_alone() -> None:
    model = language()
    model.other = nn.Embedding(ROWS, WIDTH)
    model.other.weight = model.tok.weight  # type: ignore[union-attr]
    assert all("shares its weight" in str(la.skip) for la in static_layers(model) if la.name != "mid")
    model = language()
    torch.nn.utils.parametrizations.orthogonal(model.mid)
    head = model.head
    head.register_forward_pre_hook(lambda m, a: None)
    assert {la.name: la.skip is None for la in static_layers(model)}["tok"]


def test_a_head_that_is_not_called_keeps_its_table_as_it_is() -> None:
    class Reads(Language):
        def forward(self, ids: Tensor) -> Tensor:
            return self.tok(ids) @ self.head.weight.mT

    torch.manual_seed(0)
    tok = find_layers(Reads(), ids())[0]
    assert "its forward is not called" in str(tok.skip)


# surgery


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_replaced_model_is_the_dense_one_with_the_product(name: str, tied: bool) -> None:
    model = language(tied=tied, bias=True, padding=3).double()
    built: Any = apply(model, plan(name))
    (chain,) = chains(model, built, plan(name))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        table = chain.product()[0].mT.clone()
        if name != "svd":
            table[3] = 0  # as the module does
        assert float(chain.product()[0].mT[3].abs().max()) < 2
        twin.tok.weight.copy_(table)
    x = ids()
    torch.testing.assert_close(built.tok(x), twin.tok(x), rtol=1e-9, atol=1e-9)
    if not tied or name == "svd":
        torch.testing.assert_close(built(x), twin(x), rtol=1e-9, atol=1e-9)
    assert (built.tok(torch.tensor([3])) == 0).all()
    h = torch.randn(4, WIDTH, dtype=torch.float64)
    if tied:
        torch.testing.assert_close(built.head(h), h @ chain.product()[0] + model.head.bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RANKS)
def test_the_head_stays_tied(name: str) -> None:
    model = language(bias=True)
    built: Any = apply(model, plan(name))
    shared = {id(p) for p in built.tok.parameters()}
    assert shared == {id(p) for n, p in built.head.named_parameters() if not n.endswith("bias")}
    copied: Any = copy.deepcopy(built)
    assert {id(p) for p in copied.tok.parameters()} <= {id(p) for p in copied.head.parameters()}
    before = built.tok(ids()).detach()
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
    built(ids()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(built.tok(ids()), before)
    assert {id(p) for p in built.tok.parameters()} == shared


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("tied", [True, False])
def test_costs_are_counted(name: str, tied: bool) -> None:
    model, x = language(tied=tied), ids()
    layers, dense = find_layers(model, x), count(language(tied=tied), x)
    built = apply(model, plan(name))
    assert plan_cost(layers, plan(name), dense.params, other_macs(dense, layers)) == count(built, x)


def test_padding_gets_no_gradient() -> None:
    model = language(tied=False, padding=3)
    for name in ("svd", "tt_matrix"):
        built: Any = apply(model, plan(name))
        built.tok(torch.tensor([[3, 3]])).sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in built.tok.parameters())


def test_merged_is_the_way_back() -> None:
    model = language(bias=True)
    built = apply(model, plan("tt_matrix"))
    back: Any = merged(model, built, plan("tt_matrix"))
    assert back.head.weight is back.tok.weight
    torch.testing.assert_close(back(ids()), built(ids()), rtol=1e-4, atol=1e-4)


# statistics


def options(**more: Any) -> CalibrationOptions:
    return CalibrationOptions(temperature=1.0, max_rows=None, **more)


@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_those_of_autograd(tied: bool) -> None:
    """One sample at a time, through the whole model, against the gradients of the shared parameter."""
    model = language(tied=tied).double()
    x = ids(5)
    layers = find_layers(model, x[:1])
    divergence = Divergence.of(model(x[:1]))
    batches = as_batches(x, batch_size=3)
    labels = torch.randint(ROWS, (5, 5), generator=torch.Generator().manual_seed(5))
    seen = iter([labels[:3], labels[3:]])

    def score(output: Tensor, piece: Any) -> Tensor:
        return nn.functional.nll_loss(output.log_softmax(-1).flatten(0, 1), next(seen).flatten(), reduction="sum")

    found = calibrate(model, layers[:1], batches, divergence, options(draws=1, piece=8), score)["tok"]
    changes = torch.randn(3, 1, WIDTH, ROWS, dtype=torch.float64)
    scores = found.fisher.scores(changes)  # type: ignore[union-attr]
    for n in range(5):
        model.zero_grad()
        nn.functional.nll_loss(model(x[n : n + 1]).log_softmax(-1)[0], labels[n], reduction="sum").backward()
        assert model.tok.weight.grad is not None
        expected = (changes[:, 0].mT * model.tok.weight.grad).sum((1, 2))
        torch.testing.assert_close(scores[:, n].double(), expected, rtol=1e-4, atol=1e-4)
    frequencies = (torch.bincount(x.flatten(), minlength=ROWS).double() + 1) * ROWS / (x.numel() + ROWS)
    torch.testing.assert_close(found.metric.diagonal, frequencies[None])
    assert (found.metric.turned is not None) == tied
    if tied:
        assert found.metric.turned is not None
        with torch.no_grad():
            h = model.tok(x) + torch.tanh(model.mid(model.tok(x)))
        moment = torch.einsum("npi,npj->ij", h, h) / x.numel()
        torch.testing.assert_close(found.metric.turned[0], moment)


def test_svd_of_a_table_is_the_optimum_of_its_frequencies() -> None:
    model = language(tied=False).double()
    x = ids(200)
    layers = find_layers(model, x[:1])
    found = calibrate(model, layers[:1], as_batches(x), Divergence.of(model(x[:1])), options(fisher_samples=4))["tok"]
    metric, layer, way = found.metric.without_gradient(), layers[0], method("svd")
    weight = kind_named(layer).weight(layer, model.tok).detach()
    weights = way.stage_weights(layer, way.factorize(layer, weight, metric), {"rank": 4})
    lost = float(metric.error(weight - way.reconstruct(layer, weights)))
    assert metric.diagonal is not None
    scaled = (weight[0] * metric.diagonal[0].sqrt()).numpy()
    assert lost == pytest.approx(float((np.linalg.svd(scaled, compute_uv=False)[4:] ** 2).sum()), rel=1e-6)


def test_predicted_losses_are_close_to_measured_ones() -> None:
    model = language()
    x = ids(64, 8)
    layers = find_layers(model, x[:1])
    divergence = Divergence.of(model(x[:1]))
    gathered = calibrate(model, layers[:1], as_batches(x), divergence, options())["tok"]
    factors = Factors(model, {"tok": gathered.metric})
    choices = [LayerChoice("svd", {"rank": r}) for r in (8, 12, 15)] + [LayerChoice("tt_matrix", {"rank_1": 20})]
    losses, kept = predict((layers[0],), choices, factors, [gathered], {})
    assert kept == choices
    for choice, loss in zip(choices, losses, strict=True):
        built = apply(model, Plan({"tok": choice}), factors)
        with torch.no_grad():
            measured = float(divergence.between(model(x), built(x)).mean())
        assert 0.4 < loss / measured < 2.5, choice


def test_sequence_first_tables_and_tables_of_positions_are_told_apart() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok, self.pos, self.out = nn.Embedding(ROWS, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tok(ids.T) + self.pos(torch.arange(5))[:, None]  # sequence first
            out: Tensor = self.out(x.mean(0))
            return out

    torch.manual_seed(0)
    model, x = Positions().eval(), ids(6)
    layers = find_layers(model, x[:1])
    found = calibrate(model, layers[:2], as_batches(x), Divergence.of(model(x[:1])), options(draws=2))
    assert [len(found[n].fisher) for n in ("tok", "pos")] == [12, 12]
    counts = torch.bincount(x.flatten(), minlength=ROWS).double()
    torch.testing.assert_close(found["tok"].metric.diagonal, ((counts + 1) * ROWS / (30 + ROWS))[None])


# files, exports, a search


@pytest.mark.parametrize("name", ["svd", "tt_matrix"])
def test_saved_models_are_loaded_tied(name: str, tmp_path: Path) -> None:
    model = language(bias=True)
    made = Plan(plan(name).layers, fingerprint(model))
    built = apply(model, made)
    save(tmp_path / "x", built, made, measurements={"dense": {}, "compressed": {}})
    back: Any = load(tmp_path / "x", Language(bias=True))
    assert torch.equal(back(ids()), built(ids()))
    assert {id(p) for p in back.tok.parameters()} <= {id(p) for p in back.head.parameters()}
    assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in built.parameters())


def test_structure_needs_no_values() -> None:
    built: Any = structure(language(), plan("tt_matrix"))
    assert {id(p) for p in built.tok.parameters()} == {id(p) for p in built.head.parameters()}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RANKS if name not in ("tt_matrix", "ring_matrix")]


@pytest.mark.parametrize("name", ["tt_matrix", *SLOW])
def test_exports_compute_the_same(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(language(padding=3), nn.Linear(ROWS, 20)).eval()
    made = Plan(
        {
            "0.tok": LayerChoice(name, RANKS[name]),
            "1": LayerChoice(name, {n: min(3, b) for n, b in bounds(name, ROWS, 20).items()}),
        },
        fingerprint(model),
    )
    built = apply(model, made)
    save(
        tmp_path / "x", built, made, measurements={"dense": {}, "compressed": {}}, exports=["pt2", "onnx"],
        example=((ids(),), {}),
    )  # fmt: skip
    checks = verify(tmp_path / "x", model)
    assert all(check.ok is not False for check in checks), checks
    assert {"onnx", "pt2"} <= {word for check in checks if check.ok for word in check.what.replace(":", " ").split()}
    alone = load(tmp_path / "x", standalone=True)
    torch.testing.assert_close(alone(ids(3, 5, 1)), built(ids(3, 5, 1)), rtol=1e-4, atol=1e-4)


def bounds(name: str, inputs: int, outputs: int) -> dict[str, int]:
    (layer,) = static_layers(nn.Sequential(nn.Linear(inputs, outputs)))
    return method(name).rank_bounds(layer)


def test_a_search_chooses_for_the_table_and_its_head_together() -> None:
    model = language()
    x = ids(48, 6)
    result = rankopt.search(
        model, x[:1], calibration=x, limits=["params<=60%"], space={"methods": ["svd", "tt_matrix"]}, trials=3
    )
    best = result.best()
    assert "tok" in best.plan.changed()
    assert "head" not in best.plan.changed()
    kept = best.measurements["params_kept"]
    assert kept is not None
    assert kept <= 0.6
    assert math.isfinite(best.measurements["kl"] or 0.0)
