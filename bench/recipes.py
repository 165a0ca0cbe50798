"""The recipes of the benchmarks, in the grammar that fastmerge and mergekit share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METHODS = ("linear", "slerp", "dare_linear", "dare_ties", "ties", "model_stock", "passthrough")
"""Those that mergekit has as well."""


def recipe(method: str, family: Sequence[Path]) -> dict[str, Any]:
    """A recipe over a base and its fine-tunes.

    Args:
        method: one of :data:`METHODS`, ``checkpoint_average``, or ``karcher`` (of the fine-tunes, in fp32).
        family: base, then at least two fine-tunes; slerp takes the first two fine-tunes, passthrough one,
            checkpoint_average all with the base, and all other methods every fine-tune.
    """
    base, *tuned = (str(path) for path in family)
    share = 1.0 / len(tuned)

    def models(**parameters: float) -> list[dict[str, Any]]:
        return [{"model": name, "parameters": parameters} if parameters else {"model": name} for name in tuned]

    bodies: dict[str, dict[str, Any]] = {
        "linear": {"models": models(weight=share)},
        "slerp": {"models": models()[:2], "base_model": tuned[0], "parameters": {"t": 0.4}},
        "dare_linear": {"models": models(weight=share, density=0.5), "base_model": base},
        "dare_ties": {"models": models(weight=share, density=0.5), "base_model": base},
        "ties": {"models": models(weight=share, density=0.2), "base_model": base},
        "model_stock": {"models": models(), "base_model": base},
        "passthrough": {"models": models()[:1]},
        "checkpoint_average": {"models": [{"model": str(p)} for p in family], "parameters": {"schedule": "cosine"}},
        "karcher": {"models": models(), "parameters": {"max_iter": 20000, "tol": 1e-9}, "dtype": "float32"},
    }
    return {"merge_method": method, "dtype": "bfloat16", **bodies[method]}


def inputs(body: dict[str, Any]) -> list[Path]:
    """The checkpoints that a recipe reads, each once."""
    names = [row["model"] for row in body["models"]] + ([body["base_model"]] if "base_model" in body else [])
    return [Path(name) for name in dict.fromkeys(names)]


def write(body: dict[str, Any], path: Path) -> Path:
    """Writes a recipe; JSON is YAML, and needs no library here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n")
    return path
