"""What says how good a model is, item by item."""

from __future__ import annotations

from fastmerge.search.evaluators.base import Evaluator, Function, Scores, Served, Subset, means, score, weights
from fastmerge.search.evaluators.lines import Accuracy, Perplexity
from fastmerge.search.evaluators.named import evaluator, named

__all__ = [
    "Accuracy",
    "Evaluator",
    "Function",
    "Perplexity",
    "Scores",
    "Served",
    "Subset",
    "evaluator",
    "means",
    "named",
    "score",
    "weights",
]
