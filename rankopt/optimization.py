"""How weights move: the learning rate of a step, groups of parameters, decay on products, the moving average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankopt.chains import Chain
from rankopt.errors import InputError
from rankopt.recovery_options import RecoveryOptions


def rate(step: int, steps: int, options: RecoveryOptions) -> float:
    """The learning rate of step 0 ≤ `step` < `steps`.

    In the warm-up of w = round(warmup · steps) steps it is lr · (step + 1) / w, so that it is never 0. Afterwards, with
    t = (step - w) / (steps - w), it is lr · (floor + (1 - floor) · (1 + cos πt) / 2), or lr.
    """
    warm = round(options.warmup * steps)
    if step < warm:
        return options.lr * (step + 1) / warm
    if options.schedule == "constant":
        return options.lr
    t = (step - warm) / max(steps - warm, 1)
    return options.lr * (options.floor + (1 - options.floor) * (1 + math.cos(math.pi * t)) / 2)


@dataclass
class Steps:
    """The optimizer, and what is done beside it in every step.

    Attributes:
        optimizer: its groups have ``factor``, that of the learning rate.
        parameters: all that are trained.
        chains: the decomposed layers whose products decay; none when factors do.
        product_decay: weight decay of the products.
        decoupled: whether decay goes past the optimizer's moments (AdamW).
        options: schedule and clipping.
    """

    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    options: RecoveryOptions
    chains: Sequence[Chain] = ()
    product_decay: float = 0.0
    decoupled: bool = False
    _factors: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        names: Sequence[str],
        chains: Sequence[Chain],
        options: RecoveryOptions,
    ) -> Steps:
        """Groups for the parameters of the decomposed layers of these names, and for the others.

        Frozen parameters stay frozen. Raises `InputError` when there is nothing to train.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        inside = {p for name in names for p in modules[name].parameters()}
        products = options.decay_on == "product"
        decay = options.weight_decay
        own_decay = decay if options.decomposed_weight_decay is None else options.decomposed_weight_decay
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            factor = options.decomposed_lr if parameter in inside else 1.0
            own = (0.0 if products else own_decay) if parameter in inside else decay
            groups.setdefault((factor, own if parameter.dim() > 1 else 0.0), []).append(parameter)
        if not groups:
            raise InputError("recovery: every parameter of the model is frozen (requires_grad is False)")
        listed = [{"params": ps, "factor": f, "weight_decay": d} for (f, d), ps in groups.items()]
        optimizer: torch.optim.Optimizer
        if options.optimizer == "sgd":
            nesterov = options.momentum > 0
            optimizer = torch.optim.SGD(listed, lr=options.lr, momentum=options.momentum, nesterov=nesterov)
        else:
            optimizer = torch.optim.AdamW(listed, lr=options.lr, betas=(options.momentum, 0.999))
        every = [p for ps in groups.values() for p in ps]
        own_decay = own_decay if products else 0.0
        return cls(optimizer, every, options, chains if products else (), own_decay, options.optimizer == "adamw")

    def take(self, step: int, steps: int, scale: float = 1.0) -> bool:
        """Clip, decay, and take the optimizer's step; False, and no weight changes, where a gradient is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip or math.inf)
        if not math.isfinite(float(norm)):
            return False
        now = rate(step, steps, self.options) * scale
        for group in self.optimizer.param_groups:
            group["lr"] = now * group["factor"]
        if self.product_decay > 0 and self.chains:
            self._decay(now * self.options.decomposed_lr)
        self.optimizer.step()
        return True

    def _decay(self, lr: float) -> None:
        """Add the gradient of ½ · decay · ‖product‖² of every chain: to the gradients, or decoupled to the weights."""
        for parameter, grad in product_gradients(self.chains):
            if self.decoupled:
                parameter.data.add_(grad, alpha=-lr * self.product_decay)
            elif parameter.grad is None:
                parameter.grad = self.product_decay * grad
            else:
                parameter.grad.add_(grad, alpha=self.product_decay)


def product_gradients(chains: Sequence[Chain]) -> list[tuple[nn.Parameter, Tensor]]:
    """Every trained factor and the gradient of ½ Σ ‖product‖² in it."""
    factors = [p for c in chains for p in c.modules.parameters() if p.dim() > 1 and p.requires_grad]
    if not factors:
        return []
    with torch.enable_grad():
        wide = [p.float() if (p := c.product()).dtype in (torch.float16, torch.bfloat16) else p for c in chains]
        total = torch.stack([product.square().sum() for product in wide]).sum() / 2
        grads = torch.autograd.grad(total, factors, allow_unused=True)
    return [(p, g) for p, g in zip(factors, grads, strict=True) if g is not None]


class MovingAverage:
    """An exponential moving average of all floating-point parameters and buffers; the others are as they are last.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the beginning is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in tensors_of(model).items()}

    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's values after step number `step`, counted from 0."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in tensors_of(model).items():
                kept = self.values[name]
                if kept.is_floating_point():
                    kept.lerp_(value.detach(), share)
                else:
                    kept.copy_(value)

    def put_into(self, model: nn.Module) -> None:
        """Overwrite the model's values by the average."""
        put(self.values, model)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, with those that a state dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def put(values: dict[str, Tensor], model: nn.Module) -> None:
    """Fill the model's parameters and buffers in place."""
    with torch.no_grad():
        for name, value in tensors_of(model).items():
            value.copy_(values[name])
