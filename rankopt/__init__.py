"""rankopt: compress trained PyTorch models by low-rank decomposition, searched under limits and measured.

Importing the package imports none of its heavy dependencies; the names below are loaded when they are used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankopt.artifact import load
    from rankopt.chains import merged
    from rankopt.checkpoint import load_checkpoint
    from rankopt.cost import count
    from rankopt.errors import InfeasibleError, InputError, RankoptError
    from rankopt.exporting import export
    from rankopt.factorized import factorized
    from rankopt.layer_spec import LayerSpec
    from rankopt.layers import find_layers
    from rankopt.limits import Limit, parse_limit
    from rankopt.one_call import search
    from rankopt.plan import LayerChoice, Plan
    from rankopt.plan_diff import diff
    from rankopt.recover import Recovered, recover
    from rankopt.recovery_options import RecoveryOptions
    from rankopt.result import Entry, Result
    from rankopt.search import Search
    from rankopt.study_file import load_study
    from rankopt.surgery import apply
    from rankopt.verify import verify

_HOMES = {
    "Entry": "result",
    "InfeasibleError": "errors",
    "InputError": "errors",
    "LayerChoice": "plan",
    "LayerSpec": "layer_spec",
    "Limit": "limits",
    "Plan": "plan",
    "RankoptError": "errors",
    "Recovered": "recover",
    "RecoveryOptions": "recovery_options",
    "Result": "result",
    "Search": "search",
    "apply": "surgery",
    "count": "cost",
    "diff": "plan_diff",
    "export": "exporting",
    "factorized": "factorized",
    "find_layers": "layers",
    "load": "artifact",
    "load_checkpoint": "checkpoint",
    "load_study": "study_file",
    "merged": "chains",
    "parse_limit": "limits",
    "recover": "recover",
    "search": "one_call",
    "verify": "verify",
}

__all__ = [
    "Entry",
    "InfeasibleError",
    "InputError",
    "LayerChoice",
    "LayerSpec",
    "Limit",
    "Plan",
    "RankoptError",
    "Recovered",
    "RecoveryOptions",
    "Result",
    "Search",
    "apply",
    "count",
    "diff",
    "export",
    "factorized",
    "find_layers",
    "load",
    "load_checkpoint",
    "load_study",
    "merged",
    "parse_limit",
    "recover",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankopt' has no attribute {name!r}")
    return getattr(import_module(f"rankopt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Importing the file ``search.py`` must not put the module in the place of the function `search`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
