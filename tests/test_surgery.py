import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankopt.decompositions import method
from rankopt.decompositions.metric import Metric
from rankopt.errors import LayerError, PlanError, RefusedDecomposition
from rankopt.layers import fingerprint, group_weight, static_layers, ungroup_weight
from rankopt.plan import DENSE, LayerChoice, Plan
from rankopt.surgery import apply, structure

torch.set_num_threads(1)


def svd(rank: int) -> LayerChoice:
    return LayerChoice("svd", {"rank": rank})


def dense_twin(model: nn.Module, plan: Plan) -> nn.Module:
    """The oracle: the same model with each changed weight replaced by what its stages stand for."""
    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    for layer in static_layers(twin):
        choice = plan[layer.name]
        if choice != DENSE:
            decomposition, weight = method(choice.method), modules[layer.name].weight
            factors = decomposition.factorize(layer, group_weight(layer, weight.detach().float()), Metric())
            stages = decomposition.stage_weights(layer, factors, choice.ranks)
            with torch.no_grad():
                weight.copy_(ungroup_weight(layer, decomposition.reconstruct(layer, stages)))
    return twin


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, 10),
    )


PLAN = Plan({"0": LayerChoice("svd_in", {"rank": 2}), "2": svd(3), "5": svd(4)})


def test_computes_what_the_dense_twin_computes() -> None:
    model, x = convnet().eval(), torch.randn(2, 3, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new = apply(model, PLAN)
    assert torch.allclose(new(x), dense_twin(model, PLAN)(x), atol=1e-5)
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    old = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert old.isdisjoint(t.untyped_storage().data_ptr() for t in new.state_dict().values())


def test_full_rank_gives_the_model_back() -> None:
    model, x = convnet().eval(), torch.randn(2, 3, 8, 8)
    full = Plan({"0": svd(8), "2": svd(6), "5": svd(10)})
    assert torch.allclose(apply(model, full)(x), model(x), atol=1e-4)


def test_dense_choices_leave_layers_as_they_are() -> None:
    model = convnet()
    new = apply(model, Plan({"0": DENSE, "5": svd(2)}))
    assert type(new.get_submodule("0")) is nn.Conv2d
    assert torch.equal(new.get_parameter("0.weight"), model[0].weight)
    assert apply(model, Plan({})) is not model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    new = apply(convnet().to(dtype), PLAN)
    assert all(p.dtype == dtype for p in new.parameters())
    assert all(p.dtype == dtype for p in structure(convnet().to(dtype), PLAN).parameters())


def test_modes_and_requires_grad() -> None:
    model = convnet()
    model[2].eval()
    model[5].weight.requires_grad_(False)
    new = apply(model, PLAN)
    assert all(m.training for m in new.get_submodule("0").modules())
    assert not any(m.training for m in new.get_submodule("2").modules())
    assert {n: p.requires_grad for n, p in new.get_submodule("5").named_parameters()} == {
        "0.weight": False,
        "1.weight": False,
        "1.bias": True,
    }
    for p in new.parameters():
        assert p.is_leaf
    new.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert new.get_parameter("0.0.weight").grad is not None


@pytest.mark.parametrize("make", [apply, structure])
def test_memory_format(make: Any) -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3))
    model[:2].to(memory_format=torch.channels_last)
    new = make(model, Plan({"0": svd(3), "1": svd(3), "2": svd(3)}))
    for name, expected in (("0.0", (72, 1, 24, 8)), ("0.1", (3, 1, 3, 3)), ("2.0", (54, 9, 3, 1))):
        assert new.get_parameter(f"{name}.weight").stride() == expected
    x = torch.randn(1, 8, 7, 7).to(memory_format=torch.channels_last)
    assert new.get_submodule("0")(x).is_contiguous(memory_format=torch.channels_last)


class Count:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.fc.register_forward_hook(self.keep)
        self.fc.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.fc.register_forward_hook(lambda m, a, k, out: out + 1, with_kwargs=True)
        self.seen: list[Tensor] = []
        self.layers = [self.fc]

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def test_hooks_and_references_outside_the_tree_follow() -> None:
    model, x = Hooked(), torch.randn(2, 4)
    new: Any = apply(model, Plan({"fc": svd(4)}))
    assert new.layers[0] is new.fc
    assert torch.allclose(new(x), model(x), atol=1e-5)
    assert len(new.seen) == len(model.seen) == 1  # the hook is bound to the new model
    assert new.fc._forward_hooks.keys() == model.fc._forward_hooks.keys()
    assert model.fc._forward_hooks is not new.fc._forward_hooks


def test_a_replaced_layer_still_tells_its_dtype() -> None:
    """Models of transformers read it off the weight."""
    layer = nn.Linear(6, 5, dtype=torch.float64)
    small: Any = apply(layer, Plan({"": LayerChoice("svd", {"rank": 2})}))
    assert small.weight.dtype == torch.float64
    assert small.weight.device == layer.weight.device
    assert set(small.state_dict()) == {"0.weight", "1.weight", "1.bias"}
    with pytest.raises(AttributeError):
        small.weight.shape  # noqa: B018


def test_backward_hooks_follow() -> None:
    model, count = nn.Sequential(nn.Linear(4, 4)), Count()
    model[0].register_full_backward_hook(lambda *a: count(*a))
    apply(model, Plan({"0": svd(2)}))(torch.randn(2, 4)).sum().backward()
    assert count.calls == 1


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"b": self.a})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["b"](torch.relu(self.a(x)))


def test_a_shared_module_stays_shared() -> None:
    model, x = Twice(), torch.randn(3, 4)
    plan = Plan({"a": svd(2)})
    new: Any = apply(model, plan)
    assert new.a is new.inner["b"]
    assert isinstance(new.a, nn.Sequential)
    assert torch.allclose(new(x), dense_twin(model, plan)(x), atol=1e-5)
    with pytest.raises(LayerError, match=r"'inner.b': is another name of 'a'"):
        apply(model, Plan({"inner.b": svd(2)}))


def test_tied_weights_elsewhere_stay_tied() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.mid, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.emb.weight

    new: Any = apply(Net(), Plan({"mid": svd(2)}))
    assert new.head.weight is new.emb.weight
    with pytest.raises(LayerError, match=r"head: can't be decomposed: shares its weight with emb.weight"):
        apply(Net(), Plan({"head": svd(2)}))


def test_a_lone_layer_gives_its_replacement() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 6)
    layer.register_forward_hook(lambda m, a, out: out + 1)
    new = apply(layer, Plan({"": svd(5)}))
    assert isinstance(new, nn.Sequential)
    assert torch.allclose(new(x), layer(x), atol=1e-5)


def test_dense_weights_of_replaced_layers_are_not_copied() -> None:
    class Watched(nn.Module):
        copied = 0

        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            type(self).copied += 1
            return nn.Identity()

    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    model[0].tag = Watched()
    with pytest.raises(LayerError, match="no linear"):
        apply(model, Plan({"9": svd(2)}))
    apply(model, Plan({"0": svd(2)}))
    assert Watched.copied == 0  # what hangs on the replaced layer is never visited
    old = weakref.ref(model[0])
    new = apply(model, Plan({"0": svd(2)}))
    del model
    gc.collect()
    assert old() is None
    assert new is not None


# what is refused, before anything is built -------------------------------------------------------------------------


def never(layer: Any, choice: Any) -> Any:
    raise AssertionError("a factorization began before all checks had passed")


def nan_in(module: Any) -> nn.Module:
    with torch.no_grad():
        module[5].weight[0, 0] = float("nan")
    return module


def lazy_bias(module: Any) -> nn.Module:
    with torch.no_grad():
        module[0].bias[0] = float("inf")
    return module


@pytest.mark.parametrize(
    ("model", "plan", "says"),
    [
        (convnet(), {"5": svd(2), "conv9": svd(2)}, "'conv9': the model has no linear"),
        (convnet(), {"5": svd(2), "55": DENSE}, "closest is '5'"),
        (convnet(), {"5": svd(2), "0": svd(9)}, "0: svd needs .*1 <= rank <= 8"),
        (convnet(), {"5": svd(2), "0": LayerChoice("svd", {"rang": 2})}, "0: svd needs the ranks rank"),
        (convnet(), {"5": svd(2), "0": LayerChoice("magic")}, "unknown decomposition 'magic'"),
        (convnet(), {"5": svd(2), "0": LayerChoice("dense", {"rank": 1})}, "dense takes no ranks"),
        (nan_in(convnet()), {"0": svd(2), "5": svd(2)}, r"5: weight \(linear 10×108\) holds NaN"),
        (lazy_bias(convnet()), {"5": svd(2), "0": svd(2)}, "0: bias"),
        (convnet().to("meta"), {"0": svd(2)}, "0: weight is on the meta device"),
    ],
)
def test_refusals_come_first(model: nn.Module, plan: dict[str, LayerChoice], says: str) -> None:
    with pytest.raises(LayerError, match=says) as caught:
        apply(model, Plan(plan), never)
    assert "\n" not in caught.value.message


def test_nan_in_a_layer_that_stays_is_no_matter() -> None:
    apply(nan_in(convnet()), Plan({"0": svd(2)}))


def test_skipped_layers_say_why() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(LayerError, match=r"self_attn.out_proj: can't be decomposed: nn.MultiheadAttention reads"):
        apply(model, Plan({"self_attn.out_proj": svd(2)}))
    apply(model, Plan({"self_attn.out_proj": DENSE}))


def test_fingerprints() -> None:
    model = convnet()
    plan = Plan({"0": svd(2)}, fingerprint(model), {})
    apply(model, plan)
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    nn.init.normal_(other[0].weight)
    with pytest.raises(PlanError, match=r"made for other weights.*other_weights=True"):
        apply(other, plan)
    apply(other, plan, other_weights=True)
    structure(other, plan)
    for make in (apply, structure):
        wider = convnet()
        wider[0] = nn.Conv2d(3, 8, 5, padding=2)
        with pytest.raises(PlanError, match=r"another architecture.*the plan does not know '2'"):
            make(wider, plan)
        with pytest.raises(PlanError, match=r"another architecture.*same names, but a shape"):
            make(wider, Plan({**plan.layers, "2": DENSE, "5": DENSE}, plan.fingerprint))
        with pytest.raises(PlanError, match=r"another architecture.*'0': the model has no.*closest is '00'"):
            make(nn.ModuleDict({"00": nn.Linear(2, 2)}), plan)
    with pytest.raises(PlanError, match="another architecture"):
        apply(apply(model, plan), plan, other_weights=True)


# factors from outside ------------------------------------------------------------------------------------------------


def test_given_factors_are_used_and_not_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    cache = {"0": [torch.randn(1, 2, 4), torch.randn(1, 4, 2)], "1": [torch.randn(1, 3, 4), torch.randn(1, 3, 3)]}
    kept = copy.deepcopy(cache)
    asked = []

    def give(layer: Any, choice: LayerChoice) -> tuple[Tensor, ...]:
        asked.append((layer.name, choice.ranks["rank"]))
        return tuple(cache[layer.name])

    new: Any = apply(model, Plan({"0": svd(2), "1": svd(3)}), give)
    assert asked == [("0", 2), ("1", 3)]
    assert torch.equal(new[0][0].weight, cache["0"][0][0])
    with torch.no_grad():
        for p in new.parameters():
            p.add_(1)
    assert all(torch.equal(a, b) for n in cache for a, b in zip(cache[n], kept[n], strict=True))


@pytest.mark.parametrize(
    "weights", [[], [torch.zeros(1, 2, 4)], [torch.zeros(1, 2, 4), torch.zeros(1, 4, 3)], [torch.zeros(2, 4)] * 2]
)
def test_factors_of_other_shapes_are_refused(weights: list[Tensor]) -> None:
    with pytest.raises(LayerError, match=r"0: svd\(rank=2\) needs stage weights of the shapes"):
        apply(nn.Sequential(nn.Linear(4, 4)), Plan({"0": svd(2)}), lambda *_: weights)


def test_values_that_the_dtype_cannot_hold() -> None:
    with pytest.raises(RefusedDecomposition, match="float16 can't hold"):
        apply(
            nn.Sequential(nn.Linear(4, 4).half()),
            Plan({"0": svd(2)}),
            lambda *_: [torch.full((1, 2, 4), 1e6), torch.zeros(1, 4, 2)],
        )


# PyTorch's fused transformer path ------------------------------------------------------------------------------------


def masks() -> list[dict[str, Tensor]]:
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    square = nn.Transformer.generate_square_subsequent_mask(6)
    return [{}, {"src_key_padding_mask": padding}, {"mask": square}]


@pytest.mark.parametrize("mask", masks(), ids=["none", "padding", "causal"])
@pytest.mark.parametrize("where", ["layers.0.linear1", "layers.1.linear2"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fused_transformer_path_is_off(mask: dict[str, Tensor], where: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first).eval()
    plan, x = Plan({where: svd(3)}), torch.randn(2, 6, 8)
    new: Any = apply(model, plan)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            expected = dense_twin(model, plan)(x, **mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        assert torch.allclose(new(x, **mask), expected, atol=1e-5)
    n = int(where[7])
    assert [m.activation_relu_or_gelu for m in new.layers] == [0 if i == n else 1 for i in range(3)]
    assert all(m.activation_relu_or_gelu == 1 for m in model.layers)  # type: ignore[union-attr]
    built: Any = structure(model, plan)
    assert [m.activation_relu_or_gelu for m in built.layers] == [m.activation_relu_or_gelu for m in new.layers]
    assert not new.use_nested_tensor
    assert not built.use_nested_tensor
    assert model.use_nested_tensor != norm_first


def test_an_encoder_that_nothing_changed_keeps_its_fused_path() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    new: Any = apply(nn.Sequential(encoder, nn.Linear(8, 8)), Plan({"1": svd(2)}))
    assert new[0].use_nested_tensor
    assert new[0].layers[0].activation_relu_or_gelu == 1


# structure ----------------------------------------------------------------------------------------------------------


def test_structure_has_the_shapes_of_apply_and_decomposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convnet().eval()
    applied = apply(model, PLAN)
    for name in ("factorize", "stage_weights"):
        monkeypatch.setattr(type(method("svd")), name, never)
    built = structure(nan_in(copy.deepcopy(model)), PLAN)
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in built.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in applied.named_parameters()
    }
    built.load_state_dict(applied.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(built(x), applied(x))
    assert all(p.is_meta for p in structure(convnet().to("meta"), PLAN).parameters())


# models that resist -------------------------------------------------------------------------------------------------


def test_models_that_can_not_be_copied() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].last = model(torch.randn(1, 4))
    with pytest.raises(LayerError, match=r"Sequential can't be copied \(detach the tensor 1.last\)") as caught:
        apply(model, Plan({"0": svd(2)}))
    assert "\n" not in caught.value.message
    del model[1].last
    model.numbers = (n for n in range(3))
    with pytest.raises(LayerError, match="can't be copied: TypeError"):
        apply(model, Plan({"0": svd(2)}))


def test_a_deepcopy_that_ignores_its_memo_is_noticed() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def __deepcopy__(self, memo: Any) -> nn.Module:
            return Own()

    with pytest.raises(LayerError, match=r"0\.fc: was not replaced"):
        apply(nn.Sequential(Own()), Plan({"0.fc": svd(2)}))


def test_traced_graphs() -> None:
    model, x = convnet().eval(), torch.randn(1, 3, 8, 8)
    traced = torch.fx.symbolic_trace(model)
    assert torch.allclose(apply(traced, PLAN)(x), apply(model, PLAN)(x), atol=1e-6)
