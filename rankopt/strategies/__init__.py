"""Ways to choose the next plan: name → strategy."""

from __future__ import annotations

from rankopt.errors import InputError
from rankopt.strategies.correct import Correct
from rankopt.strategies.fit import Fit
from rankopt.strategies.free import Free, Plain
from rankopt.strategies.greedy import Greedy
from rankopt.strategies.local import Local
from rankopt.strategies.mixed import Mixed
from rankopt.strategies.relinearize import Relinearize
from rankopt.strategies.solved import Solved
from rankopt.strategies.started import Started
from rankopt.strategies.strategy import Setting, Strategy
from rankopt.strategies.uniform import Energy, Uniform
from rankopt.strategies.vbmf import Vbmf

STRATEGIES: dict[str, type[Strategy]] = {
    s.name: s for s in (Mixed, Correct, Fit, Local, Relinearize, Free, Plain, Solved, Uniform, Energy, Vbmf, Greedy)
}
DEFAULT = Correct.name


def strategy(name: str) -> type[Strategy]:
    """The strategy of this name; ``auto`` is the default one."""
    if name == "auto":
        return STRATEGIES[DEFAULT]
    if name not in STRATEGIES:
        raise InputError(f"strategy: must be auto, {', '.join(STRATEGIES)}, got {name!r}")
    return STRATEGIES[name]


def strategy_for(name: str, setting: Setting) -> Strategy:
    """The strategy of this name made for a study, after the plans that the study starts with."""
    way = strategy(name)
    return Started(setting, way) if setting.start else way(setting)
