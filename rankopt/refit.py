"""`Refit`: after a plan is applied, solve the last stage of each layer against the dense layer's outputs.

The layers are taken in the order in which they run. Each is fed by the already compressed and refitted layers before it
and is asked to give what the dense layer gives in the dense model (Zhang et al., "Accelerating Very Deep Convolutional
Networks", 2015, section 3.3, "asymmetric reconstruction"). The last stage enters linearly, so this is ridge regression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.batches import Batch, concatenate
from rankopt.kinds import kind_named
from rankopt.layer_spec import LayerSpec
from rankopt.layers import inference, plain_attention, static_layers
from rankopt.patches import output_rows, patches
from rankopt.precision import EXACT, Precision, device_of


@dataclass(frozen=True)
class RefitOptions:
    """How the refit is done.

    Attributes:
        max_rows: output positions a layer is fitted on, drawn at random.
        ridge: pull towards the weights as they are, as a share of the mean squared input of the last stage.
        seed: for the positions.
        passes: how often all layers are gone through.
    """

    max_rows: int = 2**14
    ridge: float = 1e-3
    seed: int = 0
    passes: int = 1


class Refit:
    """Targets of the dense model, gathered once, and the refit of any compressed copy of it.

    Args:
        model: the dense model.
        layers: those that may be refitted. One that runs several times in a forward pass is left as it is, since its
            calls would each want another solution.
        batches: calibration inputs. In one piece (all of one shape) a refit costs a single forward pass; otherwise a
            pass a layer.
        options: see `RefitOptions`.
        fast: how the compressed model is run where a refit may be quick.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LayerSpec],
        batches: Sequence[Batch],
        options: RefitOptions,
        fast: Precision = EXACT,
    ) -> None:
        whole = concatenate(batches)
        self.batches = [whole] if whole is not None else list(batches)
        self.fast, self._device = fast, device_of(model)
        self._fast_batches = fast.batches(self.batches)
        self.options = options
        self.order: list[str] = []
        self._layers = {layer.name: layer for layer in layers if len(layer.calls) == 1 and layer.skip is None}
        self._layers = {n: layer for n, layer in self._layers.items() if kind_named(layer).linear and not layer.tied}
        self._targets: dict[str, list[Tensor]] = {name: [] for name in self._layers}
        self._positions: dict[str, list[Tensor]] = {name: [] for name in self._layers}
        generator = torch.Generator().manual_seed(options.seed)
        modules = dict(model.named_modules())
        modules = {name: kind_named(layer).tap(modules[name]) for name, layer in self._layers.items()}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                layer = self._layers[name]
                rows = output_rows(layer, _batched(layer, output))
                share = max(1, options.max_rows // max(rows.shape[0] * len(self.batches), 1))
                positions = torch.randperm(rows.shape[1], generator=generator)[:share].sort().values
                self._positions[name].append(positions)
                self._targets[name].append(rows[:, positions].flatten(0, 1).clone())
                if name not in self.order:
                    self.order.append(name)

            return hook

        with _hooks(model, {n: keep(n) for n in self._layers}, modules):
            for batch in self.batches:
                model(*batch.args, **batch.kwargs)

    def __call__(
        self,
        compressed: nn.Module,
        replaced: Mapping[str, nn.Module],
        quick: bool = False,
        solved: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Refit in place.

        Args:
            compressed: the model with the plan applied.
            replaced: layer name → the last stage of what stands in its place (`Decomposition.last`), a Linear or a
                convolution whose output is the layer's. Other layers stay as they are.
            quick: run it as `fast` says, with weights in that memory format.
            solved: told a layer as soon as its last stage is solved for good, before that stage runs.
        """
        with (self.fast if quick else EXACT).on(self._device):
            for left in reversed(range(self.options.passes)):
                told = (lambda name: None) if left else solved
                self._refit(compressed, replaced, self._fast_batches if quick else self.batches, told)

    def _refit(
        self,
        compressed: nn.Module,
        replaced: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        solved: Callable[[str], None],
    ) -> None:
        names = [name for name in self.order if name in replaced]
        if len(self.batches) == 1:
            solve = partial(self._solve_at_once, solved)
            with inference(compressed), plain_attention(), _pre_hooks(replaced, names, solve):
                self._run(compressed, batches[0])
            return
        for name in names:
            equations = _Equations(replaced[name])
            for number in range(len(self.batches)):
                gather = partial(self._gather, equations, number)
                with inference(compressed), plain_attention(), _pre_hooks(replaced, [name], gather):
                    self._run(compressed, batches[number])
            equations.solve(self.options.ridge)
            solved(name)

    def _run(self, compressed: nn.Module, batch: Batch) -> None:
        with suppress(_Enough):
            compressed(*batch.args, **batch.kwargs)

    def _gather(self, equations: _Equations, number: int, name: str, last: nn.Module, z: Tensor) -> None:
        equations.add(z, self._positions[name][number], self._targets[name][number])
        raise _Enough

    def _solve_at_once(self, solved: Callable[[str], None], name: str, last: nn.Module, z: Tensor) -> None:
        equations = _Equations(last)
        equations.add(z, self._positions[name][0], self._targets[name][0])
        equations.solve(self.options.ridge)
        solved(name)


class _Enough(Exception):
    """The rest of the forward pass is not needed."""


class _Equations:
    """Normal equations of one plain Linear or convolution, streamed."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.layer = static_layers(nn.Sequential(module))[0]
        g, o, i, *k = self.layer.group_shape
        self.size = i * int(torch.tensor(k).prod()) if k else i
        n = self.size + (1 if self.module.bias is not None else 0)
        self.gram = torch.zeros(g, n, n, dtype=torch.float64)
        self.right = torch.zeros(g, n, o, dtype=torch.float64)
        self.rows = 0

    def add(self, z: Tensor, positions: Tensor, targets: Tensor) -> None:
        """Rows of the module's input z at these output positions, and the outputs (rows, groups, out) wanted there."""
        rows = patches(self.layer, _batched(self.layer, z).float(), positions).flatten(0, 1)
        if self.module.bias is not None:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
        by_group = rows.transpose(0, 1)
        self.gram += (by_group.mT @ by_group).to(self.gram)
        self.right += (by_group.mT @ targets.float().transpose(0, 1)).to(self.right)
        self.rows += len(rows)

    def solve(self, ridge: float) -> None:
        """Write the solution into the module; one that is not finite is not written."""
        from rankopt.layer_spec import group_weight, ungroup_weight

        weight = group_weight(self.layer, self.module.weight.detach()).flatten(2).to(self.gram)
        if self.module.bias is not None:
            bias = self.module.bias.detach().reshape(self.layer.groups, -1, 1).to(self.gram)
            weight = torch.cat([weight, bias], 2)
        present = weight.mT
        pull = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * ridge
        system = self.gram + pull * torch.eye(self.gram.shape[-1]).to(self.gram)
        solution, info = torch.linalg.solve_ex(system, self.right - self.gram @ present)
        if int(info.abs().max()) or not torch.isfinite(solution).all():
            return
        solved = (present + solution).mT
        with torch.no_grad():
            shape = self.layer.group_shape
            self.module.weight.copy_(ungroup_weight(self.layer, solved[..., : self.size].reshape(shape)))
            if self.module.bias is not None:
                self.module.bias.copy_(solved[..., self.size].reshape(-1))


def _batched(layer: LayerSpec, x: Tensor) -> Tensor:
    if layer.dims:
        return x if x.dim() == layer.dims + 2 else x.unsqueeze(0)
    return x if x.dim() > (2 if layer.groups > 1 else 1) else x.unsqueeze(0)


@contextmanager
def _hooks(
    model: nn.Module, hooks: Mapping[str, Callable[..., None]], modules: Mapping[str, nn.Module]
) -> Iterator[None]:
    handles = [modules[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        with inference(model), plain_attention():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _pre_hooks(
    replaced: Mapping[str, nn.Module], names: Sequence[str], action: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Call `action(name, last stage, its input)` just before each named last stage runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: action(name, module, args[0])

    handles = [replaced[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
