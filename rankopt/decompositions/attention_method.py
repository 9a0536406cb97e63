"""`AttentionMethod`: what all ways to write a self-attention layer have in common, in terms of its sizes alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.attention_moments import Moments
from rankopt.attention_styles import Projections, Shape
from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.distill_block import DistillOptions, Example


@dataclass(frozen=True)
class Known:
    """What is known of a layer besides its weights.

    Attributes:
        moments: of tokens and attended values.
        tokens: of the example input.
        examples: inputs and outputs of the dense layer, to distill on (none: nothing is trained).
        distillation: how.
    """

    moments: Moments
    tokens: int
    examples: Sequence[Example] = ()
    distillation: DistillOptions = DistillOptions()
