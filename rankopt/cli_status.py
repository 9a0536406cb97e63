"""The verb status: how far a study is, also while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rankopt.cli_options import Json, Limits, Storage, Study, Targets, limits_of, storage_of, targets_of
from rankopt.handover import console_for, print_json

if TYPE_CHECKING:
    from rankopt.status import Running, Status

_SHOWN = 12  # failed trials; of more the last


def status(
    study: Study, limit: Limits = None, storage: Storage = None, target: Targets = None, as_json: Json = False
) -> None:
    """Show how far a study is: what is done, runs, was stopped by which limit, or failed and why.

    \b
    rankopt status studies/digits.yaml
    rankopt status studies/digits.yaml --json
    """
    from rankopt.status import read_status
    from rankopt.study_file import load_study

    file = load_study(study)
    name = file.study_on(targets_of(target))
    found = read_status(storage_of(storage) or file.storage_url, name, limits_of(limit) or file.limits)
    if as_json:
        print_json(found.to_dict())
        return
    console = console_for()
    for head, text in _lines(found):
        console.print(f"{head:<12}{text}", soft_wrap=True, markup=False, highlight=False)


def _lines(found: Status) -> Iterator[tuple[str, str]]:
    from rankopt.progress import duration
    from rankopt.tables import MEASURED, quantity

    stopped = sum(found.stopped.values())
    of = f" of {found.wanted['trials']}" if found.wanted else ""
    counts = f"{found.complete} complete, {stopped} stopped early, {len(found.failed)} failed"
    yield found.name, f"{found.done}{of} trials: {counts}"
    for reason, count in sorted(found.stopped.items(), key=lambda pair: -pair[1]):
        yield "stopped", f"{count} × {reason}"
    failed = sorted(found.failed.items())
    if len(failed) > _SHOWN:
        yield "failed", f"{len(failed) - _SHOWN} earlier ones, see rankopt trials"
    for trial, reason in failed[-_SHOWN:]:
        yield "failed", f"trial {trial}: {reason}"
    for one in found.running:
        yield "running", _running(one)
    if found.interrupted:
        left = f"{found.again} still to be run again" if found.again else "all of them run again since"
        yield "interrupted", f"{_counted(found.interrupted)}, {left}"
    alive = ", ".join(f"{host} (process {pid})" for host, pid in found.workers)
    yield "workers", alive or "none is at work"
    if found.per_minute is not None:
        yield "rate", f"{found.per_minute:.3g} trials/min; {duration(found.seconds)} of trials in all"
    if (limit := found.wanted.get("time_limit")) is not None:
        yield "time left", duration(max(limit - found.seconds, 0.0))
    if found.best is None:
        yield "best", f"no plan keeps {', '.join(found.limits) or 'all limits'} yet"
    else:
        values = [f"{k} {quantity(k, v)}" for k in MEASURED if (v := found.best.get(k)) is not None]
        name = f"trial {found.best_trial}" if (found.best_trial or 0) >= 0 else "the dense model"
        yield "best", f"{name}: {', '.join(values)}"
    yield "front", f"hypervolume {found.hypervolume:.3f}, without a gain for {_counted(found.without_gain)}"


def _counted(trials: int) -> str:
    return f"{trials} trial{'' if trials == 1 else 's'}"


def _running(one: Running) -> str:
    from rankopt.progress import duration

    heard = "" if one.heard_of is None else f", heard of {duration(one.heard_of)} ago"
    state = "" if one.alive else "; its driver is dead, and the plan is run again when the study goes on"
    again = f"; begun {len(one.died) + 1} times: {one.died[-1]}" if one.died else ""
    return f"trial {one.trial} for {duration(one.seconds)} on {one.host} (process {one.pid}{heard}){state}{again}"
