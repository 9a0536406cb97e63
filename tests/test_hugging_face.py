"""Models of transformers from a configuration, with random weights: compressed, saved, loaded, exported."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt.artifact import load, save
from rankopt.checkpoint import load_checkpoint
from rankopt.cost import count, other_macs, plan_cost
from rankopt.exports import exporter
from rankopt.exports.onnx import Onnx
from rankopt.layers import apart, find_layers, fingerprint
from rankopt.manifest import Manifest
from rankopt.plan import LayerChoice, Plan

transformers = pytest.importorskip("transformers")


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def bert_head() -> nn.Module:
    """Whose output head shares its weight with the embedding and its bias with a parameter beside it."""
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    return model


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=32, n_embd=24, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


TOKENS = {
    "input_ids": torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(2, 9, dtype=torch.int64),
}
MODELS: dict[str, tuple[Any, dict[str, Tensor], int, str | None]] = {
    "bert": (bert, TOKENS, 7 * 2 + 2 + 3, None),
    "bert-head": (bert_head, TOKENS, 7 + 3 + 1, "cls.predictions.decoder"),
    "gpt2": (gpt2, TOKENS, 5 * 2 + 2, "lm_head"),
    "vit": (vit, {"pixel_values": torch.randn(2, 3, 16, 16)}, 7 * 2 + 2, None),
}


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Tensor], int, str | None, nn.Module]:
    torch.manual_seed(0)
    make, kwargs, layers, tied = MODELS[request.param]
    return make, kwargs, layers, tied, make().eval()


def stored(folder: Path) -> list[str]:
    from rankopt.tensor_file import read_header

    return list(read_header(folder / "model.safetensors")[0])


def plan_for(model: nn.Module, kwargs: dict[str, Tensor]) -> Plan:
    found = find_layers(model, (), kwargs)
    choices = {
        layer.name: LayerChoice("svd", {"rank": 5})
        for layer in found
        if layer.skip is None and layer.kind != "attention" and min(layer.in_channels, layer.out_channels) > 5
    }
    return Plan(choices, fingerprint(model, found), {la.name: la.skip for la in found if la.skip})


def test_layers_are_found_and_counted(made: Any) -> None:
    _, kwargs, layers, tied, model = made
    found = find_layers(model, (), kwargs)
    assert len([layer for layer in found if layer.skip is None]) == layers
    if tied is not None:
        (skipped,) = [layer for layer in found if layer.skip]
        assert skipped.name == tied
        assert "shares its weight" in skipped.skip
    whole = count(model, (), kwargs)
    assert sum(layer.macs for layer in apart(found)) == whole.macs  # attention's own products among them


def test_conv1d_is_a_linear_layer(made: Any) -> None:
    _, kwargs, _, _, model = made
    flipped = [layer for layer in find_layers(model, (), kwargs) if layer.flipped and layer.kind == "linear"]
    assert len(flipped) == (8 if isinstance(model, transformers.GPT2LMHeadModel) else 0)
    for layer in flipped:
        assert layer.weight_shape == tuple(model.get_submodule(layer.name).weight.shape)
        assert "(in × out)" in layer.describe()


def test_full_rank_gives_the_model_back(made: Any) -> None:
    _, kwargs, _, _, model = made
    found = [la for la in find_layers(model, (), kwargs) if la.skip is None and la.kind != "attention"]
    ranks = {la.name: LayerChoice("svd", {"rank": min(la.in_channels, la.out_channels)}) for la in found if not la.dims}
    small = rankopt.apply(model, Plan(ranks, fingerprint(model)))
    with torch.no_grad():
        torch.testing.assert_close(small(**kwargs).logits, model(**kwargs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("formats", [["pt2"], pytest.param(["onnx", "openvino"], marks=pytest.mark.slow)])
def test_compressed_saved_loaded_and_exported(made: Any, formats: list[str], tmp_path: Path) -> None:
    make, kwargs, _, _, model = made
    plan = plan_for(model, kwargs)
    small = rankopt.apply(model, plan)
    assert type(small) is type(model)
    layers, whole = find_layers(model, (), kwargs), count(model, (), kwargs)
    assert plan_cost(layers, plan, whole.params, other_macs(whole, layers)) == count(small, (), kwargs)
    formats = [name for name in formats if exporter(name).missing() is None]
    directory = save(tmp_path / "m", small, plan, measurements={}, exports=formats, example=((), kwargs))
    assert all(record["any_batch"] for record in Manifest.read(directory).exports.values())
    back = load(directory, make)
    with torch.no_grad():
        expected = small(**kwargs).logits
        assert torch.equal(back(**kwargs).logits, expected)
        if formats == ["pt2"]:
            alone = load(directory, standalone=True)(**kwargs)["logits"]
            torch.testing.assert_close(alone, expected, rtol=1e-3, atol=1e-5)
    assert all(check.ok is not False for check in rankopt.verify(directory, make, call=((), kwargs)))


@pytest.mark.slow
@pytest.mark.skipif(Onnx().missing() is not None, reason="onnx is not installed")
def test_onnx_by_the_runtime_itself(made: Any, tmp_path: Path) -> None:
    import onnxruntime

    _, kwargs, _, _, model = made
    small = rankopt.apply(model, plan_for(model, kwargs))
    rankopt.export(small, tmp_path, ["onnx"], (), kwargs)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(kwargs)
    for batch in (1, 3, 17):
        given = {k: torch.cat([v] * 9)[:batch] for k, v in kwargs.items()}
        found = session.run(None, {k: v.numpy() for k, v in given.items()})
        with torch.no_grad():
            expected = small(**given).logits
        assert float((torch.from_numpy(found[0]) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_save_pretrained_works_and_is_read_back(made: Any, tmp_path: Path) -> None:
    make, kwargs, _, _, model = made
    plan = plan_for(model, kwargs)
    small: Any = rankopt.apply(model, plan)
    small.save_pretrained(tmp_path / "plain")  # under the names of older versions, where a model has such
    assert (tmp_path / "plain" / "config.json").is_file()
    options = inspect.signature(small.save_pretrained).parameters
    own = {"save_original_format": False} if "save_original_format" in options else {}
    small.save_pretrained(tmp_path / "hf", **own)
    from rankopt.surgery import structure

    back = structure(make().eval(), plan)
    assert {f"{name}.0.weight" for name in plan.changed()} <= set(stored(tmp_path / "hf"))
    load_checkpoint(back, tmp_path / "hf")
    with torch.no_grad():
        assert torch.equal(back.eval()(**kwargs).logits, small(**kwargs).logits)


def test_from_a_directory_on_disk(made: Any, tmp_path: Path) -> None:
    _, kwargs, _, _, model = made
    model.save_pretrained(tmp_path / "hf")
    read = type(model).from_pretrained(tmp_path / "hf").eval()
    small = rankopt.apply(read, plan_for(model, kwargs))
    with torch.no_grad():
        assert torch.equal(small(**kwargs).logits, rankopt.apply(model, plan_for(model, kwargs))(**kwargs).logits)


@pytest.mark.slow
def test_a_search(made: Any) -> None:
    _, kwargs, _, _, model = made
    batches = [((), {k: torch.cat([v] * 8) for k, v in kwargs.items()})]
    result = rankopt.search(model, (), calibration=batches, example_kwargs=kwargs, limits=["macs<=80%"], trials=4)
    best = result.best()
    assert best.measurements["macs_kept"] <= 0.8
    assert type(best.build()) is type(model)
