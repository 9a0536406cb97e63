"""What the command line does around a saved model: checks before, measurements of the reloaded model after."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from rankopt.plan import Plan
    from rankopt.result import Entry, Result
    from rankopt.study_file import StudyFile
    from rankopt.targets.target import Target


@dataclass(frozen=True)
class Compared:
    """What `rankopt bench` measures: the dense model, the compressed ones by name, a call, and the study's targets."""

    dense: nn.Module
    compressed: Mapping[str, nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Sequence[Target]


def check_free(out: Path, force: bool) -> None:
    """Refuse before anything is computed what saving would refuse after it."""
    if out.exists() and not force:
        raise ArtifactError(f"{out}: already exists; give another --out, or --force to replace a saved model there")
    if out.exists() and not (out / "plan.json").is_file():
        raise ArtifactError(f"{out}: holds no saved model, so --force does not replace it; give another --out")


def check_memory(wanted: bool) -> None:
    """Refuse what can't be measured here before anything is computed."""
    if wanted and not sys.platform.startswith("linux"):
        raise InputError(f"--memory: peak memory is measured on Linux only; this is {sys.platform}")


def check_exports(exports: Sequence[str] | None) -> None:
    """Refuse a format that is unknown, or whose package is missing, before anything is computed."""
    if exports:
        from rankopt.exporting import check_formats

        check_formats(exports)


def save(
    run: Any, entry: Any, out: Path, force: bool, exports: Sequence[str] | None = None, memory: bool = False
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Save; returns what the reloaded model measures, and the dense model on the test data if there are any."""
    saved = run.save(entry, out, force=force, exports=exports or (), memory=memory)
    return saved, run.measure(run.model, split="test") if saved.get("test") else None


def finish_all(
    run: Any,
    entries: Sequence[tuple[Any, Path]],
    force: bool,
    as_json: bool,
    exports: Sequence[str] | None,
    quiet: bool = False,
    memory: bool = False,
) -> None:
    """Save several entries, each in its own place, and print them."""
    from rankopt.tables import front_row

    rows = []
    for entry, place in entries:
        saved, dense_test = save(run, entry, place, force, exports, memory)
        rows.append({"out": str(place), **front_row(entry), **saved, "dense_test": dense_test})
        if not as_json and not quiet:
            print_saved(console_for(), entry, place, saved, dense_test)
    if as_json:
        print_json(rows)


def finish(
    run: Any,
    entry: Any,
    out: Path,
    force: bool,
    as_json: bool,
    exports: Sequence[str] | None = None,
    quiet: bool = False,
    memory: bool = False,
) -> None:
    """Save, and print what the reloaded model measures."""
    saved, dense_test = save(run, entry, out, force, exports, memory)
    if as_json:
        from rankopt.tables import front_row

        print_json({"out": str(out), **front_row(entry), **saved, "dense_test": dense_test})
    elif not quiet:
        print_saved(console_for(), entry, out, saved, dense_test)


def print_saved(console: Console, entry: Any, out: Path, saved: dict[str, Any], dense_test: Any) -> None:
    """Say where the model is, and its measurements beside those of the dense one."""
    from rankopt.tables import measured_table

    name = f"trial {entry.trial}" if entry.trial is not None and entry.trial >= 0 else "the plan"
    name = name if entry.plan.changed() else "the dense model"
    console.print(f"\nsaved {name} to {out}; measured again from there:", soft_wrap=True)
    columns = {"validation": saved.get("validation") or {}}
    if saved.get("test"):
        columns |= {"test": saved["test"], "test, dense": dense_test or {}}
    console.print(measured_table(columns))


def console_for(stderr: bool = False) -> Console:
    """A console for plain text: nothing in it is read as markup."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Print a value for programs, and nothing else."""
    print(json.dumps(value, indent=1, default=float))


def chosen(result: Result, trial: int | None, limits: Any, name: str) -> Entry:
    """A trial by its number, or the best one within the limits; raises `InputError` when there is no such trial."""
    if trial is None:
        return result.best(limits)
    entries = {entry.trial: entry for entry in result.entries if entry.trial >= 0}
    if trial not in entries:
        known = f"{min(entries)} to {max(entries)}" if entries else "none"
        raise InputError(f"--trial {trial}: the study {name} has no finished trial of that number ({known})")
    return entries[trial]


def adopted(plan: Plan, model: nn.Module) -> Plan:
    """A plan for a model of the same architecture, whatever its weights; raises `PlanError` naming the difference."""
    if plan.fingerprint is None:
        return plan
    from rankopt.layers import fingerprint
    from rankopt.surgery import checked

    checked(model, plan, weights=False)
    return replace(plan, fingerprint=fingerprint(model))


def save_applied(
    plan: Plan,
    address: str,
    weights: Path | None,
    shape: str | None,
    out: Path,
    force: bool,
    as_json: bool,
    exports: Sequence[str] | None,
    quiet: bool = False,
) -> None:
    """Carry out a plan on a model of the user's from its weights alone, save it and print its costs."""
    from rankopt import artifact
    from rankopt.callables import call, load_callable
    from rankopt.checkpoint import load_checkpoint
    from rankopt.cost import count, total_params
    from rankopt.dense_source import dense_model, source_of
    from rankopt.layers import fingerprint
    from rankopt.surgery import apply
    from rankopt.tables import measured_table

    if exports and shape is None:
        raise InputError("--export: needs --input SHAPE, e.g. 1x3x32x32")
    make = load_callable(address, Path(), "--model: ")
    dense = dense_model(lambda: call(make, {}, "--model: "), "--model").eval()
    if weights is not None:
        load_checkpoint(dense, weights)
    plan = adopted(plan, dense) if plan.fingerprint else replace(plan, fingerprint=fingerprint(dense))
    small = apply(dense, plan)
    measured: dict[str, Any] = {"dense": {"params": total_params(dense)}, "compressed": {"params": total_params(small)}}
    example = call_of(None, shape) if shape is not None else None
    for key, module in (("dense", dense), ("compressed", small)):
        if example is not None:
            measured[key]["macs"] = count(module, *example).macs
    artifact.save(
        out,
        small,
        plan,
        measurements=measured,
        source=source_of(address, {}),
        force=force,
        exports=exports or (),
        example=example,
    )
    if as_json:
        print_json({"out": str(out), "methods": plan.methods(), **measured})
        return
    if quiet:
        return
    console = console_for()
    console.print(f"\nsaved the plan's model to {out}:", soft_wrap=True)
    console.print(measured_table({"compressed": measured["compressed"], "dense": measured["dense"]}))


def measured_on(run: Any, targets: Sequence[Target], latency: bool, memory: bool) -> Any:
    """A function that measures a module beside the dense one on targets, for `verify`."""

    def measure(module: nn.Module) -> dict[str, float]:
        from rankopt.bench import bench
        from rankopt.layers import as_call
        from rankopt.saving import memory_beside, memory_target

        call = as_call(run.example, run.example_kwargs)
        found: dict[str, float] = {}
        if latency:
            rows = bench(run.model.eval(), {"saved": module}, *call, targets=targets)
            found |= {f"latency_kept@{row['target']}": row["latency_kept"] for row in rows if row["model"] == "saved"}
        if memory:
            target = memory_target(targets)
            held = memory_beside(target, run.model, module, call)["compressed"]
            found |= {f"{key}@{target.called}": value for key, value in held.items()}
        return found

    return measure


def print_difference(found: Any) -> None:
    """The layers that differ, what else differs, and how much is the same."""
    from rankopt.tables import quantity

    console = console_for()
    for name, (a, b) in found.layers.items():
        console.print(f"{name}: {a} → {b}", soft_wrap=True)
    for name, (a, b) in found.measurements.items():
        if a != b and not isinstance(a, dict):
            console.print(f"{name}: {quantity(name, a)} → {quantity(name, b)}", soft_wrap=True)
    if found.model:
        console.print(found.model, soft_wrap=True)
    count = len(found.layers)
    console.print(
        f"{count} layer{' differs' if count == 1 else 's differ'}, {found.same} {'is' if found.same == 1 else 'are'}"
        " the same",
        soft_wrap=True,
    )


def compared_in(directory: Path, study: StudyFile | None, shape: str | None) -> Compared:
    """A saved model beside its dense one, which a study builds, or what the saved model records as its source.

    Raises:
        InputError: there is neither a study nor a shape, or a model can't be made.
    """
    if not (directory / "plan.json").is_file():
        raise ArtifactError(f"{directory}: holds no saved model; give one that rankopt wrote, or a study")
    if study is None and shape is None:
        raise InputError(f"{directory}: a saved model records no input; give --study STUDY, or --input 1x3x32x32")
    from rankopt import artifact
    from rankopt.dense_source import dense_model

    if study is not None:
        dense = study.build_model()
    else:
        try:
            dense = dense_model(artifact.recorded(directory), str(directory))
        except ArtifactError as error:
            raise ArtifactError(f"{error.message.partition('; pass model=')[0]}; give --study STUDY") from error
    args, kwargs = call_of(study, shape)
    small = artifact.load(directory, dense)
    name = directory.resolve().name
    name = name if name != "dense" else "compressed"
    return Compared(dense.eval(), {name: small}, args, kwargs, study.make_targets() if study else [])


def compared_by(
    file: StudyFile, targets: Sequence[Target] | None, trial: int | None, storage: str | None, shape: str | None
) -> Compared:
    """A study's best model within its limits, or that of a trial, built as in the trial, beside the dense one.

    Of the study on these targets, if there was one, else of the study file's own.
    """
    from rankopt.ledger import read_result

    url, name = storage or file.storage_url, file.study_on(targets)
    try:
        result = read_result(url, name, limits=file.limits)
    except InputError:
        if name == file.name:
            raise
        result = read_result(url, file.name, limits=file.limits)
    entry = chosen(result, trial, file.limits, file.name)
    from rankopt.search import Search

    quiet = file.model_copy(update={"target": [], "limits": [], "objectives": []})  # only to build, not to measure
    run = Search.from_study(quiet, storage=url)
    small = run.build(entry.plan, bn=bool(entry.notes.get("bn", 0)))
    args, kwargs = call_of(file, shape)
    return Compared(run.model.eval(), {f"trial {entry.trial}": small.eval()}, args, kwargs, file.make_targets())


def call_of(study: StudyFile | None, shape: str | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The study's example input, or one of the shape that was given."""
    if shape is None:
        assert study is not None
        return study.example()
    from rankopt.example_input import make

    sizes, _, dtype = shape.partition(":")
    given = [int(size) if size.isdecimal() else size for size in sizes.split("x")]
    return make({"shape": given, "dtype": dtype or "float32"}, Path(), "--input", dict)


def print_bench(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for every target below its conditions, and then what was noisy."""
    from rankopt.bench import bench_table, described

    console, notes = console_for(), []
    for number, label in enumerate(dict.fromkeys(row["target"] for row in rows)):
        own = [row for row in rows if row["target"] == label]
        conditions, noise = described(own)
        console.print(f"{chr(10) if number else ''}{conditions}", soft_wrap=True)
        console.print(bench_table(own))
        notes += noise
    for note in notes:
        console.print(note, soft_wrap=True)
