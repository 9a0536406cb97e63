"""`search`: the whole job in one call, from a trained model and limits to measured plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.batches import as_batches
from rankopt.durations import seconds_of
from rankopt.errors import InputError, LimitError
from rankopt.evaluate import Metric
from rankopt.limits import Limit, parse_limit
from rankopt.plan import Plan
from rankopt.plan_diff import plan_at
from rankopt.result import Progress, Result
from rankopt.search import Search
from rankopt.short_recovery import ShortRecovery
from rankopt.stopping import Stopping
from rankopt.targets.target import Target


def search(
    model: nn.Module,
    example_input: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    calibration: Any,
    evaluate: Callable[[nn.Module], float] | None = None,
    limits: Sequence[str | Limit] = ("macs<=50%",),
    trials: int = 64,
    time_limit: float | str | None = None,
    patience: int | None = None,
    trial_timeout: float | str | None = None,
    target: str | Target | Sequence[str | Target] | None = None,
    cache: Path | bool | None = None,
    storage: str | None = None,
    seed: int = 0,
    strategy: str = "auto",
    sampler: str = "auto",
    space: str | Path | Mapping[str, Any] | None = None,
    objectives: Sequence[str] | None = None,
    name: str = "study",
    progress: Callable[[Progress], None] | None = None,
    samples: int | None = None,
    memory: int | None = None,
    precision: str = "auto",
    allow: Sequence[str] = (),
    recovery: int | Mapping[str, Any] | None = None,
    train: Any = None,
    start: Sequence[Plan | str | Path] = (),
    executor: str | Mapping[str, Any] | None = None,
) -> Result:
    """Find compressed versions of a trained model that keep the limits.

    Args:
        model: the trained model; it is not changed.
        example_input: a tensor, or the tuple of positional arguments; MACs are counted for it.
        example_kwargs: keyword arguments of that call.
        calibration: an iterable of batches (see `as_batches`), a third of which is held back to judge plans by their
            kl to the dense model. Labels are not needed.
        evaluate: your own metric, higher is better; called with every candidate model in eval mode. Without it kl
            decides.
        limits: e.g. ``["macs<=50%", "accuracy>=-0.5"]``.
        trials: plans to measure.
        time_limit: seconds (or ``"2h"``) of trials in all, after which no more are begun.
        patience: trials in a row without a gain in hypervolume that end the study.
        trial_timeout: seconds (or ``"10m"``) after which a single trial is given up.
        target: where latency is measured: ``"onnxruntime"``, ``"torch:threads=2"``, a `Target`, or several of them, of
            which the first is meant by ``latency<=4ms``. None: nowhere.
        cache: folder of latency tables (None: the user's cache folder; False: nothing is kept).
        storage: an Optuna storage URL or a file (.db, .log); running again goes on there. None: in memory.
        seed: of everything that is random.
        strategy: how plans are chosen: auto, or a name out of `rankopt.strategies`.
        sampler: Optuna's sampler where the strategy asks one: auto, tpe, nsga2, nsga3, gp, cmaes, qmc, random.
        space: a ready search space, a path or a mapping.
        objectives: e.g. ``["accuracy", "macs"]``.
        name: of the study in the storage.
        progress: called after every trial.
        samples: at most so many calibration samples.
        memory: bytes to work with besides the dense and a compressed model; see `Search`.
        precision: how trials run the models: "auto", "float32" or "bfloat16", see `precision.chosen`; what is handed
            over is measured in float32.
        allow: operations that no counter knows and that shall count as nothing; see `Search`.
        recovery: a short training in every trial: steps, or a mapping of `RecoveryOptions`.
        train: data for it, e.g. a DataLoader; the calibration data when None.
        start: plans that are measured first, or files of them, or folders of saved models; for the same architecture.
        executor: where trials run: "local", "ray", or e.g. ``{"name": "ray", "workers": 4}``; see `ExecutorOptions`.

    Returns:
        A `Result`: ``.front``, ``.best()``; each entry has ``.plan``, ``.measurements``, ``.build()``, ``.save(dir)``.

    Raises:
        InputError: something given is wrong; one line.
        InfeasibleError: nothing can keep the limits; says what is reachable.
    """
    numbers = (("trials", trials, 1), ("seed", seed, 0), ("memory", memory or 0, 0), ("patience", patience or 1, 1))
    for key, value, least in numbers:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{key}: must be a whole number from {least}, got {value!r}")
    for key, text in (("storage", storage), ("name", name)):
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise InputError(f"{key}: must be a text, got {text!r}")
    metric: Metric | None = None
    if evaluate is not None:
        if not callable(evaluate):
            raise InputError(f"evaluate: needs a callable module -> float, got {type(evaluate).__name__}")
        metric = lambda module, batches: evaluate(module)  # noqa: E731
    short = ShortRecovery.of(recovery)
    parsed = [li if isinstance(li, Limit) else parse_limit(li) for li in _listed(limits)]
    run = Search(
        model,
        example_input,
        example_kwargs,
        calibration=as_batches(calibration, samples=samples),
        metric=metric,
        limits=parsed,
        objectives=objectives,
        space=space,
        trials=trials,
        seed=seed,
        strategy=strategy,
        sampler=sampler,
        storage=storage,
        stopping=Stopping(_seconds("time_limit", time_limit), patience),
        trial_timeout=_seconds("trial_timeout", trial_timeout),
        name=name,
        memory=memory,
        precision=precision,
        allow=allow,
        targets=[] if target in (None, "none") else [target] if isinstance(target, str | Target) else list(target),
        cache=cache,
        executor=executor,
        recovery=replace(short, batches=train, seed=seed) if short else None,
        start=_plans(start),
    )
    return run.run(progress)


def _seconds(key: str, value: float | str | None) -> float | None:
    try:
        return None if value is None else seconds_of(value)
    except ValueError as error:
        raise InputError(f"{key}: {error}") from None


def _plans(given: Any) -> dict[str, Plan]:
    if isinstance(given, Plan | str | Path):
        given = [given]
    if not isinstance(given, Sequence) or not all(isinstance(one, Plan | str | Path) for one in given):
        raise InputError(f"start: needs a list of plans or of their files, got {given!r:.80}")
    return {f"plan {n}" if isinstance(p, Plan) else str(p): p if isinstance(p, Plan) else plan_at(Path(p))
            for n, p in enumerate(given, 1)}  # fmt: skip


def _listed(limits: Any) -> Sequence[Any]:
    if isinstance(limits, str | Limit):
        return [limits]
    if not isinstance(limits, Sequence):
        raise LimitError(f"limits: needs a list such as ['macs<=50%'], got {limits!r}")
    return limits
