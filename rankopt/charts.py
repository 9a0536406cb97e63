"""What is drawn of a study: its front, the layers of a plan, predictions, how the front grew, importances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from rankopt.chart import GREY, Chart, Rule, Series, colour_of
from rankopt.errors import InfeasibleError, InputError
from rankopt.limits import Limit, measured_key
from rankopt.plan import DENSE
from rankopt.result import Entry, Result

if TYPE_CHECKING:
    from rankopt.history import History, Trial
    from rankopt.layer_costs import LayerCosts

_MANY = 14  # changed layers that a point names; parameters that importances are shown of


def costs_of(result: Result) -> list[str]:
    """The keys of costs that some plan was measured on: shares of MACs and parameters, ms by target, memory."""
    plans = [e for e in result.entries if e.trial >= 0]
    keys = [k for e in plans for k, v in e.measurements.items() if v is not None]
    times = list(dict.fromkeys(k for k in keys if k.startswith("latency_ms@")))
    wanted = [*(times or ["latency_ms"]), "macs_kept", "params_kept", "peak_memory_mib"]
    return [key for key in wanted if key in keys]


def qualities_of(result: Result) -> list[str]:
    """accuracy and kl, as far as some plan was measured on them."""
    plans = [e for e in result.entries if e.trial >= 0]
    return [q for q in ("accuracy", "kl") if any(e.measurements.get(q) is not None for e in plans)]


def best_of(result: Result) -> Entry | None:
    """The best plan within the limits that a trial measured; None where there is none."""
    try:
        best = result.best()
    except InfeasibleError:
        return None
    return best if best.trial >= 0 else None


def title_of(key: str) -> str:
    """A quantity as an axis names it, with its unit."""
    name, _, label = key.partition("@")
    where = f" on {label}" if label else ""
    titles = {
        "accuracy": "accuracy",
        "kl": "kl to dense, nats",
        "macs_kept": "MACs, % of dense",
        "params_kept": "parameters, % of dense",
        "latency_ms": f"latency{where}, ms",
        "peak_memory_mib": "peak memory, MiB",
    }
    return titles.get(name, key)


def front(result: Result, cost: str, quality: str) -> Chart:
    """Every measured plan by what it costs and how good it is.

    Args:
        result: of the study.
        cost: out of `costs_of`.
        quality: "accuracy" or "kl".
    """
    head = f"{title_of(quality).split(',')[0]} against {title_of(cost).split(',')[0]}"
    key = f"front {quality} {cost}"
    places = {
        e.trial: (x, y)
        for e in result.entries
        if e.trial >= 0 and (x := _shown(e.measurements, cost)) is not None and (y := _quality(e, quality)) is not None
    }
    if not places:
        return Chart(key, head, title_of(cost), title_of(quality), empty="no plan was measured on both")
    entries = [e for e in result.entries if e.trial in places]
    best, on_front = best_of(result), {e.trial for e in result.front}
    any_kept = any(e.feasible for e in entries)
    front_name = "front" if any_kept else "front, outside"
    parts = [
        ("outside", "open", GREY, [e for e in entries if not e.feasible and e.trial not in on_front]),
        ("beaten", "circle", GREY, [e for e in entries if e.feasible and e.trial not in on_front]),
        (front_name, "circle", "#0072b2", [e for e in entries if e.trial in on_front]),
    ]
    series = []
    for name, symbol, colour, own in parts:
        own = sorted(own, key=lambda e: places[e.trial])
        if own:
            kind: Literal["line", "points"] = (
                "line" if name == front_name and _are_objectives(result, cost, quality) else "points"
            )
            xs, ys = zip(*(places[e.trial] for e in own), strict=True)
            series.append(Series(kind, name, xs, ys, colour, [told(e) for e in own], [e.trial for e in own], symbol))
    if best is not None and best.trial in places:
        x, y = places[best.trial]
        series.append(Series("points", "best", [x], [y], "#e69f00", [told(best)], [best.trial], "ring"))
    values = [y for _, y in places.values()]
    logarithmic = ["y"] if quality == "kl" and min(values) > 0 and max(values) > 20 * min(values) else []
    dense_x = 100.0 if cost.endswith("_kept") else result.dense.get(cost)
    dense_y = result.dense.get("accuracy") if quality == "accuracy" else 0.0
    rules = []
    if dense_x is not None and dense_y is not None and not (logarithmic and dense_y <= 0):
        series.append(Series("points", "dense", [dense_x], [dense_y], "#d55e00", ["the dense model"], symbol="star"))
    elif dense_x is not None:
        rules.append(Rule("x", dense_x, "dense"))
    rules += [rule for li in result.limits if (rule := _rule(li, result, cost, quality)) is not None]
    kept = f"{sum(e.feasible for e in entries)} of {len(entries)} measured plans keep the limits"
    summary = f"{head}: {kept}" + (f"; the best is trial {best.trial}, {told_values(best)}" if best else "")
    return Chart(key, head, title_of(cost), title_of(quality), series, rules, logarithmic, summary=f"{summary}.")


def told(entry: Entry, most: int = _MANY) -> str:
    """A plan in some lines: its number, measurements and changed layers."""
    changed = [f"{name}: {choice}" for name, choice in entry.plan.changed().items()]
    more = [f"and {len(changed) - most} more"] if len(changed) > most else []
    kept = "" if entry.feasible else " (outside of the limits)"
    return "\n".join([f"trial {entry.trial}{kept}", told_values(entry), *changed[:most], *more])


def told_values(entry: Entry) -> str:
    """The measurements that people ask for first, on one line."""
    values = entry.measurements
    parts = []
    for key, text in (("accuracy", "accuracy {:.2f}"), ("kl", "kl {:.4f}")):
        if (value := values.get(key)) is not None:
            parts.append(text.format(value))
    for key, name in (("macs_kept", "MACs"), ("params_kept", "parameters"), ("latency_kept", "latency")):
        if (value := values.get(key)) is not None:
            parts.append(f"{name} {value:.1%}")
    return ", ".join(parts)


LAYER_QUANTITIES = ("params", "macs", "rank")


def layers(costs: LayerCosts, entry: Entry, quantity: str, methods: Sequence[str] = ()) -> Chart:
    """Where a plan spends, layer by layer, before the dense model's bars; or its ranks, as points of their size.

    Args:
        costs: of the model's layers.
        entry: the plan.
        quantity: "params", "macs", "rank", or "latency@TARGET".
        methods: those that a series is made for, even where this plan does not use them (None of them: its own).
    """
    choices = {la.name: entry.plan[la.name] for la in costs.layers}
    known = {la.name: costs.of(la, choices[la.name]) for la in costs.layers}
    names = [la.name for la in costs.layers]
    label = quantity.partition("@")[2]
    titles = {"params": ("parameters", "parameters"), "macs": ("MACs", "MACs"), "rank": ("ranks", "rank, % of full")}
    title, axis = titles.get(quantity, (f"latency on {label}", f"ms on {label}, each layer alone"))
    key = f"layers {quantity}"

    def value(name: str) -> float | None:
        cost = known[name]
        if quantity == "rank":
            return 100 * cost.rank_share
        return cost.latency.get(label) if label else float(getattr(cost, quantity))

    dense = {la.name: costs.of(la, DENSE) for la in costs.layers}
    series = []
    if quantity != "rank":
        before = [d.latency.get(label) if label else float(getattr(d, quantity)) for d in dense.values()]
        if all(v is None for v in before):
            return Chart(key, title, axis, "", categories=names, empty=f"latencies on {label} are not known here")
        series.append(
            Series(
                "back",
                "before",
                before,
                names,
                GREY,
                [f"{n}\ndense: {_n(v)}" for n, v in zip(names, before, strict=True)],
            )
        )
    for name in methods or list(dict.fromkeys(c.method for c in choices.values())):
        own = [value(n) if choices[n].method == name else None for n in names]
        texts = [
            f"{n}\n{choices[n]}: {_n(v)}{' %' if quantity == 'rank' else ''}" for n, v in zip(names, own, strict=True)
        ]
        sizes = [marker_size(known[n].rank) if choices[n].method == name else 0.0 for n in names]
        kind: Literal["points", "bars"] = "points" if quantity == "rank" else "bars"
        series.append(Series(kind, name, own, names, colour_of(name), texts, sizes=sizes if kind == "points" else ()))
    changed = len(entry.plan.changed())
    summary = f"{title} of {len(names)} layers, of which trial {entry.trial} replaces {changed}."
    return Chart(key, title, axis, "", series, categories=names, summary=summary)


def marker_size(rank: float) -> float:
    """The diameter in px of a rank's mark: its area grows with the logarithm of the rank; dense layers are dots."""
    return 5.0 if rank <= 0 else 5.0 + 2.5 * math.log2(1 + rank)


def prediction(history: History, key: str) -> Chart:
    """Predicted against measured: "kl", or "latency_ms@TARGET". Plans that several trials came to count once."""
    name = title_of(key)
    pairs, texts, trials = [], [], []
    for trial in history.trials:
        predicted, measured = _pair(trial, key)
        if trial.same_as is None and predicted is not None and measured is not None and min(predicted, measured) > 0:
            pairs.append((predicted, measured))
            texts.append(f"trial {trial.number}\npredicted {predicted:.4g}\nmeasured {measured:.4g}")
            trials.append(trial.number)
    head = f"{name.split(',')[0]}: predicted and measured"
    axes = (f"prediction {key}", head, f"predicted {name}", f"measured {name}")
    if not pairs:
        return Chart(*axes, empty="no plan has both")
    xs, ys = zip(*pairs, strict=True)
    error = float(np.median([abs(x / y - 1) for x, y in pairs]))
    summary = f"{len(pairs)} plans; median error of the prediction {error:.1%} of what was measured"
    if len(set(xs)) > 2 and len(set(ys)) > 2:
        summary += f", rank correlation {spearman(xs, ys):.3f}"
    both = ["x", "y"] if key == "kl" else []
    series = [Series("points", "", xs, ys, "#0072b2", texts, trials)]
    return Chart(*axes, series, [Rule("xy", 0.0, "as predicted")], both, summary=f"{summary}.")


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The rank correlation; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])

    return float(np.corrcoef(ranks(xs), ranks(ys))[0, 1])


def volumes(history: History) -> Chart:
    """How the hypervolume of the front grew."""
    found = history.volumes()
    axes = ("history", "hypervolume", "trial", f"hypervolume of ({', '.join(history.result.objectives)})")
    if not found:
        return Chart(*axes, empty="no plan was measured")
    numbers = [n for n, _, _ in found]
    texts = [
        [f"trial {n}\nhypervolume {v:.4f}" for n, v in zip(numbers, own, strict=True)]
        for own in zip(*[f[1:] for f in found], strict=True)
    ]
    series = [Series("steps", "all measured plans", numbers, [a for _, _, a in found], GREY, texts[1], numbers)]
    if found[-1][1] > 0:
        series.append(
            Series("steps", "within the limits", numbers, [k for _, k, _ in found], "#0072b2", texts[0], numbers)
        )
    last = found[-1][1] or found[-1][2]
    return Chart(*axes, series, summary=f"The hypervolume reached {last:.3f} in {len(history.trials)} trials.")


def importances(history: History, what: str) -> Chart:
    """How much each proposed number mattered, for an objective or for reaching the front."""
    title = f"importance for {what}"
    axes = (f"importances {what}", title, "share of the importance, %", "")
    shares = history.importances.get(what)
    if not shares:
        return Chart(*axes, empty="too few trials, or all alike")
    top = list(shares.items())[:_MANY]
    rest = len(shares) - len(top)
    names = [name for name, _ in top]
    series = [Series("bars", "", [100 * v for _, v in top], names, "#0072b2", [f"{n}\n{v:.1%}" for n, v in top])]
    more = f"; {rest} more are below" if rest else ""
    return Chart(*axes, series, categories=names, summary=f"{names[0]} matters most, {top[0][1]:.0%}{more}.")


def pick(keys: Sequence[str], wanted: str | None, what: str) -> str:
    """One of the keys: the first, or the one that is named in full or by its beginning; raises `InputError`."""
    if not keys:
        raise InputError(f"{what}: the study measured none")
    if wanted is None:
        return keys[0]
    fitting = [
        k for k in keys if k == wanted or k.startswith((f"{wanted}_", f"{wanted}@", wanted.replace("@", "_ms@")))
    ]
    if not fitting:
        raise InputError(f"{what}: {wanted!r} was not measured; there are {', '.join(keys)}")
    return fitting[0]


def _n(value: float | None) -> str:
    return "not known" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _shown(values: Mapping[str, float | None], cost: str) -> float | None:
    value = values.get(cost)
    return 100 * value if value is not None and cost.endswith("_kept") else value


def _quality(entry: Entry, quality: str) -> float | None:
    return entry.measurements.get(quality)


def _are_objectives(result: Result, cost: str, quality: str) -> bool:
    """Whether the plans of the front are those that no other one beats in this very picture."""
    first = next((k for k in result.dense if k.startswith("latency_ms@")), "latency_ms")
    names = {"macs": "macs_kept", "params": "params_kept", "latency_ms": first}
    return {names.get(k := measured_key(o), k) for o in result.objectives} == {cost, quality}


def _rule(limit: Limit, result: Result, cost: str, quality: str) -> Rule | None:
    first = next((k for k in result.dense if k.startswith("latency_ms@")), "latency_ms")
    key = {"macs": "macs_kept", "params": "params_kept", "latency_ms": first}.get(limit.key, limit.key)
    if key not in (cost, quality):
        return None
    bound = limit.bound(result.dense)
    if key.endswith("_kept"):
        bound *= 100 / result.dense[limit.key]
    return Rule("x" if key == cost else "y", bound, str(limit))


def _pair(trial: Trial, key: str) -> tuple[float | None, float | None]:
    if key == "kl":
        return trial.predicted_kl, trial.measurements.get("kl")
    return trial.measurements.get(key.replace("_ms", "_predicted_ms")), trial.measurements.get(key)
