"""What calibration keeps of one layer, one class a form of statistics.

`WeightGatherer` for layers that multiply inputs with a weight, `TokenGatherer` for embeddings, `BlockGatherer` for
layers that are more than that, `MomentGatherer` for those of them that begin with a product. `gatherer` picks by the
layer's kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.block_samples import BlockSample, BlockSamples
from rankopt.by_sample import batched, by_sample, given, out_size
from rankopt.decompositions.metric import Metric
from rankopt.divergence import pick
from rankopt.fisher import FisherSamples, by_position, weight_gradients
from rankopt.gatherer import CalibrationOptions, Gatherer, LayerStatistics, Seen
from rankopt.kinds import kind_named
from rankopt.layer_spec import LayerSpec
from rankopt.nest import mapped, tensors
from rankopt.patches import output_rows, patches
from rankopt.token_statistics import TokenPiece, TokenSamples

_LEAST_ROWS = 2**13
_LEAST_BLOCK = 64


def gatherer(layer: LayerSpec, options: CalibrationOptions, samples: int) -> Gatherer:
    """The one that fits the layer's kind."""
    kind = kind_named(layer)
    if not kind.linear:
        return MomentGatherer(layer, options, samples) if kind.moments else BlockGatherer(layer, options, samples)
    return (TokenGatherer if kind.tokens else WeightGatherer)(layer, options, samples)


class WeightGatherer(Gatherer):
    """The second moment of the input patches, that of the output's gradients, and gradients of the weight."""

    def __init__(self, layer: LayerSpec, options: CalibrationOptions, samples: int) -> None:
        super().__init__(layer, options, samples)
        g, o, i, *k = layer.group_shape
        self.entries = math.prod((g, o, i, *k))
        self.full = i * math.prod(k) <= options.max_patch
        n = i * math.prod(k) if self.full else i
        self.moment = torch.zeros(g, n, n, dtype=torch.float64 if n <= 1024 else torch.float32)
        self.out_moment = torch.zeros(g, o, o, dtype=torch.float64 if o <= 1024 else torch.float32)
        self.rows = self.out_rows = 0
        self.shapes: list[tuple[int, ...]] = []
        self.gradients = torch.empty(0, self.entries)  # room for all, of which `filled` rows are there
        self.filled = 0
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def alone(self, role: str, x: Tensor) -> None:
        """Note the shape."""
        self.shapes.append(tuple(batched(self.layer, x).shape))

    def look(self, role: str, x: Tensor) -> None:
        """Add the patches of one call to the moment, at a random share of the positions."""
        layer, x = self.layer, batched(self.layer, x)
        if not self.full:
            g, _, i, *_ = layer.group_shape
            rows = x.movedim(1, -1).reshape(-1, g, i) if layer.dims else x.reshape(-1, g, i)
            rows = rows[self._subset(len(rows))].float()
        else:
            positions = math.prod(out_size(layer, x)) if layer.dims else x[0].numel() // layer.in_channels
            rows = patches(layer, x.float(), self._subset(positions)).flatten(0, 1)
        if len(rows):
            _add_products(self.moment, rows)
            self.rows += len(rows)

    def _subset(self, positions: int) -> Tensor:
        """Indices of the positions to use, so that all samples together give about as many as the options say."""
        options = self.options
        share = 1.0
        if options.max_rows is not None:
            rows = min(options.max_rows, max(_LEAST_ROWS, options.rows_each * self.moment.shape[-1]))
            share = rows / max(self.total * self.layer_positions, 1)
        wanted = max(1, math.ceil(positions * share))
        if wanted >= positions:
            return torch.arange(positions)
        return torch.randperm(positions, generator=self.generator)[:wanted]

    @property
    def layer_positions(self) -> int:
        """Output positions a sample, from the calls on the example input."""
        calls = self.layer.calls
        return max(1, sum(math.prod(c.out_size) * (1 if self.layer.dims else c.batch) for c in calls))

    def keep(self, role: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The input."""
        return batched(self.layer, given(args, kwargs)).detach().clone()

    def take(self, calls: list[Seen], samples: int) -> None:
        """As pairs of input and gradient, or multiplied out where that is smaller."""
        pairs = []
        for n, call in enumerate(calls):
            shape = self.shapes[min(n, len(self.shapes) - 1)] if self.shapes else tuple(call.kept.shape)
            gradients = (batched(self.layer, g) for g in call.gradients)
            first, *others = (by_sample(self.layer, t, samples, shape) for t in (call.kept, *gradients))
            pairs.append((first, torch.stack(others)))
        for _, g in pairs:
            rows = by_position(self.layer, g.flatten(0, 1).float(), output_rows).flatten(0, 1)
            _add_products(self.out_moment, rows)
            self.out_rows += len(rows)
        draws = pairs[0][1].shape[0]
        dense = 4 * self.entries * draws
        paired = sum(4 * (x[0].numel() + draws * g[0, 0].numel()) for x, g in pairs)
        as_pairs = paired < dense and len(pairs) == 1
        take = self._room(samples, min(dense, paired if as_pairs else dense))
        if take == 0:
            return
        if as_pairs:
            x, g = pairs[0]
            self.pairs.append((x[:take].clone(), g[:, :take].clone()))
        else:
            if not self.filled:
                most = min(self.total, self.options.fisher_samples + self.options.piece)
                room = max(take, min(most, self.options.layer_bytes // dense))
                self.gradients = torch.empty(draws * room, self.entries)
            rows = self.gradients[self.filled : self.filled + draws * take]
            total: Any = sum(weight_gradients(self.layer, x[:take], g[:, :take]) for x, g in pairs)
            rows.view(total.shape).copy_(total)
            self.filled += len(rows)

    def finish(self) -> LayerStatistics:
        """Means of the sums."""
        moment = _mirrored(self.moment) / max(self.rows, 1)
        gradient = _mirrored(self.out_moment) / max(self.out_rows, 1) if self.out_rows else None
        metric = Metric(patch=moment, gradient=gradient) if self.full else Metric(channel=moment, gradient=gradient)
        gradients = self.gradients[: self.filled] if self.filled else None
        return LayerStatistics(metric, FisherSamples(self.layer, gradients, tuple(self.pairs)))


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add the products of all pairs of columns of rows (p, groups, n) to (groups, n, n), those below the diagonal only
    as far as it costs nothing: four blocks of columns take five eighths of the work."""
    rows = rows.movedim(0, 1)
    n = rows.shape[-1]
    step = max(_LEAST_BLOCK, -(-n // 4))
    for start in range(0, n, step):
        block = slice(start, start + step)
        total[:, block, start:] += (rows[..., block].mT @ rows[..., start:]).to(total)


def _mirrored(total: Tensor) -> Tensor:
    """The whole of a symmetric matrix of which the upper half is there."""
    return total.triu() + total.triu(1).mT


class TokenGatherer(Gatherer):
    """How often rows are looked up, what a tied head is given, and their gradients."""

    def __init__(self, layer: LayerSpec, options: CalibrationOptions, samples: int) -> None:
        super().__init__(layer, options, samples)
        self.counts = torch.zeros(layer.in_channels, dtype=torch.int64)
        width = layer.out_channels
        self.given = torch.zeros(width, width, dtype=torch.float64)
        self.gradient = torch.zeros(width, width, dtype=torch.float64)
        self.head_rows = self.out_rows = 0
        self.pieces: list[TokenPiece] = []
        self.shapes: dict[str, list[tuple[int, ...]]] = {"": [], "head": []}

    def taps(self, modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
        """The table, and the heads that are tied to it."""
        return [*super().taps(modules), *(("head", modules[name]) for name in self.layer.tied)]

    def alone(self, role: str, x: Tensor) -> None:
        """Note the shape."""
        self.shapes[role].append(tuple(self._batched(role, x).shape))

    def look(self, role: str, x: Tensor) -> None:
        """Count, or add to the moment."""
        if role == "":
            self.counts += torch.bincount(x.reshape(-1).cpu(), minlength=len(self.counts))
            return
        rows = x.reshape(-1, self.layer.out_channels).double()
        self.given += (rows.mT @ rows).cpu()
        self.head_rows += len(rows)

    def keep(self, role: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The input."""
        return self._batched(role, given(args, kwargs)).detach().clone()

    def take(self, calls: list[Seen], samples: int) -> None:
        """Pairs of input and gradient."""
        found: dict[str, list[tuple[Tensor, Tensor]]] = {"": [], "head": []}
        for call in calls:
            shapes, n = self.shapes[call.role], len(found[call.role])
            shape = shapes[min(n, len(shapes) - 1)] if shapes else tuple(call.kept.shape)
            width = self.layer.out_channels if call.role == "" else self.layer.in_channels
            wide = [
                g.reshape(*call.kept.shape, width) if call.role == "" else self._batched("head", g)
                for g in call.gradients
            ]
            first, *others = (by_sample(self.layer, t, samples, shape, call.role == "") for t in (call.kept, *wide))
            first = first.reshape(samples, -1, *(() if call.role == "" else first.shape[-1:]))
            gradients = torch.stack([g.reshape(samples, -1, width) for g in others])
            if call.role == "":
                rows = gradients.reshape(-1, width).double()
                self.gradient += (rows.mT @ rows).cpu()
                self.out_rows += len(rows)
            found[call.role].append((first, gradients))
        each = sum(8 * x[0].numel() + 4 * g[:, 0].numel() for pairs in found.values() for x, g in pairs)
        take = self._room(samples, each)
        if take:
            kept = {role: [(x[:take].clone(), g[:, :take].clone()) for x, g in pairs] for role, pairs in found.items()}
            self.pieces.append(TokenPiece(take, kept[""], kept["head"]))

    def finish(self) -> LayerStatistics:
        """One is added to every count; frequencies are such that their mean is 1."""
        frequencies = (self.counts.double() + 1) * len(self.counts) / float(self.counts.sum() + len(self.counts))
        metric = Metric(
            diagonal=frequencies[None],
            gradient=(self.gradient / self.out_rows)[None] if self.out_rows else None,
            turned=(self.given / self.head_rows)[None] if self.head_rows else None,
        )
        return LayerStatistics(metric, TokenSamples(self.layer, tuple(self.pieces)))

    def _batched(self, role: str, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() < (1 if role == "" else 2) else x


class BlockGatherer(Gatherer):
    """Calls, and gradients of their outputs."""

    def __init__(self, layer: LayerSpec, options: CalibrationOptions, samples: int) -> None:
        super().__init__(layer, options, samples)
        self.samples: list[BlockSample] = []
        self.kind = kind_named(layer)
        self.module: nn.Module = nn.Identity()

    def taps(self, modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
        """The layer."""
        self.module = modules[self.layer.name]
        return super().taps(modules)

    def look(self, role: str, x: Tensor) -> None:
        """Nothing is summed."""

    def keep(self, role: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Everything that was given, and the output."""
        copies: dict[int, Tensor] = {}  # one of each, since attention asks whether query and key are one tensor

        def own(tensor: Tensor) -> Tensor:
            return copies.setdefault(id(tensor), tensor.detach().clone())

        args, kwargs = self.kind.repeated(self.module, args, kwargs)
        return mapped(args, own), mapped(kwargs, own), pick(output).detach().clone()

    def take(self, calls: list[Seen], samples: int) -> None:
        """Whole calls, while they fit."""
        for call in calls:
            args, kwargs, output = call.kept
            gradient = torch.stack(call.gradients)
            held = {id(t): t for t in (*tensors(args), *tensors(kwargs), output, gradient)}.values()
            size = sum(t.numel() * t.element_size() for t in held)
            if not self.held or self.held + size <= self.options.layer_bytes:
                self.held += size
                at = self.kind.samples_at(self.module)
                self.samples.append(BlockSample(args, kwargs, output, gradient, samples, at))

    def finish(self) -> LayerStatistics:
        """No metric."""
        return LayerStatistics(Metric(), BlockSamples(tuple(self.samples), self.module))


class MomentGatherer(BlockGatherer):
    """Calls, and the second moment of what each group is given."""

    def __init__(self, layer: LayerSpec, options: CalibrationOptions, samples: int) -> None:
        super().__init__(layer, options, samples)
        g, _, i, *_ = layer.group_shape
        self.moment, self.rows = torch.zeros(g, i, i, dtype=torch.float64), 0

    def look(self, role: str, x: Tensor) -> None:
        """Add to the moments."""
        rows = x.reshape(-1, *self.moment.shape[:2]).transpose(0, 1).float()
        self.moment += (rows.mT @ rows).to(self.moment)
        self.rows += rows.shape[1]

    def finish(self) -> LayerStatistics:
        """Means of the sums, and the calls."""
        return LayerStatistics(Metric(patch=self.moment / max(self.rows, 1)), super().finish().fisher)
