"""The verbs that train: `recover` and `compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankopt.cli_options import Address, Executor, Force, Json, Limits, Out, Storage, Study, Workers, asked
from rankopt.errors import InputError
from rankopt.handover import check_free, console_for, print_json

Steps = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Optimizer steps; else recovery.final_steps of the study.")
]


def recover(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR|STUDY", help="A saved model's folder, or a study: its best plans.")
    ],
    out: Out,
    study: Annotated[
        Path | None,
        typer.Option(metavar="STUDY", help="The study that gives a saved model's dense one, its data and options."),
    ] = None,
    steps: Steps = None,
    finalists: Annotated[
        int, typer.Option(min=1, metavar="K", help="So many plans of a study compete, by successive halving.")
    ] = 1,
    eta: Annotated[float, typer.Option(min=1.1, metavar="X", help="Each rung keeps one of X finalists.")] = 3.0,
    limit: Limits = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where checkpoints are kept, and stay. Else beside --out, and removed."),
    ] = None,
    storage: Storage = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a compressed model towards the dense one. Running it again after a stop goes on.

    \b
    rankopt recover compressed --study studies/digits.yaml --out recovered
    rankopt recover studies/digits.yaml --finalists 9 --steps 3000 --out recovered

    Finalists are trained where the study's trials run. With ray that is several at
    once, and all nodes have to see the folder of the checkpoints.
    """
    from rankopt.progress import shown

    check_free(out, force)
    saved = model.is_dir()
    if saved and (finalists > 1 or limit or storage):
        raise InputError(f"{model}: is a saved model; --finalists, --limit and --storage belong to a study")
    if saved and (executor or workers or address):
        raise InputError(
            f"{model}: is a saved model; --executor, --workers and --address belong to a study's finalists"
        )
    if saved and study is None:
        raise InputError(f"{model}: a saved model records no data; give --study STUDY")
    if not saved and study is not None:
        raise InputError(f"--study: belongs to a saved model's folder, and {model} is none")
    given = asked(model if study is None else study, limit, storage)
    if saved and not (model / "plan.json").is_file():
        raise InputError(f"{model}: holds no saved model; give one that rankopt wrote, or a study")
    result = None if saved else given.result()
    file = given.file.carried_out_by(name=executor, workers=workers, address=address)
    from rankopt.executors.chosen import chosen, trainings
    from rankopt.recovering import Recovery, recover_saved, recover_study

    with shown(console_for(stderr=True)) as progress:
        recovery = Recovery(file, steps, storage=given.url, progress=progress)
        if result is None:
            found = recover_saved(recovery, model, out, checkpoints, force)
        else:
            asked_for = executor or workers or address  # else one alone is trained here
            with trainings(chosen(file.executor if finalists > 1 or asked_for else None, file.threads)) as training:
                found, halving = recover_study(
                    recovery, result, out, finalists, given.limits, eta, checkpoints, force, executor=training
                )
            found["halving"] = {
                "steps": halving.steps,
                "steps_of_all": halving.all_steps,
                "rungs": [[rung.steps, rung.finalists] for rung in halving.rungs],
                "measured": {name: {str(n): v for n, v in by.items()} for name, by in halving.measured.items()},
                "stopped": {name: list(why) for name, why in halving.stopped.items()},
            }
    _print(found, out, as_json)


def compress(
    study: Study,
    out: Out,
    stages: Annotated[int, typer.Option(min=1, metavar="K", help="Search and recover K times, cutting deeper.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps of all stages together; else recovery.final_steps.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, metavar="N", help="Trials of every stage.")] = None,
    limit: Limits = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="S", help="Replaces the seed of the study.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the stages are kept, and stay. Else beside --out, and removed."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Search, recover, and with --stages search again from the recovered model. Running it again goes on.

    \b
    rankopt compress studies/digits.yaml --out small
    rankopt compress studies/digits.yaml --stages 2 --limit 'macs<=25%' --out m
    """
    from rankopt.progress import shown

    check_free(out, force)
    given = asked(study, limit)
    from rankopt.iterated import compress as run

    with shown(console_for(stderr=True)) as progress:
        found = run(
            given.file, out, stages=stages, steps=steps, limits=given.limits, trials=trials, seed=seed, folder=folder,
            force=force, progress=progress,
        )  # fmt: skip
    _print(found, out, as_json)


def _print(found: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        print_json({"out": str(out), **found})
        return
    from rankopt.tables import measured_table, quantity

    console = console_for()
    if len(found.get("stages", ())) > 1:
        for number, stage in enumerate(found["stages"], 1):
            before, after = stage["before"]["validation"], stage["after"]["validation"]
            key = "accuracy" if "accuracy" in after else "kl"
            console.print(
                f"stage {number}: {', '.join(stage['limits'])}; {quantity('macs_kept', stage['costs']['macs_kept'])} of"
                f" the MACs, {stage['steps']} steps, {key} {quantity(key, before[key])} → {quantity(key, after[key])}",
                soft_wrap=True,
            )
    halving = found.get("halving")
    if halving and len(halving["measured"]) > 1:
        share = halving["steps"] / halving["steps_of_all"]
        console.print(
            f"{len(halving['measured'])} finalists, {halving['steps']} steps ({share:.0%} of all for everyone); the"
            f" winner is trial {found['winner']}",
            soft_wrap=True,
        )
    training, costs = found["training"], found["costs"]
    console.print(
        f"trained {training['steps']} steps in {training['seconds']:.0f} s ({training['precision']}), keeping"
        f" {quantity('macs_kept', costs['macs_kept'])} of the MACs; saved to {out}; measured again from there:",
        soft_wrap=True,
    )
    for split in found["dense"]:
        columns = {f"{split}: dense": found["dense"][split]}
        if split in found["before"]:
            columns["before"] = found["before"][split]
        console.print(measured_table({**columns, "after": found["after"][split]}))
