import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rankopt.errors import DataError, LayerError
from rankopt.layers import (
    LayerSpec,
    decomposable,
    find_layers,
    fingerprint,
    group_weight,
    static_layers,
    ungroup_weight,
)

torch.set_num_threads(1)

CONVS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=2, bias=False), (2, 4, 9, 8)),
    (nn.Conv2d(6, 6, 3, groups=6), (1, 6, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (1, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, padding="valid"), (3, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (3, 4, 5, 5)),
    (nn.Conv1d(3, 5, 3, stride=2), (2, 3, 11)),
    (nn.Conv3d(2, 3, (1, 2, 3)), (1, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 7)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, groups=2), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, 3), (4, 7, 5)),
    (nn.Linear(5, 3), (2, 4, 5)),
    (nn.Linear(5, 3, bias=False), (5,)),
]


@pytest.mark.parametrize(("module", "shape"), CONVS, ids=lambda x: str(x)[:60])
def test_shapes_and_macs_against_torchs_counter(module: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    (spec,) = find_layers(nn.Sequential(module), x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    assert spec.macs == counter.get_total_flops() // 2 > 0
    assert spec.weight_shape == tuple(module.weight.shape)
    assert spec.params == sum(p.numel() for p in module.parameters())
    assert spec.name == "0"
    assert spec.skip is None
    grouped = group_weight(spec, module.weight)
    assert tuple(grouped.shape) == spec.group_shape
    assert torch.equal(ungroup_weight(spec, grouped), module.weight)


def test_groups_lead_in_a_grouped_transposed_weight() -> None:
    conv = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)
    (spec,) = static_layers(nn.Sequential(conv))
    for g in range(2):
        alone = nn.ConvTranspose1d(2, 3, 3, bias=False)
        with torch.no_grad():
            alone.weight.copy_(group_weight(spec, conv.weight)[g].transpose(0, 1))
        x = torch.randn(1, 4, 5)
        assert torch.allclose(alone(x[:, 2 * g : 2 * g + 2]), conv(x)[:, 3 * g : 3 * g + 3], atol=1e-6)


def test_group_weight_refuses_another_shape() -> None:
    with pytest.raises(LayerError, match=r"a: needs a weight of shape \(3, 5\), got \(5, 3\)"):
        group_weight(LayerSpec("a", "linear", 5, 3), torch.zeros(5, 3))


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, a: Any, b: Any = None, *, scale: float = 1.0) -> Tensor:
        if isinstance(a, dict):
            a, b = a["a"], a["b"]
        return (self.left(a) + self.right(input=b)) * scale


@pytest.mark.parametrize(
    ("example", "kwargs"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 5)), None),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 5)}, None),
        (torch.zeros(2, 3), {"b": torch.zeros(2, 5), "scale": 2.0}),
        (None, {"a": torch.zeros(2, 3), "b": torch.zeros(2, 5)}),
    ],
)
def test_ways_to_call(example: Any, kwargs: dict[str, Any] | None) -> None:
    assert [(s.name, s.macs) for s in find_layers(Inputs(), example, kwargs)] == [("left", 24), ("right", 40)]


def test_a_model_that_does_not_run_says_so() -> None:
    with pytest.raises(DataError, match="Sequential does not run on it: RuntimeError") as caught:
        find_layers(nn.Sequential(nn.Linear(3, 4)), torch.zeros(2, 5))
    assert "\n" not in caught.value.message
    with pytest.raises(DataError, match=r"needs a torch.nn.Module, got function"):
        find_layers(lambda x: x, torch.zeros(1))  # type: ignore[arg-type]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.unused = nn.Linear(4, 2)
        self.hidden = [nn.Linear(4, 4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.again(self.first(x)))


def test_a_shared_module_is_listed_once() -> None:
    layers = find_layers(Shared(), torch.zeros(3, 4))
    assert [s.name for s in layers] == ["first", "unused"]  # the one in a plain list is not a part of the model
    assert layers[0].aliases == ("again",)
    assert len(layers[0].calls) == 2
    assert layers[0].macs == 2 * 3 * 16
    assert "not called" in str(layers[1].skip)
    assert decomposable(layers) == layers[:1]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.emb.weight
        self.same_bias = nn.Linear(4, 4)
        self.same_bias.bias = self.mid.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.same_bias(self.mid(self.emb(x))))


def test_tied_parameters() -> None:
    skips = {s.name: s.skip for s in find_layers(Tied(), torch.tensor([1, 2]))}
    assert skips["head"] == "shares its weight with emb.weight, by whose choice it is replaced too"
    assert skips["mid"] == "shares its bias with same_bias.bias"
    assert skips["same_bias"] == "shares its bias with mid.bias"


@pytest.mark.parametrize("training", [True, False])
def test_attention_children(training: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    model.train(training)
    layers = find_layers(model, torch.zeros(2, 5, 8))
    names = [s.name for s in decomposable(layers)]
    assert names == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    assert all(s.macs == 2 * 5 * 8 * 16 for s in decomposable(layers))
    assert "nn.MultiheadAttention reads" in str(next(s for s in layers if s.name.endswith("out_proj")).skip)
    assert all(m.training == training for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class Subclass(nn.Linear):
    pass


def _pruned() -> nn.Module:
    import torch.nn.utils.prune as prune

    return prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized"),
        (torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "parametrized"),
        (torch.nn.utils.spectral_norm(nn.Linear(4, 4)), "computed by a hook"),
        (_pruned(), "computed by a hook"),
        (Subclass(4, 4), "Subclass is a subclass"),
        (nn.Linear(4, 0), "empty"),
    ],
)
def test_reasons(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    found = {s.name: s.skip for s in find_layers(model, torch.zeros(1, 4))}
    assert found["0"] is None
    assert reason in str(found["1"])
    assert {s.name: s.skip for s in static_layers(model)} == found
    (root,) = (s for s in find_layers(layer, torch.zeros(1, 4)) if s.name == "")
    assert reason in str(root.skip)


def test_torchscript_is_left_alone() -> None:
    traced = torch.jit.trace(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4))
    assert all(s.skip for s in find_layers(nn.Sequential(traced), torch.zeros(1, 4)))


def test_a_lone_layer_is_its_own_root() -> None:
    (spec,) = find_layers(nn.Linear(4, 3), torch.zeros(2, 4))
    assert (spec.name, spec.skip, spec.macs) == ("", None, 24)


class Upsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=[8, 8])


def test_a_call_with_more_than_the_input_is_left_alone() -> None:
    (spec,) = find_layers(Upsample(), torch.zeros(1, 2, 3, 3))
    assert "output_size" in str(spec.skip)


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)


def test_a_weight_that_the_parent_reads() -> None:
    (spec,) = find_layers(Direct(), torch.zeros(1, 4))
    assert "reads the weight directly" in str(spec.skip)
    assert spec.macs == 0


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten(), nn.Linear(16, 2))
    model[1].eval()  # a part that is frozen already
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    find_layers(model, torch.randn(2, 3, 4, 4))
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert seen == [1]  # the user's own hook ran
    with pytest.raises(DataError):
        find_layers(model, torch.randn(2, 5, 4, 4))
    assert model.training
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    (spec,) = find_layers(nn.Sequential(nn.Linear(4, 3, dtype=dtype)), torch.zeros(2, 4, dtype=dtype))
    assert (spec.dtype, spec.skip) == (str(dtype).removeprefix("torch."), None)


def test_unusual_weights_are_left_alone() -> None:
    complex_layer = nn.Linear(4, 3, dtype=torch.complex64)
    assert "complex64" in str(static_layers(nn.Sequential(complex_layer))[0].skip)
    assert static_layers(nn.Sequential(nn.LazyLinear(3)))[0].skip is not None


def test_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
        layers = find_layers(model, torch.empty(2, 3, 8, 8))
    assert [s.macs for s in layers] == [2 * 36 * 8 * 27, 2 * 8 * 36 * 10]


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.spare, self.first = nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def test_static_layers_are_the_same_but_for_the_run() -> None:
    model = Backwards()
    run, static = find_layers(model, torch.zeros(1, 3)), static_layers(model)
    assert [s.name for s in run] == ["first", "last", "spare"]
    assert [s.name for s in static] == ["last", "spare", "first"]
    assert all(
        s.skip is None and s.macs == 0 and s.params == r.params
        for s, r in zip(static, [run[1], run[2], run[0]], strict=True)
    )
    assert fingerprint(model) == fingerprint(model, run) == fingerprint(model, static)


def test_fingerprint_sees_values_and_shapes() -> None:
    def make(stride: int = 1) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3, stride=stride), nn.BatchNorm2d(3))

    base = fingerprint(make())
    assert fingerprint(make()) == base
    assert fingerprint(make().to(memory_format=torch.channels_last)) == base
    other = make()
    other[1].running_mean[0] = 1  # type: ignore[index, operator]
    assert fingerprint(other).architecture == base.architecture
    assert fingerprint(other).weights != base.weights
    assert fingerprint(make(2)).weights == base.weights
    assert fingerprint(make(2)).architecture != base.architecture
    assert fingerprint(make().bfloat16()).architecture == base.architecture
    assert math.prod(len(t) for t in (base.architecture, base.weights)) == 256
    with pytest.raises(DataError, match=r"0\.weight has no shape yet"):
        fingerprint(nn.Sequential(nn.LazyLinear(3)))
