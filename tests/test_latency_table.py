"""Times of layers against devices that are known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import MadeUp, stepped
from torch import nn

from rankopt.decompositions import method
from rankopt.kinds import kind_named
from rankopt.latency_store import LatencyStore
from rankopt.latency_table import LatencyTable, randomized
from rankopt.layer_spec import Call, LayerSpec
from rankopt.layers import find_layers
from rankopt.plan import DENSE, LayerChoice


def conv(name: str = "a", width: int = 32, size: int = 8, **options: Any) -> LayerSpec:
    shape = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    call = Call(1, (size, size), (size, size))
    return LayerSpec(name, "conv2d", width, width, **{**shape, "calls": (call,), **options})


def ranks(name: str, values: list[int]) -> list[LayerChoice]:
    return [LayerChoice(name, {"rank": r}) for r in values]


CHOICES = [DENSE, *ranks("svd", list(range(2, 32, 2))), *ranks("svd_in", list(range(4, 32, 4)))]


def table(target: MadeUp | None = None, path: Path | None = None, **options: Any) -> LatencyTable:
    target = target or MadeUp()
    return LatencyTable(target, LatencyStore(path, target.conditions()), **options)


def macs(layer: LayerSpec, choice: LayerChoice) -> float:
    return float(layer.macs if choice == DENSE else method(choice.method).macs(layer, choice.ranks))


def test_a_linear_device_is_known_from_some_of_the_ranks() -> None:
    found, layer = table(), conv()
    found.fill([(layer, CHOICES)])
    for choice in CHOICES:
        assert found.time(layer, choice) == pytest.approx(macs(layer, choice) / 1e6, rel=1e-6)
    counted = found.target.counted("layer: ")  # type: ignore[attr-defined]
    assert counted == 1 + 12 + 7  # of svd twelve, of svd_in all
    assert counted < len(CHOICES)


def test_equal_shapes_are_measured_once() -> None:
    found = table()
    layers = [conv("a"), conv("b"), conv("c", bias=False), conv("d", size=16), conv("e", stride=(2, 2))]
    found.fill([(la, CHOICES) for la in layers])
    one = table()
    one.fill([(conv(), CHOICES)])
    per_shape = one.target.counted()  # type: ignore[attr-defined]
    assert found.target.counted() == 4 * per_shape  # type: ignore[attr-defined]
    assert found.time(layers[0], CHOICES[3]) == found.time(layers[1], CHOICES[3])
    assert found.time(layers[3], CHOICES[3]) == pytest.approx(4 * found.time(layers[0], CHOICES[3]))


def test_layers_of_one_shape_with_other_candidates_share_what_is_measured() -> None:
    found = table()
    found.fill([(conv("a"), CHOICES[:9]), (conv("b"), CHOICES[5:])])
    for choice in CHOICES:
        assert found.time(conv(), choice) == pytest.approx(macs(conv(), choice) / 1e6, rel=1e-6)


@settings(max_examples=30, derandomize=True)
@given(data=st.data(), bend=st.floats(0.2, 3), floor=st.floats(0, 2), step=st.sampled_from([0.0, 0.1, 0.4]))
def test_interpolation_is_monotone_and_exact_where_measured(
    data: st.DataObject, bend: float, floor: float, step: float
) -> None:
    """Any device on which more MACs take no less time: `truth` is asked for every rank."""
    target = MadeUp()
    layer = conv(width=16, size=4)

    def truth(mmacs: float, key: str = "") -> float:
        value = max(floor * 0.02, mmacs**bend)
        return value + 0.001 if not step else step * 0.05 * np.ceil(value / (step * 0.05)) + 0.001

    target._formula = lambda mmacs, key: truth(mmacs)
    own = sorted(data.draw(st.sets(st.integers(1, 40), min_size=1, max_size=25)))
    choices = ranks("svd", own)
    found = table(target)
    found.fill([(layer, choices)])
    times = [found.time(layer, c) for c in choices]
    exact = [target.time(found._subject(layer, layer.calls[0], c, (torch.zeros(1, 16, 4, 4),))) for c in choices]
    known = [found.known(layer, layer.calls[0], c) for c in choices]
    for time, real, measured in zip(times, exact, known, strict=True):
        if measured:
            assert time == pytest.approx(real, rel=1e-9)
    if all(np.diff(exact) >= 0):  # the sum of two stages may fall where one of them crosses a step
        assert all(np.diff(times) >= -1e-12)
    assert known[0]
    assert known[-1]
    assert min(exact) - 1e-9 <= min(times) <= max(times) <= max(exact) + 1e-9


def test_where_it_is_not_smooth_more_ranks_are_measured() -> None:
    smooth, steps = table(), MadeUp()
    steps._formula = stepped(0.2)
    rough = table(steps)
    wanted = [DENSE, *ranks("svd", list(range(1, 33)))]
    smooth.fill([(conv(), wanted)])
    rough.fill([(conv(), wanted)])
    assert smooth.target.counted() == 13  # type: ignore[attr-defined]
    assert 13 < steps.counted() < len(wanted)
    layer = conv()
    dense = rough.time(layer, DENSE)
    args = (torch.zeros(1, 32, 8, 8),)
    miss = [abs(rough.time(layer, c) - steps.time(rough._subject(layer, layer.calls[0], c, args))) for c in wanted]
    coarse = 0.2  # a step; without more ranks whole steps would be missed
    assert max(miss) <= coarse * 1.01
    assert np.mean(miss) < 0.06 * dense


def test_a_rank_can_be_measured_itself() -> None:
    target = MadeUp()
    target._formula = stepped(0.2)
    found, layer = table(target), conv()
    found.fill([(layer, CHOICES)])
    unknown = [c for c in CHOICES if not found.known(layer, layer.calls[0], c)]
    before = target.counted()
    found.measure(layer, [*unknown[:2], DENSE, CHOICES[1]])
    assert target.counted() == before + 2
    for choice in unknown[:2]:
        exact = target.time(found._subject(layer, layer.calls[0], choice, (torch.zeros(1, 32, 8, 8),)))
        assert found.time(layer, choice) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("dies_after", [0, 5, 12, 30])
def test_after_a_kill_nothing_is_measured_twice(tmp_path: Path, dies_after: int) -> None:
    wanted = [(conv(f"l{n}", size=4 + 2 * n), CHOICES) for n in range(4)]
    whole = MadeUp()
    table(whole).fill(wanted)
    first, second = MadeUp(), MadeUp()
    first._dies_after = dies_after
    path = tmp_path / "new" / "t.jsonl"
    with pytest.raises(KeyboardInterrupt):
        table(first, path).fill(wanted)
    table(second, path).fill(wanted)
    news = [key for key in second.asked if not key.endswith("dense")]
    assert set(news).isdisjoint(key for key in first.asked if not key.endswith("dense"))
    assert len(news) == len(set(news))
    assert {*first.asked, *second.asked} == set(whole.asked)
    third = MadeUp()
    again = table(third, path)
    again.fill(wanted)
    assert third.asked == []
    assert again.time(*_last(wanted)) == pytest.approx(macs(*_last(wanted)) / 1e6, rel=1e-6)


def _last(wanted: list[tuple[LayerSpec, list[LayerChoice]]]) -> tuple[LayerSpec, LayerChoice]:
    return wanted[-1][0], wanted[-1][1][-2]


def test_a_layer_that_is_called_twice_takes_the_time_of_both_calls() -> None:
    small, large = Call(1, (4, 4), (4, 4)), Call(2, (8, 8), (8, 8))
    layer = conv(calls=(small, large, small))
    found = table()
    found.fill([(layer, CHOICES)])
    for choice in CHOICES:
        assert found.time(layer, choice) == pytest.approx(macs(layer, choice) / 1e6, rel=1e-6)
    single = table()
    single.fill([(conv(), CHOICES)])
    assert found.target.counted() == 2 * single.target.counted()  # type: ignore[attr-defined]


def test_what_was_not_filled_in_has_no_time() -> None:
    with pytest.raises(KeyError, match="a: the table was not filled for it"):
        table().time(conv(), DENSE)


def test_the_neighbours_time_is_taken_off() -> None:
    layer = conv()
    alone, between = table(), table(neighbours=True)
    for one in (alone, between):
        one.fill([(layer, CHOICES)])
    for choice in CHOICES:
        assert between.time(layer, choice) == pytest.approx(alone.time(layer, choice), rel=1e-6)
    assert all("between 1×1" in k or "neighbours alone" in k for k in between.target.asked)  # type: ignore[attr-defined]
    shared = LatencyTable(MadeUp(), between.store)  # both kinds in one file do not meet
    shared.fill([(layer, CHOICES)])
    assert shared.target.counted() == alone.target.counted()  # type: ignore[attr-defined]


def test_neighbours_of_what_is_no_two_dimensional_convolution() -> None:
    layer = LayerSpec("fc", "linear", 64, 32, calls=(Call(3, (), ()),))
    found = table(neighbours=True)
    found.fill([(layer, [DENSE, *ranks("svd", [4, 8])])])
    assert found.time(layer, ranks("svd", [8])[0]) == pytest.approx(3 * 8 * 96 / 1e6)
    assert not any("1×1" in key for key in found.target.asked)  # type: ignore[attr-defined]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear on a sequence": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (1, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 12, 11)),
    "same": (lambda: nn.Conv2d(4, 6, 4, padding="same", bias=False), (1, 4, 7, 7)),
    "groups": (lambda: nn.Conv2d(8, 4, 3, groups=2), (1, 8, 6, 6)),
    "reflect": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (1, 4, 6, 6)),
    "circular": (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), (1, 4, 6)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3, padding=1), (1, 3, 4, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (1, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (1, 4, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("case", LAYERS)
def test_the_dense_module_is_the_layer(case: str) -> None:
    make, shape = LAYERS[case]
    module, x = make(), torch.randn(shape)
    (layer,) = find_layers(nn.Sequential(module), x)
    built = kind_named(layer).dense(layer, layer.calls[0])
    assert type(built) is type(module)
    built.load_state_dict(module.state_dict())
    assert torch.equal(built(x), module(x))
    found = table()
    found.fill([(layer, [DENSE, LayerChoice("svd", {"rank": 1}), LayerChoice("svd", {"rank": 2})])])
    assert found.time(layer, DENSE) == pytest.approx(layer.macs / 1e6)
    assert found.time(layer, LayerChoice("svd", {"rank": 2})) == pytest.approx(
        method("svd").macs(layer, {"rank": 2}) / 1e6
    )


def test_different_layers_have_different_keys() -> None:
    variants: list[dict[str, Any]] = [
        {}, {"width": 16}, {"size": 4}, {"stride": (2, 2)}, {"padding": (0, 0)}, {"padding": "same"}, {"groups": 2},
        {"dilation": (2, 2)}, {"bias": False}, {"padding_mode": "reflect"}, {"kernel_size": (1, 3)},
    ]  # fmt: skip
    found = table()
    keys = {found._key(la := conv(**v), la.calls[0], DENSE) for v in variants}
    assert len(keys) == len(variants)
    assert found._key(conv("x"), conv().calls[0], DENSE) in keys
    assert found._key(replace(conv(), order=7, aliases=("y",)), conv().calls[0], DENSE) in keys


def test_random_weights_keep_activations_normal() -> None:
    deep = nn.Sequential(*[m for _ in range(20) for m in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]).train()
    for parameter in deep.parameters():
        parameter.data.fill_(float("nan"))
    found = randomized(deep)
    out = found(torch.randn(1, 32, 8, 8))
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    assert 1e-4 < float(out.std()) < 1e4
    assert bool((torch.abs(out[out != 0]) > 1e-30).all())


def test_progress_is_told() -> None:
    told: list[str] = []
    table(MadeUp(label="pi")).fill([(conv(f"l{n}", size=4 + n), CHOICES) for n in range(2)], told.append)
    assert told == [
        "timing 2 dense layers on pi",
        "timing l0 on pi, shape 1 of 2: 19 candidates",
        "timing l1 on pi, shape 2 of 2: 19 candidates",
    ]
