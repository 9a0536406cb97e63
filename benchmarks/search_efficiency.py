"""What the ways to choose plans are worth, on ResNet-20 and ResNet-56 with CIFAR-10.

::

    python benchmarks/search_efficiency.py plain --network resnet20 --seeds 5     # the samplers alone, 500 trials
    python benchmarks/search_efficiency.py reach --network resnet20 --seeds 3     # the best of them, what gets as far
    python benchmarks/search_efficiency.py moves --network resnet20 --seeds 5     # every strategy, 200 trials
    python benchmarks/search_efficiency.py accuracy --network resnet20            # test accuracy under limits on MACs
    python benchmarks/search_efficiency.py trial                                  # a trial against the naive loop
    python benchmarks/search_efficiency.py prefix                                 # what trials have in common
    python benchmarks/search_efficiency.py scale                                  # 100 layers of 40 candidates
    python benchmarks/search_efficiency.py tables --record                        # the record, from all runs so far

Every run is kept as a line of studies/records/search_runs.jsonl and not done again, so that the whole (many hours) can
be made in parts. All strategies choose from the same 450 (ResNet-56: 1,350) candidates, three methods at eight shares
of every layer's MACs, and every plan is refitted and judged in the same way.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import commit, described, write_record
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "studies")]

from rankopt import ledger, study
from rankopt.batches import Batch
from rankopt.errors import InfeasibleError
from rankopt.evaluate import Evaluation
from rankopt.limits import parse_limit
from rankopt.refit import RefitOptions
from rankopt.running import setting_of
from rankopt.search import Search
from rankopt.strategies import DEFAULT

RUNS = ROOT / "studies" / "records" / "search_runs.jsonl"
RECORD = ROOT / "studies" / "records" / "search_efficiency.md"
SPACE = {
    "methods": ["svd", "spatial_svd", "tucker2"],
    "keep": {"min": 0.1, "max": 0.9, "levels": 8},
    "rules": [{"match": ["conv1", "linear"], "dense": True}],
}
SAMPLERS = ("tpe", "nsga2", "random")
MOVES = ("solved", "mixed", "correct", "fit", "local", "relinearize", "free")
_ALL = ", all methods"
WAYS = ("uniform", "energy", "vbmf", "greedy", "solved", "plain", "mixed", "correct", f"mixed{_ALL}", f"correct{_ALL}")
IDEAL = 3.0  # the hypervolume of a plan that costs and loses nothing: 3 nats times all MACs
_TRIALS = {"plain": 60, "uniform": 9, "energy": 9, "vbmf": 9, "solved": 12}  # else as asked
_REACHED_BY = 16  # trials; ten are asked for
_KEPT_AT = (12, 25, 50, 100, 150, 200, 300, 400, 500)


def prepared(network: str, validation: int = 500, refit: int | None = 256, **options: Any) -> tuple[Search, float]:
    """A search over the common candidates, and the seconds that its preparation took."""
    import cifar10

    data = cifar10.data(calibration=1024, validation=validation)
    (images, _), (judged, labels) = (data[key]() for key in ("calibration", "validation"))
    search = Search(
        getattr(cifar10, network)().eval(),
        images[:1],
        calibration=[Batch((part,)) for part in images.split(128)],
        validation=[Batch((x,), {}, y) for x, y in zip(judged.split(125), labels.split(125), strict=True)],
        objectives=["kl", "macs"],
        limits=options.pop("limits", ()),
        space=options.pop("space", SPACE),
        refit=None if refit is None else RefitOptions(),
        refit_samples=refit,
        memory=3 * 2**30,  # all statistics of ResNet-56 in one pass
        **options,
    )
    start = time.perf_counter()
    search.space  # noqa: B018  (calibrates and factorizes)
    search.evaluator  # noqa: B018
    return search, time.perf_counter() - start


class Runs:
    """What was run before, and what is run now, line by line."""

    def __init__(self, path: Path = RUNS) -> None:
        self.path = path
        text = path.read_text().splitlines() if path.is_file() else []
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Lines with these values."""
        return [line for line in self.lines if all(line.get(k) == v for k, v in wanted.items())]

    def add(self, **line: Any) -> None:
        """Keep one."""
        line |= {"commit": commit(), "machine": described(torch.get_num_threads())}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def searched(search: Search, strategy: str, sampler: str, seed: int, trials: int, seeds: int = 12) -> dict[str, Any]:
    """One study in memory: hypervolume and seconds after so many trials, and where it first passed each level."""
    search.strategy, search.sampler, search.seed, search.trials, search.seeds = strategy, sampler, seed, trials, seeds
    storage = ledger.open_storage(None)
    opened = ledger.open_study(storage, "s", search.objectives, {}, search.evaluator.dense, search.limits)
    course: list[tuple[int, float, float]] = []
    study.run(
        opened,
        setting_of(search),
        search.evaluator,
        lambda p: course.append((p.done, p.seconds, p.hypervolume or 0.0)),
        by=strategy,
    )
    result = ledger.result_of(opened, search.limits)
    plans = [e.plan.digest for e in result.entries]
    kept = [list(c) for c in course if c[0] in _KEPT_AT or c[0] <= 30]
    return {"course": kept, "plans": len(plans), "digest": hash_of(plans)}


def hash_of(plans: Sequence[str]) -> str:
    """A short name for a sequence of plans."""
    import hashlib

    return hashlib.sha256(" ".join(plans).encode()).hexdigest()[:12]


def course(
    part: str, network: str, ways: Sequence[tuple[str, str]], seeds: int, trials: int, runs: Runs, first: int
) -> None:
    """All runs of one kind that were not done yet."""
    todo = [
        (s, a, n) for n in range(first, first + seeds) for s, a in ways
        if not runs.find(part=part, network=network, strategy=s, sampler=a, seed=n, trials=trials)
    ]  # fmt: skip
    if not todo:
        return
    search, seconds = prepared(network)
    for strategy, sampler, seed in todo:
        found = searched(search, strategy, sampler, seed, trials)
        runs.add(
            part=part, network=network, strategy=strategy, sampler=sampler, seed=seed, trials=trials,
            prepared=seconds, **found,
        )  # fmt: skip
        done, took, volume = found["course"][-1]
        print(f"{network} {strategy} {sampler} seed {seed}: {volume:.4f} after {done} in {took:.0f} s", flush=True)


def reach(network: str, seeds: int, trials: int, runs: Runs, first: int) -> None:
    """The sampler that gets farthest, and every strategy until it is as far, in one process by turns."""
    for seed in range(first, first + seeds):
        course("reach", network, [("plain", "nsga2")], 1, trials, runs, seed)
        course("reach", network, [(s, "auto") for s in MOVES], 1, _REACHED_BY, runs, seed)


def accuracy(
    network: str, limits: Sequence[float], trials: int, seed: int, runs: Runs, only: Sequence[str] | None = None
) -> None:
    """Test accuracy of the best plan within a limit on MACs, by every strategy, with and without refit."""
    import cifar10

    test = list(zip(*(t.split(125) for t in cifar10.images("test")), strict=True))
    dense = tested(getattr(cifar10, network)().eval(), test)
    for refit in (True, False):
        ways = [way for way in WAYS if (refit or not way.endswith(_ALL)) and (only is None or way in only)]
        todo = [
            (limit, way) for limit in limits for way in ways
            if not runs.find(part="accuracy", network=network, strategy=way, refit=refit, limit=limit, seed=seed)
        ]  # fmt: skip
        memo: dict[str, Evaluation] = {}
        for space in (SPACE, "resnet"):
            samples = 1000 if space == "resnet" else 500
            own = [(li, way) for li, way in todo if (space == "resnet") == way.endswith(_ALL)]
            if not own:
                continue
            search, seconds = prepared(
                network, samples, samples + 12 if refit else None, space=space, metric="accuracy"
            )
            for limit, way in own:
                search.limits = [parse_limit(f"macs<={limit:g}%")]
                search.strategy, search.sampler, search.seed = way.partition(",")[0], "auto", seed
                search.seeds, search.trials = None, _TRIALS.get(way, trials)
                vars(search).pop("space", None)
                if way == "greedy":  # its ladder has eight steps a layer, all measured before it makes a plan
                    search.trials = 10 * len(search.space.groups)
                remembering = Remembering(search, memo if space == SPACE else {})
                start = time.perf_counter()
                storage = ledger.open_storage(None)
                opened = ledger.open_study(storage, "s", search.objectives, {}, search.evaluator.dense, search.limits)
                study.run(opened, setting_of(search), remembering, by=search.strategy)
                found = dict(part="accuracy", network=network, strategy=way, refit=refit, limit=limit, seed=seed,
                             trials=search.trials, prepared=seconds)  # fmt: skip
                try:
                    entry = ledger.result_of(opened, search.limits).best()
                except InfeasibleError:
                    runs.add(**found, accuracy=None, dense=None)
                    continue
                built = search.build(entry.plan)
                runs.add(
                    **found, measured=remembering.measured, seconds=time.perf_counter() - start,
                    kl=entry.measurements["kl"], macs_kept=entry.measurements["macs_kept"],
                    accuracy=tested(built, test), dense=dense,
                )  # fmt: skip
                last = runs.lines[-1]
                print(
                    f"{network} {limit:g} % {way} refit {refit}: {last['accuracy']:.2f} ({last['macs_kept']:.3f})",
                    flush=True,
                )


def tested(module: Any, test: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Accuracy on the test images in percent, in float32."""
    with torch.no_grad():
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in test)
    return 100 * right / sum(len(y) for _, y in test)


class Remembering:
    """An evaluator that measures no plan twice, for strategies that share the plans they begin with."""

    def __init__(self, search: Search, memo: dict[str, Evaluation]) -> None:
        self.search, self.memo, self.measured = search, memo, 0

    def __call__(self, plan: Any, limits: Sequence[Any], *rest: Any) -> Evaluation:
        """Measure, or recall."""
        if plan.digest not in self.memo or self.memo[plan.digest].stopped:
            self.memo[plan.digest] = self.search.evaluator(plan, limits, *rest)
            self.measured += 1
        return self.memo[plan.digest]


def by_tucker(old: nn.Conv2d, ranks: Mapping[str, int]) -> nn.Module:
    """A convolution as a chain of three by TensorLy's partial_tucker, whatever was to be made of it."""
    from tensorly.decomposition import partial_tucker

    rank = max(1, ranks.get("rank_out", ranks.get("rank", 1)))
    pair = [min(rank, old.out_channels), min(ranks.get("rank_in", rank), old.in_channels)]
    (core, (last, first)), _ = partial_tucker(old.weight.data, rank=pair, modes=[0, 1], init="svd")
    chain = nn.Sequential(
        nn.Conv2d(old.in_channels, pair[1], 1, bias=False),
        nn.Conv2d(pair[1], pair[0], old.kernel_size, old.stride, old.padding, bias=False),
        nn.Conv2d(pair[0], old.out_channels, 1, bias=False),
    )
    return filled(chain, first.T[..., None, None], core, last[..., None, None])


def by_parafac(old: nn.Conv2d, ranks: Mapping[str, int]) -> nn.Module:
    """A convolution as a chain of four by TensorLy's parafac with its own settings."""
    from tensorly.decomposition import parafac

    rank = ranks["rank"]
    weights, (last, first, rows, columns) = parafac(old.weight.data, rank=rank)
    (kh, kw), (sh, sw), (ph, pw) = old.kernel_size, old.stride, old.padding
    chain = nn.Sequential(
        nn.Conv2d(old.in_channels, rank, 1, bias=False),
        nn.Conv2d(rank, rank, (kh, 1), (sh, 1), (ph, 0), groups=rank, bias=False),
        nn.Conv2d(rank, rank, (1, kw), (1, sw), (0, pw), groups=rank, bias=False),
        nn.Conv2d(rank, old.out_channels, 1, bias=False),
    )
    stages = (first.T[..., None, None], rows.T[:, None, :, None], columns.T[:, None, None, :])
    return filled(chain, *stages, (last * weights)[..., None, None])


def filled(chain: nn.Sequential, *weights: torch.Tensor) -> nn.Module:
    """The chain with these weights."""
    for module, weight in zip(chain, weights, strict=True):
        module.weight.data.copy_(weight)
    return chain


def naive(search: Search, plan: Any) -> float:
    """Seconds of a trial as it is usually written: TensorLy from scratch, a deep copy, thop, the same images."""
    import tensorly
    from thop import profile

    tensorly.set_backend("pytorch")
    start = time.perf_counter()
    model = copy.deepcopy(search.model)
    for name, choice in plan.changed().items():
        old = model.get_submodule(name)
        if isinstance(old, nn.Conv2d):
            way = by_parafac if choice.method == "cp" else by_tucker
            model.set_submodule(name, way(old, choice.ranks))
    profile(copy.deepcopy(model), (search.example,), verbose=False)
    model.eval()
    with torch.no_grad():
        for batch in search.validation:
            dense = search.model(*batch.args).log_softmax(-1)
            (dense.exp() * (dense - model(*batch.args).log_softmax(-1))).sum(-1).mean()
    return time.perf_counter() - start


def trial(runs: Runs, network: str) -> None:
    """A trial of ours, with and without refit, beside the naive loop, which has none, on the same plans by turns."""
    for space, kind in ((SPACE, "three"), ("resnet", "all")):
        _trial(runs, network, space, kind)


def _trial(runs: Runs, network: str, space: Any, kind: str) -> None:
    search, _ = prepared(network, 1000, 256, space=space)
    plans = [search.space.solve(search.space.losses, b) for b in np.linspace(0.8, 0.2, 9)]
    evaluator = search.evaluator
    unfitted = copy.copy(evaluator)
    unfitted.refit = None
    evaluator(plans[0])
    ways: dict[str, Callable[[Any], Any]] = {
        "ours": evaluator, "unfitted": unfitted, "naive": lambda plan: naive(search, plan)
    }  # fmt: skip
    parts = {  # of a trial with refit
        "refit_s": lambda plan: evaluator.build(plan, quick=True),
        "quality_s": lambda plan: evaluator.quality(built, quick=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in (*ways, *parts)}
    for plan in plans:
        built = evaluator.build(plan, quick=True)
        for name, way in (ways | parts).items():
            start = time.perf_counter()
            way(plan)
            taken[name].append(time.perf_counter() - start)
    seconds = {name: np.array(v) for name, v in taken.items()}
    ratios = {"ratio": seconds["naive"] / seconds["ours"], "unfitted_ratio": seconds["naive"] / seconds["unfitted"]}
    medians = {name: float(np.median(v)) for name, v in (seconds | ratios).items()}
    runs.add(
        part="trial", network=network, space=kind, fast=str(evaluator.fast),
        cp=int(np.median([plan.methods().get("cp", 0) for plan in plans])), **medians,
    )  # fmt: skip
    print(json.dumps(runs.lines[-1]))


def prefix(runs: Runs, network: str, trials: int) -> None:
    """How much of a plan's work an earlier plan of the same study has done already: the layers up to the first that
    differs, as a share of the dense MACs; and how much of it is still there where the activations behind so many
    prefixes are held, those that were used last."""
    search, _ = prepared(network)
    search.strategy, search.sampler, search.seed, search.trials, search.seeds = "mixed", "auto", 0, trials, 12
    opened = ledger.open_study(
        ledger.open_storage(None), "s", search.objectives, {}, search.evaluator.dense, search.limits
    )
    study.run(opened, setting_of(search), search.evaluator, by="mixed")
    refit, macs = search.evaluator.refit, {la.name: la.macs for la in search.layers}
    assert refit is not None
    whole = sum(macs[name] for name in refit.order)
    found: dict[str, float] = {}
    for held in (16, 64, 10**9):
        there: dict[tuple[str, ...], None] = {}  # the oldest first
        seen: set[tuple[str, ...]] = set()
        spared = []
        for entry in ledger.result_of(opened, search.limits).entries:
            choices = tuple(str(entry.plan[name]) for name in refit.order)
            starts = [choices[:n] for n in range(len(choices) - 1, 0, -1)]
            hit = next((start for start in starts if start in there), ())
            spared.append(sum(macs[name] for name in refit.order[: len(hit)]) / whole)
            again = next((start for start in starts if start in seen), ())  # held from the second time on
            for start in (hit, again):
                if start:
                    there.pop(start, None)
                    there[start] = None
            for old in list(there)[: max(0, len(there) - held)]:
                del there[old]
            seen |= set(starts)
        found["all" if held == 10**9 else str(held)] = float(np.mean(spared))
    runs.add(part="prefix", network=network, trials=trials, spared=found)
    print(json.dumps(runs.lines[-1]))


def scale(runs: Runs) -> None:
    """The integer program, asking and telling, and opening, for 100 layers of 40 candidates."""
    import tempfile

    sys.path.append(str(ROOT / "tests"))
    from test_space import group

    from rankopt.loop import Loop
    from rankopt.space import SearchSpace
    from rankopt.strategies.strategy import Setting

    groups = [group(f"l{n}", n, 16, levels=20, with_dense=n % 2 == 0) for n in range(100)]
    totals = {q: sum(float(getattr(la, q)) for g in groups for la in g.layers) for q in ("macs", "params")}
    space = SearchSpace(groups, {"macs": 0.0, "params": 0.0}, totals, {})
    start = np.array(_now())
    budgets = np.linspace(space.highest, space.lowest, 32)
    plans = [space.solve(space.losses, float(b)) for b in budgets]
    front, busy = map(float, _now() - start)
    dense = {**totals, "kl": 0.0}

    def measure(plan: Any, limits: Sequence[Any], *rest: Any) -> Evaluation:
        macs = space.cost(plan)
        return Evaluation({"kl": space.predicted(plan), "macs": macs, "macs_kept": macs / totals["macs"]}, {}, None, {})

    out: dict[str, Any] = {"integer_program_32_budgets_s": front, "integer_program_32_budgets_cpu_s": busy}
    out["plans"] = len({p.digest for p in plans})
    with tempfile.TemporaryDirectory() as folder:
        for where, url in (("memory", None), ("sqlite", f"{folder}/s.db")):
            opened = ledger.open_study(ledger.open_storage(url), "s", ("kl", "macs"), {}, dense, [])
            times: list[tuple[float, float]] = []
            setting = Setting(space, ("kl", "macs"), [], dense, 1050, 0)
            loop = Loop(opened, setting, DEFAULT)
            while loop.done < 1050:
                start = np.array(_now())
                asked = loop.ask()
                middle = np.array(_now())
                assert asked is not None
                found = loop.outcome(asked, measure)
                evaluated = np.array(_now())
                loop.tell(asked, found)
                times.append(tuple(middle - start + _now() - evaluated))
            wall, busy = 1000 * np.median(times[950:], axis=0)
            out |= {f"ask_tell_{where}_ms_at_1000": float(wall), f"ask_tell_{where}_cpu_ms_at_1000": float(busy)}
        url = f"{folder}/large.db"
        storage = ledger.open_storage(url)
        opened = ledger.open_study(storage, "s", ("kl", "macs"), {}, dense, [])
        random = np.random.default_rng(0)
        from optuna.trial import create_trial

        (like,) = ledger.read_study(f"sqlite:///{folder}/s.db", "s").get_trials()[-1:]
        for _ in range(10_000):  # all plans differ
            plan = space.plan([int(random.integers(len(g.choices))) for g in groups])
            found = measure(plan, [])
            attributes = like.user_attrs | {"plan": plan.to_dict(short=True), "measurements": found.measurements}
            values = [found.measurements["kl"], found.measurements["macs"]]
            opened.add_trial(create_trial(values=values, user_attrs=attributes, system_attrs=like.system_attrs))
        start = np.array(_now())
        result = ledger.read_result(f"sqlite:///{url}", "s")
        out["open_10000_trials_s"], out["open_10000_trials_cpu_s"] = map(float, _now() - start)
        assert len(result.entries) == 10_000
        from optuna.storages import RDBStorage

        theirs = RDBStorage(f"sqlite:///{url}")
        start = np.array(_now())
        theirs.get_all_trials(opened._study_id, deepcopy=False)
        out["optuna_reads_them_s"], out["optuna_reads_them_cpu_s"] = map(float, _now() - start)
    runs.add(part="scale", **out)
    print(json.dumps(out))


def _now() -> tuple[float, float]:
    """Seconds, and seconds of this thread on a processor, which others on the machine change less."""
    return time.perf_counter(), time.thread_time()


def tables(runs: Runs) -> Iterator[str]:
    """The record."""
    for network in ("resnet20", "resnet56"):
        yield from _plain_table(runs, network)
        yield from _moves_table(runs, network)
        yield from _accuracy_table(runs, network)
    yield from _trial_table(runs)
    for line in runs.find(part="prefix")[-1:]:
        spared = line["spared"]
        yield from (
            "", "## What trials have in common", "",
            f"{line['network']}, {line['trials']} trials of `mixed`. The layers before the first one that a plan"
            " chooses otherwise than every earlier plan need not run again where their outputs were held. Held from the"
            f" second time on that such a beginning occurs, that would spare {100 * spared['all']:.0f} % of a trial's"
            f" work (in dense MACs); with room for 64 beginnings {100 * spared['64']:.0f} %, for 16"
            f" {100 * spared['16']:.0f} %. One takes up to 48 MiB here (1,000 images in bfloat16, 256 in float32), so"
            " nothing is held.",
        )  # fmt: skip
    for line in runs.find(part="scale")[-1:]:
        yield from ("", "## Scale: 100 layers of 40 candidates", "")
        yield from ("Processor: seconds of its own thread, which other work beside it changes less.", "")
        yield from ("| | seconds | processor |", "|---|---|---|")
        names = {
            "integer_program_32_budgets{}_s": "the integer program at 32 budgets",
            "ask_tell_memory{}_ms_at_1000": "ask + tell at trial 1,000, study in memory",
            "ask_tell_sqlite{}_ms_at_1000": "the same in SQLite",
            "open_10000_trials{}_s": "opening a study with 10,000 trials, all plans different",
            "optuna_reads_them{}_s": "reading the trials alone by Optuna's own storage",
        }
        for key, text in names.items():
            pair = [line.get(key.format(of)) for of in ("", "_cpu")]
            unit = 1000 if "_ms_" in key else 1
            yield f"| {text} | {' | '.join('' if v is None else f'{v / unit:.3g}' for v in pair)} |"
        yield from ("", line["machine"])


def _trial_table(runs: Runs) -> Iterator[str]:
    found = [line for space in ("three", "all") for line in runs.find(part="trial", space=space)[-1:]]
    if not found:
        return
    yield from ("", "## A trial against the naive loop", "")
    yield (
        f"{found[0]['network']}, 1,000 images, medians over 9 plans by turns. The naive loop decomposes every layer"
        " anew with TensorLy, cp by parafac and all others by partial_tucker, and has a deep copy and thop; it refits"
        " nothing. How much longer it takes:"
    )
    yield from ("", "| candidates | naive, s | ours, s | times | ours without refit, s | times |")
    yield "|---|---|---|---|---|---|"
    for line in found:
        what = (
            f"all methods ({line['cp']} layers cp, median)" if line["space"] == "all" else "svd, spatial_svd, tucker2"
        )
        yield (
            f"| {what} | {line['naive']:.2f} | {line['ours']:.2f} | **{line['ratio']:.1f}** | {line['unfitted']:.2f}"
            f" | **{line['unfitted_ratio']:.1f}** |"
        )
    first = found[0]
    yield from (
        "",
        f"Of the first row's trial with refit, building and refitting take {first['refit_s']:.2f} s, the quality"
        f" {first['quality_s']:.2f} s ({first['fast']}). {first['machine']}",
    )


def _plain_table(runs: Runs, network: str) -> Iterator[str]:
    found = runs.find(part="plain", network=network)
    if found:
        best: dict[str, list[float]] = {}
        for line in found:
            best.setdefault(line["sampler"], []).append(line["course"][-1][2])
        yield from (
            "",
            f"## {network}: Optuna's samplers over the layers, 500 trials",
            "",
            "| sampler | hypervolume | seeds |",
            "|---|---|---|",
        )
        for sampler, volumes in best.items():
            yield f"| {sampler} | {_range(np.array(volumes), 3)} | {len(volumes)} |"
    found = runs.find(part="reach", network=network)
    theirs = [r for r in found if r["strategy"] == "plain"]
    if not theirs:
        return
    target = float(np.median([r["course"][-1][2] for r in theirs]))
    whole = float(np.median([r["course"][-1][1] for r in theirs]))
    prepared = float(np.median([r["prepared"] for r in found]))
    yield from ("", f"## {network}: what reaches the same as the best of them", "")
    yield (
        f"{theirs[0]['sampler']} comes to {target:.3f} after {theirs[0]['course'][-1][0]} trials in {whole:.0f} s"
        f" (seeds: {len(theirs)}, median), without the {prepared:.1f} s in which its candidates were made too. Run in"
        " turns."
    )
    yield from (
        "",
        "| strategy | trials to reach it | seconds, preparation included | times less than the sampler |",
        "|---|---|---|---|",
    )
    for strategy in MOVES:
        own = [_reached(r, target) for r in found if r["strategy"] == strategy]
        good = [r for r in own if r is not None]
        if not own:
            continue
        if len(good) < len(own):
            yield f"| {strategy} | not reached by {len(own) - len(good)} of {len(own)} seeds | | |"
            continue
        trials, seconds = np.array(good).T
        yield f"| {strategy} | {_range(trials, 0)} | {_range(seconds, 1)} | {whole / np.median(seconds):.1f} |"
    yield from ("", theirs[-1]["machine"])


def _moves_table(runs: Runs, network: str) -> Iterator[str]:
    found = runs.find(part="moves", network=network)
    solved = [_at(r, 12) for r in found if r["strategy"] == "solved"]
    if not solved:
        return
    start = float(np.median(solved))
    yield from ("", f"## {network}: hypervolume of the ways to move", "")
    yield (
        f"Twelve solved plans alone: {start:.4f}; the ideal is {IDEAL:g}. Closed is the share of the gap between them"
        " that is gone after 200 trials. Median (least to most) over the seeds."
    )
    yield from (
        "",
        "| strategy | seeds | 50 trials | 100 | 200 | closed |",
        "|---|---|---|---|---|---|",
    )
    for strategy in MOVES:
        own = [r for r in found if r["strategy"] == strategy]
        if not own:
            continue
        cells = [_range(np.array([_at(r, n) for r in own]), 4) for n in (50, 100, 200)]
        closed = np.array([100 * (_at(r, 200) - start) / (IDEAL - start) for r in own])
        yield f"| {strategy} | {len(own)} | {' | '.join(cells)} | {_range(closed, 1)} % |"


def _accuracy_table(runs: Runs, network: str) -> Iterator[str]:
    found = runs.find(part="accuracy", network=network)
    if not found:
        return
    limits = sorted({r["limit"] for r in found}, reverse=True)
    yield from ("", f"## {network}: test accuracy without any training", "")
    dense = next((r["dense"] for r in found if r["dense"]), 0.0)
    yield f"Dense {dense:.2f}. Change in points at MACs kept of at most …; plans chosen by kl on training images."
    yield from (
        "",
        f"| strategy | refit | {' | '.join(f'{li:g} %' for li in limits)} |",
        "|---|---|" + "---|" * len(limits),
    )
    for way in WAYS:
        for refit in (False, True):
            own = {r["limit"]: r for r in found if r["strategy"] == way and r["refit"] == refit}
            if own:
                cells = [_change(own[li]) if li in own else "" for li in limits]
                yield f"| {way} | {'yes' if refit else 'no'} | {' | '.join(cells)} |"


def _change(run: Mapping[str, Any]) -> str:
    return "no plan" if run["accuracy"] is None else f"{run['accuracy'] - run['dense']:+.2f}"


def _reached(run: Mapping[str, Any], target: float) -> tuple[float, float] | None:
    return next(((n, run["prepared"] + s) for n, s, volume in run["course"] if volume >= target), None)


def _at(run: Mapping[str, Any], trials: int) -> float:
    return float(next((v for n, _, v in reversed(run["course"]) if n <= trials), 0.0))


def _range(values: np.ndarray, digits: int) -> str:
    low, middle, high = np.min(values), np.median(values), np.max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "part",
        nargs="?",
        default="tables",
        choices=["plain", "reach", "moves", "accuracy", "trial", "prefix", "scale", "tables"],
    )
    parser.add_argument("--network", default="resnet20", choices=["resnet20", "resnet56"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--only", nargs="+", help="strategies, or with plain samplers")
    parser.add_argument("--limits", type=float, nargs="+", default=[50.0, 40.0, 30.0])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs()
    parts: dict[str, Callable[[], None]] = {
        "plain": lambda: course("plain", options.network, [("plain", s) for s in options.only or SAMPLERS],
                                options.seeds, options.trials or 500, runs, options.first),
        "reach": lambda: reach(options.network, options.seeds, options.trials or 500, runs, options.first),
        "moves": lambda: course("moves", options.network, [(s, "auto") for s in options.only or MOVES],
                                options.seeds, options.trials or 200, runs, options.first),
        "accuracy": lambda: accuracy(options.network, options.limits, options.trials or 24, options.first, runs,
                                     options.only),
        "trial": lambda: trial(runs, options.network),
        "prefix": lambda: prefix(runs, options.network, options.trials or 100),
        "scale": lambda: scale(runs),
        "tables": lambda: None,
    }  # fmt: skip
    parts[options.part]()
    if options.part == "tables":
        head = [
            "# How much search the strategies need",
            "",
            "Made by the parts of benchmarks/search_efficiency.py (its first lines name the commands), every run of",
            "which is a line of [search_runs.jsonl](search_runs.jsonl) with its commit and machine. CIFAR-10; kl on",
            "500 of the training images, refit on 256 (for test accuracy on 512; of all methods: on 1,000 and 1,012);",
            "hypervolume below 3 nats and all MACs; `memory` 3 GiB. Other work ran on the second core, so there are",
            "seconds only where things were run in turns.",
            "Runs before 4a9c72f drew all labels of the Fisher losses alike; later plans lose a little less.",
        ]
        write_record([*head, *tables(runs)], RECORD if options.record else None)


if __name__ == "__main__":
    main()
