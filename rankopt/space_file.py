"""Search spaces: which methods and how much of each layer may be kept, as declarative YAML.

::

    methods: [svd, spatial_svd, tucker2]     # the methods that layers choose from
    keep: {min: 0.1, max: 0.9, levels: 16}   # fractions of the layer's dense MACs; or a list: [0.25, 0.5]
                                             # solved: 8 of them for methods that are solved anew for every rank
    rank_multiple: 1                         # ranks snap to a multiple of this
    statistics: true                         # factorize with calibration data (false: the weights alone)
    cap: {macs: 0.8}                         # no layer keeps more than this share of its macs or params
    rules:                                   # the first rule that matches a layer replaces what it names
      - {match: [conv1, "layer4.*"], dense: true}
      - {match: "kind:linear", methods: [svd]}
      - {match: "re:layer3\\\\..*", explicit: [{method: svd, ranks: {rank: 8}}]}
    tied: [["layer1.*.conv1"]]               # groups of layers that make one choice

A pattern is a layer's name with ``*``, ``?``, ``[...]``, or ``kind:`` and a kind (conv2d, linear, ...; also conv,
pointwise, depthwise, grouped), or ``re:`` and a regular expression for the whole name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PrivateAttr, model_validator

from rankopt.errors import LayerError, StudyFileError
from rankopt.layer_patterns import Patterns, fits, matching
from rankopt.yaml_file import Strict, closest, parse, read_yaml

if TYPE_CHECKING:
    from rankopt.layer_spec import LayerSpec

Fraction = Annotated[float, Field(gt=0, le=1)]


class Keep(Strict):
    """Fractions of a layer's dense MACs that its candidates may keep."""

    min: Fraction = 0.1
    max: Fraction = 0.9
    levels: int = Field(16, ge=1, le=1000)
    solved: int = Field(8, ge=1, le=1000)
    values: list[Fraction] | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"values": data} if isinstance(data, list) else data

    @model_validator(mode="after")
    def _ordered(self) -> Keep:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def fractions(self, solved: bool = False) -> tuple[float, ...]:
        """All levels, ascending; with `solved` those of methods whose factors can't be sliced (cp, tensor_ring)."""
        if self.values is not None:
            return tuple(sorted(set(self.values)))
        levels = min(self.levels, self.solved) if solved else self.levels
        if levels == 1 or self.min == self.max:
            return (self.max,)
        step = (self.max - self.min) / (levels - 1)
        return tuple(round(self.min + n * step, 6) for n in range(levels))


class Cap(Strict):
    """The most that one layer may keep, as shares of its dense values."""

    macs: Fraction | None = None
    params: Fraction | None = None


class Explicit(Strict):
    """One candidate with its ranks written out."""

    method: str
    ranks: dict[str, Annotated[int, Field(ge=1)]]


class Rule(Strict):
    """What the layers that match do otherwise than the rest of the space."""

    match: Patterns
    optional: bool = False
    dense: bool = False
    allow_dense: bool | None = None
    methods: list[str] | None = None
    keep: Keep | None = None
    rank_multiple: int | None = Field(None, ge=1)
    cap: Cap | None = None
    explicit: list[Explicit] = Field(default_factory=list)


class Space(Strict):
    """A search space file."""

    description: str = ""
    methods: list[str] = Field(default_factory=lambda: ["svd", "svd_in", "spatial_svd", "tucker2", "tensor_train"])
    keep: Keep = Keep()
    rank_multiple: int = Field(1, ge=1)
    statistics: bool = True
    allow_dense: bool = True
    cap: Cap = Cap()
    rules: list[Rule] = Field(default_factory=list)
    tied: list[Patterns] = Field(default_factory=list)
    _label: str = PrivateAttr("search space: ")


@dataclass(frozen=True)
class LayerSpace:
    """What one layer chooses from.

    Attributes:
        methods, keeps: every method at every share of the layer's dense MACs.
        solved_keeps: the shares for methods that are solved anew for every rank (None: the same).
        rank_multiple: ranks are multiples of this.
        dense: the layer stays as it is.
        allow_dense: whether staying dense is among the choices.
        explicit: further candidates, ``{"method": ..., "ranks": {...}}``.
        cap: the largest shares of its dense ``macs`` and ``params`` that it may keep.
    """

    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    rank_multiple: int = 1
    dense: bool = False
    allow_dense: bool = True
    explicit: tuple[dict[str, Any], ...] = ()
    cap: Mapping[str, float] = field(default_factory=dict)
    solved_keeps: tuple[float, ...] | None = None


def folder() -> Path:
    """Where the ready spaces are: inside the installed package, or at the top of a clone."""
    inside = Path(__file__).parent / "searchspaces"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "searchspaces"


def names() -> list[str]:
    """The ready spaces."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def load_space(
    space: str | Path | Mapping[str, Any] | Space | None, base_dir: Path | None = None, label: str = "search space: "
) -> Space:
    """Read a space: the name of a ready one, a path (relative to `base_dir`), or a mapping. None is ``default``.

    `label` is what messages about a mapping begin with. Raises `StudyFileError`, one line that names the key.
    """
    if isinstance(space, Space):
        return space
    if isinstance(space, Mapping):
        return _labelled(space, label)
    text = str(space) if space is not None else "default"
    if isinstance(space, Path) or text.endswith((".yaml", ".yml")) or "/" in text:
        path = (base_dir or Path()) / Path(text).expanduser()
    elif text in names():
        path = folder() / f"{text}.yaml"
    else:
        raise StudyFileError(f"no ready search space is called {text!r} (a path ends in .yaml){closest(text, names())}")
    return _labelled(read_yaml(path, "search space"), f"search space {path.name}: ")


def resolve(space: Space, layers: Sequence[LayerSpec]) -> dict[str, LayerSpace]:
    """What every layer that can be decomposed chooses from, in the order of `layers`.

    Raises `StudyFileError` for a name that matches no layer, an unknown method, or explicit ranks that don't fit.
    """
    _check_methods(space)
    for r, given in enumerate(space.rules):
        for m, pattern in enumerate(given.match):
            if not given.optional:
                matching(pattern, layers, f"{space._label}rules.{r}.match.{m}")
    out = {}
    for layer in layers:
        if layer.skip is None:
            n = next((n for n, rule in enumerate(space.rules) if any(fits(p, layer) for p in rule.match)), None)
            out[layer.name] = _layer_space(space, n, layer)
    return out


def tied_groups(space: Space, layers: Sequence[LayerSpec]) -> list[list[str]]:
    """Names of the layers that must share a choice; layers that are left alone are not among them."""
    spaces, owner, groups = resolve(space, layers), dict[str, int](), list[list[str]]()
    for n, patterns in enumerate(space.tied):
        where = f"{space._label}tied.{n}"
        group: dict[str, LayerSpec] = {}
        for m, pattern in enumerate(patterns):
            group |= {layer.name: layer for layer in matching(pattern, layers, f"{where}.{m}") if not layer.skip}
        for name, layer in group.items():
            first = next(iter(group.values()))
            if name in owner:
                raise StudyFileError(f"{where}: {name} is also in tied.{owner[name]}")
            if spaces[name] != spaces[first.name] or layer.describe() != first.describe():
                raise StudyFileError(
                    f"{where}: {first.name} ({first.describe()}) and {name} ({layer.describe()}) can't make one choice:"
                    " they need the same kind, shape and methods"
                )
            owner[name] = n
        if len(group) > 1:
            groups.append(list(group))
    return groups


def _labelled(data: Any, label: str) -> Space:
    space = parse(Space, dict(data), label)
    space._label = label
    return space


def _check_methods(space: Space) -> None:
    from rankopt.decompositions import table  # only here: reading a file needs no torch

    known = [*table(), "dense"]
    places = [(f"methods.{m}", name) for m, name in enumerate(space.methods)]
    for n, rule in enumerate(space.rules):
        places += [(f"rules.{n}.methods.{m}", name) for m, name in enumerate(rule.methods or [])]
        places += [(f"rules.{n}.explicit.{m}.method", entry.method) for m, entry in enumerate(rule.explicit)]
    for key, name in places:
        if name not in known:
            raise StudyFileError(f"{space._label}{key}: unknown method {name!r}{closest(name, known)}")


def _layer_space(space: Space, n: int | None, layer: LayerSpec) -> LayerSpace:
    rule = space.rules[n] if n is not None else Rule(match=["*"])
    for m, entry in enumerate(rule.explicit):
        from rankopt.decompositions import method

        try:
            method(entry.method).check(layer, entry.ranks)
        except LayerError as error:
            raise StudyFileError(f"{space._label}rules.{n}.explicit.{m}: {error}") from None
    # a rule that writes candidates out and names no methods offers only those
    chosen = rule.methods if rule.methods is not None else [] if rule.explicit else space.methods
    cap = space.cap.model_dump(exclude_none=True) | (rule.cap.model_dump(exclude_none=True) if rule.cap else {})
    return LayerSpace(
        methods=tuple(dict.fromkeys(name for name in chosen if name != "dense")),
        keeps=(rule.keep or space.keep).fractions(),
        solved_keeps=(rule.keep or space.keep).fractions(solved=True),
        rank_multiple=rule.rank_multiple or space.rank_multiple,
        dense=rule.dense,
        allow_dense=space.allow_dense if rule.allow_dense is None else rule.allow_dense,
        explicit=tuple(entry.model_dump() for entry in rule.explicit),
        cap=cap,
    )
