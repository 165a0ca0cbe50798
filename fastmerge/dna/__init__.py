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
    from fastmerge.dna.family import create_model_family, draft_family
    from fastmerge.dna.growth import GrowthMethod, Initialization, ModelGrowthConfig, NewUnits, WidthMode
    from fastmerge.dna.layers import LayerSelection, choose_layers, plan_layers
    from fastmerge.dna.mixtures.dense import plan_moe_merge
    from fastmerge.dna.mixtures.document import Expert, MoEMergeConfig, TrunkConfig
    from fastmerge.dna.mixtures.fewer import FewerExpertsConfig, draft_fewer_experts, fewer_experts, plan_fewer_experts
    from fastmerge.dna.mixtures.join import JoinExpertsConfig, join_experts, plan_join_experts
    from fastmerge.dna.mixtures.moe import merge_to_moe
    from fastmerge.dna.mixtures.more import MoreExpertsConfig, more_experts, plan_more_experts
    from fastmerge.dna.mixtures.routing import router_statistics
    from fastmerge.dna.parent import Parent
    from fastmerge.dna.pipeline import create_dna_transfer_pipeline
    from fastmerge.dna.results import Made
    from fastmerge.dna.slicing import ImportanceMetric, ModelSlicingConfig, Refit, Study, draft_slice, slice_model
    from fastmerge.dna.upcycling import UpcyclingConfig, plan_upcycle, upcycle_dense_to_moe
    from fastmerge.dna.upcycling.balance import attach_moe_aux_loss
    from fastmerge.dna.width import fresh_rms, grow_model_width, plan_width
    from fastmerge.search.evolutionary import EvolutionaryMergeConfig, MergeStrategy, evolutionary_merge

_LAZY = {
    "Comparison": "dna.comparison",
    "ConsensusMethod": "api.deltas",
    "DepthUpscaleConfig": "dna.depth",
    "EvolutionaryMergeConfig": "search.evolutionary",
    "Expert": "dna.mixtures.document",
    "FewerExpertsConfig": "dna.mixtures.fewer",
    "GrowthMethod": "dna.growth",
    "IDUSType": "dna.depth",
    "ImportanceMetric": "dna.slicing",
    "Initialization": "dna.growth",
    "JoinExpertsConfig": "dna.mixtures.join",
    "LayerSelection": "dna.layers",
    "Made": "dna.results",
    "MergeStrategy": "search.evolutionary",
    "MoEMergeConfig": "dna.mixtures.document",
    "ModelGrowthConfig": "dna.growth",
    "ModelSlicingConfig": "dna.slicing",
    "MoreExpertsConfig": "dna.mixtures.more",
    "NewUnits": "dna.growth",
    "Parent": "dna.parent",
    "Refit": "dna.slicing",
    "SparsificationMethod": "api.deltas",
    "Study": "dna.slicing",
    "TrunkConfig": "dna.mixtures.document",
    "UpcyclingConfig": "dna.upcycling",
    "WidthMode": "dna.growth",
    "attach_moe_aux_loss": "dna.upcycling.balance",
    "choose_layers": "dna.layers",
    "compare": "dna.comparison",
    "create_dna_transfer_pipeline": "dna.pipeline",
    "create_model_family": "dna.family",
    "depth_upscale": "dna.depth",
    "draft_family": "dna.family",
    "draft_fewer_experts": "dna.mixtures.fewer",
    "draft_slice": "dna.slicing",
    "evolutionary_merge": "search.evolutionary",
    "fewer_experts": "dna.mixtures.fewer",
    "fresh_rms": "dna.width",
    "get_consensus_mask": "api.deltas",
    "get_idus_layer_arrangement": "dna.depth",
    "grow_model_depth": "dna.depth",
    "grow_model_width": "dna.width",
    "join_experts": "dna.mixtures.join",
    "merge_to_moe": "dna.mixtures.moe",
    "more_experts": "dna.mixtures.more",
    "plan_depth_growth": "dna.depth",
    "plan_depth_upscale": "dna.depth",
    "plan_fewer_experts": "dna.mixtures.fewer",
    "plan_join_experts": "dna.mixtures.join",
    "plan_layers": "dna.layers",
    "plan_moe_merge": "dna.mixtures.dense",
    "plan_more_experts": "dna.mixtures.more",
    "plan_upcycle": "dna.upcycling",
    "plan_width": "dna.width",
    "router_statistics": "dna.mixtures.routing",
    "slice_model": "dna.slicing",
    "sparsify_delta": "api.deltas",
    "upcycle_dense_to_moe": "dna.upcycling",
}

__all__ = [
    "Comparison",
    "ConsensusMethod",
    "DepthUpscaleConfig",
    "EvolutionaryMergeConfig",
    "Expert",
    "FewerExpertsConfig",
    "GrowthMethod",
    "IDUSType",
    "ImportanceMetric",
    "Initialization",
    "JoinExpertsConfig",
    "LayerSelection",
    "Made",
    "MergeStrategy",
    "MoEMergeConfig",
    "ModelGrowthConfig",
    "ModelSlicingConfig",
    "MoreExpertsConfig",
    "NewUnits",
    "Parent",
    "Refit",
    "SparsificationMethod",
    "Study",
    "TrunkConfig",
    "UpcyclingConfig",
    "WidthMode",
    "attach_moe_aux_loss",
    "choose_layers",
    "compare",
    "create_dna_transfer_pipeline",
    "create_model_family",
    "depth_upscale",
    "draft_family",
    "draft_fewer_experts",
    "draft_slice",
    "evolutionary_merge",
    "fewer_experts",
    "fresh_rms",
    "get_consensus_mask",
    "get_idus_layer_arrangement",
    "grow_model_depth",
    "grow_model_width",
    "join_experts",
    "merge_to_moe",
    "more_experts",
    "plan_depth_growth",
    "plan_depth_upscale",
    "plan_fewer_experts",
    "plan_join_experts",
    "plan_layers",
    "plan_moe_merge",
    "plan_more_experts",
    "plan_upcycle",
    "plan_width",
    "router_statistics",
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
