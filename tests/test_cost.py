import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankopt.cost import Cost, count, count_thop, other_macs, plan_cost, plan_macs, plan_params, total_params
from rankopt.decompositions import table
from rankopt.decompositions.chained import ChainDecomposition
from rankopt.errors import DataError, LayerError, UncountedOperationError
from rankopt.layers import find_layers, static_layers
from rankopt.operations import free
from rankopt.plan import DENSE, LayerChoice, Plan
from rankopt.surgery import apply

torch.set_num_threads(1)


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, output_padding=1, groups=3)
        self.dw = nn.Conv2d(6, 6, 3, groups=6)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(24, 16)
        self.twice = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dw(self.up(self.b(F.relu(self.bn(self.a(x))))))
        return self.twice(F.softmax(self.twice(self.fc(self.pool(x).flatten(1))), -1))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv, self.fc = nn.Embedding(11, 6), nn.Conv1d(6, 8, 3, stride=2), nn.Linear(8, 4)
        self.up, self.norm = nn.ConvTranspose1d(4, 3, 2, stride=2), nn.LayerNorm(8)

    def forward(self, ids: Tensor, *, scale: float) -> Tensor:
        x = self.norm(self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2))
        return self.up(self.fc(x).transpose(1, 2)) * scale


CASES: list[tuple[nn.Module, Any, dict[str, Any]]] = [
    (Convs(), torch.randn(2, 3, 9, 8), {}),
    (Sequence(), torch.randint(0, 11, (3, 9)), {"scale": 2.0}),
    (nn.Sequential(nn.Conv3d(2, 4, 2), nn.Flatten(), nn.Linear(4 * 8, 3)), torch.randn(1, 2, 3, 3, 3), {}),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0), nn.Linear(16, 3)), torch.randn(3, 4, 4), {}),
    (nn.Linear(7, 3), torch.randn(2, 3, 4, 7), {}),
]


@pytest.mark.parametrize(("model", "example", "kwargs"), CASES, ids=lambda x: type(x).__name__)
def test_three_counts_agree_where_there_are_only_layers(model: nn.Module, example: Any, kwargs: Any) -> None:
    layers = find_layers(model, example, kwargs)
    counted = count(model, example, kwargs)
    assert counted.macs == sum(s.macs for s in layers) == count_thop(model, example, kwargs).macs > 0
    assert counted.params == count_thop(model, example, kwargs).params == sum(p.numel() for p in model.parameters())
    assert other_macs(counted, layers) == 0


# capsule layers are in no such model; test_capsules.py counts their methods
@pytest.mark.parametrize("name", sorted(name for name in table() if not name.startswith("caps_")))
def test_plans_cost_what_the_built_model_costs(name: str) -> None:
    model, example, _ = copy.deepcopy(CASES[0])
    decomposition = table()[name]
    layers = find_layers(model, example)
    choices = {}
    for layer in layers:
        if layer.skip is None and decomposition.why_not(layer) is None:
            bounds = decomposition.rank_bounds(layer)
            choices[layer.name] = LayerChoice(name, {k: max(1, bound // 2) for k, bound in bounds.items()})
    assert choices
    plan = Plan({**choices, "dw": DENSE})
    dense = count(model, example)
    predicted = plan_cost(layers, plan, dense.params, other_macs(dense, layers))
    built = apply(model, plan)
    assert predicted == count(built, example)
    if isinstance(decomposition, ChainDecomposition):  # thop knows plain layers alone
        assert predicted == count_thop(built, example)
    assert predicted != dense
    assert predicted == Cost(plan_macs(layers, plan), plan_params(total_params(model), layers, plan))


class Attention(nn.Module):
    """One explicit formula to count by hand: 4 projections of 8×8, and two products of 5×5 by 8."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "einsum":
            y = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)
        else:
            y = (q @ k.mT).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", ["sdpa", "causal", "einsum", "matmul"])
def test_attention_by_hand(how: str) -> None:
    model, x = Attention(how), torch.randn(3, 5, 8)
    layers = find_layers(model, x)
    counted = count(model, x)
    assert counted.macs == 3 * (5 * 4 * 64 + 2 * 5 * 5 * 8)
    assert other_macs(counted, layers) == 3 * 2 * 5 * 5 * 8
    plan = Plan({"q": LayerChoice("svd", {"rank": 2})})
    assert plan_cost(layers, plan, counted.params, other_macs(counted, layers)) == count(apply(model, plan), x)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers_in_both_modes(training: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).train(training)
    x = torch.randn(3, 5, 8)
    by_hand = 2 * 3 * (5 * 4 * 64 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16)
    assert count(model, x, {"src_key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}).macs == by_hand
    assert all(m.training == training for m in model.modules())
    layers = find_layers(model, x)
    assert other_macs(count(model, x), layers) == 2 * 3 * (5 * 4 * 64 + 2 * 5 * 5 * 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    assert count(attention, (x, x, x)).macs == 3 * (5 * 4 * 64 + 2 * 5 * 5 * 8)


class Runs(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda a, b: a @ b[:, 0], 12),
        (lambda a, b: a[0] @ b[:, 0], 4),
        (lambda a, b: torch.vdot(a[0], b[:, 0]), 4),
        (lambda a, b: a @ b, 60),
        (lambda a, b: torch.addmv(a[:, 0], a, b[:, 0]), 12),
        (lambda a, b: torch.zeros(3, 5).addmm_(a, b), 60),
        (lambda a, b: torch.zeros(3).addmv_(a, b[:, 0]), 12),
        (lambda a, b: torch.zeros(2, 3, 5).baddbmm_(a.expand(2, 3, 4), b.expand(2, 4, 5)), 120),
        (lambda a, b: torch.addbmm(torch.zeros(3, 5), a.expand(2, 3, 4), b.expand(2, 4, 5)), 120),
        (lambda a, b: torch.mm(a, b, out=torch.zeros(3, 5)), 60),
        (lambda a, b: torch.cdist(a, b.T.contiguous()), 60),
        (lambda a, b: torch.cdist(a.repeat(10, 1), b.T.repeat(6, 1)), 30 * 30 * 4),
        (lambda a, b: F.bilinear(a, torch.zeros(3, 5), torch.zeros(6, 4, 5)), 3 * 6 * (4 * 5 + 5)),
        (lambda a, b: torch.conv_tbc(torch.zeros(7, 2, 3), torch.zeros(3, 3, 4), torch.zeros(4)), 5 * 2 * 3 * 3 * 4),
        (lambda a, b: torch.outer(a[0], b[0]) + torch.kron(a, b).sum(), 0),
        (lambda a, b: F.interpolate(a[None, None], scale_factor=2, mode="bilinear"), 0),
        (lambda a, b: F.grid_sample(a[None, None], torch.zeros(1, 2, 2, 2)), 0),
        (lambda a, b: a.sort()[0].cumsum(0).norm() + torch.linalg.vector_norm(b) + F.gelu(a).sum(), 0),
        (lambda a, b: a.var() + F.layer_norm(a, (4,)).std() + F.unfold(a[None, None], 2).sum(), 0),
        (lambda a, b: torch.linalg.multi_dot([a, b, torch.ones(5, 1)]), 20 + 12),
    ],
)
def test_products_outside_of_modules(function: Any, macs: int) -> None:
    assert count(Runs(function), (torch.ones(3, 4), torch.ones(4, 5))) == Cost(macs, 0)


@pytest.mark.parametrize("cell", [nn.GRU(4, 6), nn.RNN(4, 6), nn.LSTMCell(4, 6), nn.GRUCell(4, 6)], ids=repr)
def test_recurrences_that_run_as_products(cell: Any) -> None:
    x = torch.randn(5, 2, 4) if isinstance(cell, nn.RNNBase) else torch.randn(2, 4)
    weights = sum(p.numel() for n, p in cell.named_parameters() if n.startswith("weight"))
    assert count(cell, x).macs == weights * (10 if x.dim() == 3 else 2)


def test_lstm_kernels_are_not_taken_for_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rnn = nn.Linear(4, 4), nn.LSTM(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.fc(x))[0]

    model, x = Net(), torch.randn(5, 2, 4)
    with pytest.raises(UncountedOperationError, match=r"Net\.rnn runs aten::mkldnn_rnn_layer") as caught:
        count(model, x)
    assert "\n" not in caught.value.message
    assert "allow (['aten::mkldnn_rnn_layer'])" in caught.value.message
    assert count(model, x, allow=("aten::mkldnn_rnn_layer",)).macs == 5 * 2 * 16


@torch.library.custom_op("rankopt_test::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def test_custom_operations() -> None:
    model, x = Runs(lambda a: torch.ops.rankopt_test.product(a, a) @ a), torch.ones(3, 3)
    with pytest.raises(UncountedOperationError, match="runs rankopt_test::product"):
        count(model, x)
    assert count(model, x, allow=["rankopt_test::product"]).macs == 27


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda a: torch.linalg.svd(a), "_linalg_svd"),
        (lambda a: torch.linalg.inv(a + torch.eye(4)), "linalg_inv_ex"),
        (lambda a: torch.fft.rfft(a), "_fft_r2c"),
        (lambda a: torch.sparse.mm(a.to_sparse(), a), "_sparse_addmm"),
        (lambda a: torch.pdist(a), "_pdist_forward"),
        (lambda a: torch.matrix_exp(a), "linalg_matrix_exp"),
    ],
)
def test_arithmetic_that_no_counter_knows(function: Any, name: str) -> None:
    with pytest.raises(UncountedOperationError, match=f"aten::{name}"):
        count(Runs(function), torch.eye(4))


def test_quantized_layers() -> None:
    from torch.ao.quantization import quantize_dynamic

    model = quantize_dynamic(nn.Sequential(nn.Linear(4, 5)))
    with pytest.raises(UncountedOperationError, match="quantized::linear_dynamic"):
        count(model, torch.randn(2, 4))


def test_an_error_inside_the_model_can_not_hide_the_operation() -> None:
    class Careful(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return torch.fft.fft(x)
            except Exception:
                return x

    with pytest.raises(UncountedOperationError):
        count(Careful(), torch.ones(3))
    with pytest.raises(DataError, match="does not run on it"):
        count(nn.Linear(3, 4), torch.ones(2))


@pytest.mark.parametrize("name", ["relu_", "sqrt", "_convert_indices_from_coo_to_csr", "detach", "native_batch_norm"])
def test_names_that_only_look_like_products(name: str) -> None:
    assert free(f"aten::{name}")


def test_counting_leaves_the_model_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    model, example, _ = copy.deepcopy(CASES[0])
    model.bn.eval()  # type: ignore[union-attr]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = {n: (set(vars(m)), m.training, len(m._forward_hooks)) for n, m in model.named_modules()}
    count(model, example)
    count_thop(model, example)
    assert {n: (set(vars(m)), m.training, len(m._forward_hooks)) for n, m in model.named_modules()} == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    assert total_params(model) == 16 + 4 + 4 + 8
    assert count(model, torch.ones(2, 4)) == Cost(64, 32)
    with pytest.raises(DataError, match=r"0\.weight has no shape yet"):
        total_params(nn.Sequential(nn.LazyLinear(3)))


def test_other_inputs_are_noticed() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(UncountedOperationError, match="the same example input"):
        other_macs(count(model, torch.ones(2, 4)), find_layers(model, torch.ones(3, 4)))


def test_plans_that_do_not_fit() -> None:
    layers = find_layers(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4))
    with pytest.raises(LayerError, match="'1': the plan changes a layer"):
        plan_macs(layers, Plan({"1": LayerChoice("svd", {"rank": 1})}))
    with pytest.raises(LayerError, match="0: svd needs"):
        plan_params(20, layers, Plan({"0": LayerChoice("svd", {"rank": 5})}))
    with pytest.raises(LayerError, match="its calls are not known"):
        plan_macs(static_layers(nn.Sequential(nn.Linear(4, 4))), Plan({"0": LayerChoice("svd", {"rank": 1})}))


def test_without_thop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "thop", None)
    with pytest.raises(ValueError, match="needs the package ultralytics-thop"):
        count_thop(nn.Linear(2, 2), torch.ones(1, 2))


def test_meta_models_are_counted_too() -> None:
    with torch.device("meta"):
        assert count(nn.Linear(4096, 4096), torch.empty(8, 4096)).macs == 8 * 4096**2
