"""`arguments`: what a study file says, as arguments of `Search`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rankopt.dense_source import source_of
from rankopt.limits import Limit
from rankopt.refit import RefitOptions
from rankopt.stopping import Stopping
from rankopt.targets.target import Target

if TYPE_CHECKING:
    from torch import nn

    from rankopt.executors.executor import Executor
    from rankopt.study_file import StudyFile


def arguments(
    file: StudyFile,
    limits: Sequence[Limit] | None = None,
    trials: int | None = None,
    storage: str | None = None,
    seed: int | None = None,
    targets: Sequence[Target] | None = None,
    model: nn.Module | None = None,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Builds the model and data that the file names. `storage` is a URL; what is not None replaces the file's."""
    torch.set_num_threads(file.threads)
    splits = file.splits()
    args, kwargs = file.example()
    return {
        "model": file.build_model() if model is None else model,
        "example_input": args,
        "example_kwargs": kwargs,
        "calibration": splits["calibration"],
        "validation": splits.get("validation"),
        "tests": splits.get("test"),
        "metric": file.metric_function() or file.metric,
        "limits": file.limits if limits is None else limits,
        "objectives": file.goals if targets is None else file.goals_on([t.called for t in targets]),
        "space": file.load_space(),
        "trials": file.trials if trials is None else trials,
        "seed": file.seed if seed is None else seed,
        "strategy": file.strategy,
        "sampler": file.sampler,
        "seeds": file.seeds,
        "storage": storage or file.storage_url,
        "name": file.study_on(targets),
        "refit": RefitOptions() if file.refit.enabled else None,
        "refit_samples": file.refit.samples,
        "bn": file.recovery.bn,
        "precision": file.precision,
        "output": file.output.kind,
        "class_dim": file.output.class_dim,
        "allow": file.allow,
        "targets": file.make_targets() if targets is None else targets,
        "cache": file.cache_folder,
        "retargeted": file.study_on(targets) != file.name,
        "recovery": file.short_recovery(),
        "start": file.starting_plans,
        "stopping": Stopping(file.time_limit, file.patience),
        "trial_timeout": file.trial_timeout,
        "executor": executor or file.executor,
        "threads": file.threads,
        "source": source_of(file.model.call, file.model.args),
    }
