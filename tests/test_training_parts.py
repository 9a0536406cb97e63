"""The parts of a training, each against an independent computation: losses, decay on products, chains, data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rankopt.batches import Batch, as_batches
from rankopt.chains import balance, chains, decomposed, merged
from rankopt.divergence import Divergence
from rankopt.errors import DataError, InputError, PlanError
from rankopt.factorized import factorized
from rankopt.optimization import Steps, product_gradients
from rankopt.plan import LayerChoice, Plan
from rankopt.randomness import Randomness
from rankopt.recover import recover
from rankopt.recovery_options import RecoveryOptions
from rankopt.surgery import apply
from rankopt.training_data import TrainingData
from rankopt.training_loss import TrainingLoss, cosines, inner_error, mixed, watched_layers


class Net(nn.Module):
    """One layer of every kind that is treated differently: grouped, depthwise, transposed, shared, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.bn = nn.BatchNorm2d(6)
        self.tucker = nn.Conv2d(6, 6, 3)
        self.cp = nn.Conv2d(6, 6, 3)
        self.tt = nn.Conv2d(6, 6, 3)
        self.ring = nn.Conv2d(6, 6, 3)
        self.fc = nn.Linear(6, 5)
        self.again = self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.up(self.depthwise(self.grouped(torch.relu(self.a(x))))))
        return self.again(self.ring(self.tt(self.cp(self.tucker(x)))).mean((2, 3)))


PLAN = Plan(
    {
        "a": LayerChoice("spatial_svd", {"rank": 5}),
        "grouped": LayerChoice("svd_in", {"rank": 2}),
        "depthwise": LayerChoice("spatial_svd", {"rank": 2}),
        "up": LayerChoice("svd", {"rank": 4}),
        "tucker": LayerChoice("tucker2", {"rank_out": 3, "rank_in": 4}),
        "cp": LayerChoice("cp", {"rank": 7}),
        "tt": LayerChoice("tensor_train", {"rank_1": 3, "rank_2": 4, "rank_3": 3}),
        "ring": LayerChoice("tensor_ring", {"rank_1": 2, "rank_2": 2, "rank_3": 2}),
        "fc": LayerChoice("svd", {"rank": 3}),
    }
)
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = Net().eval()
    return dense, apply(dense, PLAN).eval()


def test_products_are_what_the_chains_compute(pair: tuple[nn.Module, nn.Module]) -> None:
    dense, model = pair
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # as after training: no longer what the weights were decomposed to
        back = merged(dense, model, PLAN).eval()
        torch.testing.assert_close(back(X), model(X), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(back(X), dense(X), atol=1e-3)
    assert back.again is back.fc  # type: ignore[attr-defined]
    assert [type(m) for m in back.modules()] == [type(m) for m in dense.modules()]
    assert sorted(decomposed(dense, model)) == sorted(PLAN.changed())
    assert decomposed(dense, dense) == []


def test_decay_on_the_product_is_the_gradient_of_its_norm(pair: tuple[nn.Module, nn.Module]) -> None:
    """The oracle takes the weight from what the chain answers to unit inputs, and lets autograd do the rest."""
    dense, model = pair
    found = {id(p): g for p, g in product_gradients(chains(dense, model, PLAN))}
    for name in ("a", "tucker", "fc", "cp", "ring", "tt"):
        layer, chain = getattr(dense, name), getattr(model, name)
        inputs = layer.weight.shape[1]
        if isinstance(layer, nn.Linear):
            units = torch.eye(inputs)
        else:
            units = torch.zeros(inputs, inputs, 5, 5)
            units[range(inputs), range(inputs), 2, 2] = 1.0
        answers = chain(units) - chain(torch.zeros_like(units))
        total = answers.square().sum() / 2
        if name == "a":  # padded: all kernel positions are seen around the unit
            assert answers.shape[-1] == 5
        factors = [p for p in chain.parameters() if p.dim() > 1]
        for p, expected in zip(factors, torch.autograd.grad(total, factors), strict=True):
            torch.testing.assert_close(found[id(p)], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_decays_the_product_and_not_the_factors(optimizer: Any) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    plan = Plan({"0": LayerChoice("svd", {"rank": 3})})
    model = apply(dense, plan)
    options = RecoveryOptions(
        optimizer=optimizer, decay_on="product", decomposed_weight_decay=0.3, weight_decay=0.1, warmup=0.0, lr=0.01,
        momentum=0.0, clip=0.0, decomposed_lr=2.0,
    )  # fmt: skip
    steps = Steps.of(model, ["0"], chains(dense, model, plan), options)
    first, second = (model[0][n].weight for n in (0, 1))  # type: ignore[index]
    start = [p.detach().clone() for p in model.parameters()]
    w = second @ first
    expected = torch.autograd.grad(w.square().sum() / 2, [first, second])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert steps.take(0, 10)
    rate = 0.01 * 2.0
    torch.testing.assert_close(first, start[0] - rate * 0.3 * expected[0])
    torch.testing.assert_close(second, start[1] - rate * 0.3 * expected[1])
    torch.testing.assert_close(model[1].weight, start[3] * (1 - 0.01 * 0.1))  # type: ignore[index]
    assert torch.equal(model[0][1].bias, start[2])  # type: ignore[index]


def test_decomposed_layers_have_a_rate_and_a_decay_of_their_own() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model = apply(dense, Plan({"0": LayerChoice("svd", {"rank": 3})}))
    options = RecoveryOptions(decomposed_lr=0.5, decomposed_weight_decay=0.0, weight_decay=0.1)
    groups = Steps.of(model, ["0"], [], options).optimizer.param_groups
    found = {id(p): (g["factor"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = {"0.0.weight": (0.5, 0.0), "0.1.weight": (0.5, 0.0), "0.1.bias": (0.5, 0.0)}
    expected |= {"1.weight": (1.0, 0.1), "1.bias": (1.0, 0.0)}
    assert {name: found[id(p)] for name, p in model.named_parameters()} == expected


# balance and factorized nets -----------------------------------------------------------------------------------------


def test_balance_keeps_the_product_and_gives_spectral_factors(pair: tuple[nn.Module, nn.Module]) -> None:
    dense, model = pair
    found = chains(dense, model, PLAN)
    before = [c.product().detach().clone() for c in found]
    balance(found)
    for chain, product in zip(found, before, strict=True):
        torch.testing.assert_close(chain.product(), product, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    one = nn.Sequential(nn.Linear(7, 6))
    plan = Plan({"0": LayerChoice("svd", {"rank": 4})})
    net = apply(one, plan)
    balance(chains(one, net, plan))
    singular = torch.linalg.svdvals(one[0].weight)[:4]
    first, last = net[0][0].weight, net[0][1].weight  # type: ignore[index]
    torch.testing.assert_close(first @ first.T, singular.diag(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.T @ last, singular.diag(), rtol=1e-4, atol=1e-4)


def test_a_factorized_net_keeps_its_share_and_learns_from_labels() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    x = torch.randn(90, 2, 6, 6)
    y = torch.arange(90) % 3
    x = x + y.reshape(-1, 1, 1, 1)
    net, plan = factorized(dense, x[:1], keep=0.4, dense=["7"])
    from rankopt.cost import count

    assert plan["7"].method == "dense"
    assert plan["3"].method == "spatial_svd"
    assert count(net, x[:1]).macs <= 0.42 * count(dense, x[:1]).macs
    options = {"distill": 0.0, "decay_on": "product", "orthogonality": 0.01, "device": "cpu", "precision": "float32"}
    found = recover(net, dense, (x, y), plan=plan, steps=60, lr=0.1, batch=30, **options).model
    with torch.no_grad():
        assert (found(x).argmax(1) == y).float().mean() > 0.8
        back = merged(dense, found, plan).eval()
        torch.testing.assert_close(back(x[:5]), found(x[:5]), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="keep: must lie above 0"):
        factorized(dense, x[:1], keep=0.0)
    with pytest.raises(InputError, match="none of its 3 layers can be factorized"):
        factorized(dense, x[:1], dense=["*"])


def test_a_model_that_the_plan_did_not_make_is_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    dense, model = pair
    with pytest.raises(PlanError, match="a: the plan says"):
        chains(dense, dense, PLAN)
    other = Plan({**PLAN.layers, "a": LayerChoice("spatial_svd", {"rank": 4})})
    with pytest.raises(PlanError, match="other ranks"):
        chains(dense, model, other)


# losses --------------------------------------------------------------------------------------------------------------


def loss_of(dense: nn.Module | None, kind: str = "logits", class_dim: int = -1, **options: Any) -> TrainingLoss:
    return TrainingLoss(RecoveryOptions(**options), dense, Divergence(kind, class_dim, 2.0))


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@given(
    seed=st.integers(0, 100),
    share=st.floats(0, 1),
    temperature=st.floats(0.5, 8),
    smoothing=st.floats(0, 0.5),
    tokens=st.booleans(),
)
@settings(max_examples=30)
def test_the_loss_against_numpy(seed: int, share: float, temperature: float, smoothing: float, tokens: bool) -> None:
    torch.manual_seed(seed)
    dense, model = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    x = torch.randn((6, 3, 5) if tokens else (6, 5)).double()
    y = torch.randint(-1, 4, x.shape[:-1])
    y.flatten()[0] = 2
    found = loss_of(dense, distill=share, temperature=temperature, label_smoothing=smoothing)(model, Batch((x,), {}, y))
    with torch.no_grad():
        wanted, given_ = dense(x).reshape(-1, 4).numpy(), model(x).reshape(-1, 4).numpy()
    p, q = softmax(wanted / temperature), softmax(given_ / temperature)
    kd = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    labels = y.flatten().numpy()
    target = np.full((len(labels), 4), smoothing / 4)
    target[np.arange(len(labels)), labels] += 1 - smoothing
    ce = -(target * np.log(softmax(given_))).sum(1)[labels >= 0].mean()
    assert float(found.detach()) == pytest.approx((1 - share) * ce + share * kd, rel=1e-4, abs=1e-5)


def test_regression_images_and_soft_labels() -> None:
    torch.manual_seed(0)
    dense, model = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
    x, y = torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4, 5, 5))
    with torch.no_grad():
        logits = model(x)
        expected = F.cross_entropy(logits, y)
        images = loss_of(None, class_dim=1)(model, Batch((x,), {}, y))
        assert float(images) == pytest.approx(float(expected), rel=1e-5)
        soft = torch.rand(4, 3, 5, 5).softmax(1)
        assert float(loss_of(None, class_dim=1)(model, Batch((x,), {}, soft))) == pytest.approx(
            float(F.cross_entropy(logits, soft)), rel=1e-5
        )
        real = loss_of(dense, "regression", distill=0.25)(model, Batch((x,), {}, logits + 1))
        kd = float((dense(x) - logits).square().mean()) / 4
        assert float(real) == pytest.approx(0.75 * 1 / 4 + 0.25 * kd, rel=1e-4)
        none = loss_of(None)(nn.Linear(5, 3), Batch((torch.randn(2, 5),), {}, torch.full((2,), -1)))
        assert float(none) == 0
    with pytest.raises(DataError, match=r"outputs have shape \(4, 3, 5, 5\), labels \(4,\)"):
        loss_of(dense, class_dim=1, distill=0.5)(model, Batch((x,), {}, torch.zeros(4).long()))
    with pytest.raises(DataError, match="needs labels as a tensor"):
        loss_of(dense, distill=0.5)(model, Batch((x,), {}, ["a"] * 4))


def test_inner_outputs_and_orthogonality() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    plan = Plan({"0": LayerChoice("svd", {"rank": 3}), "2": LayerChoice("svd", {"rank": 2})})
    model = apply(dense, plan)
    x = torch.randn(7, 5)
    names = watched_layers(model, dense, [], decomposed(dense, model))
    assert names == ["0", "2"]
    assert watched_layers(model, dense, ["?"], []) == ["0", "1", "2"]
    found = chains(dense, model, plan)
    options = RecoveryOptions(distill=1.0, features=0.5, orthogonality=0.25)
    loss = TrainingLoss(options, dense, Divergence(), names, found)
    with torch.no_grad():
        inner = []
        for number in (1, 3):
            w, g = dense[:number](x), model[:number](x)  # type: ignore[index]
            inner.append(float((w - g).square().sum() / w.square().sum()))
        squares = []
        for layer in (0, 2):
            for rows in (model[layer][0].weight, model[layer][1].weight.T):  # type: ignore[index]
                unit = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
                gram = (unit @ unit.T) ** 2
                r = len(gram)
                squares.append((gram.sum() - np.trace(gram)) / (r * (r - 1)))
        expected = 0.5 * np.mean(inner) + 0.25 * np.mean(squares)
        kd = float(loss_of(dense, distill=1.0)(model, Batch((x,))))
        assert float(loss(model, Batch((x,)))) == pytest.approx(kd + expected, rel=1e-4)
        assert float(cosines(found)) == pytest.approx(np.mean(squares), rel=1e-4)
    assert float(inner_error([x, x], [x, 2 * x])) == pytest.approx(0.5)
    assert not any(m._forward_hooks for m in [*dense.modules(), *model.modules()])
    with pytest.raises(InputError, match="no layer is decomposed"):
        watched_layers(dense, dense, [], [])


def test_mixup_mixes_inputs_and_the_loss_of_both_labels() -> None:
    x, y = torch.randn(16, 3), torch.arange(16)
    whole = torch.arange(16).reshape(16, 1)
    torch.manual_seed(4)
    batch, other, share = mixed(Batch((x, whole), {"z": x}, y), 0.5)
    assert 0 <= share <= 1
    torch.testing.assert_close(batch.args[0], share * x + (1 - share) * x[other])
    torch.testing.assert_close(batch.kwargs["z"], batch.args[0])
    assert torch.equal(batch.args[1], whole)  # whole numbers are not mixed
    assert torch.equal(batch.labels, y)
    model = nn.Linear(3, 16)
    torch.manual_seed(4)
    found = loss_of(None, mixup=0.5)(model, Batch((x,), {}, y))
    torch.manual_seed(4)
    batch, other, share = mixed(Batch((x,), {}, y), 0.5)
    output = model(batch.args[0])
    expected = share * F.cross_entropy(output, y) + (1 - share) * F.cross_entropy(output, other)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


# data and randomness -------------------------------------------------------------------------------------------------


def seen(source: Any, count: int, **options: Any) -> list[list[float]]:
    stream = TrainingData(source, **options)
    return [stream.next().args[0].flatten().tolist() for _ in range(count)]


def flat(batches: list[list[float]]) -> list[float]:
    return [value for batch in batches for value in batch]


def test_data_in_memory_are_shuffled_anew_in_every_epoch() -> None:
    x = torch.arange(10.0).reshape(10, 1)
    found = seen(x, 6, batch_size=3)
    epochs = [flat(found[:3]), flat(found[3:])]
    for epoch in epochs:
        assert len(set(epoch)) == 9  # the incomplete batch is left out
    assert epochs[0] != epochs[1]
    assert seen(x, 6, batch_size=3) == found
    assert seen(x, 6, batch_size=3, seed=1) != found
    assert [len(b) for b in seen(x, 2, batch_size=64)] == [10, 10]
    joined = seen(as_batches(x, batch_size=5), 4)
    assert [len(b) for b in joined] == [5] * 4
    assert sorted(flat(joined[:2])) == list(range(10))
    assert sorted(joined[0]) not in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])  # samples move between batches
    ragged = [torch.zeros(2, 3), torch.ones(2, 4), 2 * torch.ones(2, 5)]
    assert sorted(b[0] for b in seen(ragged, 3)) == [0, 1, 2]
    assert sorted(flat(seen(TensorDataset(x), 5, batch_size=2))) == list(range(10))


@given(skip=st.integers(0, 11), seed=st.integers(0, 5))
@settings(max_examples=15)
def test_data_are_taken_up_anywhere(skip: int, seed: int) -> None:
    x = torch.arange(10.0).reshape(10, 1)
    for source in (x, DataLoader(TensorDataset(x), batch_size=3, shuffle=True)):
        first = TrainingData(source, 3, seed)
        for _ in range(skip):
            first.next()
        place = first.epoch, first.position
        expected = [first.next().args[0] for _ in range(5)]
        second = TrainingData(source, 3, seed)
        second.go_to(*place)
        assert all(torch.equal(second.next().args[0], batch) for batch in expected)


def test_looking_at_some_batches_moves_nothing_on() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10.0).reshape(10, 1)), batch_size=3, shuffle=True)
    one, two = TrainingData(loader), TrainingData(loader)
    one.next(), two.next()
    assert len(one.some(2)) == 2
    assert len(one.some(99)) == 4
    assert torch.equal(one.next().args[0], two.next().args[0])
    assert (one.epoch, one.position) == (two.epoch, two.position)


def test_a_sampler_is_told_the_epoch_and_generators_are_seeded() -> None:
    class Told(list[Any]):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class Source:
        sampler = Told()

        def __iter__(self) -> Any:
            return iter([torch.zeros(2, 1)])

    stream = TrainingData(Source())
    for _ in range(3):
        stream.next()
    assert Told.epochs == [0, 1, 2]
    x = torch.arange(50.0).reshape(50, 1)
    generator = torch.Generator()
    loader = DataLoader(TensorDataset(x), batch_size=5, shuffle=True, generator=generator)
    before = seen(loader, 12)
    generator.manual_seed(99)
    assert seen(loader, 12) == before


def test_what_a_loader_raises_is_one_line() -> None:
    class Broken:
        def __iter__(self) -> Any:
            yield torch.zeros(2, 1)
            raise OSError("disk\nfull")

    stream = TrainingData(Broken())
    stream.next()
    with pytest.raises(DataError, match=r"train: reading the data raised OSError: disk$"):
        stream.next()
    with pytest.raises(DataError, match="train: batch 0: an input holds NaN"):
        TrainingData([torch.full((2, 1), math.nan)]).next()
    with pytest.raises(DataError, match="needs an iterable of batches, got int"):
        TrainingData(3)


def test_randomness_is_swapped_stored_and_restored() -> None:
    import random

    def draw() -> tuple[float, ...]:
        return float(torch.rand(())), float(np.random.rand()), random.random(), random.gauss(0, 1), np.random.randn()

    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = [draw() for _ in range(4)]
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    own = Randomness(3)
    found = []
    inside = []
    for _ in range(4):
        found.append(draw())
        with own.inside():
            inside.append(draw())
    assert found == expected
    other = Randomness(3)
    with other.inside():
        assert [draw() for _ in range(2)] == inside[:2]
        stored = {name: value.clone() for name, value in other.tensors().items()}
        assert draw() == inside[2]
        other.restore(stored)
        assert draw() == inside[2]
    fresh = Randomness(8)
    fresh.restore(stored)
    with fresh.inside():
        assert [draw(), draw()] == inside[2:]
