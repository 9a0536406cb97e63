"""The verbs around saved models: `export`, `apply`, `verify`, `diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankopt.cli_options import (
    Exports,
    Force,
    Json,
    Limits,
    Memory,
    Out,
    Quiet,
    Shape,
    Storage,
    Study,
    Targets,
    asked,
    targets_of,
)
from rankopt.errors import InputError
from rankopt.handover import (
    adopted,
    call_of,
    check_exports,
    check_free,
    check_memory,
    chosen,
    console_for,
    finish,
    finish_all,
    measured_on,
    print_difference,
    print_json,
    save_applied,
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="CALLABLE", help="What makes the dense model: package.module:name or file.py:name."
    ),
]


def export(
    study: Study,
    out: Out,
    trial: Annotated[int | None, typer.Option(min=0, metavar="N", help="Which trial; else the best one.")] = None,
    top: Annotated[int | None, typer.Option(min=1, metavar="N", help="The N best, each in DIR/trial-NUMBER.")] = None,
    knee: Annotated[bool, typer.Option("--knee", help="The knee of the front.")] = False,
    limit: Limits = None,
    exports: Exports = None,
    memory: Memory = False,
    storage: Storage = None,
    target: Targets = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a trial's compressed model: plan.json, safetensors, measurements. The best one within the limits, or N.

    Where DIR ends in .json or .yaml only the plan is written, which needs neither the model nor the data.

    \b
    rankopt export studies/digits.yaml --out compressed --export onnx --export pt2
    rankopt export studies/digits.yaml --trial 12 --out compressed
    rankopt export studies/digits.yaml --top 5 --limit 'macs<=40%' --out best
    rankopt export studies/digits.yaml --knee --out plan.yaml
    """
    if sum((trial is not None, top is not None, knee)) > 1:
        raise InputError("--trial, --top and --knee: each chooses what is written; give one of them")
    alone = out.suffix in (".json", ".yaml", ".yml")
    if alone and (top is not None or exports or memory):
        raise InputError(f"--out {out}: names a file for one plan; with --top, --export or --memory give a directory")
    given = asked(study, limit, storage, target)
    check_exports(exports)
    check_memory(memory)
    if not alone and top is None:
        check_free(out, force)
    result = given.result()
    if top is not None:
        entries = result.top(top, given.within)
    else:
        entries = [result.knee() if knee else chosen(result, trial, given.within, given.file.name)]
    if alone:
        from rankopt.plan_file import write_plan

        write_plan(entries[0].plan, out, force)
        text = f"saved the plan of trial {entries[0].trial} to {out}"
        if as_json:
            print_json({"out": str(out), "trial": entries[0].trial})
        elif not quiet:
            console_for().print(text, soft_wrap=True)
        return
    places = [out / f"trial-{entry.trial}" if top is not None else out for entry in entries]
    for place in places:
        check_free(place, force)
    from rankopt.search import Search

    run = Search.from_study(given.file, limits=given.limits, storage=given.url, targets=given.targets)
    run.recorded = result
    if top is None:
        finish(run, entries[0], out, force, as_json, exports, quiet, memory)
    else:
        finish_all(run, list(zip(entries, places, strict=True)), force, as_json, exports, quiet, memory)


def apply(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A plan (.json, .yaml), or the folder of a saved model.")
    ],
    out: Out,
    study: Annotated[
        Path | None, typer.Option(metavar="STUDY", help="The study that gives the model and the data.")
    ] = None,
    model: Model = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights of your own for the model: safetensors or torch.save.")
    ] = None,
    shape: Shape = None,
    exports: Exports = None,
    memory: Memory = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a plan on a model of the same architecture, measure it, and write it.

    With a study the layers are decomposed with its data and the result is measured; with --model from the
    weights alone.

    \b
    rankopt apply compressed/plan.json --study studies/digits.yaml --out again
    rankopt apply compressed --study studies/digits.yaml --weights my.pt --out m
    rankopt apply plan.yaml --model mymodels:net --input 1x3x32x32 --out m
    """
    from rankopt.plan_file import read_plan

    if (study is None) == (model is None):
        raise InputError("apply: give --study STUDY or --model CALLABLE, one of them")
    if memory and study is None:
        raise InputError("--memory: needs --study, which names the targets")
    decided = read_plan(plan)
    check_exports(exports)
    check_memory(memory)
    check_free(out, force)
    if study is None:
        assert model is not None
        save_applied(decided, model, weights, shape, out, force, as_json, exports, quiet)
        return
    from rankopt.study_file import load_study

    file = load_study(study)
    if shape is not None:
        raise InputError("--input: belongs to --model; a study has its own example input")
    from rankopt.search import Search

    run = Search.from_study(file.with_weights(weights) if weights else file)
    finish(run, run.evaluate(adopted(decided, run.model)), out, force, as_json, exports, quiet, memory)


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a saved model.")],
    study: Annotated[
        Path | None, typer.Option(metavar="STUDY", help="The study that gives the dense model and the data.")
    ] = None,
    model: Model = None,
    shape: Shape = None,
    latency: Annotated[bool, typer.Option("--latency", help="Measure times on the study's targets again.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory again.")] = False,
    target: Targets = None,
    as_json: Json = False,
) -> None:
    """Check a saved model: files, plan and weights, exports, and the numbers that are stated. Exit status 1 if not.

    \b
    rankopt verify compressed
    rankopt verify compressed --study studies/digits.yaml --latency
    rankopt verify compressed --study studies/digits.yaml --memory --target torch
    """
    from rankopt.verify import verify as verified

    if study is not None and model is not None:
        raise InputError("verify: --study and --model both give the dense model; give one of them")
    targets = targets_of(target)
    if targets and not (latency or memory):
        raise InputError("--target: says where --latency and --memory measure again; give one of them")
    if (latency or memory) and study is None:
        raise InputError(f"--{'latency' if latency else 'memory'}: needs --study, which names the targets")
    check_memory(memory)
    if study is not None:
        from rankopt.search import Search
        from rankopt.study_file import load_study

        file = load_study(study)
        quiet = file.model_copy(update={"target": [], "limits": [], "objectives": []})
        run = Search.from_study(quiet)
        devices = measured_on(run, targets or file.make_targets(), latency, memory) if latency or memory else None
        call = call_of(file, shape)
        test = (lambda module: run.measure(module, "test")) if run.tests is not None else None
        checks = verified(directory, run.model, call=call, measure=run.measure, test=test, devices=devices)
    else:
        from rankopt.callables import load_callable

        dense = load_callable(model, Path(), "--model: ") if model else None
        checks = verified(directory, dense, call=call_of(None, shape) if shape else None)
    failed = [check for check in checks if check.ok is False]
    if as_json:
        print_json({"ok": not failed, "checks": [vars(check) for check in checks]})
    else:
        console = console_for()
        for check in checks:
            mark = {True: "ok  ", False: "FAIL", None: "–   "}[check.ok]
            console.print(f"{mark} {check.what}: {check.text}", soft_wrap=True)
        console.print(
            f"\n{len(failed)} of {len(checks)} checks failed" if failed else "\nall that was checked is as stated"
        )
    if failed:
        raise typer.Exit(1)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A plan (.json, .yaml), or the folder of a saved model.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: Json = False,
) -> None:
    """Compare two plans or saved models, layer by layer. Exit status 1 where they differ.

    \b
    rankopt diff compressed smaller
    rankopt diff plan.yaml compressed/plan.json --json
    """
    from rankopt.plan_diff import diff as compared

    found = compared(a, b)
    print_json(found.to_dict()) if as_json else print_difference(found)
    if found.layers or found.model:
        raise typer.Exit(1)
