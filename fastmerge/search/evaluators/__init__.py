"""What says how good a model is, item by item."""

from __future__ import annotations

from fastmerge.search.evaluators.base import Each, Served, Subset, means, score, weights
from fastmerge.search.evaluators.lines import Accuracy, Perplexity
from fastmerge.search.evaluators.named import named

__all__ = ["Accuracy", "Each", "Perplexity", "Served", "Subset", "means", "named", "score", "weights"]
