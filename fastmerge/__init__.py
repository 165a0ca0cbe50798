"""fastmerge: merge LLM weights at the speed of the bytes.

Importing this package imports nothing heavy: every public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmerge.errors import (
    BackendUnavailable,
    BudgetError,
    CheckpointError,
    FastMergeError,
    Interrupted,
    OutputError,
    RecipeError,
    ShapeError,
)
from fastmerge.version import __version__

if TYPE_CHECKING:
    from fastmerge.adamerging import AdaMerging, AdaMergingConfig, MergedModule, learned_soup
    from fastmerge.api.experts import replicate_experts
    from fastmerge.api.merge import merge, plan
    from fastmerge.api.task_vectors import (
        apply_task_vectors,
        compute_task_vector,
        dare_sparsify,
        dare_ties_merge,
        slerp_models,
        ties_merge,
    )
    from fastmerge.api.tensors import merge_state_dicts, merge_tensors
    from fastmerge.checkpoint import Checkpoint
    from fastmerge.planning import Plan
    from fastmerge.recipe import Recipe
    from fastmerge.report import Report
    from fastmerge.session import Session

_LAZY = {
    "AdaMerging": "adamerging",
    "AdaMergingConfig": "adamerging",
    "Checkpoint": "checkpoint",
    "MergedModule": "adamerging",
    "Plan": "planning",
    "Recipe": "recipe",
    "Report": "report",
    "Session": "session",
    "apply_task_vectors": "api.task_vectors",
    "compute_task_vector": "api.task_vectors",
    "dare_sparsify": "api.task_vectors",
    "dare_ties_merge": "api.task_vectors",
    "learned_soup": "adamerging",
    "merge": "api.merge",
    "merge_state_dicts": "api.tensors",
    "merge_tensors": "api.tensors",
    "plan": "api.merge",
    "replicate_experts": "api.experts",
    "slerp_models": "api.task_vectors",
    "ties_merge": "api.task_vectors",
}

__all__ = [
    "AdaMerging",
    "AdaMergingConfig",
    "BackendUnavailable",
    "BudgetError",
    "Checkpoint",
    "CheckpointError",
    "FastMergeError",
    "Interrupted",
    "MergedModule",
    "OutputError",
    "Plan",
    "Recipe",
    "RecipeError",
    "Report",
    "Session",
    "ShapeError",
    "__version__",
    "apply_task_vectors",
    "compute_task_vector",
    "dare_sparsify",
    "dare_ties_merge",
    "learned_soup",
    "merge",
    "merge_state_dicts",
    "merge_tensors",
    "plan",
    "replicate_experts",
    "slerp_models",
    "ties_merge",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastmerge' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastmerge.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
