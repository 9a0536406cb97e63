"""`Plan`: what was decided for every layer. It is all that crosses from the search to the torch half.

JSON (schema 1)::

    {"schema": 1,
     "fingerprint": {"architecture": "…", "weights": "…"},
     "layers": {"conv1": {"method": "tucker2", "ranks": {"rank_out": 24, "rank_in": 16}},
                "fc": {"method": "dense", "ranks": {}}},
     "skipped": {"head": "shares its weight with emb"}}

Studies hold it shorter (schema 2), with texts for choices: ``"conv1": "tucker2(rank_out=24, rank_in=16)"``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from rankopt.errors import PlanError

SCHEMA, SHORT = 1, 2
_MAX_BYTES = 64 * 2**20
_MAX_RANK = 2**31
_NAME = re.compile(r"\w+", re.ASCII)
_TEXT = re.compile(r"(\w+)(?:\((\w+=\d{1,10}(?:, \w+=\d{1,10})*)\))?", re.ASCII)


@dataclass(frozen=True)
class Fingerprint:
    """Digests of the model that a plan was made for: its layers' names and shapes, and its weights' values."""

    architecture: str
    weights: str


@dataclass(frozen=True)
class LayerChoice:
    """A method and its named ranks, e.g. ``LayerChoice("tucker2", {"rank_out": 24, "rank_in": 16})``.

    Raises `PlanError` when a rank is not a positive integer.
    """

    method: str
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rank in self.ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < _MAX_RANK:
                raise PlanError(f"{self.method}: {name} must be a whole number from 1, got {rank!r}")

    def __str__(self) -> str:
        return self._said

    @cached_property
    def _said(self) -> str:
        ranks = ", ".join(f"{k}={v}" for k, v in self.ranks.items())
        return f"{self.method}({ranks})" if ranks else self.method

    @cached_property
    def short(self) -> str | dict[str, Any]:
        """As it stands in studies: a text, unless a name is none that can be read back."""
        plain = all(_NAME.fullmatch(name) for name in (self.method, *self.ranks))
        return self._said if plain else {"method": self.method, "ranks": dict(self.ranks)}

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.method, tuple(sorted(self.ranks.items()))))

    @cached_property
    def text(self) -> str:
        """JSON, the same for the same choice."""
        return json.dumps([self.method, dict(sorted(self.ranks.items()))])


DENSE = LayerChoice("dense")


@dataclass(frozen=True)
class Plan:
    """Layer name → choice, with the fingerprint of the model it was made for.

    `skipped` repeats why the remaining layers were left alone. A layer that is not named stays dense.
    """

    layers: Mapping[str, LayerChoice]
    fingerprint: Fingerprint | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __getitem__(self, name: str) -> LayerChoice:
        return self.layers.get(name, DENSE)

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name the decisions (not the model)."""
        layers = self.layers
        changed = [(name, layers[name]) for name in sorted(layers)]
        text = ", ".join([f"{_quoted(n)}: {c.text}" for n, c in changed if c.method != "dense"])
        return hashlib.sha256(f"{{{text}}}".encode()).hexdigest()[:12]

    def changed(self) -> dict[str, LayerChoice]:
        """The layers that do not stay dense."""
        return {n: c for n, c in self.layers.items() if c.method != "dense"}

    def methods(self) -> dict[str, int]:
        """How many layers use each method, most used first."""
        counts: dict[str, int] = {}
        for choice in self.layers.values():
            counts[choice.method] = counts.get(choice.method, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def to_dict(self, short: bool = False) -> dict[str, Any]:
        """The JSON form; `short` is that of studies, which hold thousands of plans. `from_dict` reads both."""
        out: dict[str, Any] = {"schema": SHORT if short else SCHEMA}
        if self.fingerprint is not None:
            out["fingerprint"] = {
                "architecture": self.fingerprint.architecture,
                "weights": self.fingerprint.weights,
            }
        if short:
            out["layers"] = {n: c.short for n, c in self.layers.items()}
        else:
            out["layers"] = {n: {"method": c.method, "ranks": dict(c.ranks)} for n, c in self.layers.items()}
        if self.skipped:
            out["skipped"] = dict(self.skipped)
        return out

    def to_json(self) -> str:
        """The JSON text, indented; `Plan.from_json` reads it back to an equal plan."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Plan:
        """Read the JSON form strictly; raises `PlanError` naming the place that is wrong."""
        if not isinstance(data, dict):
            raise PlanError(f"{where}: needs an object, got {type(data).__name__}")
        unknown = set(data) - {"schema", "fingerprint", "layers", "skipped"}
        if unknown:
            raise PlanError(f"{where}: unknown key {sorted(unknown)[0]!r}")
        schema = data.get("schema")
        if schema not in (SCHEMA, SHORT) or isinstance(schema, bool):
            raise PlanError(f"{where}: schema must be {SCHEMA} or {SHORT}, got {schema!r}")
        layers = data.get("layers")
        if not isinstance(layers, dict):
            raise PlanError(f"{where}: layers must be an object of layer name to choice")
        try:  # at once where all are texts, of which a study says the same over and over
            choices = {name: _read(entry) for name, entry in layers.items()} if schema == SHORT else {}
        except (PlanError, TypeError):
            choices = {}
        if not choices:
            short = schema == SHORT
            choices = {name: _choice(entry, f"{where}: layers.{name}", short) for name, entry in layers.items()}
        return cls(choices, _fingerprint(data.get("fingerprint"), where), _texts(data.get("skipped", {}), where))

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Parse JSON text; a duplicate key, a wrong type or broken JSON raises `PlanError`."""
        if len(text) > _MAX_BYTES:
            raise PlanError(f"{where}: larger than {_MAX_BYTES >> 20} MiB, so it is not a plan")
        try:
            data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise PlanError(f"{where}: not valid JSON: {error}") from None
        except RecursionError:
            raise PlanError(f"{where}: nested too deeply to be a plan") from None
        except ValueError as error:  # PlanError is one too, and an integer of too many digits raises ValueError
            raise PlanError(f"{where}: {error}") from None
        return cls.from_dict(data, where)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file (or `plan.json` of an artifact directory)."""
        path = Path(path)
        if path.is_dir():
            path = path / "plan.json"
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise PlanError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, so it is not a plan")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise PlanError(f"{path}: can't be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PlanError(f"{path}: not a text file") from None
        return cls.from_json(text, str(path))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key!r} stands there twice")
        out[key] = value
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a value that a plan can hold")


@lru_cache(maxsize=2**14)
def _read(text: str) -> LayerChoice:
    """A choice from its text, as `LayerChoice.short` gives it; raises `PlanError` when it is none."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise PlanError(f"{text[:80]!r} is no choice such as 'svd(rank=8)' or 'dense'")
    pairs = [part.split("=") for part in (found[2] or "").split(", ") if part]
    if len(dict(pairs)) < len(pairs):
        raise PlanError(f"{text[:80]!r} names a rank twice")
    return LayerChoice(found[1], {name: int(rank) for name, rank in pairs})


def _choice(entry: Any, where: str, short: bool = False) -> LayerChoice:
    if short and isinstance(entry, str):
        try:
            return _read(entry)
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from None
    if not isinstance(entry, dict) or set(entry) - {"method", "ranks"} or not isinstance(entry.get("method"), str):
        raise PlanError(f'{where} must be {{"method": name, "ranks": {{...}}}}, got {str(entry)[:80]}')
    ranks = entry.get("ranks", {})
    if not isinstance(ranks, dict):
        raise PlanError(f"{where}.ranks must be an object of rank name to whole number")
    try:
        if all(type(rank) is int for rank in ranks.values()):  # True and 1.0 would find what 1 has left
            return _made(entry["method"], tuple(ranks.items()))
        return LayerChoice(entry["method"], ranks)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


@lru_cache(maxsize=2**14)
def _made(method: str, ranks: tuple[tuple[str, int], ...]) -> LayerChoice:
    """A study of 10,000 trials says the same of its layers a million times."""
    return LayerChoice(method, dict(ranks))


_quoted = lru_cache(maxsize=2**14)(json.dumps)


def _fingerprint(entry: Any, where: str) -> Fingerprint | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or set(entry) != {"architecture", "weights"}:
        raise PlanError(f"{where}: fingerprint must hold architecture and weights")
    if not all(isinstance(v, str) and len(v) <= 128 for v in entry.values()):
        raise PlanError(f"{where}: fingerprint must hold two short texts")
    return Fingerprint(entry["architecture"], entry["weights"])


def _texts(entry: Any, where: str) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
        raise PlanError(f"{where}: skipped must be an object of layer name to reason")
    return dict(entry)
