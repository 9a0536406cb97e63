"""What a busy machine does to a search: the same search with and without a loop running on one core.

::

    python benchmarks/latency_noise.py --record

Both searches share the latency table (it was measured before and lies on disk, as for any later study), and measure
their plans end to end themselves.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from pathlib import Path

import torch
from latency_limits import prepared
from machine import headed, write_record

from rankopt.limits import parse_limit

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
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, plans = [], []
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table"
        first = prepared(options.network, options.target, options.trials, 0)
        first.cache = table
        first.devices.prepare(first.groups)
        for busy in (False, True):
            own = Path(folder) / ("busy" if busy else "quiet")
            shutil.copytree(table, own)  # the table and the fit are shared, plans of the search are not
            search = prepared(options.network, options.target, options.trials, 0)
            search.cache, search.limits = own, [parse_limit(options.limit)]
            vars(search)["_prepared"] = first._prepared
            loop = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
            if busy:
                loop.start()
            best = search.run().best()
            if busy:
                loop.kill()
            noisy = [line for line in search.notes() if "noisy" in line]
            plans.append(best.plan.digest)
            kept = best.measurements["latency_kept"]
            label = "a busy loop" if busy else "quiet"
            rows.append(f"| {label} | {best.plan.digest} | {kept:.4f} | {'; '.join(noisy) or 'none'} |")
            print(rows[-1], flush=True)
    lines = [
        *headed(
            "A busy loop beside the search",
            f"{options.network}, {options.target}, `{options.limit}`, {options.trials} trials, seed 0.",
            runtimes=("onnxruntime", "openvino"),
        ),
        f"The chosen plan is **{'the same' if len(set(plans)) == 1 else 'another one'}**.",
        "",
        "| | chosen plan | measured × dense | noisy records |",
        "|---|---|---|---|",
        *rows,
    ]
    write_record(lines, RECORD if options.record else None)


if __name__ == "__main__":
    main()
