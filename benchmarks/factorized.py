"""Training in factorized form: time and memory of a training step against dense, and accuracy where it is asked for.

    python benchmarks/factorized.py --keep 50 25 --record studies/records/factorized.md
    python benchmarks/factorized.py --keep 25 --epochs 10 --record studies/records/factorized_trained.md
    python benchmarks/factorized.py --data digits --epochs 40 --seeds 3 --record studies/records/factorized_digits.md

Random weights, SGD with momentum, on as many threads as are given. Each net runs in a process of its own, whose largest
resident set beyond that before the first step is its memory (on a GPU: the largest allocation). With --epochs a net is
trained from the beginning, dense and factorized, with weight decay on the factors and on the product: ResNet-20 on
CIFAR-10, or with --data digits the study's small net on handwritten digits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]

import digits
import psutil
import torch
import torch.nn.functional as F
from cifar10 import ResNet, data, images
from machine import headed, write_record
from torch import Tensor, nn

from rankopt.cost import count
from rankopt.factorized import factorized
from rankopt.recover import recover

EPOCH = 48_000 // 128


class Wide(nn.Module):
    """Six 3×3 convolutions of one width on 16×16 maps: layers as wide as they are in large nets."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(6))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to (batch, 10)."""
        x = F.relu(self.stem(x))
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.head(x.mean((2, 3)))


NETS = {"resnet20": (lambda: ResNet(3), 128), "wide": (Wide, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[50.0, 25.0], help="MACs kept, in percent")
    parser.add_argument("--networks", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=0.0)
    parser.add_argument("--data", choices=["cifar10", "digits"], default="cifar10", help="what --epochs trains on")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each net, which are averaged")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--work", type=Path, help="checkpoints of the training")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        network, keep = args.child.split(":")
        print(json.dumps(child(network, float(keep), args.rounds)))
        return
    if args.epochs:
        what = {"cifar10": "ResNet-20 on CIFAR-10", "digits": "A small net on handwritten digits"}[args.data]
        write_record(
            [*headed(f"{what}, trained from the beginning, dense and factorized"), *trained(args)], args.record
        )
        return
    lines = [
        "| net | MACs kept | batch | ms a step | of dense | memory MiB | of dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for network in args.networks:
        found: dict[float, list[dict[str, float]]] = {keep: [] for keep in (100.0, *args.keep)}
        for _ in range(3):  # in turns, so that a drift of the machine meets all
            for keep, values in found.items():
                command = [sys.executable, __file__, "--child", f"{network}:{keep}", "--rounds", str(args.rounds)]
                done = subprocess.run(
                    [*command, "--threads", str(args.threads)], capture_output=True, text=True, check=True
                )
                values.append(json.loads(done.stdout))
        medians = {k: {q: statistics.median(v[q] for v in vs) for q in vs[0]} for k, vs in found.items()}
        dense = medians[100.0]
        for m in medians.values():
            lines.append(
                f"| {network} | {m['kept']:.3f} | {NETS[network][1]} | {m['ms']:.1f} | {m['ms'] / dense['ms']:.2f} "
                f"| {m['mib']:.0f} | {m['mib'] / dense['mib']:.2f} |"
            )
    write_record([*headed("A training step in factorized form"), *lines], args.record)


def child(network: str, keep: float, rounds: int) -> dict[str, float]:
    """ms and MiB of training steps of one net."""
    torch.manual_seed(0)
    make, batch = NETS[network]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = make()
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10
    net = dense if keep >= 100 else factorized(dense, torch.randn(1, 3, 32, 32), keep=keep / 100, dense=["conv1"] if network == "resnet20" else ["stem"])[0]  # noqa: E501  # fmt: skip
    example = torch.randn(1, 3, 32, 32)
    kept = count(net, example).macs / count(dense, example).macs
    net = net.to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    process, before, largest = psutil.Process(), psutil.Process().memory_info().rss, 0
    times = []

    def watch(*_: Any) -> None:
        nonlocal largest
        largest = max(largest, process.memory_info().rss)

    for number in range(rounds + 2):
        start = time.perf_counter()
        loss = F.cross_entropy(net(x), y)
        watch()
        optimizer.zero_grad()
        loss.backward()
        watch()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - start)
    mib = (torch.cuda.max_memory_allocated() if device == "cuda" else largest - before) / 2**20
    return {"ms": 1000 * statistics.median(times), "mib": mib, "kept": kept}


class Shifted:
    """Batches of all digits in a new order in every pass, shifted by up to one pixel."""

    def __init__(self, x: Tensor, y: Tensor, batch: int = 50) -> None:
        self.x, self.y, self.batch = x, y, batch

    def __len__(self) -> int:
        return len(self.y) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.y)).split(self.batch):
            dx, dy = (int(n) for n in torch.randint(-1, 2, (2,)))
            yield torch.roll(self.x[index], (dx, dy), (2, 3)), self.y[index]


def task(name: str) -> tuple[Callable[[], nn.Module], Any, tuple[Tensor, Tensor], int]:
    """What makes the untrained net, training data, test data, and batches an epoch."""
    if name == "digits":
        splits = digits.data()
        loader = Shifted(*splits["train"])
        return digits.SmallNet, loader, splits["test"], len(loader)
    return lambda: ResNet(3), data()["train"](), images("test"), EPOCH


def trained(args: argparse.Namespace) -> list[str]:
    """Accuracy of nets trained from the beginning."""
    make, loader, test, epoch = task(args.data)
    steps = round(args.epochs * epoch)
    lines = [f"{steps} steps ({args.epochs:g} epochs), lr {args.lr:g}, the first layer dense; {args.seeds} seeds.", ""]
    lines += ["| net | MACs kept | params kept | seconds | test accuracy | of each seed |", "|---|---|---|---|---|---|"]
    options: dict[str, Any] = {"steps": steps, "lr": args.lr, "distill": 0.0, "ema": 0.99, "weight_decay": 5e-4}
    for keep in (100.0, *args.keep):
        for decay in ("factors", "product") if keep < 100 else ("factors",):
            found = [one_training(args, make, loader, test, keep, decay, seed, options) for seed in range(args.seeds)]
            name = "dense" if keep >= 100 else f"factorized, decay on {decay}"
            macs, params, seconds, accuracy = (statistics.mean(v[n] for v in found) for n in range(4))
            each = ", ".join(f"{v[3]:.2f}" for v in found)
            lines.append(f"| {name} | {macs:.3f} | {params:.3f} | {seconds:.0f} | {accuracy:.2f} | {each} |")
    return lines


def one_training(
    args: argparse.Namespace,
    make: Callable[[], nn.Module],
    loader: Any,
    test: tuple[Tensor, Tensor],
    keep: float,
    decay: str,
    seed: int,
    options: dict[str, Any],
) -> tuple[float, float, float, float]:
    """(MACs kept, parameters kept, seconds, test accuracy in percent) of one net."""
    torch.manual_seed(seed)
    dense, example = make(), test[0][:1]
    net, plan = (dense, None) if keep >= 100 else factorized(dense, example, keep=keep / 100, dense=["conv1"])
    folder = args.work / f"{args.data}-{keep:g}-{decay}-{seed}" if args.work else None
    found = recover(
        net, dense, loader, plan=plan, decay_on=decay, checkpoints=folder, progress=told, seed=seed, **options
    )
    with torch.no_grad():
        pairs = zip(*(t.split(500) for t in test), strict=True)
        hits = torch.cat([(found.model(x).argmax(1) == y).float() for x, y in pairs])
    whole, small = count(dense, example), count(found.model, example)
    return small.macs / whole.macs, small.params / whole.params, found.seconds, 100 * float(hits.mean())


def told(progress: Any) -> None:
    print(progress.text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
