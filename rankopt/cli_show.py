"""The verbs that show a study and change nothing: report, plot, trials."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rankopt.cli_options import Asked, Json, Limits, Quiet, Storage, Study, Targets, asked, repeated
from rankopt.errors import InputError, RankoptError
from rankopt.handover import chosen, console_for, print_json

if TYPE_CHECKING:
    from rankopt.chart import Chart
    from rankopt.history import History
    from rankopt.layer_costs import LayerCosts

NoModel = Annotated[
    bool, typer.Option("--no-model", help="Don't build the study's model: layers are shown without their costs.")
]
Kind = Literal["front", "layers", "prediction", "history", "importances"]


def report(
    study: Study,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page that is written.")],
    limit: Limits = None,
    storage: Storage = None,
    target: Targets = None,
    no_model: NoModel = False,
    quiet: Quiet = False,
) -> None:
    """Write a study as one HTML page that needs no network: fronts, layers, predictions, conditions.

    \b
    rankopt report studies/digits.yaml --out report.html
    rankopt report studies/digits.yaml --out report.html --no-model
    """
    _check_ending(out, ("html", "htm"), "a report")
    given = asked(study, limit, storage, target)
    history = _history(given)
    from rankopt.report import Subject, write_report

    notes: list[str] = []
    costs = None if no_model else _costs(given, history, notes)
    if no_model:
        notes.append("The model was not built (--no-model), so layers are shown without their costs.")
    options = repeated(storage, target)
    subject = Subject(str(study), given.file.name, given.file.description, costs, notes, options)
    write_report(history, subject, out)
    if not quiet:
        for note in notes:
            print(note, file=sys.stderr)
        print(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB)")


def plot(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="front, layers, prediction, history or importances.")],
    study: Study,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Ends in .svg, .pdf or .png.")],
    cost: Annotated[
        str | None,
        typer.Option(metavar="COST", help="Of a front or layers: macs, params, latency, latency@TARGET, memory, rank."),
    ] = None,
    quality: Annotated[str | None, typer.Option(metavar="QUALITY", help="Of a front: accuracy or kl.")] = None,
    trial: Annotated[int | None, typer.Option(min=0, metavar="N", help="Whose layers; else the best plan's.")] = None,
    width: Annotated[float, typer.Option(min=1, max=20, metavar="INCHES", help="Of one picture.")] = 3.4,
    limit: Limits = None,
    storage: Storage = None,
    target: Targets = None,
    quiet: Quiet = False,
) -> None:
    """Draw one picture of a study for a paper, as SVG, PDF or PNG.

    \b
    rankopt plot front studies/digits.yaml --out front.svg
    rankopt plot front studies/digits.yaml --cost params --out front.pdf
    rankopt plot layers studies/digits.yaml --trial 4 --out layers.png
    """
    from rankopt import plots

    _check_ending(out, plots.FORMATS, "a plot")
    _check_options(kind, {"--cost": cost, "--quality": quality, "--trial": trial})
    given = asked(study, limit, storage, target)
    plots.draw(_charts(kind, given, _history(given), cost, quality, trial), out, width)
    if not quiet:
        print(f"wrote {out}")


def trials(
    study: Study,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all there is to .csv, .parquet or .json.")
    ] = None,
    limit: Limits = None,
    storage: Storage = None,
    target: Targets = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List all trials, also those that were stopped or failed and why; or write them as a table.

    \b
    rankopt trials studies/digits.yaml
    rankopt trials studies/digits.yaml --out trials.csv
    """
    from rankopt import trial_table

    if out is not None:
        _check_ending(out, trial_table.FORMATS, "a table")
    history = _history(asked(study, limit, storage, target))
    rows = trial_table.trial_rows(history)
    if out is not None:
        trial_table.write_rows(rows, out)
    if as_json:
        print_json(rows)
    elif out is not None and not quiet:
        print(f"wrote {len(rows)} trials to {out}")
    elif not quiet:
        console_for().print(trial_table.trials_table(history))


def _history(given: Asked) -> History:
    from rankopt.history import read_history

    return read_history(given.url, given.name, given.within)


def _costs(given: Asked, history: History, notes: list[str]) -> LayerCosts | None:
    """What layers cost; None, with a note, where the model can't be had."""
    from rankopt.layer_costs import layer_costs

    try:
        costs = layer_costs(given.file, given.targets, history.facts)
    except RankoptError as error:
        notes.append(f"Layers are shown without their costs: {error.message}")
        return None
    notes.extend(costs.notes)
    return costs


def _charts(
    kind: Kind, given: Asked, history: History, cost: str | None, quality: str | None, trial: int | None
) -> list[Chart]:
    from rankopt import charts

    result = history.result
    keys = charts.costs_of(result)
    if kind == "front":
        chosen_cost = charts.pick(keys, cost, "--cost")
        return [charts.front(result, chosen_cost, charts.pick(charts.qualities_of(result), quality, "--quality"))]
    if kind == "prediction":
        return [charts.prediction(history, key) for key in ("kl", *(k for k in keys if k.startswith("latency_ms")))]
    if kind == "history":
        return [charts.volumes(history)]
    if kind == "importances":
        return [charts.importances(history, what) for what in history.importances or ("the front",)]
    from rankopt.layer_costs import layer_costs

    costs = layer_costs(given.file, given.targets, history.facts)
    quantities = ["params", "macs", *(f"latency@{label}" for label in costs.times), "rank"]
    wanted = quantities if cost is None else [charts.pick(quantities, cost, "--cost")]
    entry = chosen(result, trial, result.limits, given.file.name)
    return [charts.layers(costs, entry, quantity) for quantity in wanted]


def _check_ending(out: Path, endings: tuple[str, ...], what: str) -> None:
    """Before anything is read: a file that is replaced can't be one of another kind."""
    if out.suffix.lower().removeprefix(".") not in endings:
        raise InputError(f"{out}: {what} ends in .{', .'.join(endings)}, got {out.suffix or 'no ending'!r}")


def _check_options(kind: Kind, given: dict[str, object]) -> None:
    taken = {"front": ("--cost", "--quality"), "layers": ("--cost", "--trial")}.get(kind, ())
    for option, value in given.items():
        if value is not None and option not in taken:
            raise InputError(f"{option}: is not an option of plot {kind}")
