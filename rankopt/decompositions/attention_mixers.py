"""Self-attention replaced at a cost linear in tokens: `attention_nystrom`, `_nmf`, `_pnmf`, `_ntf`, `_ntf_grid`.

None of them equals attention at any rank. Each begins with the dense layer's own projections and is distilled: trained
alone to give what the dense layer gives on the calibration data. From weights alone it is as it begins, far from the
dense layer; so all of them need recovery.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.attention_moments import Moments, outputs_of
from rankopt.attention_parts import Projections, Shape, shape_of
from rankopt.attention_styles import style_of
from rankopt.decompositions.attention_method import AttentionMethod, filled
from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.distill_block import DistillOptions, Example, distill
from rankopt.errors import LayerError
from rankopt.layer_spec import LayerSpec
from rankopt.nn.factor_mixing import NmfMixing, NtfMixing, PnmfMixing, macs_of_nmf, macs_of_ntf, macs_of_pnmf
from rankopt.nn.nystrom import Nystrom, macs_of_nystrom

_STEPS = 6  # the most iterations; Geng et al. train with 6
_OFFERED = (1, 3, 6)


class Mixer(AttentionMethod):
    """What the five have in common.

    Attributes:
        inner: the dense projections that the inward layer begins with.
        pace: times the rate of distillation.
    """

    inner: tuple[str, ...] = ("v",)
    pace: float = 1.0
    sliceable = False
    exact = False
    linear = False
    needs_recovery = True

    def why_not_of(self, shape: Shape, masking: str, tokens: int) -> str | None:
        """Causal attention and masks between pairs can't be had from what mixes all tokens at once."""
        if masking == "causal" or shape.causal:
            return "it mixes all tokens of a sample, and this attention is causal"
        if masking == "pairs":
            return "it mixes all tokens of a sample, and this attention is masked between pairs of tokens"
        return None

    def prepare(self, shape: Shape, dense: Projections, moments: Moments) -> Factors:
        """The dense weights; the block is trained when its ranks are known."""
        return {name: value for name, value in vars(dense).items() if value is not None}

    def tensors_of(self, shape: Shape, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """The dense layer's own projections, and for what it has not, seeded numbers."""
        block: Any = self.core(shape, ranks, dtype=torch.float64)
        with torch.no_grad():
            block.inward.weight.copy_(torch.cat([factors[n] for n in self.inner]))
            block.outward.weight.copy_(factors["o"])
            if shape.bias:
                block.inward.bias.copy_(torch.cat([factors[f"b{n}"] for n in self.inner]))
            if shape.bias_out:
                block.outward.bias.copy_(factors["bo"])
            if hasattr(block, "start"):
                generator = torch.Generator().manual_seed(0)
                block.start.copy_(torch.randn(block.start.shape, generator=generator))
        return [p.detach() for p in block.parameters()]

    def offered(
        self, layer: LayerSpec, keeps: Sequence[float], multiple: int, quantity: str
    ) -> list[dict[str, int]] | None:
        """For every share and every number of steps the most components, since nothing is known before training."""
        shape, bounds = shape_of(layer), self.rank_bounds(layer)
        fixed = self.fixed_of(shape, min(call.in_size[0] for call in layer.calls))
        main = self.rank_names(layer)[0]
        levels = (
            np.arange(multiple, bounds[main] + 1, multiple) if bounds[main] >= multiple else np.array([bounds[main]])
        )
        found: dict[tuple[int, ...], dict[str, int]] = {}
        for steps in _OFFERED if "steps" in bounds else (0,):
            others = fixed | ({"steps": steps} if steps else {})
            costs = getattr(self, quantity)(layer, {main: levels} | others)
            for keep in keeps:
                fitting = levels[costs <= keep * getattr(layer, quantity)]
                if len(fitting):
                    ranks = {main: int(fitting[-1])} | others
                    found[tuple(ranks.values())] = ranks
        return list(found.values())

    def distil(
        self, layer: LayerSpec, ranks: Mapping[str, int], weights: Sequence[Tensor], dense: nn.Module, samples: Any
    ) -> list[Tensor]:
        """Train the core on the gathered calls, in float32; see `distill_block`."""
        if not samples.calls:
            return list(weights)
        shape = shape_of(layer)
        block = filled(self.core(shape, ranks), weights)
        style = style_of(dense)
        assert style is not None
        given = [style.seen(dense, call.args, call.kwargs) for call in samples]
        own = style.read(dense).detached()
        outputs = outputs_of(own, shape, given)
        examples = [Example(c.x.float(), y.float(), c.keep) for c, y in zip(given, outputs, strict=True)]
        options = DistillOptions()
        distill(block, examples, replace(options, lr=options.lr * self.pace))
        return [p.detach() for p in block.parameters()]

    def linear_params(self, shape: Shape) -> int:
        """Entries of the two linear layers."""
        inner = len(self.inner) * shape.width
        return inner * (shape.channels + shape.bias) + shape.channels * (shape.width + shape.bias_out)

    def linear_macs(self, shape: Shape, tokens: int) -> int:
        """Multiply-accumulates of the two linear layers on one sample."""
        return tokens * shape.channels * shape.width * (len(self.inner) + 1)

    def linears(self, shape: Shape, where: Mapping[str, Any]) -> tuple[nn.Linear, nn.Linear]:
        """The two linear layers, with values of no meaning."""
        inner = len(self.inner) * shape.width
        return (
            nn.Linear(shape.channels, inner, bias=shape.bias, **where),
            nn.Linear(shape.width, shape.channels, bias=shape.bias_out, **where),
        )

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """Steps and landmarks leave no trace in the tensors."""
        raise NotImplementedError(f"{self.name}: its ranks can't be read off its tensors")

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """Nothing is known before training: more components and more steps are taken to lose less."""
        lost: Any = 0.0
        for value in ranks.values():
            lost = lost + 1.0 / value
        return lost


class AttentionNystrom(Mixer):
    """Attention through a few landmarks (Xiong et al., 2021); `landmarks` of them."""

    name = "attention_nystrom"
    inner = ("q", "k", "v")
    pace = 0.2  # it begins close to where it ends

    def rank_names_of(self, shape: Shape) -> tuple[str, ...]:
        """One."""
        return ("landmarks",)

    def bounds_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """A landmark a token."""
        return {"landmarks": tokens}

    def params_of(self, shape: Shape, ranks: Ranks) -> Any:
        """Those of the dense layer, whatever the landmarks."""
        return self.linear_params(shape) + 0 * ranks["landmarks"]

    def macs_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        return self.linear_macs(shape, tokens) + shape.heads * macs_of_nystrom(tokens, shape.size, ranks["landmarks"])

    def core(self, shape: Shape, ranks: Mapping[str, int], **where: Any) -> nn.Module:
        """See `AttentionMethod`."""
        return Nystrom(*self.linears(shape, where), shape.heads, ranks["landmarks"], shape.scale)


class AttentionNmf(Mixer):
    """Tokens as a product of non-negative matrices, in the hamburger of Geng et al. (2021)."""

    name = "attention_nmf"

    def rank_names_of(self, shape: Shape) -> tuple[str, ...]:
        """Components and iterations."""
        return ("rank", "steps")

    def bounds_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """The smaller side of tokens × width."""
        return {"rank": min(tokens, shape.width), "steps": _STEPS}

    def params_of(self, shape: Shape, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        return self.linear_params(shape) + ranks["rank"] * shape.width

    def macs_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        inner: Any = macs_of_nmf(tokens, shape.width, ranks["rank"], ranks["steps"])
        return self.linear_macs(shape, tokens) + inner

    def core(self, shape: Shape, ranks: Mapping[str, int], **where: Any) -> nn.Module:
        """See `AttentionMethod`."""
        start = torch.empty(ranks["rank"], shape.width, **where)
        return NmfMixing(*self.linears(shape, where), ranks["rank"], ranks["steps"], start)


class AttentionPnmf(AttentionNmf):
    """Tokens projected on a few non-negative directions, X ≈ W Wᵀ X (Yang and Oja, 2010)."""

    name = "attention_pnmf"

    def macs_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        inner: Any = macs_of_pnmf(tokens, shape.width, ranks["rank"], ranks["steps"])
        return self.linear_macs(shape, tokens) + inner

    def core(self, shape: Shape, ranks: Mapping[str, int], **where: Any) -> nn.Module:
        """See `AttentionMethod`."""
        start = torch.empty(shape.width, ranks["rank"], **where)
        return PnmfMixing(*self.linears(shape, where), ranks["rank"], ranks["steps"], start)


class AttentionNtf(AttentionNmf):
    """Tokens as a non-negative tensor (tokens, heads, channels), a sum of `rank` outer products."""

    name = "attention_ntf"

    def bounds_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """The channels of all heads."""
        return {"rank": shape.width, "steps": _STEPS}

    def params_of(self, shape: Shape, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        return self.linear_params(shape) + ranks["rank"] * (shape.heads + shape.size)

    def macs_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        modes = (tokens, shape.heads, shape.size)
        return self.linear_macs(shape, tokens) + macs_of_ntf(modes, ranks["rank"], ranks["steps"])

    def modes(self, shape: Shape, ranks: Mapping[str, int]) -> tuple[int, ...]:
        """The modes whose factors begin with parameters."""
        return (shape.heads, shape.size)

    def core(self, shape: Shape, ranks: Mapping[str, int], **where: Any) -> nn.Module:
        """See `AttentionMethod`."""
        modes = self.modes(shape, ranks)
        start = torch.empty(sum(modes), ranks["rank"], **where)
        return NtfMixing(*self.linears(shape, where), ranks["rank"], ranks["steps"], start, modes)


class AttentionNtfGrid(AttentionNtf):
    """Tokens of a square image as a non-negative tensor (height, width, channels); `side` is the image's."""

    name = "attention_ntf_grid"

    def why_not_of(self, shape: Shape, masking: str, tokens: int) -> str | None:
        """The tokens must be a square's points, and all of them there."""
        if math.isqrt(tokens) ** 2 != tokens:
            return f"{tokens} tokens are no square grid (a class token, perhaps)"
        if masking == "padding":
            return "a grid has no padding"
        return super().why_not_of(shape, masking, tokens)

    def rank_names_of(self, shape: Shape) -> tuple[str, ...]:
        """Components, iterations, and the side of the grid."""
        return ("rank", "steps", "side")

    def bounds_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """The channels of all heads; the side is given by the tokens."""
        return {"rank": shape.width, "steps": _STEPS, "side": math.isqrt(tokens)}

    def fixed_of(self, shape: Shape, tokens: int) -> dict[str, int]:
        """The side."""
        return {"side": math.isqrt(tokens)}

    def check(self, layer: LayerSpec, ranks: Mapping[str, int]) -> None:
        """The side must be that of the tokens, where they are known."""
        super().check(layer, ranks)
        for call in layer.calls:
            if ranks["side"] ** 2 != call.in_size[0]:
                raise LayerError(f"{layer.name}: {self.name} needs side² = {call.in_size[0]} tokens, got {dict(ranks)}")

    def params_of(self, shape: Shape, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        return self.linear_params(shape) + ranks["rank"] * (2 * ranks["side"] + shape.width)

    def macs_of(self, shape: Shape, tokens: int, ranks: Ranks) -> Any:
        """See `AttentionMethod`."""
        side = ranks["side"]
        return self.linear_macs(shape, tokens) + macs_of_ntf((side, side, shape.width), ranks["rank"], ranks["steps"])

    def modes(self, shape: Shape, ranks: Mapping[str, int]) -> tuple[int, ...]:
        """All three."""
        return (ranks["side"], ranks["side"], shape.width)
