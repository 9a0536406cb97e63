"""Does the winner keep its limit? Twenty searches at random limits on latency, each winner measured afresh.

::

    python benchmarks/latency_limits.py --record
    python benchmarks/latency_limits.py --searches 3 --trials 8

Calibration, factors and the latency table are prepared once; every search is a study of its own. The winner is then
measured once more beside dense, after the search has ended, and that measurement is what is reported. The network has
random weights, so the limits are real and the quality is not; the data are noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from machine import headed, write_record
from networks import network

from rankopt.batches import Batch
from rankopt.calibration import CalibrationOptions
from rankopt.errors import InfeasibleError
from rankopt.limits import parse_limit
from rankopt.refit import RefitOptions
from rankopt.search import Search

RECORD = Path(__file__).parent.parent / "studies" / "records" / "latency_limits.md"
SPACE = {"methods": ["svd", "svd_in", "spatial_svd", "tucker2"], "keep": {"min": 0.08, "max": 0.9, "levels": 12}}


def prepared(name: str, target: str, trials: int, seed: int) -> Search:
    """A search whose limits are still to be set: ResNet-20 on CIFAR-10, or a ResNet-18 with random weights on noise."""
    model, example = network(name)
    if name == "resnet20":
        import cifar10

        model = cifar10.resnet20().eval()
        data = cifar10.data(calibration=1024, validation=500)
        images, judged = (torch.as_tensor(data[key]()[0]) for key in ("calibration", "validation"))
        batches, held = ([Batch((part,)) for part in x.split(128)] for x in (images, judged))
    else:
        generator = torch.Generator().manual_seed(seed)
        noise = [Batch((torch.randn((16, *example.shape[1:]), generator=generator),)) for _ in range(10)]
        batches, held = noise[:6], noise[6:]
    return Search(
        model,
        example,
        calibration=batches,
        validation=held,
        objectives=["kl", "latency"],
        space=SPACE,
        trials=trials,
        seed=seed,
        options=CalibrationOptions(seed=seed, **({} if name == "resnet20" else {"fisher_samples": 48, "draws": 2})),
        refit=RefitOptions(),
        refit_samples=256 if name == "resnet20" else 32,
        targets=[target],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet20", choices=["resnet20", "resnet18"])
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--searches", type=int, default=20)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--lowest", type=float, default=0.35)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    search = prepared(options.network, options.target, options.trials, options.seed)
    start = time.perf_counter()
    search.groups  # noqa: B018  (calibrates and factorizes)
    print(f"prepared in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    limits = np.random.default_rng(options.seed).uniform(options.lowest, 0.9, options.searches).round(3)
    rows, kept_all, slacks = [], 0, []
    for number, limit in enumerate(limits):
        search.limits = [parse_limit(f"latency<={limit}x")]
        search.name = f"limit {number}"
        vars(search).pop("space", None)
        start = time.perf_counter()
        try:
            best = search.run().best()
        except InfeasibleError as error:
            rows.append([f"{limit}", "–", "–", "–", "–", f"{error.message}"])
            continue
        seconds = time.perf_counter() - start
        (latency,) = search.devices.latencies
        (fresh,) = latency.measure_again([best.plan], [search.build(best.plan)])
        assert fresh.kept is not None
        assert fresh.kept_low is not None
        assert fresh.kept_high is not None
        spread = (fresh.kept_high - fresh.kept_low) / fresh.kept
        within = fresh.kept <= limit * (1 + spread)
        kept_all += within
        slacks.append(1 - fresh.kept / limit)
        verdict = "yes" if fresh.kept <= limit else "within the spread" if within else "no"
        rows.append(
            [f"{limit}", f"{fresh.kept:.4f}", f"{spread:.1%}", f"{slacks[-1]:+.1%}", verdict, f"{seconds:.0f} s"]
        )
        print(" | ".join(rows[-1]), flush=True)
    lines = [
        *headed(
            "Winners of searches under a limit on latency",
            f"{options.network}, {options.target}, {options.trials} trials a search, batch 1, one thread.",
            "The share of dense is measured afresh after the search, interleaved with dense; its spread is the",
            "interquartile range of the ratio over the rounds of that measurement.",
            runtimes=("onnxruntime", "openvino"),
        ),
        f"Kept within the measurement's spread: **{kept_all} of {len(rows)}**."
        f" Slack to the limit: median **{np.median(slacks):.1%}**, from {min(slacks):.1%} to {max(slacks):.1%}.",
        "",
        "| limit × dense | measured × dense | spread | slack | kept | search took |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    write_record(lines, RECORD if options.record else None)


if __name__ == "__main__":
    main()
