"""Which of PyTorch's operations multiply and accumulate: formulas that torch's counter lacks, and the ones without any.

torch's FlopCounterMode knows matrix products, convolutions and attention. It takes every other operation for nothing,
also ``mv``, ``dot`` and ``addmm_``, which get formulas here, and LSTM kernels or custom operations, which `Watch`
reports. Formulas give FLOPs, which are twice the MACs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

aten = torch.ops.aten
Shape = tuple[int, ...]

# Operations in ATen that contract something, by their names; in-place forms end in an underscore.
_CONTRACTS = re.compile(
    r"(^|_)(mm|bmm|addmm|spmm|hspmm|addbmm|baddbmm|mv|addmv|dot|vdot|matmul)(_|$)"
    r"|conv|linear|_rnn|lstm|gru|attention|attn|encoder_layer|fft_[cr]2|linalg|cholesky|^lu_|solve|geqrf|ormqr"
    r"|cdist|pdist|euclidean_dist|einsum"
)
_FREE = re.compile(
    r"^(linalg_vector_norm|linalg_cross|linalg__powsum|_linalg_check_errors|upsample_\w*linear\w*|_upsample_\w+"
    r"|_thnn_fused_lstm_cell|_thnn_fused_gru_cell|_convert_\w+|_cudnn_rnn_flatten_weight|mkldnn_reorder_\w+|lu_unpack)$"
)
# prim: queries of a tensor's device and layout. profiler: marks. torchvision: selections and samplings, no products.
_FREE_NAMESPACES = ("prim", "profiler")
_FREE_ELSEWHERE = ("torchvision::nms", "torchvision::roi_align", "torchvision::roi_pool", "torchvision::ps_roi_align")


def _matrix_vector(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(a)


def _added_matrix_vector(self: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(a)


def _matrix_matrix(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(a) * b[-1]


def _added_matrix_matrix(self: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(a) * b[-1]


def _distances(a: Shape, b: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(out_shape) * a[-1]


def _time_conv(x: Shape, weight: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(out_shape[:2]) * prod(weight)  # (time, batch, out); weight (kernel, in, out)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _trilinear(
    a: Shape, b: Shape, c: Shape, expand_a: Any, expand_b: Any, expand_c: Any, summed: Any, *_: Any, **__: Any
) -> int:
    """Two contractions over the summed dimensions (nn.Bilinear: first in1, then in2)."""
    shapes = []
    for shape, expand in ((a, expand_a), (b, expand_b), (c, expand_c)):
        full = list(shape)
        for d in sorted(expand):
            full.insert(d, 1)
        shapes.append(full)
    sizes = [max(dims) for dims in zip(*shapes, strict=True)]
    both = prod(sizes)
    return 2 * (both + both // prod(sizes[d] for d in summed[:1]))


FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mv: _matrix_vector,
    aten.dot: _matrix_vector,
    aten.vdot: _matrix_vector,
    aten.addmv: _added_matrix_vector,
    aten.addmv_: _added_matrix_vector,
    aten.addmm_: _added_matrix_matrix,
    aten._addmm_activation: _added_matrix_matrix,
    aten.addbmm: _added_matrix_matrix,
    aten.addbmm_: _added_matrix_matrix,
    aten.baddbmm_: _added_matrix_matrix,
    aten._int_mm: _matrix_matrix,
    aten._cdist_forward: _distances,
    aten._euclidean_dist: _distances,
    aten.conv_tbc: _time_conv,
    aten._trilinear: _trilinear,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._scaled_dot_product_attention_math_for_mps: _attention,
}


def free(name: str) -> bool:
    """Whether an operation, as ``namespace::name``, is known to contract nothing."""
    namespace, _, operation = name.partition("::")
    if namespace == "aten":
        return bool(_FREE.match(operation)) or not _CONTRACTS.search(operation)
    return namespace in _FREE_NAMESPACES or name in _FREE_ELSEWHERE


class Watch(TorchDispatchMode):
    """Sees what `counter` passes on, and notes in `uncounted` each operation with unknown arithmetic and its module."""

    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode, allow: frozenset[str]) -> None:
        super().__init__()
        self.uncounted: dict[str, str] = {}
        self._counter = counter
        self._allow = allow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if packet not in flop_registry and packet not in FORMULAS:
            name = f"{func.namespace}::{packet.__name__}"
            if name not in self._allow and not free(name):
                modules: set[str] = self._counter.mod_tracker.parents
                self.uncounted.setdefault(name, max(modules - {"Global"}, key=len, default="the model"))
        return func(*args, **(kwargs or {}))
