"""`vbmf`: ranks by variational Bayesian matrix factorization of the weights, weakened step by step.

The estimated rank of a layer is how many of its singular values stand out of the noise (see `rankopt.evbmf`). One such
plan has one cost; as in MUSCO (Gusak et al., "Automated multi-stage compression of neural networks", 2019) the ranks
are weakened towards the full ones, and here also tightened beyond the estimate, to meet a budget.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from rankopt.candidates import Group
from rankopt.strategies.strategy import Setting
from rankopt.strategies.uniform import OneRule, _dense, _own


class Vbmf(OneRule):
    """Every layer's share of MACs lies equally far, as a power, from what its estimated ranks would keep."""

    name: ClassVar[str] = "vbmf"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.estimated is None:
            raise ValueError("vbmf needs Setting.estimated")
        self._estimated = setting.estimated
        self._keeps: dict[tuple[str, str], float] = {}

    def choice(self, group: Group, method: str, number: float) -> int:
        """The candidate nearest to the estimated share to the power of a number: 0 dense, 1 the estimate, and above."""
        own, keeps = _own(group, method)
        if not own or number <= 0:
            return _dense(group)
        key = (group.name, method)
        if key not in self._keeps:
            self._keeps[key] = min(max(self._estimated(group, method), 1e-3), 0.999)
        wanted = self._keeps[key] ** (number / max(1 - number, 1e-9))
        nearest = min(own, key=lambda n: abs(np.log(keeps[n]) - np.log(max(wanted, 1e-12))))
        return _dense(group) if wanted > (1 + float(keeps[own].max())) / 2 else nearest
