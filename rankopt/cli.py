"""The command line: thin verbs over `rankopt.search` and `rankopt.study`. Every fault is one line and exit status 2."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rankopt import cli_compare, cli_recovery, cli_show, cli_status, saved_verbs
from rankopt.cli_options import (
    Address,
    Cpus,
    Executor,
    Exports,
    Force,
    Gpus,
    Json,
    Limits,
    Memory,
    Quiet,
    Shape,
    Storage,
    Study,
    Targets,
    Workers,
    asked,
    repeated,
    storage_of,
    targets_of,
)
from rankopt.cli_watch import watched
from rankopt.errors import InputError, RankoptError
from rankopt.handover import (
    check_exports,
    check_free,
    check_memory,
    compared_by,
    compared_in,
    console_for,
    print_bench,
    print_json,
    print_saved,
    save,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def rankopt(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Compress a trained PyTorch model by low-rank decomposition, under limits.

    \b
    rankopt layers STUDY             what can be decomposed, and what not and why
    rankopt search STUDY             search for the best plans (again: go on)
    rankopt status STUDY             how far that is
    rankopt front  STUDY             the plans that no other one beats
    rankopt export STUDY --out DIR   write the best one within the limits
    rankopt bench  STUDY             measure it beside the dense model
    rankopt recover DIR --study S    fine-tune what was written
    rankopt report STUDY --out FILE  all of it as one HTML page
    rankopt compare STUDY            every method alone at equal cost

    \b
    Exit status: 0 done; 1 a fault of rankopt itself, or nobody reads its
    output; 2 wrong input, or nothing keeps the limits (one line says what);
    130 interrupted.
    """
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"rankopt {installed('rankopt')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def layers(study: Study, as_json: Json = False) -> None:
    """List the layers of a study's model: shapes, costs, the methods offered, and why others are left alone.

    \b
    rankopt layers studies/digits.yaml
    rankopt layers studies/digits.yaml --json
    """
    from rankopt.layers import apart, find_layers
    from rankopt.space_file import resolve
    from rankopt.study_file import load_study
    from rankopt.tables import compact, layer_row, layers_table, offered

    file = load_study(study)
    found = find_layers(file.build_model(), *file.example())
    spaces = resolve(file.load_space(), found)
    total = sum(layer.macs for layer in apart(found))
    rows = [layer_row(layer, total, *offered(layer, spaces.get(layer.name))) for layer in found]
    if as_json:
        print_json(rows)
        return
    console = console_for()
    console.print(layers_table(rows))
    params = sum(layer.params for layer in apart(found))
    left = [row for row in rows if row["left_alone"]]
    console.print(f"\n{len(rows)} layers, {compact(total)} MACs, {compact(params)} params; {len(left)} left alone")
    for row in left:
        console.print(f"{row['name']}: {row['left_alone']}", soft_wrap=True)


@app.command()
def search(
    study: Study,
    limit: Limits = None,
    trials: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many trials the study shall have in all.")
    ] = None,
    storage: Storage = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the best model within the limits here.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="S", help="Replaces the seed of the study.")] = None,
    strategy: Annotated[str | None, typer.Option(metavar="NAME", help="How plans are chosen.")] = None,
    sampler: Annotated[str | None, typer.Option(metavar="NAME", help="Optuna's sampler.")] = None,
    start: Annotated[
        list[str] | None,
        typer.Option(metavar="PLAN", help="Measure this plan first: its file, a saved model, or STUDY.yaml:TRIAL."),
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option(metavar="TIME", help="End after so much time of trials in all, e.g. 90s, 20m or 2h.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="End after N trials by which the front did not grow.")
    ] = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    cpus_per_trial: Cpus = None,
    gpus_per_trial: Gpus = None,
    force: Force = False,
    exports: Exports = None,
    memory: Memory = False,
    target: Targets = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what every trial measures for TensorBoard, too.")
    ] = None,
    mlflow: Annotated[str | None, typer.Option(metavar="URI", help="And to this MLflow server or store.")] = None,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Append a log of the run to this file.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search for the best plans under the limits. Running it again goes on where it stopped.

    \b
    rankopt search studies/digits.yaml
    rankopt search studies/digits.yaml --limit 'macs<=40%' --limit 'params<=60%'
    rankopt search studies/digits.yaml --out compressed --export onnx --json
    rankopt search studies/digits.yaml --target torch --limit 'latency<=0.6x'
    rankopt search studies/digits.yaml --strategy correct --sampler nsga2
    rankopt search studies/digits.yaml --start plan.yaml --start other.yaml:12
    rankopt search studies/digits.yaml --executor ray --workers 2
    """
    from rankopt.tables import front_row, front_table

    given = asked(study, limit, storage, target)
    limits, targets, url = given.limits, given.targets, given.storage
    file = given.file.choosing(strategy, sampler).ending(time_limit, patience).starting_with(start)
    file = file.carried_out_by(
        name=executor, workers=workers, address=address, cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial
    )
    file.starting_plans("--start: " if start else None)  # refused before anything is prepared
    if (exports or memory) and out is None:
        raise InputError(f"--{'export' if exports else 'memory'}: needs --out DIR, where the model is written")
    check_exports(exports)
    check_memory(memory)
    if out is not None:
        check_free(out, force)
    with watched(file, tensorboard, mlflow, log, quiet) as progress:
        from rankopt.search import Search  # last: what can be refused at once needs no torch

        run = Search.from_study(file, limits=limits, trials=trials, storage=url, seed=seed, targets=targets)
        try:
            result = run.run(progress=progress)
        except KeyboardInterrupt:
            if not quiet:
                print("rankopt: interrupted; what was measured is kept, the same command goes on", file=sys.stderr)
            raise
        best = result.best(limits)
        saved, dense_test = save(run, best, out, force, exports, memory) if out is not None else ({}, None)
    rows = [front_row(entry) for entry in result.front]
    if as_json:
        print_json(
            {"front": rows, "best": front_row(best), "dense": result.dense, "out": str(out) if out else None}
            | {"notes": run.notes()}
            | {"validation": saved.get("validation"), "test": saved.get("test"), "dense_test": dense_test}
        )
        return
    if quiet:
        return
    console = console_for()
    console.print(front_table(rows, result.dense, best.trial))
    for note in run.notes():
        console.print(note, soft_wrap=True)
    if out is None:
        name = f"trial {best.trial}" if best.plan.changed() else "the dense model, nothing within the limits beats it"
        again = shlex.join(["rankopt", "export", str(study), *repeated(storage, target, limit)])
        console.print(f"\nbest: {name}; write it with: {again} --out DIR", soft_wrap=True)
    else:
        print_saved(console, best, out, saved, dense_test)


@app.command()
def front(
    study: Study, limit: Limits = None, storage: Storage = None, target: Targets = None, as_json: Json = False
) -> None:
    """Show the plans that no other one beats in all objectives. Needs neither the model nor the data.

    \b
    rankopt front studies/digits.yaml
    rankopt front studies/digits.yaml --limit 'macs<=40%' --json
    """
    from rankopt.tables import front_row, front_table

    result = asked(study, limit, storage, target).result()
    rows = [front_row(entry) for entry in result.front]
    if as_json:
        print_json(rows)
        return
    console = console_for()
    console.print(front_table(rows, result.dense))
    for note in result.notes:
        console.print(note, soft_wrap=True)


app.command()(saved_verbs.export)
app.command()(saved_verbs.apply)


@app.command()
def bench(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR|STUDY", help="A saved model's folder, or a study: its best plan.")
    ],
    target: Targets = None,
    study: Annotated[
        Path | None, typer.Option(metavar="STUDY", help="The study that gives a saved model's dense one and its input.")
    ] = None,
    trial: Annotated[int | None, typer.Option(min=0, metavar="N", help="Which trial of a study.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory too.")] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Samples in a call; else as the example.")
    ] = None,
    shape: Shape = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Measure a compressed model beside the dense one: latency, and peak memory where it is asked for.

    \b
    rankopt bench studies/digits.yaml --target torch --target onnxruntime
    rankopt bench compressed --study studies/digits.yaml --memory --batch 8
    """
    from rankopt.study_file import load_study
    from rankopt.targets import make

    targets = targets_of(target)
    if model.is_dir():
        if trial is not None or storage is not None:
            raise InputError(f"{model}: is a saved model; --trial and --storage belong to a study")
        given = compared_in(model, load_study(study) if study else None, shape)
    else:
        if study is not None:
            raise InputError(f"--study: belongs to a saved model's folder, and {model} is none")
        given = compared_by(load_study(model), targets, trial, storage_of(storage), shape)
    chosen_targets = targets or list(given.targets) or [make("torch")]
    if batch is not None:
        chosen_targets = [t if t.batch else t.model_copy(update={"batch": batch}) for t in chosen_targets]
    from rankopt.bench import bench as measured

    rows = measured(given.dense, given.compressed, given.args, given.kwargs, targets=chosen_targets, memory=memory)
    if as_json:
        print_json(rows)
    else:
        print_bench(rows)


app.command()(saved_verbs.verify)
app.command()(saved_verbs.diff)
for verb in (cli_status.status, cli_show.report, cli_show.plot, cli_show.trials):
    app.command()(verb)
app.command()(cli_compare.compare)
app.command()(cli_recovery.recover)
app.command()(cli_recovery.compress)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for wrong input and broken limits, 130 when interrupted.

    1 where nobody reads the output; what is not expected is raised, and Python ends with 1 and the traceback.
    """
    try:
        code = typer.main.get_command(app).main(args=args, prog_name="rankopt", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except RankoptError as error:
        return _fail(error.message)
    except BrokenPipeError:  # `rankopt front … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # wrong options and arguments
            path = getattr(getattr(error, "ctx", None), "command_path", "rankopt")
            return _fail(f"{' '.join(error.format_message().split())} (see {path} --help)")
        raise


def _fail(message: str) -> int:
    print(f"rankopt: error: {message}", file=sys.stderr)
    return 2
