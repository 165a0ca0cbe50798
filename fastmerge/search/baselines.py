"""What a search has to beat: every single model, and all of them with equal weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmerge.search.space import Space


def baselines(space: Space) -> dict[str, dict[str, Any]]:
    """Recipes by name: each model by itself (the base too), and ``uniform``, the mean of all but the base.

    Args:
        space: whose models.

    Returns:
        The recipes; none where the space has no list of models, or changes the tokenizer: a single model then has
        other shapes.
    """
    template = space.template
    entries = template.get("models")
    if not isinstance(entries, list) or {"tokenizer", "tokenizer_source"} & template.keys():
        return {}
    refs = [entry.get("model") if isinstance(entry, Mapping) else None for entry in entries]
    base = template.get("base_model")
    if not refs or not all(isinstance(ref, str) for ref in refs):
        return {}
    shared = {key: template[key] for key in ("dtype", "out_dtype") if isinstance(template.get(key), str)}

    def mean(*models: Any) -> dict[str, Any]:
        weighted = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
        return {"merge_method": "linear", "models": weighted, **shared}

    every = list(dict.fromkeys([*([base] if isinstance(base, str) else []), *refs]))
    out = {space.short(ref): mean(ref) for ref in every}
    tuned = [ref for ref in refs if ref != base]
    if len(tuned) > 1:
        out["uniform"] = mean(*tuned)
    return out
