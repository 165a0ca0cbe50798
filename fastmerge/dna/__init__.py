"""DNA transfer: a model of another shape out of the weights of one that is there.

Every name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.api.deltas import ConsensusMethod, SparsificationMethod, get_consensus_mask, sparsify_delta
    from fastmerge.dna.parent import Parent
    from fastmerge.dna.pipeline import create_dna_transfer_pipeline
    from fastmerge.dna.results import Made
    from fastmerge.search.evolutionary import EvolutionaryMergeConfig, MergeStrategy, evolutionary_merge

_LAZY = {
    "ConsensusMethod": "api.deltas",
    "SparsificationMethod": "api.deltas",
    "get_consensus_mask": "api.deltas",
    "sparsify_delta": "api.deltas",
    "Parent": "dna.parent",
    "create_dna_transfer_pipeline": "dna.pipeline",
    "Made": "dna.results",
    "EvolutionaryMergeConfig": "search.evolutionary",
    "MergeStrategy": "search.evolutionary",
    "evolutionary_merge": "search.evolutionary",
}

__all__ = [
    "ConsensusMethod",
    "EvolutionaryMergeConfig",
    "Made",
    "MergeStrategy",
    "Parent",
    "SparsificationMethod",
    "create_dna_transfer_pipeline",
    "evolutionary_merge",
    "get_consensus_mask",
    "sparsify_delta",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastmerge.dna' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastmerge.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
