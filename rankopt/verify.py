"""`verify`: whether a saved model is still what was saved, and still does what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rankopt import artifact
from rankopt.cost import count, total_params
from rankopt.dense_source import dense_model
from rankopt.errors import ArtifactError, InputError, RankoptError
from rankopt.exporting import largest_difference
from rankopt.exports import exporter
from rankopt.fresh_inputs import fresh
from rankopt.layers import weights_digest
from rankopt.manifest import MANIFEST, Manifest
from rankopt.targets.target import Subject
from rankopt.targets.torch_cpu import converted
from rankopt.traced import Call

_NEAR = 1e-5  # of kl and accuracy, relative: sums may be taken in another order
_SEED = 1_000  # other inputs than the export was checked with
_LOOSE = 0.1  # of latency ratios and of memory
_MEMORY = ("peak_memory_mib", "memory_kept")  # of one target, which `memory_on` names

Measure = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `ok` is None where it could not be, and `text` says why."""

    what: str
    ok: bool | None
    text: str


def verify(
    directory: str | Path,
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    *,
    call: Call | None = None,
    measure: Measure | None = None,
    test: Measure | None = None,
    devices: Measure | None = None,
) -> list[Check]:
    """Look at everything that is said of a saved model.

    Args:
        directory: as `artifact.save` wrote it.
        model: the dense model, as in `artifact.load`. Without one, and without a recorded source, the weights are
            checked against the hashes alone.
        call: the example input that MACs were counted with; else one like that of the exports.
        measure: gives kl and accuracy of a module as they were measured when it was saved.
        test: likewise on the test data.
        devices: gives what was measured of a module on targets: ``latency_kept@TARGET``, ``peak_memory_mib@TARGET``.

    Returns:
        What was looked at, in order: files, plan and weights, values, exports, numbers.

    Raises:
        ArtifactError: the directory or its manifest can't be read at all.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: is not a directory; give a saved model's")
    manifest = Manifest.read(directory)
    checks = list(_files(directory, manifest))
    loaded: nn.Module | None = None
    if all(check.ok for check in checks):
        fits, loaded = _fits(directory, model)
        checks.append(fits)
        if loaded is not None:
            same = weights_digest(loaded) == manifest.weights
            text = f"digest {manifest.weights}" if same else "the values are not those that were saved"
            checks.append(Check("reload equals what was saved", same, text))
        checks += _exports(directory, manifest, loaded)
        if loaded is not None:
            checks += _numbers(directory, manifest, loaded, call, (measure, test, devices))
    return checks


def _files(directory: Path, manifest: Manifest) -> Iterator[Check]:
    listed = dict.fromkeys([*manifest.files, artifact.PLAN, artifact.TENSORS, artifact.MEASUREMENTS])
    for name in listed:
        try:
            manifest.check(directory, name)
        except ArtifactError as error:
            yield Check(f"file {name}", False, error.message)
        else:
            yield Check(f"file {name}", True, f"{manifest.files[name].bytes:,} bytes, SHA-256 as recorded")
    for path in sorted(directory.iterdir()):
        if path.name not in manifest.files and path.name != MANIFEST:
            yield Check(f"file {path.name[:80]}", False, f"is not listed in {MANIFEST}")


def _fits(directory: Path, model: Any) -> tuple[Check, nn.Module | None]:
    what = "plan fits the weights"
    try:
        make = artifact.recorded(directory) if model is None else model
    except ArtifactError as error:
        return Check(what, None, error.message), None
    try:
        dense = dense_model(make, str(directory))
        loaded = artifact.load(directory, dense)
    except RankoptError as error:
        return Check(what, False, error.message), None
    changed = len(artifact.read_plan(directory, Manifest.read(directory)).changed())
    return Check(what, True, f"{changed} layers replaced"), loaded


def _exports(directory: Path, manifest: Manifest, loaded: nn.Module | None) -> Iterator[Check]:
    reference: nn.Module | None = None
    for name, record in manifest.exports.items():
        what = f"export {name}"
        if loaded is None or manifest.inputs is None:
            yield Check(what, None, "there is no model to compare it with")
            continue
        try:
            one = exporter(name)
            missing = one.missing()
            if missing:
                yield Check(what, None, missing)
                continue
            if reference is None:
                args, kwargs = fresh(manifest.inputs)
                reference = converted(Subject(loaded, args, kwargs), "float32", "contiguous")[0]
            if set(record["files"]) != set(one.files):
                raise ArtifactError(f"{MANIFEST}: exports.{name} must name the files {', '.join(one.files)}")
            tolerance, batches = _stated(record, name)
            found = largest_difference(one.run(directory), reference, manifest.inputs, batches, _SEED)
        except RankoptError as error:
            yield Check(what, False, error.message)
        except Exception as error:
            yield Check(what, False, f"can't be run: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            text = f"outputs differ by {found:.1e} of their largest entry, stated is {tolerance:.0e}"
            yield Check(what, found <= tolerance, f"{text} ({one.runtime()}, batches {', '.join(map(str, batches))})")


def _stated(record: Mapping[str, Any], name: str) -> tuple[float, list[int]]:
    tolerance, batches = record.get("tolerance"), record.get("batches")
    if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not 0 < tolerance <= 0.1:
        raise InputError(f"{MANIFEST}: exports.{name} states no tolerance between 0 and 0.1")
    if not isinstance(batches, list) or not batches or not all(type(n) is int and 0 < n <= 4096 for n in batches):
        raise InputError(f"{MANIFEST}: exports.{name} states no batch sizes")
    return float(tolerance), batches[:8]


def _numbers(
    directory: Path,
    manifest: Manifest,
    loaded: nn.Module,
    call: Call | None,
    again: tuple[Measure | None, Measure | None, Measure | None],
) -> Iterator[Check]:
    """`again` measures on validation data, test data and targets."""
    recorded = artifact.read_measurements(directory)
    stated, tested = (v if isinstance(v := recorded.get(k), dict) else {} for k in ("compressed", "compressed_test"))
    exact: dict[str, float] = {"params": total_params(loaded)}
    try:
        call = call if call is not None or manifest.inputs is None else fresh(manifest.inputs)
        if call is not None and "macs" in stated:
            exact["macs"] = count(loaded, *call).macs
    except RankoptError as error:
        yield Check("macs", None, error.message)
    for key, value in exact.items():
        if key in stated:
            yield Check(key, stated[key] == value, f"{value:,}, stated {_text(stated[key])}")
    seen: set[str] = set()
    for found, near, said, of in zip(
        again, (_NEAR, _NEAR, _LOOSE), (stated, tested, stated), ("", ", test", ""), strict=True
    ):
        for key, value in (found(loaded) if found is not None else {}).items():
            base, _, target = key.partition("@")
            known = said.get(key)
            if base in _MEMORY and target in ("", recorded.get("memory_on", target)):
                known = said.get(base)
            if isinstance(known, int | float) and value is not None and not key.endswith("_se"):
                close = abs(value - known) <= near * max(abs(known), abs(value), 1e-2)
                seen.add(f"{base}{of}")
                yield Check(f"{key}{of}", close, f"{value:.6g}, stated {known:.6g}")
    there = [k for k in ("kl", "accuracy", "latency_kept", "memory_kept") if k in stated]
    there += [f"{k}, test" for k in ("kl", "accuracy") if k in tested]
    unseen = [k for k in there if k not in seen]
    if unseen:
        text = "needs the study's data (--study), --latency for times, --memory"
        where = {k.partition("@")[2] for k in stated if k.startswith("latency_kept@")} | {recorded.get("memory_on")}
        if {"latency_kept", "memory_kept"} & {*unseen} and (named := sorted(_text(w) for w in where if w)):
            text += f", on what was measured then (--target): {', '.join(named)}"
        yield Check("; ".join(unseen), None, text)


def _text(value: Any) -> str:
    return f"{value:,.10g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)[:40]
