"""Studies that were never run: their storage is written by hand, with numbers that follow from a formula."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from rankopt import ledger
from rankopt.limits import parse_limit
from rankopt.plan import LayerChoice, Plan

NAMES = ("stem", "body", "head")
CODE = """
import torch
from torch import nn

NAMES = {names!r}

def model():
    torch.manual_seed(0)
    net = nn.Sequential()
    sizes = [(12, 32), (32, 32), (32, 4)]
    for name, (inputs, outputs) in zip(NAMES, sizes):
        net.add_module(name, nn.Linear(inputs, outputs))
    return net.eval()

def data():
    raise RuntimeError("a report needs no data")
"""


def recorded(
    folder: Path,
    trials: int = 12,
    *,
    accuracy: bool = True,
    latency: bool = True,
    limits: Sequence[str] = ("macs<=80%",),
    names: Sequence[str] = NAMES,
    name: str = "made up",
    description: str = "numbers by a formula",
    failures: bool = True,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Write code.py, a study file and its storage; returns the study file."""
    (folder / "code.py").write_text(CODE.format(names=tuple(names)), encoding="utf-8")
    objectives = ["accuracy" if accuracy else "kl", "latency" if latency else "macs"]
    file: dict[str, Any] = {
        "name": name,
        "description": description,
        "model": "code.py:model",
        "data": "code.py:data",
        "metric": "accuracy" if accuracy else "kl",
        "example_input": [1, 12],
        "limits": list(limits),
        "objectives": objectives,
        "cache": "cache",
    }
    if latency:
        file["target"] = {"name": "replay", "ms_per_mmac": 1000.0, "label": "device"}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(file | dict(changes or {}), allow_unicode=True), encoding="utf-8")
    _record(folder, trials, accuracy, latency, limits, names, name, objectives, failures)
    return path


def _record(
    folder: Path, trials: int, accuracy: bool, latency: bool, limits: Sequence[str], names: Sequence[str], name: str,
    objectives: list[str], failures: bool,
) -> None:  # fmt: skip
    dense = {"macs": 1536.0, "params": 1604.0, "kl": 0.0}
    if accuracy:
        dense |= {"accuracy": 90.0, "accuracy_se": 1.5}
    conditions = {}
    if latency:
        dense |= {"latency_ms": 2.0, "latency_ms@device": 2.0, "latency_kept": 1.0, "latency_kept@device": 1.0}
        conditions = {"device": {"target": "device", "processor": "Example <1> & co", "threads": "1"}}
    (folder / "runs").mkdir(exist_ok=True)
    storage = ledger.open_storage(f"sqlite:///{folder / 'runs' / f'{name}.db'}")
    study = ledger.open_study(
        storage,
        name,
        objectives,
        {"metric": "accuracy", "bn": "off"},
        dense,
        [parse_limit(t) for t in limits],
        conditions,
    )
    chance = random.Random(0)
    for number in range(trials):
        study.add_trial(_trial(number, chance, accuracy, latency, names))
    if failures:
        attributes = {ledger.REASON: "ValueError: <b>no</b> convergence"}
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attributes))
    if latency:
        ledger.say(study, ["predicted latency on device: off by median 3.1%"])


def _trial(
    number: int, chance: random.Random, accuracy: bool, latency: bool, names: Sequence[str]
) -> optuna.trial.FrozenTrial:
    budget = 0.2 + 0.7 * chance.random()
    ranks = dict(zip(names, (1 + number % 5, 1 + number % 32, 1 + number % 3), strict=True))
    kept_dense = names[0] if number % 2 else names[2]
    layers = {n: LayerChoice("dense") if n == kept_dense else LayerChoice("svd", {"rank": r}) for n, r in ranks.items()}
    kl = 0.5 * math.exp(-4 * budget) * (1 + 0.1 * chance.random())
    values = {"macs": 1536 * budget, "params": 1604 * budget, "macs_kept": budget, "params_kept": budget, "kl": kl}
    if accuracy:
        values |= {"accuracy": 90 - 20 * kl, "accuracy_se": 1.5}
    if latency:
        ms = 2.0 * (0.3 + 0.7 * budget)
        values |= {"latency_ms": ms, "latency_ms@device": ms, "latency_kept": ms / 2, "latency_kept@device": ms / 2}
        values |= {"latency_predicted_ms": 1.05 * ms, "latency_predicted_ms@device": 1.05 * ms}
    params: dict[str, Any] = {"budget": budget, "exponent": chance.uniform(0.6, 1.4)}
    ranges: dict[str, Any] = {"budget": FloatDistribution(0.1, 0.9), "exponent": FloatDistribution(0.6, 1.4)}
    for layer in names:
        params |= {f"method.{layer}": layers[layer].method, f"keep.{layer}": chance.uniform(0.1, 1)}
        ranges |= {
            f"method.{layer}": CategoricalDistribution(["dense", "svd"]),
            f"keep.{layer}": FloatDistribution(0, 1),
        }
    told = [values["accuracy" if accuracy else "kl"], values["latency_ms" if latency else "macs"]]
    attributes = {
        ledger.PLAN: Plan(layers).to_dict(),
        ledger.VALUES: values,
        ledger.NOTES: {"seconds": 0.5},
        "predicted_kl": kl * (0.7 + 0.1 * chance.random()),
    }
    return create_trial(values=told, params=params, distributions=ranges, user_attrs=attributes)
