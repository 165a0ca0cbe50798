"""Learned coefficients as an ordinary recipe: a weight per model, with a filter per tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.recipe import Recipe

Path = str | os.PathLike[str]


def rules(weights: Mapping[str, float]) -> Any:
    """A parameter that has a value for each tensor name: one number where all are equal, else filters.

    A filter counts for every name that it is part of, and the first that does decides: the longest names come first,
    so that a name's own filter is the first one that it meets.
    """
    values = set(weights.values())
    if len(values) == 1:
        return values.pop()
    ordered = sorted(weights, key=lambda name: (-len(name), name))
    return [{"filter": name, "value": weights[name]} for name in ordered]


def parameters(coefficients: Mapping[str, Sequence[float]]) -> list[Any]:
    """The parameter ``weight`` of each expert.

    Args:
        coefficients: one per expert, by tensor name.
    """
    return [
        rules({name: float(row[i]) for name, row in coefficients.items()})
        for i in range(len(next(iter(coefficients.values()))))
    ]


def recipe(
    coefficients: Mapping[str, Sequence[float]],
    base: Path,
    models: Sequence[Path],
    *,
    method: str,
    preset: str | None = None,
    shared: Mapping[str, float] | None = None,
    out_dtype: str | None = None,
) -> Recipe:
    """The recipe of a base plus weighted task vectors.

    Args:
        coefficients: one per model, by tensor name.
        base: the base's directory, or ``org/name`` on the hub.
        models: those of the experts, in their order.
        method: ``task_arithmetic``, or ``ties`` where entries were selected.
        preset: of the method.
        shared: the method's other parameters.
        out_dtype: of the result, where it is not the one that the inputs promote to.

    Raises:
        RecipeError: for another number of models than of coefficients.
    """
    weights = parameters(coefficients)
    if len(models) != len(weights):
        raise RecipeError(f"models: expected {len(weights)}, one per expert, got {len(models)}")
    plain: dict[str, Any] = {"merge_method": method, "base_model": os.fspath(base)}
    if preset is not None:
        plain["preset"] = preset
    plain["models"] = [
        {"model": os.fspath(model), "parameters": {"weight": weight}}
        for model, weight in zip(models, weights, strict=True)
    ]
    if shared:
        plain["parameters"] = dict(shared)
    if out_dtype is not None:
        plain["out_dtype"] = out_dtype
    return Recipe.load(plain)
