"""Accuracy of ResNet-20 on CIFAR-10 under limits on MACs, without any training.

    python benchmarks/cifar10_no_training.py --limits 50 40 --record studies/records/cifar10_no_training.md

Plans are searched and chosen on (augmented) training images alone; the accuracy of the chosen one, of the solved plan
that the search began with, and of the dense model is then taken once on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from machine import described, write_record

from rankopt.limits import parse_limit
from rankopt.search import Search
from rankopt.study_file import load_study


def main() -> None:
    """Search under each limit and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=ROOT / "studies" / "cifar10_resnet20.yaml")
    parser.add_argument("--limits", type=float, nargs="+", default=[50.0, 40.0], help="MACs kept at most, in percent")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", help="a folder for the studies, to go on later; else in memory")
    parser.add_argument("--record", type=Path, help="write the output here too")
    args = parser.parse_args()
    lines = [f"# ResNet-20 on CIFAR-10 without training\n\n    {' '.join(['python', *sys.argv])}\n"]
    rows = ["| MACs kept at most | plan | MACs kept | params kept | kl on validation | test accuracy | change |"]
    rows.append("|---|---|---|---|---|---|---|")
    threads = 1
    for limit in args.limits:
        file = load_study(args.study)
        threads = file.threads
        storage = f"sqlite:///{Path(args.storage).resolve()}/macs{limit:g}-seed{args.seed}.db" if args.storage else None
        run = Search.from_study(
            file, [parse_limit(f"macs<={limit:g}%")], trials=args.trials, storage=storage, seed=args.seed
        )
        if storage is None:
            run.storage = None
        start = time.perf_counter()
        result = run.run(lambda p: print(f"{p.done}/{p.total} {p.seconds:.0f} s {p.best}", file=sys.stderr, flush=True))
        seconds = time.perf_counter() - start
        dense = run.measure(run.model, "test")["accuracy"]
        solved = next(e for e in result.entries if e.trial == 0)
        for name, entry in (("solved and refitted (trial 0)", solved), (f"best of {run.trials} trials", result.best())):
            accuracy = run.measure(entry.build(), "test")["accuracy"]
            m = entry.measurements
            rows.append(
                f"| {limit:g} % | {name} | {m['macs_kept']:.3f} | {m['params_kept']:.3f} | {m['kl']:.4f} "
                f"| {accuracy:.2f} | {accuracy - dense:+.2f} |"
            )
        rows.append(f"| | dense | 1 | 1 | 0 | {dense:.2f} | |")
        lines.append(f"{limit:g} %: {run.trials} trials, seed {args.seed}, {seconds:.0f} s with calibration.\n")
    write_record([*lines, described(threads), "", *rows], args.record)


if __name__ == "__main__":
    main()
