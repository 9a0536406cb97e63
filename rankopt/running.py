"""`run`: a search from opening its storage to the last measurement of its winner, in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rankopt import ledger, study
from rankopt.batches import digest
from rankopt.errors import InputError
from rankopt.evbmf import estimated_share
from rankopt.executors.local import Local
from rankopt.plan import Plan
from rankopt.problem import learn
from rankopt.result import Entry, Result
from rankopt.sensitivity import Sensitivities, SensitivityOptions
from rankopt.starting import joined
from rankopt.storages import only_writer, open_storage
from rankopt.strategies.started import START
from rankopt.strategies.strategy import Setting

if TYPE_CHECKING:
    from rankopt.search import Search


def run(search: Search) -> Result:
    """See `Search.run`."""
    start = search.start  # a plan that does not fit is refused before there is a storage
    with only_writer(search.storage, search.name):
        return _run(search, start)


def _run(search: Search, start: Sequence[Plan]) -> Result:
    storage = open_storage(search.storage)
    search.start = joined(start, ledger.proposed(storage, search.name, START))
    devices = search.devices
    devices.keep_pace(ledger.begun_with(storage, search.name))
    space = search.space
    search.evaluator.use(devices)
    facts = facts_of(search)
    targets = {"targets": ", ".join(devices.labels)} if devices else {}
    opened = ledger.open_study(
        storage, search.name, search.objectives, facts | targets, search.evaluator.dense, search.limits,
        devices.conditions,
    )  # fmt: skip
    ledger.want(opened, search.trials, search.stopping.time_limit, search.stopping.patience)
    known = ledger.known_entries(opened, search.limits)
    for entry in known:
        devices.recall(entry.plan, entry.measurements)
    learn(space, devices)
    inherited = ledger.judged(storage, facts, search.name) if search.retargeted else []
    _measure_together(search, inherited, known)
    search.stopped = study.run(
        opened,
        setting_of(search),
        search.evaluator,
        search.progress,
        learn=lambda: learn(space, devices),
        inherited=inherited,
        by=search.strategy,
        executor=search.executor or Local(search.trial_timeout),
        stopping=search.stopping,
    )
    if devices or search.evaluator.fast.bfloat16:
        study.confirm_best(opened, search.limits, lambda entry: _again(search, entry))
    if devices:
        ledger.say(opened, devices.report())
    return ledger.with_owner(ledger.result_of(opened, search.limits), search)


def setting_of(search: Search) -> Setting:
    """What the strategy of a search is made for."""
    built, factors = search.evaluator, search._factors
    return Setting(
        search.space,
        search.objectives,
        search.limits,
        built.dense,
        search.trials,
        search.seed,
        search.seeds,
        search.sampler,
        Sensitivities(
            search.model, search.groups, factors, search.calibration, search.divergence, built.build,
            SensitivityOptions(seed=search.seed),
        ),
        lambda group, method: estimated_share(group, method, factors),
        search.start,
    )  # fmt: skip


def facts_of(search: Search) -> dict[str, str]:
    """What a study must not be continued without, each as a text or a digest."""
    space = json.dumps({n: repr(s) for n, s in search.spaces.items()}, sort_keys=True) + repr(search.space_file.tied)
    metric: Any = search.metric
    return {
        "model": search.fingerprint.architecture,
        "weights": search.fingerprint.weights,
        "calibration data": digest(search.calibration),
        "validation data": digest(search.validation),
        "search space": hashlib.sha256(space.encode()).hexdigest()[:16],
        "metric": metric if isinstance(metric, str) else "a callable" if metric else "none",
        "refit": repr(search.refit_options) + f" on {search.refit_samples} samples",
        "bn": search.bn,
    } | ({"recovery": str(search.recovery)} if search.recovery else {})


def _measure_together(search: Search, inherited: Sequence[ledger.Judged], known: Sequence[Entry]) -> None:
    """Plans of an earlier study side by side, which takes less time than one after the other."""
    done = {entry.plan.digest for entry in known}
    plans = [old.plan for old in inherited if old.plan.digest not in done][: max(search.trials - len(done), 0)]
    if plans:
        search.tell(f"measuring {len(plans)} plans of an earlier study")
        with suppress(InputError):  # one of them can't be run: its trial will say so
            search.devices.measure_all(plans)


def _again(search: Search, entry: Entry) -> dict[str, float]:
    """Measure an entry again, as it is handed over: quality in float32, and times beside dense."""
    search.tell(f"measuring trial {entry.trial} again, as it is handed over")
    built = search.build(entry.plan, bn=bool(entry.notes.get("bn", 0)))
    values = search.evaluator.quality(built) if search.evaluator.fast.bfloat16 else {}
    return values | search.devices.measured(entry.plan, built, search.limits)
