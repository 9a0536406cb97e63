"""Attention as a citizen of the search: found, offered, costed, distilled, built, saved, merged, recovered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt.artifact import load, save
from rankopt.batches import as_batches
from rankopt.candidates import candidates
from rankopt.chains import merged
from rankopt.cost import count, other_macs, plan_cost
from rankopt.decompositions import method
from rankopt.divergence import Divergence
from rankopt.errors import InputError, LayerError
from rankopt.layers import find_layers, fingerprint
from rankopt.plan import LayerChoice, Plan
from rankopt.prediction import unpredicted
from rankopt.space_file import load_space, resolve
from rankopt.surgery import structure

FULL = {
    "attention_heads": {"rank_qk": 4, "rank_vo": 4},
    "attention_apart": {"rank_q": 8, "rank_k": 8, "rank_v": 8, "rank_o": 8},
    "attention_fused": {"rank_qkv": 8, "rank_o": 8},
}
CUT = {
    "attention_heads": {"rank_qk": 2, "rank_vo": 3},
    "attention_apart": {"rank_q": 2, "rank_k": 3, "rank_v": 4, "rank_o": 3},
    "attention_fused": {"rank_qkv": 5, "rank_o": 8},
    "attention_nystrom": {"landmarks": 3},
    "attention_nmf": {"rank": 2, "steps": 3},
    "attention_pnmf": {"rank": 2, "steps": 1},
    "attention_ntf": {"rank": 3, "steps": 2},
    "attention_ntf_grid": {"rank": 2, "steps": 2, "side": 3},
}
MIXERS = [name for name in CUT if name not in FULL]


class Net(nn.Module):
    """Nine tokens of three numbers each; encoder layers, perhaps causal."""

    def __init__(self, causal: bool = False, batch_first: bool = True, depth: int = 2) -> None:
        super().__init__()
        self.causal, self.batch_first = causal, batch_first
        self.embed = nn.Linear(3, 8)
        self.positions = nn.Parameter(torch.randn(9, 8))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=batch_first, norm_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """(batch, 9, 3) to (batch, 4)."""
        x = self.embed(x) + self.positions
        mask = torch.ones(9, 9, dtype=torch.bool).triu(1) if self.causal else None
        x = x if self.batch_first else x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x, mask, padding, self.causal)
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(x.mean(1))


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    model = Net(**options).eval()
    for layer in model.layers:
        nn.init.normal_(layer.self_attn.in_proj_bias, std=0.3)
        nn.init.normal_(layer.self_attn.out_proj.bias, std=0.3)
    return model


X = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(5))
BOTH = ("layers.0.self_attn", "layers.1.self_attn")


def plan_of(name: str, ranks: dict[str, int]) -> Plan:
    return Plan({layer: LayerChoice(name, ranks) for layer in BOTH})


def test_attention_is_found_with_its_calls() -> None:
    for model, note in ((net(), "none"), (net(causal=True), "causal")):
        found = {layer.name: layer for layer in find_layers(model, X)}
        assert [n for n, layer in found.items() if layer.kind == "attention"] == list(BOTH)
        layer = found[BOTH[0]]
        assert layer.skip is None
        assert (layer.fact("heads"), layer.fact("size"), layer.params) == (2, 4, 4 * 64 + 4 * 8)
        assert [(c.batch, c.in_size, c.note) for c in layer.calls] == [(4, (9,), note)]
        assert other_macs(count(model, X), found.values()) == 0
    padding = torch.zeros(4, 9, dtype=torch.bool)
    padding[1, 6:] = True
    (layer, _) = [la for la in find_layers(net(), X, {"padding": padding}) if la.kind == "attention"]
    assert layer.calls[0].note == "padding"


class Crossed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[:, :2], x[:, :2])[0]


def test_what_is_left_alone() -> None:
    x = torch.randn(1, 5, 8)
    (layer,) = [la for la in find_layers(Crossed(), x) if la.kind == "attention"]
    assert "no self-attention" in str(layer.skip)
    (layer,) = [la for la in find_layers(Crossed(add_bias_kv=True), x) if la.kind == "attention"]
    assert "add_bias_kv" in str(layer.skip)
    with pytest.raises(LayerError, match="more than one matrix"):
        rankopt.apply(net(), Plan({BOTH[0]: LayerChoice("svd", {"rank": 2})}))
    with pytest.raises(LayerError, match="self-attention"):
        rankopt.apply(net(), Plan({"head": LayerChoice("attention_nmf", {"rank": 2, "steps": 1})}))


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"batch_first": False}], ids=["", "causal", "tokens first"])
def test_full_rank_is_the_same_model(name: str, options: dict[str, bool]) -> None:
    model = net(**options)
    small = rankopt.apply(model, plan_of(name, FULL[name]))
    with torch.no_grad():
        assert torch.allclose(small(X), model(X), atol=1e-5)
        padding = torch.zeros(4, 9, dtype=torch.bool)
        padding[1, 6:] = True
        if not options.get("causal"):
            assert torch.allclose(small(X, padding), model(X, padding), atol=1e-5)


@pytest.mark.parametrize("name", CUT)
def test_costs_skeleton_and_saving(name: str, tmp_path: Path) -> None:
    model = net()
    plan = Plan(plan_of(name, CUT[name]).layers, fingerprint(model))
    small = rankopt.apply(model, plan)
    layers, whole = find_layers(model, X), count(model, X)
    assert plan_cost(layers, plan, whole.params, other_macs(whole, layers)) == count(small, X)
    blank = structure(net(), plan)
    blank.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(blank(X), small(X))
    save(tmp_path / "m", small, plan, measurements={})
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "m", net())(X), small(X))
    assert {m.training for m in rankopt.apply(net().train(), plan).modules()} == {True}


def test_every_method_is_exported_with_a_free_batch_size(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Net(depth=len(CUT)).eval()
    choices = {f"layers.{n}.self_attn": LayerChoice(name, CUT[name]) for n, name in enumerate(CUT)}
    plan = Plan(choices, fingerprint(model))
    small = rankopt.apply(model, plan)
    save(tmp_path / "m", small, plan, measurements={}, exports=["onnx", "pt2"], example=((X,), {}))
    session = onnxruntime.InferenceSession(tmp_path / "m" / "model.onnx")
    alone = load(tmp_path / "m", standalone=True)
    for n in (1, 3, 17):
        x = torch.randn(n, 9, 3)
        with torch.no_grad():
            expected = small(x)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(alone(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FULL)
def test_exact_methods_merge_back(name: str) -> None:
    model, plan = net(), plan_of(name, CUT[name])
    small = rankopt.apply(model, plan)
    with torch.no_grad():
        assert torch.allclose(merged(model, small, plan)(X), small(X), atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_do_not_merge_and_refuse_what_they_cannot_honour(name: str) -> None:
    model, plan = net(), plan_of(name, CUT[name])
    small = rankopt.apply(model, plan)
    with pytest.raises(LayerError, match="not linear"):
        merged(model, small, plan)
    small.causal = True
    with pytest.raises(InputError, match="causal"):
        small(X)


def test_a_part_and_the_whole_are_not_both_replaced() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    model, kwargs = transformers.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    whole = next(la for la in find_layers(model, (), kwargs) if la.kind == "attention")
    both = {whole.name: LayerChoice("attention_heads", {"rank_qk": 2, "rank_vo": 2}),
            f"{whole.name}.q_proj": LayerChoice("svd", {"rank": 2})}  # fmt: skip
    with pytest.raises(LayerError, match="is a part of"):
        rankopt.apply(model, Plan(both))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_blocks_of_transformers_at_full_rank(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    tokens = torch.randint(5, 30, (2, 7))
    kwargs: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": (tokens != tokens[1, 6]).long()}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=30, **small)).eval()
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **small)).eval()
        kwargs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    layers = find_layers(model, (), kwargs)
    (layer,) = [la for la in layers if la.kind == "attention"]
    whole = count(model, (), kwargs)
    for name, ranks in FULL.items():
        plan = Plan({layer.name: LayerChoice(name, ranks)})
        built = rankopt.apply(model, plan)
        with torch.no_grad():
            assert torch.allclose(built(**kwargs)[0], model(**kwargs)[0], atol=1e-5)
            back = merged(model, built, plan)(**kwargs)[0]
            assert torch.allclose(back, model(**kwargs)[0], atol=1e-5)
        assert plan_cost(layers, plan, whole.params, other_macs(whole, layers)) == count(built, (), kwargs)
    reason = method("attention_nmf").why_not(layer)
    assert ("causal" in str(reason)) == (kind == "gpt2")


def test_candidates_are_distilled_and_refusals_said() -> None:
    space = load_space({"methods": list(CUT), "keep": [0.4, 0.9], "rules": [{"match": "kind:linear", "dense": True}]})
    x = torch.randn(48, 9, 3)
    for causal in (False, True):
        model = net(causal=causal)
        layers = find_layers(model, x[:1])
        groups, factors = candidates(
            model, layers, resolve(space, layers), [], as_batches(x), Divergence.of(model(x).detach())
        )
        assert [g.name for g in groups] == list(BOTH)
        offered = {c.method for c in groups[0].choices}
        note = unpredicted(choice for group in groups for choice in group.choices)
        if causal:
            assert offered.isdisjoint(MIXERS)
            assert note == []
            assert "causal" in groups[0].refused["attention_nmf"]
            continue
        assert set(MIXERS) <= offered
        assert len(note) == 1
        assert note[0].startswith(f"the prediction does not apply to {', '.join(sorted(MIXERS))}, which")
        choice = next(c for c in groups[0].choices if c.method == "attention_nmf")
        layer = groups[0].layers[0]
        begun = method("attention_nmf").stage_weights(layer, factors.full(layer, "attention_nmf"), choice.ranks)
        trained = factors(layer, choice)
        assert any(not torch.allclose(a.float(), b.float()) for a, b in zip(begun, trained, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(trained, factors(layer, choice), strict=True))
        steps = {c.ranks["steps"] for c in groups[0].choices if "steps" in c.ranks}
        assert len(steps) > 1
        assert all(loss >= 0 for loss in groups[0].losses)


def test_a_search_with_recovery(tmp_path: Path) -> None:
    model, x = net(), torch.randn(60, 9, 3)
    offered = ["attention_heads", "attention_nystrom", "attention_pnmf"]
    rule = {"match": "kind:attention", "methods": offered, "keep": [0.4, 0.7]}
    space = {"methods": ["svd"], "keep": [0.5, 0.8], "rules": [rule]}
    result = rankopt.search(
        model, x[:1], calibration=x, limits=["macs<=70%"], trials=3, space=space, recovery={"steps": 4}
    )
    best = result.best()
    assert any(name in best.plan for name in BOTH)
    built = best.build()
    assert count(built, x[:1]).macs == best.measurements["macs"] <= 0.7 * count(model, x[:1]).macs
    best.save(tmp_path / "m")
    with torch.no_grad():
        assert torch.allclose(rankopt.load(tmp_path / "m", net())(x[:5]), built(x[:5]), atol=1e-6)
