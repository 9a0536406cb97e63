"""The seam for kinds of layers, with kinds that are made up here: one of groups behind a tap, one that is a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankopt.decompositions
import rankopt.kinds
from rankopt.artifact import load, save
from rankopt.batches import as_batches
from rankopt.block_samples import BlockSamples
from rankopt.calibration import CalibrationOptions, calibrate
from rankopt.candidates import candidates
from rankopt.cost import count, other_macs, plan_cost
from rankopt.decompositions.decomposition import Decomposition, Factors
from rankopt.decompositions.metric import Metric
from rankopt.divergence import Divergence
from rankopt.errors import LayerError
from rankopt.kinds.kind import Kind
from rankopt.layer_spec import Call, LayerSpec
from rankopt.layers import apart, find_layers, fingerprint
from rankopt.plan import DENSE, LayerChoice, Plan
from rankopt.refit import Refit, RefitOptions
from rankopt.space_file import LayerSpace
from rankopt.surgery import apply, structure

OPTIONS = CalibrationOptions(draws=2, temperature=1.0, max_rows=None)


# a block: two linear layers around a nonlinearity, replaced as a whole


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return self.down(torch.tanh(self.up(x))) * scale, None


class BlockKind(Kind):
    name = "block"
    classes = (Block,)
    linear = False

    def unfit(self, module: nn.Module) -> str | None:
        return None

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        width = module.up.in_features  # type: ignore[union-attr]
        own = sum(p.numel() for p in module.parameters())
        return {"in_channels": width, "out_channels": width, "bias": True, "own_params": own, "facts": (("times", 2),)}

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call | str:
        if len(args) + len(kwargs) > 1:
            return "it is called with a scale"
        rows, width = args[0].numel() // args[0].shape[-1], args[0].shape[-1]
        return Call(rows, (), (), macs=4 * rows * width**2)

    def weight(self, layer: LayerSpec, module: nn.Module) -> Tensor:
        m: Any = module
        return torch.cat([m.up.weight, m.down.weight.mT])[None]

    def bias(self, module: nn.Module) -> Tensor | None:
        return None

    def dense(self, layer: LayerSpec, call: Call) -> nn.Module:
        return Block(layer.in_channels)


class Narrow(nn.Module):
    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(first.clone()), nn.Parameter(second.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.relu(x @ self.first.mT) @ self.second.mT, None


class NarrowMethod(Decomposition):
    """A ReLU block of `rank` units, which equals the other at no rank."""

    name = "narrow"
    needs_recovery = True
    sliceable = False
    exact = False
    linear = False
    distilled: list[int]

    def why_not(self, layer: LayerSpec) -> str | None:
        return None if layer.kind == "block" else "only blocks"

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        return ("rank",)

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        return {"rank": layer.fact("times") * layer.in_channels}

    def params(self, layer: LayerSpec, ranks: Mapping[str, Any]) -> Any:
        return 2 * ranks["rank"] * layer.in_channels

    def macs(self, layer: LayerSpec, ranks: Mapping[str, Any]) -> Any:
        return 2 * ranks["rank"] * layer.in_channels * sum(call.batch for call in layer.calls)

    def stage_shapes(self, layer: LayerSpec, ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
        return [(ranks["rank"], layer.in_channels), (layer.in_channels, ranks["rank"])]

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        return {"weight": weight}

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        up, down = factors["weight"][0].chunk(2)
        return [up[: ranks["rank"]], down[: ranks["rank"]].mT]

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        raise AssertionError("nobody may ask what a block's weight is")

    def lost(self, factors: Factors, ranks: Mapping[str, Any]) -> Any:
        return 1 - ranks["rank"] / 1000

    def build(self, layer: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Module:
        return Narrow(*weights)

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        return {"rank": weights[0].shape[0]}

    def weights_of(self, layer: LayerSpec, ranks: Mapping[str, int], built: nn.Module) -> list[Tensor]:
        return list(built.parameters())

    def distil(
        self,
        layer: LayerSpec,
        ranks: Mapping[str, int],
        weights: Sequence[Tensor],
        dense: nn.Module,
        samples: BlockSamples,
    ) -> list[Tensor]:
        """The output side, by least squares."""
        x = torch.cat([call.args[0].flatten(0, -2) for call in samples]).double()
        y = torch.cat([call.output.flatten(0, -2) for call in samples]).double()
        self.distilled.append(len(x))
        hidden = torch.relu(x @ weights[0].double().mT)
        return [weights[0], torch.linalg.lstsq(hidden, y).solution.mT.to(weights[1])]


class Blocks(nn.Module):
    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.block, self.out, self.scaled = Block(), nn.Linear(6, 5), scaled

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.block(x, 2.0) if self.scaled else self.block(x)
        out: Tensor = self.out(x + y)
        return out


# groups behind a tap: what capsules are


class Votes(nn.Module):
    def __init__(self, groups: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("goi,ngi->ngo", self.weight, x)


class Voting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.votes = Votes(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.votes(x)).sum(1)


class VotingKind(Kind):
    name = "voting"
    classes = (Voting,)

    def unfit(self, module: nn.Module) -> str | None:
        return None

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        g, o, i = module.votes.weight.shape  # type: ignore[union-attr]
        return {"in_channels": g * i, "out_channels": g * o, "groups": g, "bias": False}

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call | str:
        return Call(args[0].shape[0], (), ())

    def weight(self, layer: LayerSpec, module: nn.Module) -> Tensor:
        weight: Tensor = module.votes.weight  # type: ignore[union-attr, assignment]
        return weight

    def bias(self, module: nn.Module) -> Tensor | None:
        return None

    def tap(self, module: nn.Module) -> nn.Module:
        return module.votes  # type: ignore[return-value]

    def dense(self, layer: LayerSpec, call: Call) -> nn.Module:
        return Voting()


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {**rankopt.kinds.table(), "block": BlockKind(), "voting": VotingKind()}
    narrow = NarrowMethod()
    narrow.distilled = []
    methods = {**rankopt.decompositions.table(), "narrow": narrow}
    monkeypatch.setattr(rankopt.kinds, "table", lambda: kinds)
    monkeypatch.setattr(rankopt.decompositions, "table", lambda: methods)


def blocks() -> tuple[Blocks, Tensor]:
    torch.manual_seed(0)
    return Blocks().eval(), torch.randn(24, 3, 6)


def space(*methods: str) -> LayerSpace:
    keeps = (0.25, 0.5)
    return LayerSpace(
        methods=methods, keeps=keeps, solved_keeps=keeps, rank_multiple=1, dense=False, allow_dense=True, explicit=(),
        cap={},
    )  # fmt: skip


def test_a_block_stands_before_its_parts_and_its_costs_hold_theirs() -> None:
    model, x = blocks()
    layers = find_layers(model, x)
    assert [la.name for la in layers] == ["block", "block.up", "block.down", "out"]
    assert [la.name for la in apart(layers)] == ["block", "out"]
    assert layers[0].params == sum(p.numel() for p in model.block.parameters())
    counted = count(model, x)
    assert other_macs(counted, layers) == 0
    choice = Plan({"block": LayerChoice("narrow", {"rank": 4})})
    assert plan_cost(layers, choice, counted.params, 0) == count(apply(model, choice), x)
    inner = Plan({"block.up": LayerChoice("svd", {"rank": 2})})
    assert plan_cost(layers, inner, counted.params, 0) == count(apply(model, inner), x)


def test_a_call_that_no_method_can_take_leaves_the_layer_alone() -> None:
    layers = find_layers(Blocks(scaled=True), torch.randn(2, 3, 6))
    assert layers[0].skip == "it is called with a scale"


def test_a_plan_can_not_change_a_layer_and_a_part_of_it() -> None:
    model, _ = blocks()
    both = Plan({"block": LayerChoice("narrow", {"rank": 4}), "block.up": LayerChoice("svd", {"rank": 2})})
    with pytest.raises(LayerError, match=r"block\.up: is a part of 'block', which the plan changes too"):
        apply(model, both)


def test_calls_of_a_block_are_kept_with_gradients_and_say_what_a_change_costs() -> None:
    model, x = blocks()
    model, x = model.double(), x.double()
    layers = find_layers(model, x[:1])
    divergence = Divergence.of(model(x[:1]))
    found = calibrate(model, layers[:1], as_batches(x, batch_size=8), divergence, OPTIONS)["block"]
    assert isinstance(found.fisher, BlockSamples)
    assert len(found.fisher) == 48
    assert torch.equal(torch.cat([call.args[0] for call in found.fisher]), x)
    with torch.no_grad():
        expected = torch.cat([call.output for call in found.fisher])
        torch.testing.assert_close(expected, model.block(x)[0])
    changed = apply(model, Plan({"block.down": LayerChoice("svd", {"rank": 5})}))
    with torch.no_grad():
        measured = float(divergence.between(model(x), changed(x)).mean())
    assert found.fisher.loss(model.block) == 0
    assert found.fisher.loss(changed.block) == pytest.approx(measured, rel=0.6)  # type: ignore[arg-type]


def test_candidates_of_a_block_are_distilled_and_its_parts_stay_out() -> None:
    model, x = blocks()
    layers = find_layers(model, x[:1])
    spaces = {la.name: space("narrow", "svd") for la in layers}
    divergence = Divergence.of(model(x[:1]))
    groups, factors = candidates(model, layers, spaces, [], as_batches(x), divergence, options=OPTIONS)
    assert [g.name for g in groups] == ["block", "out"]
    block = groups[0]
    assert block.choices[0] == DENSE
    assert {c.method for c in block.choices[1:]} == {"narrow"}
    assert block.refused["svd"] == "a layer of kind block is more than one matrix"
    assert (block.losses[1:] > 0).all()
    assert block.losses[-1] != block.losses[1]
    narrow: Any = rankopt.decompositions.table()["narrow"]
    done = len(narrow.distilled)
    assert done == len(block.choices) - 1
    built = apply(model, Plan({"block": block.choices[1]}), factors)
    assert len(narrow.distilled) == done  # once a choice
    assert float(factors.samples["block"].loss(built.block)) == pytest.approx(float(block.losses[1]), rel=1e-4)  # type: ignore[arg-type]
    only_parts = {**spaces, "block": space("svd")}
    groups, _ = candidates(model, layers, only_parts, [], as_batches(x), divergence, options=OPTIONS)
    assert [g.name for g in groups] == ["block.up", "block.down", "out"]


def test_a_replaced_block_is_saved_and_loaded(tmp_path: Any) -> None:
    model, x = blocks()
    made = Plan({"block": LayerChoice("narrow", {"rank": 4})}, fingerprint(model))
    built = apply(model, made)
    save(tmp_path / "m", built, made, measurements={})
    loaded = load(tmp_path / "m", Blocks())
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(x), built(x))  # not bit for bit: products differ with where their operands lie
    assert isinstance(structure(model, made).block, Narrow)


def test_statistics_are_taken_at_the_tap() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Voting(), nn.Linear(5, 3)).double().eval(), torch.randn(20, 4, 3).double()
    layers = find_layers(model, x[:1])
    assert (layers[0].kind, layers[0].group_shape, layers[0].macs) == ("voting", (4, 5, 3), 60)
    seen: list[Tensor] = []

    def score(output: Tensor, piece: Any) -> Tensor:
        return output.log_softmax(-1)[:, 0].sum()

    found = calibrate(model, layers[:1], as_batches(x), Divergence.of(model(x)), OPTIONS, score)["0"]
    assert found.metric.patch is not None
    expected = torch.einsum("ngi,ngj->gij", x, x) / 20
    torch.testing.assert_close(found.metric.patch, expected)
    change = torch.randn(1, 4, 5, 3, dtype=torch.float64)
    scores = found.fisher.scores(change)[0]  # type: ignore[union-attr]
    votes: Any = model[0].votes  # type: ignore[union-attr]
    for n in range(20):
        model.zero_grad()
        model(x[n : n + 1]).log_softmax(-1)[0, 0].backward()
        seen.append((votes.weight.grad * change[0]).sum())
    torch.testing.assert_close(scores[:20].double(), torch.stack(seen), rtol=1e-4, atol=1e-5)


def test_layers_that_are_no_product_are_not_refitted() -> None:
    model, x = blocks()
    layers = find_layers(model, x[:1])
    assert Refit(model, layers, as_batches(x), RefitOptions()).order == ["block.up", "block.down", "out"]
