"""A model of one billion parameters is compressed in less than twice the memory of its weights.

A stack of 60 linear layers of 4096 × 4096 with residuals and norms, random weights, random data: what is shown is not
what the result is worth but how much memory it takes to get there. Everything runs that a study runs: calibration,
factorization, prediction, allocation at half the MACs, two trials with refit, and the best model built once more.

    python benchmarks/memory_1b.py                                  # 8 GB of memory, an hour on one core
    python benchmarks/memory_1b.py --layers 12 --width 1024         # half a minute
    python benchmarks/memory_1b.py --record                         # writes studies/records/memory_1b.md as well

Exit status 1 when the peak is not below twice the weights; at small sizes Python and PyTorch alone are more than that.
Factors wait in the temporary directory (three times the weights; TMPDIR says where).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna  # noqa: F401  (what is loaded at use elsewhere counts as a part of the baseline here)
import scipy.optimize  # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.batches import Batch
from rankopt.calibration import CalibrationOptions
from rankopt.limits import parse_limit
from rankopt.result import Result
from rankopt.search import Search

CLASSES = 16
MIB = 2**20


class Stack(nn.Module):
    """Residual blocks of a norm, a square linear layer and a ReLU, and a head; 60 × 4096² are 1.007 B parameters."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) to (batch, classes)."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.relu(layer(norm(x)))
        return self.head(x / x.std(-1, keepdim=True))


class Watch:
    """The largest resident set in every phase, sampled every 5 ms, and the largest of all from the operating system."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self._phase, self._stop = "", threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside belongs to the phase."""
        start = time.perf_counter()
        self.phases[name] = {"peak_mib": resident()}
        self._phase = name
        try:
            yield
        finally:
            self._phase = ""
            record = self.phases[name]
            record["peak_mib"] = max(record["peak_mib"], resident())
            record["after_mib"], record["seconds"] = resident(), time.perf_counter() - start
            print(
                f"{name:<12} {record['seconds']:8.1f} s   peak {record['peak_mib']:8,.0f} MiB"
                f"   after {record['after_mib']:8,.0f} MiB",
                file=sys.stderr,
                flush=True,
            )

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            record = self.phases.get(self._phase)
            if record is not None:
                record["peak_mib"] = max(record["peak_mib"], resident())


def resident() -> float:
    """Resident set now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def highest() -> float:
    """The largest resident set so far, in MiB. Not ru_maxrss, which counts the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(layers: int, width: int, samples: int, trials: int, memory: int | None, seed: int = 0) -> dict[str, Any]:
    """Run it all; returns what the record holds."""
    torch.manual_seed(seed)
    tiny = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, CLASSES))  # so that what is loaded at use is in the baseline
    data = [Batch((torch.randn(8, 8),))] * 2
    Search(
        tiny, data[0].args, calibration=data, space={"keep": [0.5]}, limits=[parse_limit("macs<=90%")], trials=1
    ).run()
    watch, baseline = Watch(), resident()
    with watch.phase("model"):
        model = Stack(layers, width).eval()
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
        x = torch.randn(samples, width) @ torch.diag(torch.arange(1, width + 1) ** -0.5)
        batches = [Batch((part,)) for part in x.split(32)]
        held_back = max(1, len(batches) // 4)
    loaded = resident()
    with watch.phase("list layers"):
        search = Search(
            model,
            x[:1],
            calibration=batches[:-held_back],
            validation=batches[-held_back:],
            limits=[parse_limit("macs<=50%")],
            space={"methods": ["svd"], "keep": [0.25, 0.5, 0.75]},
            trials=trials,
            seed=seed,
            refit_samples=samples,
            options=CalibrationOptions(fisher_samples=16, draws=1),
            memory=memory,
        )
    with watch.phase("candidates"):
        candidates = sum(len(group.choices) for group in search.groups)
    with watch.phase("dense model"):
        dense = search.evaluator.dense
    with watch.phase("trials"):
        result: Result = search.run()
    best = result.best()
    with watch.phase("build"):
        built = best.build()
        params = sum(p.numel() for p in built.parameters())
    peak = highest()
    return {
        "layers": layers,
        "width": width,
        "params": int(dense["params"]),
        "weights_mib": weights,
        "baseline_mib": baseline,
        "loaded_mib": loaded,
        "peak_mib": peak,
        "ratio": peak / weights,
        "candidates": candidates,
        "params_built": params,
        "best": dict(best.measurements),
        "phases": watch.phases,
    }


def text(found: dict[str, Any], command: str) -> str:
    """The record."""
    rows = [
        f"| {name} | {p['seconds']:,.0f} | {p['peak_mib']:,.0f} | {p['peak_mib'] / found['weights_mib']:.2f} |"
        for name, p in found["phases"].items()
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    best = found["best"]
    return "\n".join(
        [
            "# Memory: a model of one billion parameters",
            "",
            f"Claim: the peak stays under twice the weights. Measured: **{found['ratio']:.2f} ×**"
            f" ({found['peak_mib']:,.0f} MiB against weights of {found['weights_mib']:,.0f} MiB).",
            "",
            "```",
            command,
            "```",
            "",
            f"{found['layers']} linear layers of {found['width']} × {found['width']}, {found['params']:,} parameters in"
            f" float32; {found['candidates']} candidates (svd at 25, 50 and 75 % of the MACs, and dense), limit"
            f" macs<=50%. Random weights and data: kl {best['kl']:.4f} at {best['macs_kept']:.1%} of the MACs says"
            " nothing about real models.",
            "",
            f"{os.cpu_count()} cores, {memory:.0f} GiB of memory, {torch.get_num_threads()} thread(s); Python"
            f" {platform.python_version()}, torch {torch.__version__}, rankopt {version('rankopt')}.",
            "",
            "| phase | seconds | peak resident MiB | × weights |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Python, PyTorch and Optuna alone hold {found['baseline_mib']:,.0f} MiB of it. The largest of all is the"
            " operating system's own figure (VmHWM); those of the phases are sampled every 5 ms.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=128, help="of random data, a quarter of them held back")
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--memory", type=int, help="MiB to work with besides the models; default: rankopt's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--record", action="store_true", help="write studies/records/memory_1b.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    memory = None if args.memory is None else args.memory * MIB
    found = measure(args.layers, args.width, args.samples, args.trials, memory)
    record = text(found, shlex.join(["python", "benchmarks/memory_1b.py", *sys.argv[1:]]))
    print(json.dumps(found) if args.json else record)
    if args.record:
        path = Path(__file__).parent.parent / "studies" / "records" / "memory_1b.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record, encoding="utf-8")
    return 0 if found["ratio"] < 2 else 1


if __name__ == "__main__":
    sys.exit(main())
