"""What a grown model is asked for by: the way, how much of it, and the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class GrowthMethod(Enum):
    """Ways to grow a model."""

    NET2WIDER = "net2wider"
    """More units, each split into replicas."""
    NET2DEEPER = "net2deeper"
    """More layers that change nothing at first."""
    BERT2BERT = "bert2bert"
    """Both."""


@dataclass(frozen=True)
class ModelGrowthConfig:
    """How to grow a model.

    Attributes:
        method: a :class:`GrowthMethod`, or its value.
        width_multiplier: of the hidden size.
        num_new_layers: how many identity layers are put in.
        insertion_positions: the layers of the model that new ones follow, or, where it is empty, evenly spread ones.
        preserve_output: the grown model computes what the model computes.
        noise_std: standard deviation of noise that tells new weights from old ones, as ``noise_mode`` says.
        noise_mode: ``relative``, in units of each tensor's root mean square, or ``absolute``.
        seed: of the noise.
    """

    method: GrowthMethod | str = GrowthMethod.NET2WIDER
    width_multiplier: float = 2.0
    num_new_layers: int = 4
    insertion_positions: Sequence[int] = ()
    preserve_output: bool = True
    noise_std: float = 0.01
    noise_mode: str = "relative"
    seed: int = 0
