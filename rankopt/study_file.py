"""`load_study`: a study file (YAML) checked in full, and the model, data and metric that it names.

::

    model: {call: "cifar10.py:resnet20", args: {}}   # or just the text; a file is looked up beside the study file
    data: "cifar10.py:data"        # returns {"calibration": ..., "validation": ..., "test": ...}; see as_batches
    metric: accuracy               # or kl, or a callable (module, batches) -> float, higher is better
    example_input: [1, 3, 32, 32]  # or {shape, dtype}, or a callable; default: the first calibration sample
    calibration: {samples: 1024, batch: 128}
    space: resnet                  # a ready search space, a path, or a mapping
    limits: ["macs<=50%"]
    trials: 100

Reading the file imports nothing that it names: `build_model`, `splits` and `metric_function` do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from rankopt.callables import call, load_callable
from rankopt.errors import StudyFileError
from rankopt.executor_options import ExecutorOptions, executor_section
from rankopt.limits import Limit
from rankopt.plan_sources import plans_named
from rankopt.recovery_options import RecoveryOptions
from rankopt.space_file import Space, load_space
from rankopt.study_parts import (
    CallSpec,
    ModelSpec,
    OutputSpec,
    RefitSpec,
    SplitSpec,
    one_of,
    read_limit,
    read_metric,
    read_name,
    read_objective,
    read_seconds,
    read_targets,
    read_texts,
    short_for,
)
from rankopt.yaml_file import Strict, closest, parse, read_yaml

if TYPE_CHECKING:
    from torch import nn

    from rankopt.batches import Batch
    from rankopt.plan import Plan
    from rankopt.short_recovery import ShortRecovery
    from rankopt.targets.target import Target

# Stated here, since reading a study file loads neither Optuna nor torch; a test compares them with the tables.
STRATEGY_NAMES = (
    "auto", "mixed", "correct", "fit", "local", "relinearize", "free", "plain", "solved", "uniform", "energy", "vbmf",
    "greedy",
)  # fmt: skip
SAMPLER_NAMES = ("auto", "tpe", "nsga2", "nsga3", "gp", "cmaes", "qmc", "random")
SPLITS = ("calibration", "validation", "test")
TRAIN = "train"  # iterated by the training itself, anew in every epoch


class StudyFile(Strict):
    """A study: what is compressed, on which data it is judged, and what it must keep."""

    name: Annotated[str, BeforeValidator(read_name)] = "study"
    description: str = ""
    model: Annotated[ModelSpec, short_for("call")]
    data: Annotated[CallSpec, short_for("call")]
    metric: Annotated[str, BeforeValidator(read_metric)] = "accuracy"
    example_input: Any = None
    calibration: SplitSpec = SplitSpec(samples=1024, batch=128)
    validation: SplitSpec = SplitSpec(batch=256)
    test: SplitSpec = SplitSpec(batch=256)
    space: Any = "default"
    limits: list[Annotated[Limit, BeforeValidator(read_limit)]] = Field(default_factory=list)
    objectives: list[Annotated[str, BeforeValidator(read_objective)]] = Field(default_factory=list, max_length=12)
    target: Annotated[list[dict[str, Any]], BeforeValidator(read_targets)] = Field(default_factory=list)
    cache: str | None = Field(None, min_length=1)
    trials: int = Field(64, ge=1, le=1_000_000)
    time_limit: Annotated[float | None, BeforeValidator(read_seconds)] = None
    patience: int | None = Field(None, ge=1)
    trial_timeout: Annotated[float | None, BeforeValidator(read_seconds)] = None
    strategy: Annotated[str, BeforeValidator(one_of(STRATEGY_NAMES))] = "auto"
    sampler: Annotated[str, BeforeValidator(one_of(SAMPLER_NAMES))] = "auto"
    seeds: int | None = Field(None, ge=0, le=10_000)
    start: Annotated[list[str], BeforeValidator(read_texts)] = Field(default_factory=list)
    seed: int = Field(0, ge=0, lt=2**32)
    threads: int = Field(1, ge=1, le=1024)
    storage: str | None = Field(None, min_length=1)
    executor: Annotated[ExecutorOptions, BeforeValidator(executor_section)] = ExecutorOptions()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    refit: RefitSpec = RefitSpec()
    recovery: RecoveryOptions = RecoveryOptions()
    output: OutputSpec = OutputSpec()
    allow: list[str] = Field(default_factory=list)
    _path: Path = PrivateAttr(Path("study.yaml"))
    _splits: dict[str, list[Batch]] | None = PrivateAttr(None)
    _train: Any = PrivateAttr(None)

    @model_validator(mode="after")
    def _consistent(self) -> StudyFile:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives: one stands there twice: {', '.join(self.objectives)}")
        if "accuracy" in self.objectives and self.metric == "kl":
            raise ValueError("objectives: accuracy needs a metric other than kl")
        kept = {"accuracy", "kl"} & {*self.objectives, *(li.quantity for li in self.limits)}
        if self.objectives and not kept:
            raise ValueError(
                "objectives: accuracy or kl must be among them or have a limit, or everything would be cut away"
            )
        return self

    @property
    def path(self) -> Path:
        """The file that was read."""
        return self._path

    @property
    def base_dir(self) -> Path:
        """The folder that relative paths start from."""
        return self._path.resolve().parent

    @property
    def goals(self) -> list[str]:
        """The objectives, or the default: accuracy (kl where there is no other metric), and latency where there is a
        target, else macs."""
        quality = "kl" if self.metric == "kl" else "accuracy"
        return list(self.objectives) or [quality, "latency" if self.target else "macs"]

    def goals_on(self, labels: Sequence[str]) -> list[str]:
        """The objectives on other targets than the file's: latency takes the place of costs if there is none of it."""
        quality = [o for o in self.goals if o in ("accuracy", "kl")]
        costs = [o for o in self.goals if o not in quality and o.partition("@")[2] in ("", *labels)]
        times = [o for o in costs if o.startswith("latency")]
        return [*quality, *(costs if times else ["latency"])]

    def choosing(self, strategy: str | None, sampler: str | None) -> StudyFile:
        """The same study with another strategy or sampler, where one is given; raises `StudyFileError` for no such."""
        given = {k: v for k, v in (("strategy", strategy), ("sampler", sampler)) if v is not None}
        for key, value in given.items():
            known = STRATEGY_NAMES if key == "strategy" else SAMPLER_NAMES
            if value not in known:
                raise StudyFileError(f"{key}: must be one of {', '.join(known)}, got {value!r}{closest(value, known)}")
        return self.model_copy(update=given)

    def ending(self, time_limit: str | None, patience: int | None) -> StudyFile:
        """The same study that ends earlier or later, where it is given; raises `StudyFileError` for no duration."""
        try:
            given = {"time_limit": read_seconds(time_limit), "patience": patience}
        except ValueError as error:
            raise StudyFileError(f"--time-limit: {error}") from None
        return self.model_copy(update={k: v for k, v in given.items() if v is not None})

    def carried_out_by(self, **given: Any) -> StudyFile:
        """The same study with another executor; what is None stays. Raises `StudyFileError` for what does not fit."""
        given = {key: value for key, value in given.items() if value is not None}
        if not given:
            return self
        name = given.get("name", self.executor.name)
        for key in given:
            if name == "local" and key != "name":
                raise StudyFileError(f"--{key.replace('_', '-')}: belongs to the executor ray; add --executor ray")
        before = {} if name == "local" else self.executor.model_dump(exclude_unset=True)
        return self.model_copy(update={"executor": parse(ExecutorOptions, before | given, "executor: ")})

    def make_targets(self) -> list[Target]:
        """The targets that are named; raises `StudyFileError` that names the option that is wrong."""
        from rankopt.targets import make

        return [
            make(spec["name"], {k: v for k, v in spec.items() if k != "name"}, f"{self._path}: ")
            for spec in self.target
        ]

    def study_on(self, targets: Sequence[Target] | None) -> str:
        """The study's name in its storage; on other targets than the file's it is one of its own."""
        if targets is None or list(targets) == self.make_targets():
            return self.name
        return f"{self.name} on {', '.join(t.called for t in targets)}"

    @property
    def cache_folder(self) -> Path | None:
        """Where latency tables are kept; None: in the user's cache folder."""
        return None if self.cache is None else self.base_dir / Path(self.cache).expanduser()

    @property
    def storage_url(self) -> str:
        """Where trials are kept: ``storage``, or ``runs/NAME.db`` beside the study file."""
        return storage_url(self.storage or f"runs/{self.name}.db", self.base_dir)

    def with_weights(self, path: Path) -> StudyFile:
        """The same study of other weights."""
        return self.model_copy(update={"model": self.model.model_copy(update={"weights": str(path.resolve())})})

    def starting_with(self, plans: Sequence[str] | None) -> StudyFile:
        """The same study with other plans to begin with, where some are given (paths from the current folder)."""
        resolved = [str(Path(p).expanduser().resolve()) for p in plans or ()]
        return self if plans is None else self.model_copy(update={"start": resolved})

    def starting_plans(self, where: str | None = None) -> dict[str, Plan]:
        """What ``start`` names: text → plan; raises `InputError`, one line, for one that can't be read.

        `where` is what that begins with, in place of the file and the key.
        """
        return plans_named(self.start, self.base_dir, load_study, where or f"{self._path}: start: ")

    def load_space(self) -> Space:
        """The search space that the study names or holds."""
        try:
            return load_space(self.space, self.base_dir, f"{self._path}: space.")
        except StudyFileError as error:
            inline = isinstance(self.space, Mapping)
            raise error if inline else StudyFileError(f"{self._path}: space: {error}") from None

    def build_model(self) -> nn.Module:
        """Call what ``model`` names, and load the weights if there are any."""
        from torch import nn

        model = self._called("model")
        if not isinstance(model, nn.Module):
            raise StudyFileError(f"{self._path}: model.call: must return a torch.nn.Module, got {type(model).__name__}")
        if self.model.weights is not None:
            from rankopt.checkpoint import load_checkpoint

            load_checkpoint(model, self.base_dir / Path(self.model.weights).expanduser())
        return model

    def splits(self) -> dict[str, list[Batch]]:
        """Call what ``data`` names, once, and read its splits as batches.

        A split may be a function without arguments, so that what isn't used needn't be loaded before.
        """
        from rankopt.batches import as_batches

        if self._splits is None:
            found = self._called("data")
            where = f"{self._path}: data.call"
            if not isinstance(found, Mapping):
                raise StudyFileError(f"{where}: must return a mapping of splits, got {type(found).__name__}")
            for key in found:
                if key not in (*SPLITS, TRAIN):
                    raise StudyFileError(f"{where}: returned an unknown split {key!r}{closest(key, (*SPLITS, TRAIN))}")
            if found.get("calibration") is None:
                raise StudyFileError(f"{where}: must return the split 'calibration'; got {', '.join(found) or 'none'}")
            self._splits, self._train = {}, found.get(TRAIN)
            for key in SPLITS:
                source = found.get(key)
                if source is not None:
                    spec: SplitSpec = getattr(self, key)
                    source = _called(source)
                    self._splits[key] = as_batches(source, samples=spec.samples, batch_size=spec.batch, where=key)
        return self._splits

    def training_data(self) -> Any:
        """The split ``train`` as it was returned, or None; a function is called when it is asked for."""
        self.splits()
        self._train = _called(self._train)
        return self._train

    def training_function(self) -> Callable[..., Any] | None:
        """The user's own training, called as function(model, dense, batches, steps)."""
        spec = self.recovery.function
        return load_callable(spec, self.base_dir, f"{self._path}: recovery.function: ") if spec else None

    def short_recovery(self) -> ShortRecovery | None:
        """The training that is part of every trial, if there is one."""
        if self.recovery.steps == 0:
            return None
        from rankopt.short_recovery import ShortRecovery

        return ShortRecovery(self.recovery, self.training_data(), train=self.training_function(), seed=self.seed)

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of a call of the model with one sample."""
        from rankopt.example_input import make

        return make(self.example_input, self.base_dir, f"{self._path}: example_input", self.splits)

    def metric_function(self) -> Callable[..., float] | None:
        """The user's own metric, called as metric(module, batches); None for accuracy and kl."""
        if self.metric in ("accuracy", "kl"):
            return None
        return load_callable(self.metric, self.base_dir, f"{self._path}: metric: ")

    def _called(self, key: str) -> Any:
        spec: CallSpec = getattr(self, key)
        function = load_callable(spec.call, self.base_dir, f"{self._path}: {key}.call: ")
        return call(function, spec.args, f"{self._path}: {key}.")


def _called(source: Any) -> Any:
    """A split, made now where it is a function."""
    return source() if callable(source) and not hasattr(source, "__getitem__") else source


def storage_url(text: str, base_dir: Path) -> str:
    """A storage URL as it is; for a path, relative to `base_dir`, that of an SQLite file (.log: of a journal file)."""
    if "://" in text:
        return text
    scheme = "journal" if text.endswith((".log", ".journal")) else "sqlite"
    return f"{scheme}:///{(base_dir / Path(text).expanduser()).resolve()}"


def load_study(path: str | Path) -> StudyFile:
    """Read and check a study file; raises `StudyFileError`, one line that names the file and the key."""
    path = Path(path)
    data = {"name": path.stem, **read_yaml(path, "study")}
    study = parse(StudyFile, data, f"{path}: ")
    study._path = path
    study.load_space()
    return study
