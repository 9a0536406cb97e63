"""The table of methods: name → `Decomposition`. A package adds one by the entry point ``rankopt.decompositions``."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from rankopt.decompositions.activated import Activated
from rankopt.decompositions.attention_low_rank import AttentionApart, AttentionFused, AttentionHeads
from rankopt.decompositions.attention_mixers import (
    AttentionNmf,
    AttentionNtf,
    AttentionNtfGrid,
    AttentionNystrom,
    AttentionPnmf,
)
from rankopt.decompositions.block_term import BlockTerm
from rankopt.decompositions.capsule_methods import CapsCp, CapsRouting, CapsSvd, CapsTt, CapsTucker
from rankopt.decompositions.chained import ChainDecomposition
from rankopt.decompositions.cp import Cp
from rankopt.decompositions.cp_matrix import CpMatrix
from rankopt.decompositions.decomposition import Decomposition
from rankopt.decompositions.hierarchical_tucker import HierarchicalTucker
from rankopt.decompositions.rebuilt import FunctionOfProduct
from rankopt.decompositions.ring_matrix import RingMatrix
from rankopt.decompositions.shared_votes import CapsShared
from rankopt.decompositions.spatial_svd import SpatialSvd
from rankopt.decompositions.svd import Svd, SvdIn
from rankopt.decompositions.tensor_ring import TensorRing
from rankopt.decompositions.tensor_train import TensorTrain
from rankopt.decompositions.tensorized import TensorizedDecomposition, memory
from rankopt.decompositions.tt_matrix import TtMatrix
from rankopt.decompositions.tucker import Tucker
from rankopt.decompositions.tucker2 import Tucker2
from rankopt.decompositions.tucker_matrix import TuckerMatrix
from rankopt.errors import LayerError

_TENSORIZED: tuple[type[TensorizedDecomposition], ...] = (
    *(TtMatrix, TuckerMatrix, CpMatrix, RingMatrix, BlockTerm, HierarchicalTucker),
)
_OWN: tuple[type[Decomposition], ...] = (
    *(Svd, SvdIn, SpatialSvd, Tucker2, Tucker, Cp, TensorTrain, TensorRing),
    *_TENSORIZED,
    *(memory(cls) for cls in _TENSORIZED),
    *(CapsSvd, CapsTucker, CapsCp, CapsTt, CapsShared, CapsRouting),
    *(AttentionHeads, AttentionApart, AttentionFused),
    *(AttentionNystrom, AttentionNmf, AttentionPnmf, AttentionNtf, AttentionNtfGrid),
)
_ACTIVATED: tuple[type[ChainDecomposition], ...] = (Svd, SpatialSvd, Tucker2, Cp)
_REBUILT = (("relu", "svd"), ("relu", "tucker"), ("relu", "cp"), ("sin", "svd"))


@cache
def table() -> dict[str, Decomposition]:
    """All methods by name, the project's own first. ``dense`` is not among them: it is the absence of one."""
    methods: dict[str, Decomposition] = {cls.name: cls() for cls in _OWN}
    for way in [*(Activated(cls()) for cls in _ACTIVATED), *(FunctionOfProduct(*pair) for pair in _REBUILT)]:
        methods[way.name] = way
    for entry in entry_points(group="rankopt.decompositions"):
        methods.setdefault(entry.name, entry.load()())
    return methods


def method(name: str) -> Decomposition:
    """Look a method up; raises `LayerError` that lists the known ones."""
    try:
        return table()[name]
    except KeyError:
        names = [n for n in table() if not n.endswith("_memory")]
        known = f"known: dense, {', '.join(names)}, and the matrix methods with _memory behind their names"
        raise LayerError(f"unknown decomposition {name!r}; {known}") from None
