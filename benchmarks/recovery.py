"""ResNet-20 and ResNet-56 on CIFAR-10, and the net for digits, compressed and fine-tuned: the records of recovery.

    python benchmarks/recovery.py macs --network resnet20 --keep 30 --epochs 30
    python benchmarks/recovery.py latency --network resnet20 --keep 50 --epochs 30
    python benchmarks/recovery.py halving --keep 30 --finalists 9 --epochs 9
    python benchmarks/recovery.py stages --keep 25 --stages 2 --epochs 20
    python benchmarks/recovery.py again --model studies/runs/recovery/macs-resnet20-30-11250-seed0/model --epochs 30

macs: a plan of at most so many percent of the MACs, recovered. latency: of dense in ONNX Runtime, and measured again
beside dense. halving: successive halving against giving every finalist the whole training. stages: search and recover
in stages against one shot, at the same number of steps. again: another training of what an earlier one handed over,
from a high rate again (a warm restart; Loshchilov and Hutter, "SGDR", 2017).

Plans are searched and models trained on training images alone; the 10,000 test images are seen when what is handed over
is measured. Everything is kept in --work, so the same command goes on after a stop. ``--set lr=0.1`` changes an option
of the recovery, ``--network digits`` takes minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import torch
import yaml
from machine import headed, write_record

from rankopt import artifact
from rankopt.bench import bench
from rankopt.halving import Rung
from rankopt.iterated import compress
from rankopt.limits import parse_limit
from rankopt.plan import Plan
from rankopt.recovering import Recovery, recover_saved, recover_study
from rankopt.recovery_options import RecoveryOptions
from rankopt.result import Progress
from rankopt.search import Search
from rankopt.study_file import ModelSpec, StudyFile, load_study
from rankopt.yaml_file import parse

# steps of 128 images an epoch: all training images but the 2,000 of the validation split; the digits' training images
EPOCHS = {"resnet20": 48_000 // 128, "resnet56": 48_000 // 128, "digits": 1_000 // 128 + 1}
NAMES = {"resnet20": "ResNet-20 on CIFAR-10", "resnet56": "ResNet-56 on CIFAR-10", "digits": "Handwritten digits"}
# from trained weights; what is learned is mostly the dense model's outputs on shifted images
OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "distill": 0.7,
    "temperature": 4.0,
    "weight_decay": 5e-4,
    "ema": 0.995,
    "checkpoint": 100,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["macs", "latency", "halving", "stages", "again"], nargs="?", default="macs")
    parser.add_argument("--network", choices=list(EPOCHS), default="resnet20")
    parser.add_argument(
        "--keep", type=float, default=30.0, help="MACs (latency: of ONNX Runtime) kept at most, percent"
    )
    parser.add_argument("--epochs", type=float, default=30.0, help="of the whole recovery")
    parser.add_argument("--steps", type=int, help="in place of epochs")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--finalists", type=int, default=9)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--model", type=Path, help="again: a recovered model's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of the recovery")
    parser.add_argument("--work", type=Path, default=ROOT / "studies" / "runs" / "recovery", help="to go on later")
    parser.add_argument("--record", type=Path, help="write the output here too")
    args = parser.parse_args()
    if (args.kind == "again") != (args.model is not None):
        parser.error("--model goes with again, and again needs it")
    epoch = EPOCHS[args.network]
    steps = args.steps or round(args.epochs * epoch)
    file = study(args, steps)
    work = args.work / f"{args.kind}-{args.network}-{args.keep:g}-{steps}-seed{args.seed}"
    limit = parse_limit(f"{'latency' if args.kind == 'latency' else 'macs'}<={args.keep:g}%")
    file = file.model_copy(update={"limits": [limit]})
    start = time.perf_counter()
    run = {"macs": one_shot, "latency": one_shot, "halving": halving, "stages": stages, "again": again}[args.kind]
    title, lines = run(args, file, steps, work)
    seconds = spent(work, time.perf_counter() - start)
    settings = "" if args.kind == "again" else f"{args.trials} trials, "
    settings += f"{steps} steps of 128 images ({steps / epoch:.1f} epochs), seed {args.seed}, "
    settings += f"{seconds:.0f} s wall-clock in all, {args.threads} threads, on {device()}; recovery: "
    changed = {k: v for k, v in file.recovery.model_dump().items() if v != RecoveryOptions.model_fields[k].default}
    settings += ", ".join(f"{k} {v}" for k, v in changed.items() if k != "feature_layers") + "."
    runtimes = ["onnxruntime"] if args.kind == "latency" else []
    write_record([*headed(title, runtimes=runtimes), settings, "", *lines], args.record)


def study(args: argparse.Namespace, steps: int) -> StudyFile:
    """The study of a network, with other options and targets."""
    small = args.network == "digits"
    file = load_study(ROOT / "studies" / ("digits.yaml" if small else "cifar10_resnet20.yaml"))
    own: dict[str, Any] = {} if small else dict(OPTIONS)
    for text in args.set:
        key, _, value = text.partition("=")
        own[key] = yaml.safe_load(value)
    recovery = parse(RecoveryOptions, {"bn": "auto", "final_steps": steps, **own}, "--set ")
    changes: dict[str, Any] = {
        "name": f"{args.network}-{args.kind}",
        "model": file.model if small else ModelSpec(call=f"cifar10.py:{args.network}"),
        "recovery": recovery,
        "trials": args.trials,
        "seed": args.seed,
        "threads": args.threads,
    }
    if args.kind == "latency":
        changes |= {"target": [{"name": "onnxruntime"}], "objectives": ["kl", "latency"]}
    return file.model_copy(update=changes)


def one_shot(args: argparse.Namespace, file: StudyFile, steps: int, work: Path) -> tuple[str, list[str]]:
    found = compress(file, work / "model", folder=work, steps=steps, force=True, progress=told)
    lines = [HEAD, RULE, *rows("", found)]
    what = "MACs"
    if args.kind == "latency":
        what = "latency in ONNX Runtime"
        dense = file.build_model().eval()
        small = artifact.load(work / "model", dense)
        inputs, kwargs = file.example()
        (_, row) = bench(dense, {"compressed": small}, inputs, kwargs, targets=file.make_targets())
        lines += ["", "Measured afterwards beside dense in ONNX Runtime, batch 1, one thread:", ""]
        lines += [f"- {key}: {value}" for key, value in row.items() if not isinstance(value, dict | list)]
    lines += ["", f"Layers per method: {counted(work / 'model')}."]
    return f"{NAMES[args.network]}: at most {args.keep:g} % of the {what}, fine-tuned", lines


def halving(args: argparse.Namespace, file: StudyFile, steps: int, work: Path) -> tuple[str, list[str]]:
    url = f"sqlite:///{work.resolve()}/study.db"
    result = Search.from_study(file, storage=url).run(told)
    lines = [
        "| | winner | MACs kept | kl on validation | test accuracy | steps | share |",
        "|---|---|---|---|---|---|---|",
    ]
    table: list[str] = []
    for name, rungs in (("successive halving", None), ("everyone to the end", [Rung(steps, args.finalists)])):
        recovery = Recovery(file, steps, storage=url, progress=told)
        folder = work / name.replace(" ", "-")
        out = work / f"model-{'halving' if rungs is None else 'all'}"
        found, done = recover_study(recovery, result, out, args.finalists, checkpoints=folder, rungs=rungs, force=True)
        after = found["after"]
        lines.append(
            f"| {name} | trial {found['winner']} | {found['costs']['macs_kept']:.3f} | {after['validation']['kl']:.4f} "
            f"| {after['test']['accuracy']:.2f} | {done.steps} | {done.steps / done.all_steps:.0%} |"
        )
        table += ["", f"{name.capitalize()}, kl on validation after so many steps:", ""]
        for finalist, by_steps in done.measured.items():
            values = ", ".join(f"{n}: {v['kl']:.4f}" for n, v in by_steps.items())
            table.append(f"- {finalist} ({by_steps[0]['macs_kept']:.3f} of the MACs): {values}")
    return f"{NAMES[args.network]}: successive halving against the whole training for all", [*lines, *table]


def stages(args: argparse.Namespace, file: StudyFile, steps: int, work: Path) -> tuple[str, list[str]]:
    lines = [HEAD, RULE]
    for count in (1, args.stages):
        place = work / f"stages-{count}"
        found = compress(file, place / "model", stages=count, folder=place, steps=steps, force=True, progress=told)
        lines += rows(f"{count} stage{'s' if count > 1 else ''}: ", found)
    return f"{NAMES[args.network]}: in stages against one shot, at most {args.keep:g} % of the MACs", lines


def again(args: argparse.Namespace, file: StudyFile, steps: int, work: Path) -> tuple[str, list[str]]:
    work.mkdir(parents=True, exist_ok=True)
    recovery = Recovery(file, steps, progress=told)
    found = recover_saved(recovery, args.model, work / "model", work / "checkpoints", force=True)
    kept = f"{100 * found['costs']['macs_kept']:.1f} % of the MACs"
    lines = [f"Begun from {args.model}.", "", HEAD, RULE, *rows("", found), ""]
    return f"{NAMES[args.network]}: {kept}, fine-tuned again", [
        *lines,
        f"Layers per method: {counted(work / 'model')}.",
    ]


HEAD = "| | MACs kept | params kept | validation kl | validation accuracy | test accuracy | change |"
RULE = "|---|---|---|---|---|---|---|"


def rows(name: str, found: dict[str, Any]) -> list[str]:
    """Dense, compressed before and after recovery."""
    dense = found["dense"]["test"]["accuracy"]
    out = [] if name else [row("dense", {"macs_kept": 1, "params_kept": 1}, found["dense"], dense)]
    out.append(row(f"{name}compressed", found["costs"], found["before"], dense))
    return [*out, row(f"{name}recovered", found["costs"], found["after"], dense)]


def row(name: str, costs: dict[str, float], values: dict[str, dict[str, float]], dense: float) -> str:
    validation, test = values["validation"], values.get("test", {}).get("accuracy", float("nan"))
    return (
        f"| {name} | {costs['macs_kept']:.3f} | {costs['params_kept']:.3f} | {validation['kl']:.4f} "
        f"| {validation['accuracy']:.2f} | {test:.2f} | {test - dense:+.2f} |"
    )


def counted(directory: Path) -> str:
    return ", ".join(f"{method} {count}" for method, count in Plan.load(directory).methods().items())


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"


def spent(work: Path, seconds: float) -> float:
    """Seconds of this run and of those that it goes on from."""
    file = work / "seconds.json"
    total = (json.loads(file.read_text()) if file.is_file() else 0.0) + seconds
    file.write_text(json.dumps(total))
    return total


last = 0.0


def told(progress: Progress) -> None:
    """A line every ten seconds."""
    global last
    if time.monotonic() - last > 10:
        last = time.monotonic()
        trial = f"trial {progress.done}/{progress.total} " if progress.total else ""
        print(f"{trial}{progress.text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
