"""Coefficients of task vectors, learned by gradient: AdaMerging, learned soups, and the fused pair below them."""

from __future__ import annotations

from fastmerge.backends.probe import torch_reason
from fastmerge.errors import BackendUnavailable

if reason := torch_reason():
    raise BackendUnavailable(f"learning coefficients: {reason}")

from fastmerge.adamerging.coefficients import Coefficients
from fastmerge.adamerging.function import merged_parameters, merged_tensor
from fastmerge.adamerging.module import MergedModule
from fastmerge.adamerging.objectives import Seen, Task
from fastmerge.adamerging.results import AdaMerged
from fastmerge.adamerging.soup import LearnedSoup, learned_soup
from fastmerge.adamerging.training import AdaMerging, AdaMergingConfig

__all__ = [
    "AdaMerged",
    "AdaMerging",
    "AdaMergingConfig",
    "Coefficients",
    "LearnedSoup",
    "MergedModule",
    "Seen",
    "Task",
    "learned_soup",
    "merged_parameters",
    "merged_tensor",
]
