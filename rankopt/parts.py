"""Which layers belong together: the stages of a network, and the roles that layers have in its blocks.

What the prediction gets wrong of one layer it often gets wrong of all layers of a stage, or of all that have the same
place in their blocks (the second convolution of every residual block, the output projection of every attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankopt.candidates import Group

_STAGES = 4
_ROLES = 6


def stages(groups: Sequence[Group]) -> dict[str, set[str]]:
    """Names of groups by stage: runs of layers in the order of execution, cut where the output size changes most often.

    Networks whose spatial size changes are cut there; others (transformers, MLPs) into equal parts by depth.
    """
    ordered = sorted(groups, key=lambda g: g.layers[0].order)
    sizes = [g.layers[0].calls[0].out_size if g.layers[0].calls else () for g in ordered]
    distinct = list(dict.fromkeys(s for s in sizes if s))
    if 1 < len(distinct) <= 2 * _STAGES:
        found: dict[str, set[str]] = {}
        for group, size in zip(ordered, sizes, strict=True):
            found.setdefault("x".join(map(str, size)) or "linear", set()).add(group.name)
        return found
    parts = min(_STAGES, max(1, len(ordered) // 3))
    cuts = np.array_split(np.arange(len(ordered)), parts)
    return {f"part{n + 1}": {ordered[i].name for i in cut} for n, cut in enumerate(cuts) if len(cut)}


def roles(groups: Sequence[Group]) -> dict[str, set[str]]:
    """Names of groups by role: what layers of several blocks are called alike, such as conv2 or out_proj.

    Empty where fewer than two or more than six names occur more than once, and where layers have numbers for names.
    """
    found: dict[str, set[str]] = {}
    for group in groups:
        last = group.name.rpartition(".")[2]
        if last and not last.isdigit():
            found.setdefault(last, set()).add(group.name)
    shared = {name: names for name, names in found.items() if len(names) > 1}
    return shared if 2 <= len(shared) <= _ROLES else {}
