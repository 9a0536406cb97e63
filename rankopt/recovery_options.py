"""`RecoveryOptions`: how a compressed model is trained after the search. The ``recovery`` section of a study file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from rankopt.callables import check_spec
from rankopt.yaml_file import Strict


class RecoveryOptions(Strict):
    """Batch norm recalibration and fine-tuning.

    Attributes:
        bn: estimate batch norm statistics again: on, off, or auto: where it wins on validation data.
        steps: optimizer steps. In a study file they are part of every trial.
        final_steps: optimizer steps of what is handed over (``rankopt recover``).
        batch: samples a step, for data that do not come in batches.
        optimizer: "sgd" (Nesterov momentum) or "adamw".
        lr: the highest learning rate.
        momentum: of SGD; beta1 of AdamW.
        weight_decay: of weights with more than one dimension; biases and norms have none. As L2 in SGD, decoupled in
            AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019).
        warmup: share of the steps in which the rate rises linearly.
        schedule: "cosine" (Loshchilov and Hutter, "SGDR", 2017) down to `floor` times `lr`, or "constant".
        floor: see `schedule`.
        distill: weight of the dense model's outputs as targets, from 0 (labels alone) to 1 (no labels needed). Without
            labels in the data it is 1.
        temperature: of the distillation (Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network",
            2015).
        features: weight of the mean relative squared error of inner outputs (Romero et al., "FitNets", 2015).
        feature_layers: whose outputs, as patterns of module names; without any, those of the decomposed layers.
        label_smoothing: share of the labels' weight that is spread over all classes.
        mixup: alpha of mixup (Zhang et al., 2018); 0 is none.
        clip: largest norm of the gradient; 0 is none.
        ema: decay of the moving average of the weights that is handed over; 0 is none.
        decomposed_lr: factor of the learning rate of decomposed layers.
        decomposed_weight_decay: of decomposed layers; None: `weight_decay`.
        decay_on: what weight decay shrinks in decomposed layers: each factor, or the weight that their product stands
            for (Khodak et al., "Initialization and regularization of factorized neural layers", 2021).
        orthogonality: weight of the mean squared cosine between rank components (Yang et al., "Learning low-rank deep
            neural networks via singular vector orthogonality regularization", 2020).
        precision, memory_format: "auto" is what a short timing of training steps finds to be faster by 5 %; a study's
            short recovery takes what the processor is built for, since a trial has to be repeatable.
        device: "auto" is a GPU where there is one, else where the model is.
        checkpoint: steps between two checkpoints.
        function: a training loop of the user's own instead, ``function(model, dense, batches, steps)``; it trains in
            place, or returns the model.
    """

    bn: Annotated[
        Literal["auto", "on", "off"],
        BeforeValidator(lambda v: {True: "on", False: "off"}[v] if isinstance(v, bool) else v),  # YAML reads on as true
    ] = "auto"
    steps: int = Field(0, ge=0)
    final_steps: int = Field(2000, ge=0)
    batch: int = Field(128, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.02, gt=0, allow_inf_nan=False)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0, allow_inf_nan=False)
    warmup: float = Field(0.05, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    floor: float = Field(0.0, ge=0, le=1)
    distill: float = Field(0.7, ge=0, le=1)
    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)
    features: float = Field(0.0, ge=0, allow_inf_nan=False)
    feature_layers: list[str] = Field(default_factory=list)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0, allow_inf_nan=False)
    clip: float = Field(5.0, ge=0, allow_inf_nan=False)
    ema: float = Field(0.99, ge=0, lt=1)
    decomposed_lr: float = Field(1.0, ge=0, allow_inf_nan=False)
    decomposed_weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False)
    decay_on: Literal["factors", "product"] = "factors"
    orthogonality: float = Field(0.0, ge=0, allow_inf_nan=False)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    device: str = Field("auto", min_length=1)
    checkpoint: int = Field(200, ge=1)
    function: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> RecoveryOptions:
        if self.function is not None:
            check_spec(self.function)
        return self
