"""DNA transfer: a model of another shape out of the weights of one that is there."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.dna.comparison import Comparison, compare
    from fastmerge.dna.depth import (
        DepthUpscaleConfig,
        IDUSType,
        depth_upscale,
        get_idus_layer_arrangement,
        grow_model_depth,
        plan_depth_growth,
        plan_depth_upscale,
    )
    from fastmerge.dna.family import create_model_family
    from fastmerge.dna.growth import GrowthMethod, ModelGrowthConfig
    from fastmerge.dna.layers import LayerSelection, choose_layers, plan_layers
    from fastmerge.dna.parent import Parent
    from fastmerge.dna.slicing import ImportanceMetric, ModelSlicingConfig, Refit, slice_model

_LAZY = {
    "Comparison": "comparison",
    "DepthUpscaleConfig": "depth",
    "GrowthMethod": "growth",
    "IDUSType": "depth",
    "ImportanceMetric": "slicing",
    "LayerSelection": "layers",
    "ModelGrowthConfig": "growth",
    "ModelSlicingConfig": "slicing",
    "Parent": "parent",
    "Refit": "slicing",
    "choose_layers": "layers",
    "compare": "comparison",
    "create_model_family": "family",
    "depth_upscale": "depth",
    "get_idus_layer_arrangement": "depth",
    "grow_model_depth": "depth",
    "plan_depth_growth": "depth",
    "plan_depth_upscale": "depth",
    "plan_layers": "layers",
    "slice_model": "slicing",
}

__all__ = [
    "Comparison",
    "DepthUpscaleConfig",
    "GrowthMethod",
    "IDUSType",
    "ImportanceMetric",
    "LayerSelection",
    "ModelGrowthConfig",
    "ModelSlicingConfig",
    "Parent",
    "Refit",
    "choose_layers",
    "compare",
    "create_model_family",
    "depth_upscale",
    "get_idus_layer_arrangement",
    "grow_model_depth",
    "plan_depth_growth",
    "plan_depth_upscale",
    "plan_layers",
    "slice_model",
]


def __getattr__(name: str) -> Any:
    """Loads a public name at its first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
