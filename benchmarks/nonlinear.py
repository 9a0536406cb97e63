"""Nonlinear factorizations beside their linear twins, at equal MACs and equal parameters, before and after recovery.

    python benchmarks/nonlinear.py --networks mlp digits --record studies/records/nonlinear.md
    python benchmarks/nonlinear.py --networks resnet20 --steps 100 --levels 0.4 --record nonlinear_cifar10.md

Each method alone is solved for every level, refitted, measured, trained towards the dense model's outputs by so many
steps, and measured again, on validation data. At equal MACs: chains and the same with activations between the stages;
at equal parameters the weights that are functions of products too. ResNet-20 needs the data of studies/cifar10.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import torch
from machine import headed, write_record
from torch import nn

from rankopt.comparison import Comparison, compare, widened
from rankopt.plan import Plan
from rankopt.recover import recover
from rankopt.search import Search
from rankopt.study_file import CallSpec, RefitSpec, SplitSpec, StudyFile, load_study

ALIKE = ("svd", "svd_act", "spatial_svd", "spatial_svd_act", "cp", "cp_act")
STORED = ("svd", "relu_svd", "sin_svd", "cp", "relu_cp")
OPTIONS = {"lr": 0.02, "distill": 1.0, "ema": 0.99, "batch": 128}
KEEP = {"min": 0.1, "max": 0.9, "levels": 12, "solved": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=["mlp", "digits", "resnet20"], default=["mlp", "digits"])
    parser.add_argument("--levels", type=float, nargs="+", default=[0.4, 0.2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [f"{args.steps} steps of {OPTIONS['batch']} samples, distilling alone, rate {OPTIONS['lr']}, seed 0."]
    for network in args.networks:
        file = study(network)
        for by, methods in (("macs", ALIKE), ("params", STORED)):
            start = time.perf_counter()
            own = [m for m in methods if network != "mlp" or m.endswith(("svd", "svd_act"))]
            own = [m for m in own if network != "mlp" or not m.startswith("spatial")]
            found = compared(file, own, args.levels, by, args.steps)
            lines += ["", f"## {network}, at equal {by}", ""]
            lines += [*table(found, by), "", f"{time.perf_counter() - start:.0f} s."]
    write_record([*headed("Nonlinear factorizations and their linear twins"), *lines], args.record)


def study(network: str) -> StudyFile:
    file = load_study(ROOT / "studies" / ("cifar10_resnet20.yaml" if network == "resnet20" else "digits.yaml"))
    changes: dict[str, Any] = {"limits": [], "objectives": []}
    if network == "mlp":
        changes["model"] = CallSpec(call="digits.py:mlp")
    if network == "resnet20":
        changes |= {"calibration": SplitSpec(samples=1000, batch=250), "validation": SplitSpec(samples=1000, batch=250)}
        changes |= {"refit": RefitSpec(samples=512)}
    return file.model_copy(update=changes)


def compared(file: StudyFile, methods: list[str], levels: list[float], by: str, steps: int) -> Comparison:
    space = widened(file.load_space(), methods)
    space = space.model_copy(update={"keep": type(space.keep).model_validate(KEEP)})
    run = Search.from_study(file.model_copy(update={"space": space}))
    run.progress = lambda p: print(p.text, file=sys.stderr, flush=True)
    data = file.training_data()

    def train(built: nn.Module, plan: Plan) -> nn.Module:
        options: dict[str, Any] = {**OPTIONS, "steps": steps}
        return recover(built, run.model, data, plan=plan, divergence=run.divergence, timing=False, **options).model

    return compare(run, methods, levels, [by], train=train)


def table(found: Comparison, by: str) -> list[str]:
    lines = ["| level | method | MACs kept | params kept | kl | kl trained | accuracy | trained |", "|---" * 8 + "|"]
    for row in found.rows:
        values = [row.values.get(k) for k in ("macs_kept", "params_kept", "kl", "trained_kl")]
        cells = ["–" if v is None else f"{v:.4f}" if n > 1 else f"{v:.3f}" for n, v in enumerate(values)]
        cells += ["–" if (v := row.values.get(k)) is None else f"{v:.2f}" for k in ("accuracy", "trained_accuracy")]
        lines.append(f"| {row.level:.0%} | {row.method} | {' | '.join(cells)} |")
    dense = found.dense.get("accuracy")
    return [f"Dense: accuracy {dense:.2f}.", "", *lines, "", *(f"- {note}" for note in found.notes)]


if __name__ == "__main__":
    main()
