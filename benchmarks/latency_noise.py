"""What a busy machine does to a search: searches with and without a loop running on one core, and their plans again.

::

    python benchmarks/latency_noise.py --record

All searches share the latency table (it was measured before and lies on disk, as for any later study), and measure
their plans end to end themselves. `correct`, the default strategy, lets measured latencies change what is proposed
next; `solved` does not. Two quiet searches stand beside the busy one, since they may differ too. At last the plans of
the first search are measured again, quiet and beside the loop: whether noise changes which of the same plans is chosen.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from latency_limits import prepared
from machine import headed, write_record

from rankopt.limits import Limit, parse_limit
from rankopt.result import Result
from rankopt.search import Search

RECORD = Path(__file__).parent.parent / "studies" / "records" / "latency_noise.md"


def spin() -> None:
    """Keep one core busy."""
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet20", choices=["resnet20", "resnet18"])
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--limit", default="latency<=0.8x")
    parser.add_argument("--strategies", nargs="+", default=["correct", "solved"])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table"
        first = prepared(options.network, options.target, options.trials, 0)
        first.cache = table
        first.devices.prepare(first.groups)
        for strategy in options.strategies:
            for name, busy in (("quiet", False), ("quiet again", False), ("a busy loop", True)):
                own = Path(folder) / f"{strategy} {name}"
                shutil.copytree(table, own)  # the table and the fit are shared, plans of the search are not
                search = prepared(options.network, options.target, options.trials, 0)
                search.cache, search.limits, search.strategy = own, [parse_limit(options.limit)], strategy
                vars(search)["_prepared"] = first._prepared
                with loop_beside(busy):
                    result = search.run()
                best = result.best()
                noisy = [line for line in search.notes() if "noisy" in line]
                kept = best.measurements["latency_kept"]
                rows.append(
                    f"| `{strategy}`, {name} | {best.plan.digest} | {kept:.4f} | {best.measurements['kl']:.4f} "
                    f"| {'; '.join(noisy) or 'none'} |"
                )
                print(rows[-1], flush=True)
                if len(rows) == 1:
                    plans = result, search
        for name, busy in (("quiet", False), ("a busy loop", True)):
            with loop_beside(busy):
                rows.append(again(*plans, name, parse_limit(options.limit)))
            print(rows[-1], flush=True)
    chosen = [row.split("|")[2].strip() for row in rows]
    searches, same = chosen[:-2], chosen[-2:]
    verdicts = []
    for strategy, (quiet, other, busy) in zip(options.strategies, batched(searches), strict=True):
        beside = "the plan of" if busy == quiet else "another plan than"
        both = "the same plan" if other == quiet else "different plans"
        verdicts.append(f"`{strategy}`: beside the loop {beside} the quiet search; two quiet searches chose {both}.")
    verdicts.append(
        "Of the same plans, measured again, "
        + ("the same one" if len({chosen[0], *same}) == 1 else "another one")
        + " is chosen with and without the loop."
    )
    lines = [
        *headed(
            "A busy loop beside the search",
            f"{options.network}, {options.target}, `{options.limit}`, {options.trials} trials, seed 0.",
            runtimes=("onnxruntime", "openvino"),
        ),
        *verdicts,
        "",
        "| | chosen plan | measured × dense | its kl | noisy records |",
        "|---|---|---|---|---|",
        *rows,
    ]
    write_record(lines, RECORD if options.record else None)


@contextmanager
def loop_beside(busy: bool) -> Iterator[None]:
    """A loop on one core inside, if it shall be busy."""
    if not busy:
        yield
        return
    loop = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    loop.start()
    try:
        yield
    finally:
        loop.kill()
        loop.join()


def batched(chosen: Sequence[str]) -> list[Sequence[str]]:
    """In threes: what the searches of one strategy chose."""
    return [chosen[n : n + 3] for n in range(0, len(chosen), 3)]


def first_target(values: Mapping[str, float]) -> dict[str, float]:
    """With the names that the first target's values go by."""
    return {key.partition("@")[0]: value for key, value in values.items()}


def again(result: Result, search: Search, name: str, limit: Limit) -> str:
    """Which of a search's measured plans is chosen when all of them are measured again."""
    known = [e for e in result.entries if e.plan.changed() and e.measurements.get("latency_kept") is not None]
    (latency,) = search.devices.latencies
    found = latency.measure_again([e.plan for e in known])
    entries = tuple(
        replace(e, measurements={**e.measurements, **first_target(latency.values(m))})
        for e, m in zip(known, found, strict=True)
    )
    best = replace(result, entries=entries).best([limit])
    noisy = [m for m in found if m.noisy]
    said = (
        f"{len(noisy)} of {len(found)}; the worst {max(noisy, key=lambda m: m.spread + m.others).noise()}"
        if noisy
        else "none"
    )
    values = best.measurements
    cells = [f"its plans again, {name}", best.plan.digest, f"{values['latency_kept']:.4f}", f"{values['kl']:.4f}", said]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
