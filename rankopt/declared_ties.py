"""`declare`: a model of transformers is told which parameters its new layers share, so that `save_pretrained` works.

Such a model names the parameters that are tied on purpose (``_tied_weights_keys``, in transformers 5 also
``all_tied_weights_keys``), and refuses to write itself where others are. An embedding and the output head that is tied
to it hold other parameters once both are replaced. transformers is not imported; other models have no such lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_LISTS = ("_tied_weights_keys", "all_tied_weights_keys")


def declare(model: nn.Module, replaced: Iterable[str]) -> None:
    """Say in `model`, in place, what the modules of the names `replaced` share, and nothing of parameters they lack.

    Only instances are changed, never their classes. The name that is kept is the first one outside of these modules,
    or else the first one in their order.
    """
    places = tuple(f"{name}." for name in replaced)
    ties = _ties(model, places)
    if not ties:
        return
    for name, module in model.named_modules():
        within = f"{name}." if name else ""
        own = {
            target.removeprefix(within): source.removeprefix(within)
            for target, source in ties.items()
            if target.startswith(within) and source.startswith(within)
        }
        gone = tuple(place.removeprefix(within) for place in places if place.startswith(within))
        for key in _LISTS:
            known = getattr(module, key, None)
            if own and known is not None:
                setattr(module, key, _renewed(known, own, gone))


def _ties(model: nn.Module, places: tuple[str, ...]) -> dict[str, str]:
    """Parameter of a replaced module → the name that is kept of the same parameter."""
    order = {place: number for number, place in enumerate(places)}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for same in names.values():
        rank = {name: next((order[p] for p in places if name.startswith(p)), -1) for name in same}
        kept = min(same, key=rank.__getitem__)
        found |= {name: kept for name in same if name != kept and rank[name] >= 0}
    return found


def _renewed(known: Any, own: dict[str, str], gone: tuple[str, ...]) -> Any:
    """{target: source} as transformers 5 has it, or the targets alone as transformers 4 does."""
    if isinstance(known, dict):
        kept = {t: s for t, s in known.items() if not t.startswith(gone) and not str(s).startswith(gone)}
        return kept | own
    return [*(target for target in known if not target.startswith(gone)), *own]
