"""How well the latency of whole plans is predicted: random plans, three runtimes, two networks.

::

    python benchmarks/latency_prediction.py --record
    python benchmarks/latency_prediction.py --network resnet20 --target onnxruntime --plans 10

For every network and runtime the latency table is filled from nothing, the correction is fitted on the plans that
`PlanLatency.prepare` draws, and then so many other random plans are predicted and measured, each beside dense. The
floor is what some of the same plans do when they are measured a second time. A run of some of them replaces their rows
in the record and leaves the others.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import commit, headed, merged, write_record
from networks import groups_of, network

from rankopt.latency import PlanLatency
from rankopt.latency_probes import random_plans
from rankopt.targets import read

RECORD = Path(__file__).parent.parent / "studies" / "records" / "latency_prediction.md"
_TWICE = 15  # plans that are measured a second time
TARGETS = ("onnxruntime", "openvino", "torch")


def measured(name: str, target: str, plans: int) -> list[str]:
    """One row of the table."""
    model, example = network(name)
    layers, groups = groups_of(model, example)
    with tempfile.TemporaryDirectory() as folder:
        latency = PlanLatency(read(target), model, layers, (example,), cache=Path(folder))
        start = time.perf_counter()
        latency.prepare(groups, lambda text: print(f"{time.perf_counter() - start:6.0f} s  {text}", file=sys.stderr))
        seconds = time.perf_counter() - start
        others = random_plans(groups, plans, seed=4711)
        predicted = np.array([latency.predict(p) for p in others]) / latency.dense.value
        first = latency.measure(others)
        twice = latency.measure_again(others[:_TWICE])
    kept = np.array([m.kept for m in first], float)
    again = np.array([m.kept for m in twice], float)
    miss, floor = abs(predicted / kept - 1), abs(again / kept[:_TWICE] - 1)
    noisy = sum(m.noisy for m in first)
    assert latency.error is not None
    return [
        name,
        target,
        f"{latency.dense.value:.3g}",
        f"{kept.min():.2f} to {kept.max():.2f}",
        f"{np.median(miss):.1%}",
        f"{np.quantile(miss, 0.95):.1%}",
        f"{latency.error.median:.1%} / {latency.error.p95:.1%}",
        f"{np.median(floor):.1%} / {np.quantile(floor, 0.95):.1%}",
        f"{noisy}",
        f"{seconds:.0f}",
        commit(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", action="append", choices=["resnet20", "resnet18"])
    parser.add_argument("--target", action="append")
    parser.add_argument("--plans", type=int, default=50)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.network or ["resnet20", "resnet18"]:
        for target in options.target or TARGETS:
            rows.append(measured(name, target, options.plans))
            print(" | ".join(rows[-1]), flush=True)
    lines = [
        *headed(
            "Predicted against measured latency of whole plans",
            f"{options.plans} random plans each that the prediction was not fitted on, batch 1, one thread, random",
            "weights; ResNet-20 at 32×32, ResNet-18 at 96×96. Errors are relative to the measured share of dense. The",
            "rows come from one or several runs of the script on this machine, the last of which is named here.",
            runtimes=("onnxruntime", "openvino"),
        ),
        "| network | runtime | dense ms | plans took × dense | error, median | error, 95th percentile"
        " | own estimate of both | measured twice: median / 95th | noisy | seconds to prepare | rankopt at |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *merged(RECORD, rows, key=2),
    ]
    write_record(lines, RECORD if options.record else None)


if __name__ == "__main__":
    main()
