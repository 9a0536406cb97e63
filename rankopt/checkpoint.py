"""`load_checkpoint`: a user's own weights into a model, from safetensors or a file of torch.save; no code is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankopt.errors import ArtifactError, RankoptError
from rankopt.tensor_file import read_header
from rankopt.untrusted import read_json

_WITHIN = ("state_dict", "model_state_dict", "model", "module", "weights", "params", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_INDEX, _ONE = "model.safetensors.index.json", "model.safetensors"
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|Unsupported (?:class|global:?) ([\w.]+)", re.ASCII)


def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill a model in place with the weights of a checkpoint.

    Args:
        model: of the architecture that the weights belong to.
        path: a ``.safetensors`` file, a directory that holds ``model.safetensors`` (or its shards and their index), or
            a file of ``torch.save``. That is read with ``weights_only=True``; its tensors may lie under a key such as
            ``state_dict`` or ``model``, and names may begin with ``module.`` or ``_orig_mod.``.

    Returns:
        The model.

    Raises:
        ArtifactError: the file can't be read without running code, or it is another architecture's; names the first
            difference. The model is then unchanged.
    """
    path = Path(path)
    values = _tensors(path)
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    values = _with_ties(_renamed(values, expected), expected)
    for name, wanted in expected.items():
        if name not in values:
            raise ArtifactError(f"{path}: lacks {name}; it was saved from another architecture{_nearest(name, values)}")
        if values[name].shape != wanted.shape:
            raise ArtifactError(
                f"{path}: {name} has the shape {tuple(values[name].shape)}, this model's is {tuple(wanted.shape)}"
            )
    surplus = next((name for name in values if name not in expected), None)
    if surplus is not None:
        raise ArtifactError(f"{path}: holds {surplus[:200]}, which this model does not have")
    try:
        model.load_state_dict(values)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    return model


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        return _directory(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: there is no such file")
    return _safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)


def _directory(path: Path) -> dict[str, Tensor]:
    """As ``save_pretrained`` writes it: one file, or several and an index."""
    if (path / _ONE).is_file():
        return _safetensors(path / _ONE)
    if not (path / _INDEX).is_file():
        raise ArtifactError(f"{path}: holds neither {_ONE} nor {_INDEX}; give a file of weights")
    places = read_json(path / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) and n == Path(n).name for n in places.values()):
        raise ArtifactError(f"{path / _INDEX}: needs a weight_map from names to files in this directory")
    return {k: v for name in sorted(set(places.values())) for k, v in _safetensors(path / name).items()}


def _safetensors(path: Path) -> dict[str, Tensor]:
    stored, _ = read_header(path.resolve())
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in stored}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ArtifactError(f"{path}: can't be read: {' '.join(str(error).split())[:200]}") from None


def _of_torch(path: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except RankoptError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        refused = _REFUSED.search(text)
        if refused or "weights_only" in text.lower() or "weights only" in text.lower():
            what = f" ({next(filter(None, refused.groups()))})" if refused else ""
            raise ArtifactError(
                f"{path}: holds Python objects besides tensors{what}, which are not loaded because that could run "
                "code; save the weights alone: torch.save(model.state_dict(), ...), or use safetensors"
            ) from None
        raise ArtifactError(f"{path}: is no checkpoint of torch.save ({type(error).__name__}: {text[:120]})") from None
    while isinstance(found, Mapping):
        inner = next((found[key] for key in _WITHIN if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping) or not found or not all(isinstance(k, str) for k in found):
        raise ArtifactError(f"{path}: needs a mapping of names to tensors, got {type(found).__name__}")
    odd = next((key for key, value in found.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ArtifactError(
            f"{path}: {odd[:80]!r} is a {type(found[odd]).__name__}, not a tensor; save the state dict alone"
        )
    return dict(found)


def _renamed(values: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without a prefix that all names have, where they fit the model better so.

    A name that the file lacks does not count: of a tied tensor it may hold one name alone.
    """
    for prefix in _PREFIXES * 2:
        if values and all(name.startswith(prefix) for name in values):
            bare = {name.removeprefix(prefix): value for name, value in values.items()}
            fitting = len(values.keys() & expected.keys())
            if fitting == 0 or len(bare.keys() & expected.keys()) > fitting:
                values = bare
    return values


def _with_ties(values: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the names that the model gives to a tensor it has under another name too: some writers store it once."""
    places: dict[Any, str] = {}
    for name, value in expected.items():
        if name in values and not value.is_meta:
            places[value.data_ptr(), value.shape, value.stride()] = name
    ties = {n: places.get((v.data_ptr(), v.shape, v.stride())) for n, v in expected.items() if not v.is_meta}
    return values | {n: values[tie] for n, tie in ties.items() if n not in values and tie is not None}


def _nearest(name: str, values: Mapping[str, Tensor]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(values)[:10_000], 1, 0.6)
    return f" (the closest it has is {close[0]})" if close else ""
