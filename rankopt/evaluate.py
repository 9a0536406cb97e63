"""`Evaluator`: build a plan and measure it, cheap to dear, stopping at the first limit that is broken for certain."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from rankopt.batches import Batch
from rankopt.batches import pieces as cut
from rankopt.bn import has_batch_norm, recalibrate
from rankopt.cost import Cost, plan_cost
from rankopt.decompositions import method
from rankopt.devices import Devices
from rankopt.divergence import Divergence, pick
from rankopt.errors import DataError, RankoptError
from rankopt.factors import Factors
from rankopt.layer_spec import LayerSpec, apart
from rankopt.layers import call_model, inference
from rankopt.limits import Limit
from rankopt.norm_fold import folding, followers
from rankopt.plan import Plan
from rankopt.precision import EXACT, Precision, device_of
from rankopt.refit import Refit
from rankopt.surgery import apply

_PIECE = 128  # samples that a model is run on at once
_KEPT = 2**22  # numbers of the dense model's outputs on other data than the validation's that are remembered
_LOST = 2.0  # nats beyond which a plan is judged again in float32

Metric = Callable[[nn.Module, Sequence[Batch]], float]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a plan.

    Attributes:
        measurements: quantity → value; macs, params, macs_kept, params_kept always, kl and accuracy unless stopped.
        violations: limit → excess as a fraction of its bound, 0 or less when kept; only limits that were looked at.
        stopped: the limit at which the evaluation ended, or None.
        notes: facts needed to build it again (whether batch norm was recalibrated), and the seconds it took.
    """

    measurements: dict[str, float]
    violations: dict[str, float]
    stopped: str | None = None
    notes: dict[str, float] = field(default_factory=dict)


class Evaluate(Protocol):
    """What measures a plan, such as an `Evaluator`."""

    def __call__(
        self,
        plan: Plan,
        limits: Sequence[Limit],
        worth: Callable[[Mapping[str, float]], bool] = ...,
        known: Mapping[str, float] | None = None,
    ) -> Evaluation:
        """Measure."""


class Evaluator:
    """Measures plans of one model.

    Args:
        model: the dense model.
        layers: from `find_layers`.
        factors: the factor cache.
        cost: MACs and parameters of the dense model.
        validation: batches on which plans are judged.
        divergence: for kl.
        metric: the user's metric (higher is better), "accuracy" (top-1 in percent; needs labels), or None.
        refit: how layers are refitted, or None for not at all.
        bn: "off", "on", or "auto": recalibrate batch norm where that lowers kl on the validation data.
        bn_batches: inputs that batch norm is recalibrated on.
        devices: where latency and memory are measured, or None.
        fast: how trials run models; `build` and `quality` are exact unless asked.
        recovery: trains a built module a little, ``recovery(built, dense, plan) -> module``, or None.

    Attributes:
        device: what the model is on, "cpu" or "cuda".
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LayerSpec],
        factors: Factors,
        cost: Cost,
        validation: Sequence[Batch],
        divergence: Divergence,
        *,
        metric: Metric | str | None = None,
        refit: Refit | None = None,
        bn: str = "off",
        bn_batches: Sequence[Batch] = (),
        devices: Devices | None = None,
        fast: Precision = EXACT,
        recovery: Callable[[nn.Module, nn.Module, Plan], nn.Module] | None = None,
    ) -> None:
        self.model, self.layers, self.factors, self.cost = model, list(layers), factors, cost
        self.validation, self.divergence, self.metric = list(validation), divergence, metric
        self.refit, self.recovery = refit, recovery
        self.bn = bn if has_batch_norm(model) else "off"
        self.bn_batches = list(bn_batches)
        self.devices: Devices | None = None
        self.fast, self.device = fast, device_of(model)
        # A user's own metric sees batches as they came; else pieces whose activations fit the processor's caches.
        pieces = self.validation if callable(metric) else [p for b in self.validation for p in cut(b, _PIECE)]
        self._pieces, self._fast_pieces = pieces, fast.batches(pieces)
        self._dense_outputs: dict[int, tuple[Sequence[Batch], list[Tensor]]] = {}
        self.dense = {"macs": float(cost.macs), "params": float(cost.params), **self.quality(model)}
        exact = not fast.bfloat16 or self.bn != "off" or recovery is not None
        names = [la.name for la in self.layers]
        self._followers = {} if exact or not pieces else followers(model, names, pieces[0])
        if devices:
            self.use(devices)

    def use(self, devices: Devices) -> None:
        """Measure latency and memory on these from now on."""
        self.devices = devices or None
        self.dense |= devices.dense

    def costs(self, plan: Plan) -> dict[str, float]:
        """Exact MACs and parameters, absolute and as shares of dense, without building anything."""
        cost = plan_cost(
            self.layers, plan, self.cost.params, self.cost.macs - sum(la.macs for la in apart(self.layers))
        )
        return {
            "macs": float(cost.macs),
            "params": float(cost.params),
            "macs_kept": cost.macs / max(self.cost.macs, 1),
            "params_kept": cost.params / max(self.cost.params, 1),
        }

    def build(self, plan: Plan, bn: bool | None = None, quick: bool = False) -> nn.Module:
        """The compressed model in eval mode: applied, refitted, recovered, batch norm recalibrated if `bn` says so.

        The plan must be checked before, since weights are not compared with its fingerprint here (see `apply`). With
        `quick` it is made as trials run models: refitted so, in that memory format, and in bfloat16 without its norms.
        With a recovery that is only how it comes out: a training from weights that differ in their last digits ends
        elsewhere, and what a trial measured has to be what is handed over.
        """
        built = apply(self.model, plan, self.factors, other_weights=True).eval()
        if self.recovery is not None and quick:
            return self.fast.module_(self.build(plan, bn))
        built = self.fast.module_(built) if quick else built
        modules = dict(built.named_modules())
        lasts = {n: method(c.method).last(modules[n]) for n, c in plan.changed().items()}
        refitted = {n: last for n, last in lasts.items() if last is not None and self.refit is not None}
        pairs = self._followers if quick else {}
        fold = folding(pairs, built, {n: lasts.get(n, modules[n]) for n in pairs})
        for name in pairs:
            if self.refit is None or name not in self.refit.order or name not in refitted:
                fold(name)
        if self.refit is not None:
            self.refit(built, refitted, quick, fold)
        if self.recovery is not None:
            built = self.recovery(built, self.model, plan)
        if bn is None:
            bn = self.bn == "on"
        if bn:
            recalibrate(built, self.bn_batches)
        return built

    def quality(
        self, module: nn.Module, batches: Sequence[Batch] | None = None, quick: bool = False
    ) -> dict[str, float]:
        """kl to the dense model, and accuracy with its standard error where it is known; on the validation data.

        With `quick` the module is run as trials run models; it has to be in that memory format.
        """
        dense = self._dense(self._pieces if batches is None else batches)
        if batches is None:
            batches = self._fast_pieces if quick else self._pieces
        kl: list[Tensor] = []
        correct: list[Tensor] = []
        with inference(module), (self.fast if quick else EXACT).on(self.device):
            for batch, wanted in zip(batches, dense, strict=True):
                output = pick(module(*batch.args, **batch.kwargs))
                kl.append(self.divergence.between(wanted, output))
                if self.metric == "accuracy":
                    correct.append(_hits(output, batch, self.divergence.class_dim))
        values = {"kl": float(torch.cat(kl).mean())}
        if not math.isfinite(values["kl"]):
            raise DataError("the compressed model's output holds NaN or infinity")
        if self.metric == "accuracy":
            hits = torch.cat(correct).double()
            if len(hits) == 0:
                raise DataError("metric accuracy: no label is 0 or above")
            share = float(hits.mean())
            values["accuracy"] = 100 * share
            values["accuracy_se"] = 100 * math.sqrt(share * (1 - share) / max(len(hits), 1))
        elif callable(self.metric):
            with inference(module):
                values["accuracy"] = _measured(self.metric, module, batches)
        return values

    def __call__(
        self,
        plan: Plan,
        limits: Sequence[Limit] = (),
        worth: Callable[[Mapping[str, float]], bool] = lambda measured: True,
        known: Mapping[str, float] | None = None,
    ) -> Evaluation:
        """Exact costs, predicted latency, quality, measured latency and memory; a broken limit ends it.

        Args:
            plan: what is measured.
            limits: what it has to keep. A predicted latency breaks a limit only beyond the prediction's own error.
            worth: told everything that is known by then, whether the plan is worth measuring on a device.
            known: quality that was measured before (and whether batch norm was recalibrated, ``bn``), taken instead
                of building the plan.
        """
        start = time.perf_counter()
        early = self.early(plan, limits)
        if early is not None:
            return early
        known = self.judge(plan) if known is None else known
        measured = self._known(plan, known)
        stopped = self._broken(measured, limits)
        if self.devices is not None and not stopped and worth(measured):
            measured |= self.devices.measured(plan)
            stopped = self._broken(measured, limits)
        return self._ended(measured, limits, stopped, {"bn": known.get("bn", 0.0)}, start)

    def early(self, plan: Plan, limits: Sequence[Limit]) -> Evaluation | None:
        """What comes out if a limit is broken by what is known before anything is built; None if none is."""
        start = time.perf_counter()
        measured = self._known(plan, {})
        stopped = self._broken(measured, limits) or self._hopeless(plan, limits)
        return self._ended(measured, limits, stopped, {}, start) if stopped else None

    def judge(self, plan: Plan) -> dict[str, float]:
        """Quality of the built model, and ``bn``: whether batch norm was recalibrated for it. Needs no device."""
        found, bn = self._judged_once(plan, quick=True)
        # weights that nearly cancel can come out wrong in few digits
        if self.fast.bfloat16 and found["kl"] > _LOST:
            found, bn = self._judged_once(plan, quick=False)
        return {**found, "bn": bn}

    def to_measure(
        self,
        plan: Plan,
        limits: Sequence[Limit],
        worth: Callable[[Mapping[str, float]], bool],
        known: Mapping[str, float],
    ) -> bool:
        """Whether a call with the same arguments would go on to the devices."""
        measured = self._known(plan, known)
        return bool(self.devices) and not self._broken(measured, limits) and worth(measured)

    def travelling(self) -> Evaluator:
        """The same without its devices: all that `judge` needs, to be sent to another process."""
        other = copy.copy(self)
        other.devices, other._dense_outputs = None, {}  # which are known by where the batches lie in this process
        return other

    def _known(self, plan: Plan, known: Mapping[str, float]) -> dict[str, float]:
        """Costs, predictions, and what is known of the quality."""
        predicted = {} if self.devices is None else self.devices.predicted(plan)
        return self.costs(plan) | predicted | {k: v for k, v in known.items() if k != "bn"}

    def _judged_once(self, plan: Plan, quick: bool) -> tuple[dict[str, float], float]:
        built = self.build(plan, bn=False if self.bn == "auto" else None, quick=quick)
        quality = self.quality(built, quick=quick)
        if self.bn != "auto":
            return quality, float(self.bn == "on")
        recalibrate(built, self.bn_batches)
        other = self.quality(built, quick=quick)
        return (other, 1.0) if other["kl"] < quality["kl"] else (quality, 0.0)

    def _broken(self, measured: Mapping[str, float], limits: Sequence[Limit]) -> str | None:
        return next((text for text, excess in self.violations(measured, limits).items() if excess > 0), None)

    def _hopeless(self, plan: Plan, limits: Sequence[Limit]) -> str | None:
        """A limit on latency that the plan will not keep, even if the prediction is as wrong as it gets."""
        if self.devices is None:
            return None
        return next((str(li) for li in limits if self.devices.exceeds(plan, li)), None)

    def _ended(
        self, measured: dict[str, float], limits: Sequence[Limit], stopped: str | None, notes: dict[str, float],
        start: float,
    ) -> Evaluation:  # fmt: skip
        notes["seconds"] = time.perf_counter() - start
        return Evaluation(measured, self.violations(measured, limits), stopped, notes)

    def violations(self, measured: Mapping[str, float], limits: Sequence[Limit]) -> dict[str, float]:
        """Excess over each limit whose quantity is known by now."""
        return {str(li): li.violation(measured, self.dense) for li in limits if li.key in measured}

    def _dense(self, batches: Sequence[Batch]) -> list[Tensor]:
        if id(batches) in self._dense_outputs:
            return self._dense_outputs[id(batches)][1]
        with inference(self.model):
            outputs = [pick(call_model(self.model, b.args, b.kwargs, "validation data")).clone() for b in batches]
        if any(not torch.isfinite(o).all() for o in outputs):
            raise DataError(
                "validation: the dense model's output holds NaN or infinity; check its weights and the data"
            )
        if batches is self._pieces or sum(o.numel() for o in outputs) <= _KEPT:
            self._dense_outputs[id(batches)] = batches, outputs  # held together, so that no other batches get the id
        return outputs


def _hits(output: Tensor, batch: Batch, class_dim: int) -> Tensor:
    """Which predictions are right, flattened; negative labels are left out."""
    labels = batch.labels
    if not isinstance(labels, Tensor):
        raise DataError("metric accuracy: needs labels as a tensor in every batch; use kl or a metric of your own")
    predicted = output.argmax(class_dim)
    if predicted.shape != labels.shape:
        raise DataError(
            f"metric accuracy: predictions have shape {tuple(predicted.shape)}, labels {tuple(labels.shape)};"
            " they must be equal (set output.class_dim, or use a metric of your own)"
        )
    valid = labels >= 0
    return (predicted == labels)[valid].flatten()


def _measured(metric: Metric, module: nn.Module, batches: Sequence[Batch]) -> float:
    """What the user's metric says; what it raises, and what is no number, becomes one line."""
    try:
        value: object = metric(module, batches)
    except RankoptError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"metric: raised {type(error).__name__}: {first}") from error
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"metric: must return a number, got {type(value).__name__}") from None
    if not math.isfinite(number):
        raise DataError(f"metric: must return a finite number, got {number}")
    return number
