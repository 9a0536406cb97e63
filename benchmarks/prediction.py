"""How well, and how much faster, the loss of every candidate is predicted than measured: ResNet-20 on CIFAR-10.

    python benchmarks/prediction.py --record studies/records/prediction.md

Every candidate of every layer is built alone and its kl to the dense model is measured on held-back images; the
prediction has seen other images. Needs the CIFAR-10 data and the pretrained network (see studies/cifar10.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]

import cifar10
from machine import described, write_record

from rankopt.batches import as_batches
from rankopt.calibration import CalibrationOptions
from rankopt.candidates import candidates
from rankopt.divergence import Divergence
from rankopt.layers import find_layers, inference
from rankopt.plan import DENSE, Plan
from rankopt.space_file import load_space, resolve
from rankopt.surgery import apply


def main() -> None:
    """Predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="images that kl is measured on")
    parser.add_argument("--levels", type=int, default=8, help="levels of keep a method")
    parser.add_argument("--sample", type=int, help="measure only so many candidates, drawn at random")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, help="write the output here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    splits = cifar10.data(calibration=1000, validation=args.images)
    calibration, validation = (as_batches(splits[key](), batch_size=250) for key in ("calibration", "validation"))
    model = cifar10.resnet20()
    layers = find_layers(model, torch.zeros(1, 3, 32, 32))
    space = load_space({"methods": ["svd", "svd_in", "spatial_svd", "tucker2"], "keep": {"levels": args.levels}})
    lines = [
        f"# Predicted against measured loss\n\n    {' '.join(['python', *sys.argv])}\n",
        described(args.threads),
        "",
    ]
    measured: list[float] = []
    for temperature in (2.0, 1.0):
        start = time.perf_counter()
        groups, factors = candidates(
            model,
            layers,
            resolve(space, layers),
            [],
            calibration,
            Divergence(),
            options=CalibrationOptions(temperature=temperature),
        )
        predicting = time.perf_counter() - start
        labels = [(g.name, c) for g in groups for c in g.choices if c != DENSE]
        predicted = [float(v) for g in groups for c, v in zip(g.choices, g.losses, strict=True) if c != DENSE]
        drawn = np.random.default_rng(0).permutation(len(labels))[: args.sample]  # the same for both temperatures
        chosen = [labels[n] for n in drawn]
        if not measured:
            start = time.perf_counter()
            measured = measure(model, chosen, factors, validation)
            measuring = (time.perf_counter() - start) * len(labels) / len(chosen)
            if args.sample:
                lines.append(f"Of {len(labels)} candidates {len(chosen)} were measured, and the seconds scaled up.\n")
        lines += report(chosen, [predicted[n] for n in drawn], measured, temperature, predicting, measuring)
    write_record(lines, args.record)


def measure(model: torch.nn.Module, labels: list, factors: object, validation: list) -> list[float]:
    """The kl of every candidate alone."""
    divergence = Divergence()
    with inference(model):
        dense = [model(*b.args) for b in validation]
        out = []
        for name, choice in labels:
            built = apply(model, Plan({name: choice}), factors, other_weights=True).eval()
            parts = [divergence.between(d, built(*b.args)) for d, b in zip(dense, validation, strict=True)]
            out.append(float(torch.cat(parts).mean()))
    return out


def report(
    labels: list, predicted: list[float], measured: list[float], temperature: float, predicting: float, measuring: float
) -> list[str]:
    """Rank correlations, overall and by layer."""
    by_layer: dict[str, list[int]] = defaultdict(list)
    for n, (name, _) in enumerate(labels):
        by_layer[name].append(n)
    within = [
        spearmanr(np.take(predicted, index), np.take(measured, index)).statistic
        for index in by_layer.values()
        if len(index) > 2
    ]
    return [
        f"Labels drawn at temperature {temperature:g}{' (the default)' if temperature == 2 else ''}:\n",
        f"- candidates: {len(labels)} of {len(by_layer)} layers",
        f"- Spearman correlation of predicted with measured kl: {spearmanr(predicted, measured).statistic:.4f}",
        f"- within a layer: median {np.median(within):.4f}, lowest {min(within):.4f}",
        f"- seconds to calibrate, factorize and predict: {predicting:.1f}; to measure one by one: {measuring:.1f} "
        f"({measuring / predicting:.0f} times as long)",
        "",
    ]


if __name__ == "__main__":
    main()
