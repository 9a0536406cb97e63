"""A study's dense model beside saved ones: costs, quality, latency and peak memory, as a table for its record.

    python benchmarks/study_record.py studies/digits.yaml compressed recovered

Latency and memory are those of one call with the study's example input in PyTorch; the models' calls take turns, and
the ratio to dense is surer than the times. What is said of a noisy measurement stands below the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from machine import described, write_record

import rankopt
from rankopt.bench import bench
from rankopt.cost import count
from rankopt.search import Search
from rankopt.study_file import load_study
from rankopt.targets import make
from rankopt.timing import Effort

HEADS = ["", "MACs", "parameters", "kl", "quality", "kl, test", "quality, test", "ms", "time", "memory, MiB"]


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("saved", type=Path, nargs="*", help="folders of saved models")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring latency, for each model")
    parser.add_argument("--record", type=Path, help="write it here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = load_study(given.study)
    run = Search.from_study(file.model_copy(update={"target": [], "limits": [], "objectives": [], "start": []}))
    call = run.example if isinstance(run.example, tuple) else (run.example,)
    nets = {path.name: rankopt.load(path, run.model) for path in given.saved}
    times = bench(
        run.model,
        nets,
        call,
        run.example_kwargs,
        targets=[make("torch", {"threads": 1})],
        effort=Effort(seconds=given.seconds, repeats=1),
        memory=True,
    )
    whole, rows = count(run.model, run.example, run.example_kwargs), []
    for name, net, time in zip(("dense", *nets), (run.model, *nets.values()), times, strict=True):
        cost, seen = count(net, run.example, run.example_kwargs), run.measure(net)
        tested = run.measure(net, "test") if run.tests is not None else {}
        rows.append(
            [
                name,
                f"{cost.macs / 1e6:.4g} M ({cost.macs / whole.macs:.1%})",
                f"{cost.params / 1e3:.4g} K ({cost.params / whole.params:.1%})",
                *(f"{part[key]:.4g}" if key in part else "" for part in (seen, tested) for key in ("kl", "accuracy")),
                f"{time['latency_ms']:.3g}",
                f"{time['latency_kept']:.2f}",
                f"{time['memory_mib']:.2f}",
            ]
        )
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [f"- noisy: {row['model']}: {row['noisy']}" for row in times if row["noisy"]]
    write_record([*lines, "", described(1)], given.record)


if __name__ == "__main__":
    main()
