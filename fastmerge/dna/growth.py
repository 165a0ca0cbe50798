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


class WidthMode(Enum):
    """Ways to grow the residual stream, D to D' channels. All keep what the model computes."""

    AUTO = "auto"
    """``duplicate`` for whole multiples, else ``zero``; ``scaled`` for OLMo 2 and 3, where rms_norm_eps is also that of
    norms of queries and keys, which do not grow (1e-5 of the largest logit)."""
    DUPLICATE = "duplicate"
    """Every channel m times; what reads them is split, exactly in any type. Whole multiples alone."""
    ZERO = "zero"
    """New channels are 0; gains get sqrt(D / D'), and rms_norm_eps gets D / D'."""
    SCALED = "scaled"
    """n replicas of a channel, each times sqrt(D' / D / n): the mean square stays, and rms_norm_eps with it."""


class NewUnits(Enum):
    """What units are at first that MLPs and attention get."""

    COPY = "copy"
    """Replicas of those that are there, whose outputs are split."""
    RANDOM = "random"
    """Noise, whose outputs get weight 0."""


class Initialization(Enum):
    """The two ways of bert2BERT (arXiv 2110.07143)."""

    FPI = "fpi"
    """Function-preserving: replicas are copies."""
    AKI = "aki"
    """Advanced knowledge: new outputs of a layer's weights are those of the next layer. Preserves nothing."""


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
        hidden_size: of the wider model. Where this or one of the next five is given, only what is given grows, and
            ``width_multiplier`` is not used; else everything grows by it.
        intermediate_size: of MLPs (of experts, where ``intermediate_size`` counts those).
        num_attention_heads: of the wider model, each as large as before.
        num_key_value_heads: of the wider model.
        moe_intermediate_size: of experts.
        shared_expert_intermediate_size: of the expert that every token passes.
        mode: how the hidden size grows, a :class:`WidthMode` or its value.
        units: what new units of MLPs and new heads are, a :class:`NewUnits` or its value.
        initialization: of ``bert2bert``, an :class:`Initialization` or its value.
    """

    method: GrowthMethod | str = GrowthMethod.NET2WIDER
    width_multiplier: float = 2.0
    num_new_layers: int = 4
    insertion_positions: Sequence[int] = ()
    preserve_output: bool = True
    noise_std: float = 0.01
    noise_mode: str = "relative"
    seed: int = 0
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    mode: WidthMode | str = "auto"
    units: NewUnits | str = "copy"
    initialization: Initialization | str = "fpi"


FIELDS = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "moe_intermediate_size": "expert_ffn",
    "shared_expert_intermediate_size": "shared_ffn",
}
"""Axes by the fields of :class:`~fastmerge.dna.growth.ModelGrowthConfig` that give their new sizes."""

FIELDS_OF = {axis: key for key, axis in FIELDS.items()}
