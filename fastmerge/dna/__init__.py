"""DNA transfer: a model of another shape out of the weights of one that is there.

Every name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.api.deltas import ConsensusMethod, SparsificationMethod, get_consensus_mask, sparsify_delta
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
    from fastmerge.dna.growth import GrowthMethod, Initialization, ModelGrowthConfig, NewUnits, WidthMode
    from fastmerge.dna.layers import LayerSelection, choose_layers, plan_layers
    from fastmerge.dna.parent import Parent
    from fastmerge.dna.pipeline import create_dna_transfer_pipeline
    from fastmerge.dna.results import Made
    from fastmerge.dna.slicing import ImportanceMetric, ModelSlicingConfig, Refit, slice_model
    from fastmerge.dna.upcycling import UpcyclingConfig, plan_upcycle, upcycle_dense_to_moe
    from fastmerge.dna.upcycling.balance import attach_moe_aux_loss
    from fastmerge.dna.width import fresh_rms, grow_model_width, plan_width
    from fastmerge.search.evolutionary import EvolutionaryMergeConfig, MergeStrategy, evolutionary_merge

_LAZY = {
    "Comparison": "dna.comparison",
    "ConsensusMethod": "api.deltas",
    "DepthUpscaleConfig": "dna.depth",
    "EvolutionaryMergeConfig": "search.evolutionary",
    "GrowthMethod": "dna.growth",
    "IDUSType": "dna.depth",
    "ImportanceMetric": "dna.slicing",
    "Initialization": "dna.growth",
    "LayerSelection": "dna.layers",
    "Made": "dna.results",
    "MergeStrategy": "search.evolutionary",
    "ModelGrowthConfig": "dna.growth",
    "ModelSlicingConfig": "dna.slicing",
    "NewUnits": "dna.growth",
    "Parent": "dna.parent",
    "Refit": "dna.slicing",
    "SparsificationMethod": "api.deltas",
    "UpcyclingConfig": "dna.upcycling",
    "WidthMode": "dna.growth",
    "attach_moe_aux_loss": "dna.upcycling.balance",
    "choose_layers": "dna.layers",
    "compare": "dna.comparison",
    "create_dna_transfer_pipeline": "dna.pipeline",
    "create_model_family": "dna.family",
    "depth_upscale": "dna.depth",
    "evolutionary_merge": "search.evolutionary",
    "fresh_rms": "dna.width",
    "get_consensus_mask": "api.deltas",
    "get_idus_layer_arrangement": "dna.depth",
    "grow_model_depth": "dna.depth",
    "grow_model_width": "dna.width",
    "plan_depth_growth": "dna.depth",
    "plan_depth_upscale": "dna.depth",
    "plan_layers": "dna.layers",
    "plan_upcycle": "dna.upcycling",
    "plan_width": "dna.width",
    "slice_model": "dna.slicing",
    "sparsify_delta": "api.deltas",
    "upcycle_dense_to_moe": "dna.upcycling",
}

__all__ = [
    "Comparison",
    "ConsensusMethod",
    "DepthUpscaleConfig",
    "EvolutionaryMergeConfig",
    "GrowthMethod",
    "IDUSType",
    "ImportanceMetric",
    "Initialization",
    "LayerSelection",
    "Made",
    "MergeStrategy",
    "ModelGrowthConfig",
    "ModelSlicingConfig",
    "NewUnits",
    "Parent",
    "Refit",
    "SparsificationMethod",
    "UpcyclingConfig",
    "WidthMode",
    "attach_moe_aux_loss",
    "choose_layers",
    "compare",
    "create_dna_transfer_pipeline",
    "create_model_family",
    "depth_upscale",
    "evolutionary_merge",
    "fresh_rms",
    "get_consensus_mask",
    "get_idus_layer_arrangement",
    "grow_model_depth",
    "grow_model_width",
    "plan_depth_growth",
    "plan_depth_upscale",
    "plan_layers",
    "plan_upcycle",
    "plan_width",
    "slice_model",
    "sparsify_delta",
    "upcycle_dense_to_moe",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastmerge.dna' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastmerge.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
