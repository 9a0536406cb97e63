"""Options that several verbs of the command line share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rankopt.limits import Limit
    from rankopt.result import Result
    from rankopt.study_file import StudyFile
    from rankopt.targets.target import Target

Study = Annotated[Path, typer.Argument(metavar="STUDY", help="The study, a YAML file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only, and JSON where it is asked for.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where the compressed model is written.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a saved model in DIR.")]
Limits = Annotated[
    list[str] | None,
    typer.Option("--limit", metavar="LIMIT", help="E.g. 'macs<=50%' or 'accuracy>=-0.5'; replaces those of the study."),
]
Storage = Annotated[
    str | None, typer.Option(metavar="URL", help="Where trials are kept: an Optuna storage URL, or a .db file.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="Where latency is measured, e.g. onnxruntime or torch:threads=2; replaces those of the study.",
    ),
]
Exports = Annotated[
    list[str] | None,
    typer.Option("--export", metavar="FORMAT", help="Write this format too: onnx, pt2, openvino or executorch."),
]
Memory = Annotated[
    bool, typer.Option("--memory", help="Measure peak memory of what is written, and of the dense model, too.")
]
Shape = Annotated[
    str | None,
    typer.Option("--input", metavar="SHAPE", help="E.g. 1x3x32x32 or 1x16:int64, in place of the study's."),
]

Executor = Annotated[
    str | None, typer.Option(metavar="NAME", help="Where trials run: local (this process) or ray (workers).")
]
Workers = Annotated[int | None, typer.Option(min=1, metavar="N", help="How many trials at once, with ray.")]
Address = Annotated[
    str | None, typer.Option(metavar="ADDR", help="Of a Ray cluster: auto or HOST:PORT; else one is begun here.")
]
Cpus = Annotated[float | None, typer.Option("--cpus-per-trial", metavar="X", help="Processors of a trial, with ray.")]
Gpus = Annotated[float | None, typer.Option("--gpus-per-trial", metavar="X", help="GPUs of a trial, with ray.")]


@dataclass(frozen=True)
class Asked:
    """A study, and what the command line says in place of what the file says.

    Attributes:
        file: the study.
        limits, targets, storage: None where the file's own count; `storage` is a URL.
    """

    file: StudyFile
    limits: list[Limit] | None = None
    targets: list[Target] | None = None
    storage: str | None = None

    @property
    def url(self) -> str:
        """Where the trials are."""
        return self.storage or self.file.storage_url

    @property
    def name(self) -> str:
        """The study's name in its storage."""
        return self.file.study_on(self.targets)

    @property
    def within(self) -> Sequence[Limit]:
        """The limits that count."""
        return self.limits or self.file.limits

    def result(self) -> Result:
        """What was measured; raises `InputError` when nothing was searched yet."""
        from rankopt.ledger import read_result

        return read_result(self.url, self.name, limits=self.within)


def asked(
    study: Path, limit: list[str] | None = None, storage: str | None = None, target: list[str] | None = None
) -> Asked:
    """Read the study file and these options; raises `RankoptError`, one line, for the first that is wrong."""
    from rankopt.study_file import load_study

    return Asked(load_study(study), limits_of(limit), targets_of(target), storage_of(storage))


def repeated(storage: str | None, target: list[str] | None, limit: list[str] | None = None) -> list[str]:
    """These options once more, for a command that is proposed."""
    found = ["--storage", storage] if storage else []
    for option, texts in (("--target", target), ("--limit", limit)):
        found += [part for text in texts or [] for part in (option, text)]
    return found


def limits_of(texts: list[str] | None) -> list[Limit] | None:
    """What ``--limit`` says; raises `LimitError`."""
    from rankopt.limits import parse_limit

    return [parse_limit(text) for text in texts] if texts else None


def targets_of(texts: list[str] | None) -> list[Target] | None:
    """What ``--target`` says; raises `InputError`."""
    from rankopt.targets import read

    return [read(text) for text in texts] if texts else None


def storage_of(text: str | None) -> str | None:
    """What ``--storage`` says, as a URL."""
    from rankopt.study_file import storage_url

    return storage_url(text, Path()) if text else None
