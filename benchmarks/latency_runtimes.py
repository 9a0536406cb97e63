"""The same plans on all runtimes, and what it is worth to choose plans by measured latency instead of by MACs.

::

    python benchmarks/latency_runtimes.py --network resnet18 --record
    python benchmarks/latency_runtimes.py --network resnet20 --compile --record

Plans are of two kinds: every layer at half its MACs by one method, and solved ones. "Least MACs" is the plan of least
predicted loss at half the MACs; "least latency" is, for every runtime, the fastest plan whose predicted loss is no
larger than that one's. ResNet-20 has its trained weights and CIFAR-10 images; the ResNet-18 has random weights, so that
its losses say little and its times everything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from latency_limits import SPACE
from machine import headed, write_record
from networks import METHODS, network, ranks_at

from rankopt.allocate import Allocation, allocate
from rankopt.batches import Batch
from rankopt.calibration import CalibrationOptions
from rankopt.candidates import Group
from rankopt.decompositions import method
from rankopt.devices import Devices
from rankopt.errors import InfeasibleError
from rankopt.plan import LayerChoice, Plan
from rankopt.search import Search
from rankopt.targets import read

RECORDS = Path(__file__).parent.parent / "studies" / "records"
TARGETS = ("onnxruntime", "openvino", "torch")


def prepared(name: str, targets: Sequence[str]) -> Search:
    """A search with its candidates' losses and latencies."""
    model, example = network(name)
    if name == "resnet20":
        import cifar10

        model = cifar10.resnet20().eval()
        data = cifar10.data(calibration=1000, validation=100)
        images = torch.as_tensor(data["calibration"]()[0])
        batches = [Batch((part,)) for part in images.split(100)]
        space = {**SPACE, "methods": [*SPACE["methods"], "cp"]}
    else:
        generator = torch.Generator().manual_seed(0)
        batches = [Batch((torch.randn((16, *example.shape[1:]), generator=generator),)) for _ in range(8)]
        space = {**SPACE, "statistics": False}  # noise as data says nothing about where to truncate
    return Search(
        model,
        example,
        calibration=batches[:-2],
        validation=batches[-2:],
        space=space,
        options=CalibrationOptions(fisher_samples=64 if name == "resnet18" else 256, draws=2),
        targets=[t for t in targets if t != "torch-compile"],
    )


def uniform(groups: Sequence[Group], name: str, keep: float = 0.5) -> Plan:
    """Every layer that the method fits at this share of its MACs."""
    layers = [g.layers[0] for g in groups]
    fitting = [la for la in layers if method(name).why_not(la) is None and la.kind != "linear"]
    return Plan({la.name: LayerChoice(name, ranks_at(la, name, keep)) for la in fitting})


def solved(groups: Sequence[Group], devices: Devices, limits: dict[str, float]) -> tuple[Plan, Allocation]:
    """The plan of least predicted loss within limits on sums over the groups."""
    allocation = allocate([g.as_choices(costs=devices.costs(g)) for g in groups], limits)
    return Plan({g.name: g.choices[p] for g, p in zip(groups, allocation.picks, strict=True)}), allocation


def fastest(groups: Sequence[Group], devices: Devices, quantity: str, loss: float, start: float) -> Plan:
    """The fastest plan of at most this predicted loss: the least bound on latency that allows one."""
    low, high = 0.3 * start, start
    best = solved(groups, devices, {quantity: high})[0]
    for _ in range(14):
        middle = (low + high) / 2
        try:
            plan, allocation = solved(groups, devices, {quantity: middle})
        except InfeasibleError:
            low = middle
            continue
        if allocation.loss <= loss:
            best, high = plan, middle
        else:
            low = middle
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18", choices=["resnet20", "resnet18"])
    parser.add_argument("--compile", action="store_true", help="torch.compile as well; takes minutes")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    search = prepared(options.network, TARGETS)
    search.devices.prepare(search.groups, lambda text: print(text, file=sys.stderr))
    groups, devices = search.groups, search.devices
    dense_macs = search.cost.macs
    outside = dense_macs - sum(la.macs for g in groups for la in g.layers)
    by_macs, allocation = solved(groups, devices, {"macs": 0.5 * dense_macs - outside})
    plans = {f"{name}, each layer at half": uniform(groups, name) for name in METHODS if name != "tensor_train"}
    plans["least MACs"] = by_macs
    for latency in devices.latencies:
        key = f"latency_ms@{latency.label}"
        start = sum(float(devices.costs(g)[key][p]) for g, p in zip(groups, allocation.picks, strict=True))
        plans[f"least latency on {latency.label}"] = fastest(groups, devices, key, allocation.loss, start)
    kept = {la.label: [m.kept for m in la.measure_again(list(plans.values()))] for la in devices.latencies}
    if options.compile:
        from rankopt.latency import PlanLatency

        latency = PlanLatency(read("torch-compile"), search.model, search.layers, (search.example,), cache=False)
        kept["torch-compile"] = [m.kept for m in latency.measure_again(list(plans.values()))]
    labels = list(kept)
    rows = []
    for n, (name, plan) in enumerate(plans.items()):
        share = search.evaluator.costs(plan)["macs_kept"]
        times = " | ".join(f"{1 / (kept[label][n] or 1):.2f} ({rank(kept[label], n)})" for label in labels)
        rows.append(f"| {name} | {share:.3f} | {times} |")
    base = list(plans).index("least MACs")
    gains = [
        f"On {la.label} the fastest plan of the same predicted loss takes"
        f" {(kept[la.label][list(plans).index(f'least latency on {la.label}')] or 1) / (kept[la.label][base] or 1):.1%}"
        " of the time of the plan with the least MACs."
        for la in devices.latencies
    ]
    lines = [
        *headed(
            f"The same plans on several runtimes: {options.network}",
            "Speed-up over dense in the same runtime (interleaved, median of the ratios over the rounds), batch 1, one",
            "thread; in brackets the rank of the plan on that runtime, 1 the fastest.",
            runtimes=("onnxruntime", "openvino"),
        ),
        f"| plan | MACs kept | {' | '.join(labels)} |",
        f"|---|---|{'---|' * len(labels)}",
        *rows,
        "",
        *gains,
        "",
        *(f"- {line}" for line in devices.report()),
    ]
    write_record(lines, RECORDS / f"latency_runtimes_{options.network}.md" if options.record else None)


def rank(values: Sequence[float | None], index: int) -> int:
    """The place of a value among all, 1 the least."""
    order = np.argsort([v or 1.0 for v in values])
    return int(np.flatnonzero(order == index)[0]) + 1


if __name__ == "__main__":
    main()
