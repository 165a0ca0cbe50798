"""Searching for merges: which of many candidates is best.

Every name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.search.configs import benchmark_merge_configs
    from fastmerge.search.evolutionary import EvolutionaryMergeConfig, MergeStrategy, evolutionary_merge
    from fastmerge.search.genes import Gene
    from fastmerge.search.genetic import Genetic
    from fastmerge.search.journal import Evaluation
    from fastmerge.search.paths import layer_paths
    from fastmerge.search.running import Renderer, Result, search
    from fastmerge.search.samplers import SAMPLERS, Sampler, sampler
    from fastmerge.search.space import Space

_LAZY = {
    "SAMPLERS": "samplers",
    "Evaluation": "journal",
    "EvolutionaryMergeConfig": "evolutionary",
    "Gene": "genes",
    "Genetic": "genetic",
    "MergeStrategy": "evolutionary",
    "Renderer": "running",
    "Result": "running",
    "Sampler": "samplers",
    "Space": "space",
    "benchmark_merge_configs": "configs",
    "evolutionary_merge": "evolutionary",
    "layer_paths": "paths",
    "sampler": "samplers",
    "search": "running",
}

__all__ = [
    "SAMPLERS",
    "Evaluation",
    "EvolutionaryMergeConfig",
    "Gene",
    "Genetic",
    "MergeStrategy",
    "Renderer",
    "Result",
    "Sampler",
    "Space",
    "benchmark_merge_configs",
    "evolutionary_merge",
    "layer_paths",
    "sampler",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
