"""Self-attention with fewer channels: `attention_heads`, `attention_apart`, `attention_fused`. Exact at full rank.

All three keep the softmax, so masks, causal attention and padding are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.attention_moments import (
    Moments,
    key_gram,
    of_outputs,
    of_scores,
    output_gram,
    query_gram,
    solved_output,
    weighted_svd,
)
from rankopt.attention_parts import Projections, Shape, shape_of
from rankopt.decompositions.attention_method import AttentionMethod
from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.decompositions.multilinear import tail
from rankopt.layer_spec import LayerSpec
from rankopt.nn.attention import Apart, Attention


class AttentionHeads(AttentionMethod):
    """Smaller heads: `rank_qk` channels for queries and keys of a head, `rank_vo` for its values.

    Both products, of queries with keys and of values with the output projection, are balanced over the data's tokens
    and cut (see `attention_moments`), and the output projection is solved again over all heads. Projections and
    attention itself get cheaper.
    """

    name = "attention_heads"

    def rank_names_of(self, shape: Shape) -> tuple[str, ...]:
        """Two."""
        return ("rank_qk", "rank_vo")

    def bounds_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """The channels of a head."""
        return {"rank_qk": shape.size, "rank_vo": shape.size}

    def params_of(self, shape: Shape, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        h, e = shape.heads, shape.channels
        inner = h * (2 * ranks["rank_qk"] + ranks["rank_vo"])
        return inner * (e + shape.bias) + e * (h * ranks["rank_vo"] + shape.bias_out)

    def macs_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        h, qk, vo = shape.heads, ranks["rank_qk"], ranks["rank_vo"]
        return tokens * shape.channels * h * 2 * (qk + vo) + h * tokens**2 * (qk + vo)

    def core(self, shape: Shape, ranks: Mapping[str, int], **where: Any) -> Attention:
        """See `AttentionMethod`."""
        h, qk, vo = shape.heads, ranks["rank_qk"], ranks["rank_vo"]
        inward = nn.Linear(shape.channels, h * (2 * qk + vo), bias=shape.bias, **where)
        outward = nn.Linear(h * vo, shape.channels, bias=shape.bias_out, **where)
        return Attention(inward, outward, h, qk, vo, shape.scale, shape.dropout)

    def prepare(self, shape: Shape, dense: Projections, moments: Moments) -> Factors:
        """The balanced rotations, applied to the weights."""
        scores, outputs = of_scores(dense, shape, moments), of_outputs(dense, shape, moments)
        parts = {
            "q": _rotated(scores.left, dense.q, dense.bq),
            "k": _rotated(scores.right, dense.k, dense.bk),
            "v": _rotated(outputs.right, dense.v, dense.bv),
        }
        found = {"energy_qk": scores.energy.sum(0), "energy_vo": outputs.energy.sum(0), "left": outputs.left,
                 "right": outputs.right, "values": moments.values, "o": dense.o.double()}  # fmt: skip
        return found | parts | ({} if dense.bo is None else {"bo": dense.bo.double()})

    def tensors_of(self, shape: Shape, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The first rows of every head, and the output projection solved behind them."""
        qk, vo = ranks["rank_qk"], ranks["rank_vo"]
        cut = [factors["q"][:, :qk], factors["k"][:, :qk], factors["v"][:, :vo]]
        rows = torch.cat([c.flatten(0, 1) for c in cut])
        inward = [rows[:, :-1], rows[:, -1]] if shape.bias else [rows[:, :-1]]
        left, right = factors["left"][:, :vo], factors["right"][:, :vo]
        outward = solved_output(factors["o"], left, right, factors["values"])
        return [*inward, outward, *([factors["bo"]] if shape.bias_out else [])]

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the inward and the outward weight."""
        shape = shape_of(layer)
        vo = weights[2 if shape.bias else 1].shape[1] // shape.heads
        return {"rank_qk": (weights[0].shape[0] // shape.heads - vo) // 2, "rank_vo": vo}

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Tails of both spectra."""
        return tail(factors["energy_qk"], ranks["rank_qk"]) + tail(factors["energy_vo"], ranks["rank_vo"])


class AttentionApart(AttentionMethod):
    """Queries, keys, values and the output, each of a rank of its own across the heads.

    An error in a query is judged by the keys that it meets and the other way round, an error in a value by the output
    projection, an error in that by the attended values. An output at full rank stays one dense projection.
    """

    name = "attention_apart"

    def rank_names_of(self, shape: Shape) -> tuple[str, ...]:
        """Four."""
        return ("rank_q", "rank_k", "rank_v", "rank_o")

    def bounds_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """The smaller side of each weight."""
        return dict.fromkeys(self.rank_names_of(shape), min(shape.channels, shape.width))

    def params_of(self, shape: Shape, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        inner = sum(ranks[n] for n in ("rank_q", "rank_k", "rank_v"))
        return inner * (shape.channels + shape.width) + shape.bias * 3 * shape.width + _outward(shape, ranks["rank_o"])

    def macs_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        inner = sum(ranks[n] for n in ("rank_q", "rank_k", "rank_v"))
        linear = inner * (shape.channels + shape.width) + _outward(shape, ranks["rank_o"]) - _bias(shape)
        return tokens * linear + 2 * tokens**2 * shape.width

    def core(self, shape: Shape, ranks: Mapping[str, int], **where: Any) -> Attention:
        """See `AttentionMethod`."""
        inner = [ranks[n] for n in ("rank_q", "rank_k", "rank_v")]
        lasts = nn.ModuleList(nn.Linear(r, shape.width, bias=shape.bias, **where) for r in inner)
        inward = Apart(nn.Linear(shape.channels, sum(inner), bias=False, **where), lasts)
        outward = _outward_module(shape, ranks["rank_o"], where)
        return Attention(inward, outward, shape.heads, shape.size, shape.size, shape.scale, shape.dropout)

    def prepare(self, shape: Shape, dense: Projections, moments: Moments) -> Factors:
        """Four weighted singular value decompositions."""
        metrics = {"q": key_gram, "k": query_gram}
        found: dict[str, Tensor] = {}
        for name in ("q", "k", "v"):
            weight: Tensor = getattr(dense, name).double()
            gram = metrics[name](dense, shape, moments) if name in metrics else output_gram(dense, shape)
            moment = moments.covariance if shape.bias or name == "k" else moments.second
            first, last, energy = weighted_svd(weight, gram, moment)
            found |= {f"first_{name}": first, f"last_{name}": last, f"energy_{name}": energy}
        return found | _prepared_outward(shape, dense, moments) | _biases(dense, moments)

    def tensors_of(self, shape: Shape, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices; biases take up what the cut does to the mean token."""
        first = [factors[f"first_{n}"][: ranks[f"rank_{n}"]] for n in "qkv"]
        lasts: list[Tensor] = []
        for n, rows in zip("qkv", first, strict=True):
            last = factors[f"last_{n}"][:, : ranks[f"rank_{n}"]]
            lasts.append(last)
            if shape.bias:
                lasts.append(_shifted(factors, n, last @ rows))
        return [torch.cat(first), *lasts, *_sliced_outward(shape, factors, ranks["rank_o"])]

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the second factors."""
        shape = shape_of(layer)
        step = 2 if shape.bias else 1
        inner = {f"rank_{n}": weights[1 + i * step].shape[1] for i, n in enumerate("qkv")}
        return inner | {"rank_o": _outward_rank(shape, weights[1 + 3 * step :])}

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Tails of the four spectra."""
        return sum(tail(factors[f"energy_{n}"], ranks[f"rank_{n}"]) for n in "qkvo")


class AttentionFused(AttentionMethod):
    """Queries, keys and values of all heads from one set of `rank_qkv` channels; the output of rank `rank_o`.

    The three enter the shared decomposition in the metrics of `attention_apart`, each as a share of its own energy.
    """

    name = "attention_fused"

    def rank_names_of(self, shape: Shape) -> tuple[str, ...]:
        """Two."""
        return ("rank_qkv", "rank_o")

    def bounds_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """The smaller side of each weight."""
        return {"rank_qkv": min(shape.channels, 3 * shape.width), "rank_o": min(shape.channels, shape.width)}

    def params_of(self, shape: Shape, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        inner = ranks["rank_qkv"] * (shape.channels + 3 * shape.width)
        return inner + shape.bias * 3 * shape.width + _outward(shape, ranks["rank_o"])

    def macs_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        inner = ranks["rank_qkv"] * (shape.channels + 3 * shape.width)
        linear = inner + _outward(shape, ranks["rank_o"]) - _bias(shape)
        return tokens * linear + 2 * tokens**2 * shape.width

    def core(self, shape: Shape, ranks: Mapping[str, int], **where: Any) -> Attention:
        """See `AttentionMethod`."""
        r = ranks["rank_qkv"]
        inward = nn.Sequential(
            nn.Linear(shape.channels, r, bias=False, **where), nn.Linear(r, 3 * shape.width, bias=shape.bias, **where)
        )
        outward = _outward_module(shape, ranks["rank_o"], where)
        return Attention(inward, outward, shape.heads, shape.size, shape.size, shape.scale, shape.dropout)

    def prepare(self, shape: Shape, dense: Projections, moments: Moments) -> Factors:
        """Two weighted singular value decompositions."""
        moment = moments.covariance if shape.bias else moments.second
        grams = [key_gram(dense, shape, moments), query_gram(dense, shape, moments), output_gram(dense, shape)]
        scaled = []
        for gram, weight in zip(grams, (dense.q, dense.k, dense.v), strict=True):
            blocks = weight.double().unflatten(0, (shape.heads, shape.size))
            whole = torch.einsum("hij,hjk,kl,hil->", gram, blocks, moment, blocks)
            scaled.append(gram / whole.clamp_min(1e-300))
        weight = torch.cat([dense.q, dense.k, dense.v]).double()
        first, last, energy = weighted_svd(weight, torch.cat(scaled), moment)
        found = {"first": first, "last": last, "energy_qkv": energy}
        return found | _prepared_outward(shape, dense, moments) | _biases(dense, moments)

    def tensors_of(self, shape: Shape, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """Slices; biases take up what the cut does to the mean token."""
        first, last = factors["first"][: ranks["rank_qkv"]], factors["last"][:, : ranks["rank_qkv"]]
        product = (last @ first).chunk(3)
        biases = [torch.cat([_shifted(factors, n, p) for n, p in zip("qkv", product, strict=True)])]
        return [first, last, *(biases if shape.bias else []), *_sliced_outward(shape, factors, ranks["rank_o"])]

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """From the first factors."""
        shape = shape_of(layer)
        return {"rank_qkv": len(weights[0]), "rank_o": _outward_rank(shape, weights[3 if shape.bias else 2 :])}

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Tails of both spectra."""
        return tail(factors["energy_qkv"], ranks["rank_qkv"]) + tail(factors["energy_o"], ranks["rank_o"])


def _rotated(rotation: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(heads, d, d) on a projection's rows: (heads, d, channels + 1), the bias behind the weight (0 without)."""
    column = weight.new_zeros(len(weight)) if bias is None else bias
    full = torch.cat([weight, column[:, None]], 1).double()
    return rotation @ full.unflatten(0, (len(rotation), -1))


def _bias(shape: Shape) -> int:
    return shape.channels if shape.bias_out else 0


def _outward(shape: Shape, rank: Any) -> Any:
    """Entries of the output projection of this rank, with its bias."""
    whole, cut = shape.channels * shape.width, rank * (shape.channels + shape.width)
    found = np.where(np.asarray(rank) >= min(shape.channels, shape.width), whole, cut) + _bias(shape)
    return found if isinstance(rank, np.ndarray) else int(found)


def _outward_module(shape: Shape, rank: int, where: Mapping[str, Any]) -> nn.Module:
    e, w = shape.channels, shape.width
    if rank >= min(e, w):
        return nn.Linear(w, e, bias=shape.bias_out, **where)
    return nn.Sequential(nn.Linear(w, rank, bias=False, **where), nn.Linear(rank, e, bias=shape.bias_out, **where))


def _prepared_outward(shape: Shape, dense: Projections, moments: Moments) -> dict[str, Tensor]:
    o = dense.o.double()
    eye = torch.eye(len(o), dtype=o.dtype)[None]
    first, last, energy = weighted_svd(o, eye, moments.values)
    found = {"o": o, "first_o": first, "last_o": last, "energy_o": energy}
    return found if dense.bo is None else found | {"bo": dense.bo.double()}


def _sliced_outward(shape: Shape, factors: Factors, rank: int) -> list[Tensor]:
    bias = [factors["bo"]] if shape.bias_out else []
    if rank >= min(shape.channels, shape.width):
        return [factors["o"], *bias]
    return [factors["first_o"][:rank], factors["last_o"][:, :rank], *bias]


def _outward_rank(shape: Shape, weights: Sequence[Tensor]) -> int:
    whole = len(weights) == (2 if shape.bias_out else 1)
    return min(shape.channels, shape.width) if whole else len(weights[0])


def _biases(dense: Projections, moments: Moments) -> dict[str, Tensor]:
    """The biases, and what the dense projections make of the mean token."""
    found: dict[str, Tensor] = {}
    if dense.bq is not None and dense.bk is not None and dense.bv is not None:
        found["mean"] = moments.mean
        for n, w, b in (("q", dense.q, dense.bq), ("k", dense.k, dense.bk), ("v", dense.v, dense.bv)):
            found |= {f"b{n}": b.double(), f"mean_{n}": w.double() @ moments.mean}
    return found


def _shifted(factors: Factors, name: str, product: Tensor) -> Tensor:
    """The bias with which the cut projection treats the mean token as the dense one does."""
    if "mean" not in factors:
        return product[:, 0]  # not used: the layer has no bias
    return factors[f"b{name}"] + factors[f"mean_{name}"] - product @ factors["mean"]
