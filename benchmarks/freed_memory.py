"""How many pages a PyTorch model is given anew in every run, with glibc's own settings and with freed memory kept.

    python benchmarks/freed_memory.py --network resnet20 --record

A dense network runs between runs of other plans of it, as it does while latencies are measured, in a process of its own
for each setting. Minor page faults of its runs are counted by the system; the times are those of the same runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from machine import headed, write_record
from networks import groups_of, network

from rankopt.latency_probes import random_plans
from rankopt.layers import inference
from rankopt.machine import keep_freed_memory
from rankopt.surgery import structure

RECORD = Path(__file__).parent.parent / "studies" / "records" / "freed_memory.md"
_RUNS = 20
SETTINGS = {"own": "glibc's own", "kept": "freed memory kept"}


def counted(name: str, setting: str, plans: int) -> dict[str, list[float]]:
    """Page faults and milliseconds of a run of the dense network, each a median over the runs between two plans."""
    if setting == "kept" and not keep_freed_memory():
        raise SystemExit("the C library has no such setting")
    torch.set_num_threads(1)
    model, example = network(name)
    _, groups = groups_of(model, example)
    faults, times = [], []
    for plan in random_plans(groups, plans, seed=1):
        other = structure(model, plan).eval()
        with inference(model), inference(other):
            for _ in range(_RUNS):
                other(example)
            model(example)
            each = []
            for _ in range(_RUNS):
                before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
                model(example)
                took = time.perf_counter() - start
                each.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, 1000 * took))
        fault, ms = np.median(each, axis=0)
        faults.append(float(fault))
        times.append(float(ms))
    return {"faults": faults, "ms": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20", choices=["resnet20", "resnet18"])
    parser.add_argument("--plans", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind, by turns")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--setting", choices=list(SETTINGS), help="count here and now, and print JSON")
    options = parser.parse_args()
    if options.setting:
        print(json.dumps(counted(options.network, options.setting, options.plans)))
        return
    rows = []
    for number in range(options.rounds):
        for setting, said in SETTINGS.items():
            command = [sys.executable, __file__, "--setting", setting]
            command += ["--network", options.network, "--plans", str(options.plans)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = {key: np.array(values) for key, values in json.loads(done.stdout).items()}
            low, middle, high = np.quantile(found["faults"], [0.0, 0.5, 1.0])
            spread = np.ptp(np.quantile(found["ms"], [0.1, 0.9])) / np.median(found["ms"])
            cells = [said, str(number + 1), f"{low:.0f}", f"{middle:.0f}", f"{high:.0f}"]
            cells += [f"{np.median(found['ms']):.3g}", f"{spread:.1%}"]
            rows.append(f"| {' | '.join(cells)} |")
            print(rows[-1], file=sys.stderr, flush=True)
    lines = [
        *headed(
            "Pages that a model is given anew in every run",
            f"{options.network} in PyTorch, batch 1, random weights: {_RUNS} runs of the dense network after as many",
            f"of each of {options.plans} other plans. What a row sums up are {options.plans} medians over those runs.",
        ),
        "| setting | process | fewest page faults a run | median | most | ms, median | 10th to 90th percentile |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    write_record(lines, RECORD if options.record else None)


if __name__ == "__main__":
    main()
