"""The verb compare: every method alone at equal cost."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankopt.cli_options import Json, Quiet, Study, Targets, targets_of
from rankopt.errors import InputError
from rankopt.handover import console_for, print_json

if TYPE_CHECKING:
    from torch import nn

    from rankopt.plan import Plan
    from rankopt.search import Search
    from rankopt.study_file import StudyFile


def compare(
    study: Study,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="E.g. svd,tucker2 or cp+caps_cp,svd+caps_svd; else all that the search space offers.",
        ),
    ] = None,
    levels: Annotated[
        str, typer.Option(metavar="SHARES", help="Of the dense model's cost, e.g. 0.5,0.35 or 50%,35%.")
    ] = "50%,35%,25%",
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COSTS", help="What is equal: macs, params, latency, latency@TARGET; else all that is measured."
        ),
    ] = None,
    target: Targets = None,
    steps: Annotated[
        int, typer.Option(min=0, metavar="N", help="Fine-tune every plan by so many steps, and measure again.")
    ] = 0,
    test: Annotated[bool, typer.Option("--test", help="Measure on the test data too.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, metavar="S", help="Replaces the seed of the study.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write compare.md, .csv, .json and, with Matplotlib, .svg here."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare representations: every method alone at equal MACs, parameters and latency, beside all together.

    Each is solved for the level, refitted and measured; nothing is searched.

    \b
    rankopt compare studies/digits.yaml
    rankopt compare studies/digits.yaml --methods svd,cp --levels 40% --by params
    rankopt compare studies/digits.yaml --target onnxruntime --out compared
    rankopt compare studies/digits.yaml --methods svd,svd_act --steps 300
    rankopt compare studies/capsnet_digits.yaml --methods cp+caps_cp,svd+caps_svd
    """
    from rankopt.study_file import load_study

    file, targets, shares = load_study(study), targets_of(target), _levels(levels)
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; give a folder")
    names = _names(methods, "--methods")
    from rankopt import comparison, comparison_files
    from rankopt.cli_watch import watched
    from rankopt.search import Search

    if names is not None:
        file = file.model_copy(update={"space": comparison.widened(file.load_space(), names)})
    file = file.model_copy(update={"limits": [], "objectives": [], "start": []})
    with watched(file, None, None, None, quiet) as progress:
        run = Search.from_study(file, targets=targets, seed=seed)
        run.progress = progress
        train = _training(file, run, steps) if steps else None
        found = comparison.compare(run, names, shares, _names(by, "--by"), test=test, train=train)
    written: list[str] = []
    if out is not None:
        command = _command(
            study, {"methods": methods, "levels": levels, "by": by, "steps": steps, "seed": seed}, target
        )
        title = f"Representations compared: {file.name}"
        head = comparison_files.head_of(file, command + (" --test" if test else ""))
        written = comparison_files.write(found, out, title, head)
    if as_json:
        print_json(comparison_files.as_dict(found) | {"out": str(out) if out else None})
        return
    if quiet:
        return
    console = console_for()
    for table in comparison_files.tables(found):
        console.print(table)
        console.print()
    for line in [*comparison_files.sentences(found), *found.notes]:
        console.print(line, soft_wrap=True)
    if written:
        console.print(f"\nwrote {', '.join(written)} to {out}", soft_wrap=True)


def _names(text: str | None, option: str) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"{option}: needs names with commas between them, got {text!r}")
    return list(dict.fromkeys(names))


def _levels(text: str) -> list[float]:
    found = []
    for part in text.split(","):
        try:
            share = float(part.strip().removesuffix("%")) / (100 if part.strip().endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise InputError(f"--levels: needs shares above 0 and at most 1 (100%), got {part.strip()!r}")
        found.append(share)
    return list(dict.fromkeys(found))


def _training(file: StudyFile, run: Search, steps: int) -> Callable[[nn.Module, Plan], nn.Module]:
    """Fine-tuning as in `rankopt recover`, the same for all."""
    from rankopt.recover import recover

    data: Any = file.training_data()
    data = run.calibration if data is None else data
    function = file.training_function()

    def train(built: nn.Module, plan: Plan) -> nn.Module:
        options = file.recovery.model_copy(update={"steps": steps})
        return recover(
            built, run.model, data, options=options, plan=plan, divergence=run.divergence, train=function,
            seed=run.seed, progress=run.progress,
        ).model  # fmt: skip

    return train


def _command(study: Path, options: dict[str, Any], targets: list[str] | None) -> str:
    words = ["rankopt", "compare", str(study)]
    for name, value in options.items():
        if value not in (None, 0):
            words += [f"--{name}", str(value)]
    for text in targets or []:
        words += ["--target", text]
    return shlex.join(words)
