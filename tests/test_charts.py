from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import recorded
from scipy.stats import spearmanr
from test_history import history_of

from rankopt import charts
from rankopt.chart import colour_of
from rankopt.errors import InputError
from rankopt.latency_store import LatencyStore, default_path
from rankopt.latency_table import LatencyTable
from rankopt.layer_costs import layer_costs
from rankopt.layers import find_layers
from rankopt.plan import DENSE, LayerChoice
from rankopt.study_file import load_study
from rankopt.surgery import apply


def test_every_measured_plan_is_a_point_of_the_front(tmp_path: Path) -> None:
    history = history_of(recorded(tmp_path))
    result = history.result
    assert charts.costs_of(result) == ["latency_ms@device", "macs_kept", "params_kept"]
    chart = charts.front(result, "macs_kept", "accuracy")
    points = {
        trial: (x, y)
        for series in chart.series
        if series.symbol != "ring"
        for trial, x, y in zip(series.trials, series.x, series.y, strict=False)
    }
    wanted = {
        e.trial: (100 * e.measurements["macs_kept"], e.measurements["accuracy"]) for e in result.entries if e.trial >= 0
    }  # type: ignore[operator]
    assert points == wanted
    (dense,) = [s for s in chart.series if s.name == "dense"]
    assert (dense.x, dense.y) == ([100.0], [90.0])
    assert [(r.axis, r.at, r.label) for r in chart.rules] == [("x", pytest.approx(80.0), "macs<=80%")]
    outside = next(s for s in chart.series if s.name == "outside")
    assert all(x > 80 for x in outside.x)
    best = next(s for s in chart.series if s.symbol == "ring")
    assert list(best.trials) == [result.best().trial]
    assert "svd(rank=" in best.texts[0]


def test_limits_are_drawn_where_they_are_measured(tmp_path: Path) -> None:
    limits = ["latency<=0.7x", "accuracy>=-5", "params<=1K", "kl<=0.2", "latency_p95<=9ms"]
    result = history_of(recorded(tmp_path, limits=limits)).result
    rules = {cost: charts.front(result, cost, "accuracy").rules for cost in charts.costs_of(result)}
    at = {cost: {r.label: r.at for r in found} for cost, found in rules.items()}
    assert at["latency_ms@device"] == {"latency<=0.7x": pytest.approx(1.4), "accuracy>=-5": 85.0}
    assert at["params_kept"] == {"params<=1K": pytest.approx(100 * 1000 / 1604), "accuracy>=-5": 85.0}
    assert {r.label for r in charts.front(result, "macs_kept", "kl").rules} >= {"kl<=0.2"}


def test_the_front_is_connected_in_its_own_objectives_only(tmp_path: Path) -> None:
    result = history_of(recorded(tmp_path, limits=["macs<=95%"])).result
    kinds = {cost: {s.kind for s in charts.front(result, cost, "accuracy").series} for cost in charts.costs_of(result)}
    assert "line" in kinds["latency_ms@device"]
    assert "line" not in kinds["macs_kept"]


@pytest.mark.parametrize("trials", [0, 1])
@pytest.mark.parametrize("options", [{}, {"accuracy": False}, {"latency": False}, {"limits": ["macs<=1%"]}])
def test_small_and_poor_studies_have_charts_or_a_reason(
    tmp_path: Path, trials: int, options: dict[str, object]
) -> None:
    history = history_of(recorded(tmp_path, trials=trials, **options))  # type: ignore[arg-type]
    result = history.result
    found = [charts.front(result, c, q) for q in charts.qualities_of(result) for c in charts.costs_of(result)]
    assert bool(found) == bool(trials)
    found += [charts.prediction(history, "kl"), charts.volumes(history), charts.importances(history, "the front")]
    for chart in found:
        assert bool(chart.empty) != bool(chart.series)
        assert chart.empty or chart.summary


def test_predictions_say_how_far_they_are_off(tmp_path: Path) -> None:
    history = history_of(recorded(tmp_path, trials=30))
    chart = charts.prediction(history, "latency_ms@device")
    assert "median error of the prediction 5.0%" in chart.summary
    assert "rank correlation 1.000" in chart.summary
    assert [r.axis for r in chart.rules] == ["xy"]
    again = replace(history, trials=[*history.trials, replace(history.trials[0], number=99, same_as=0)])
    assert len(charts.prediction(again, "latency_ms@device").series[0].x) == 30


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_rank_correlation_with_ties(pairs: list[tuple[int, int]]) -> None:
    xs, ys = zip(*pairs, strict=True)
    if len(set(xs)) > 1 and len(set(ys)) > 1:
        assert charts.spearman(xs, ys) == pytest.approx(spearmanr(xs, ys).statistic)


def filled(path: Path) -> None:
    """Fill the latency table of a recorded study's target, in the study's own cache folder."""
    file = load_study(path)
    model = file.build_model()
    (target,) = file.make_targets()
    assert file.cache_folder is not None
    conditions = target.conditions()
    table = LatencyTable(target, LatencyStore(file.cache_folder / default_path(conditions).name, conditions))
    args, kwargs = file.example()
    table.fill(
        [
            (la, [DENSE, *(LayerChoice("svd", {"rank": r}) for r in (1, 2, 4))])
            for la in find_layers(model, args, kwargs)
        ]
    )


def test_layers_cost_what_is_counted_in_the_built_model(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    filled(path)
    file, history = load_study(path), history_of(path)
    costs = layer_costs(file, facts=None)
    assert not costs.notes
    entry = next(e for e in history.result.entries if e.trial == 4)
    built = apply(file.build_model(), entry.plan)
    for layer in costs.layers:
        cost = costs.of(layer, entry.plan[layer.name])
        module = built.get_submodule(layer.name)
        assert cost.params == sum(p.numel() for p in module.parameters())
        weights = sum(p.numel() for p in module.parameters() if p.dim() > 1)
        assert cost.macs == weights  # linear layers, one sample
        if entry.plan[layer.name].ranks["rank"] in (1, 2, 4) if entry.plan[layer.name].ranks else True:
            assert cost.latency["device"] == pytest.approx(cost.macs / 1000)  # what the made-up device takes


def test_the_picture_of_layers(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    filled(path)
    costs = layer_costs(load_study(path))
    entry = next(e for e in history_of(path).result.entries if e.trial == 4)
    for quantity in ("params", "macs", "latency@device"):
        chart = charts.layers(costs, entry, quantity)
        back, *bars = chart.series
        assert back.kind == "back"
        assert list(chart.categories) == ["stem", "body", "head"]
        for n, name in enumerate(chart.categories):
            (own,) = [s for s in bars if s.x[n] is not None]
            assert own.name == entry.plan[name].method
            assert own.colour == colour_of(own.name)
            assert own.x[n] <= back.x[n] + 1e-9 or quantity == "latency@device"  # type: ignore[operator]
    ranks = charts.layers(costs, entry, "rank")
    for n, name in enumerate(ranks.categories):
        (own,) = [s for s in ranks.series if s.x[n] is not None]
        bound = {"stem": 12, "body": 32, "head": 4}[name]
        rank = entry.plan[name].ranks.get("rank")
        assert own.x[n] == pytest.approx(100.0 if rank is None else 100 * rank / bound)
    sizes = [charts.marker_size(r) for r in (1, 2, 8, 64, 512)]
    assert sizes == sorted(set(sizes))


def test_latencies_that_nobody_measured_are_no_zeros(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    costs = layer_costs(load_study(path))
    assert "no table was recorded" in costs.notes[0]
    assert costs.times == {}
    filled(path)
    costs = layer_costs(load_study(path))
    layer = costs.layers[0]
    assert costs.of(layer, LayerChoice("svd", {"rank": 3})).latency  # between measured ranks
    assert not costs.times["device"].table.tells(layer, LayerChoice("cp", {"rank": 3}))


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="others than those that the study was begun with"):
        layer_costs(load_study(recorded(tmp_path)), facts={"model": "0" * 16})


def test_pick() -> None:
    keys = ["latency_ms@pi", "macs_kept", "peak_memory_mib"]
    assert charts.pick(keys, None, "x") == "latency_ms@pi"
    assert charts.pick(keys, "latency", "x") == charts.pick(keys, "latency@pi", "x") == "latency_ms@pi"
    assert charts.pick(keys, "macs", "x") == "macs_kept"
    with pytest.raises(InputError, match="'speed' was not measured; there are latency_ms@pi, macs_kept"):
        charts.pick(keys, "speed", "x")
    with pytest.raises(InputError, match="the study measured none"):
        charts.pick([], None, "x")


def test_ranks_of_methods_with_several_are_averaged() -> None:
    import torch
    from torch import nn

    from rankopt.layer_costs import LayerCosts

    (layer,) = find_layers(nn.Sequential(nn.Conv2d(8, 16, 3)), torch.randn(1, 8, 5, 5))
    cost = LayerCosts([layer]).of(layer, LayerChoice("tucker2", {"rank_out": 4, "rank_in": 1}))
    assert cost.rank == pytest.approx(2.0)
    assert cost.rank_share == pytest.approx(np.sqrt(4 / 16 * 1 / 8))
