"""DNA transfer: a model of another shape out of the weights of one that is there."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.dna.mixtures.dense import plan_moe_merge
    from fastmerge.dna.mixtures.document import Expert, MoEMergeConfig, TrunkConfig
    from fastmerge.dna.mixtures.fewer import FewerExpertsConfig, fewer_experts, plan_fewer_experts
    from fastmerge.dna.mixtures.join import JoinExpertsConfig, join_experts, plan_join_experts
    from fastmerge.dna.mixtures.moe import merge_to_moe
    from fastmerge.dna.mixtures.more import MoreExpertsConfig, more_experts, plan_more_experts
    from fastmerge.dna.mixtures.routing import router_statistics
    from fastmerge.dna.upcycling import UpcyclingConfig, plan_upcycle, upcycle_dense_to_moe
    from fastmerge.dna.upcycling.balance import attach_moe_aux_loss

_LAZY = {
    "Expert": "mixtures.document",
    "FewerExpertsConfig": "mixtures.fewer",
    "JoinExpertsConfig": "mixtures.join",
    "MoEMergeConfig": "mixtures.document",
    "MoreExpertsConfig": "mixtures.more",
    "TrunkConfig": "mixtures.document",
    "UpcyclingConfig": "upcycling",
    "attach_moe_aux_loss": "upcycling.balance",
    "fewer_experts": "mixtures.fewer",
    "join_experts": "mixtures.join",
    "merge_to_moe": "mixtures.moe",
    "more_experts": "mixtures.more",
    "plan_fewer_experts": "mixtures.fewer",
    "plan_join_experts": "mixtures.join",
    "plan_moe_merge": "mixtures.dense",
    "plan_more_experts": "mixtures.more",
    "plan_upcycle": "upcycling",
    "router_statistics": "mixtures.routing",
    "upcycle_dense_to_moe": "upcycling",
}

__all__ = [
    "Expert",
    "FewerExpertsConfig",
    "JoinExpertsConfig",
    "MoEMergeConfig",
    "MoreExpertsConfig",
    "TrunkConfig",
    "UpcyclingConfig",
    "attach_moe_aux_loss",
    "fewer_experts",
    "join_experts",
    "merge_to_moe",
    "more_experts",
    "plan_fewer_experts",
    "plan_join_experts",
    "plan_moe_merge",
    "plan_more_experts",
    "plan_upcycle",
    "router_statistics",
    "upcycle_dense_to_moe",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
