"""The space of layer paths: which source layer each layer of the output is, as in frankenmerges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.errors import RecipeError


def layer_paths(
    models: Mapping[str, int] | Sequence[str],
    *,
    layers: int | None = None,
    blocks: int | None = None,
    near: int | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """A template for :class:`~fastmerge.search.space.Space`: every block of output layers chooses where it comes from.

    Args:
        models: how many layers each model has, by model; names alone are looked up in their headers.
        layers: of the output; None for as many as the first model has.
        blocks: consecutive layers of the output that are chosen together: there are so many of these blocks, of equal
            size; None for one block per layer.
        near: choose only among blocks that stand at most so many blocks from the same relative depth in their model;
            None for every block. ``near=0`` chooses the model alone.
        dtype: of the result; None for that of the sources.

    Returns:
        A passthrough recipe with a slice for each block. What is outside the layers comes as the engine has it: what
        stands before the layers from the model of the first slice, what stands behind from that of the last.

    Raises:
        RecipeError: the numbers of layers do not divide, or nothing is left to choose.
    """
    counts = dict(models) if isinstance(models, Mapping) else {m: _count(m) for m in models}
    if not counts:
        raise RecipeError("models: expected one or more, got none")
    total = next(iter(counts.values())) if layers is None else layers
    number = total if blocks is None else blocks
    problems = []
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        problems.append(f"layers: expected a number of 1 or more, got {total!r:.80}")
    elif isinstance(number, bool) or not isinstance(number, int) or number < 1 or total % number:
        problems.append(f"blocks: expected a number that divides {total} layers, got {number!r:.80}")
    else:
        size = total // number
        wrong = [f"{m}: {n} layers are no whole blocks of {size}" for m, n in counts.items() if n < 1 or n % size]
        problems += wrong
    if near is not None and (isinstance(near, bool) or not isinstance(near, int) or near < 0):
        problems.append(f"near: expected a number of 0 or more, got {near!r:.80}")
    if problems:
        raise RecipeError(problems)
    slices = []
    for block in range(number):
        choices = [
            [{"model": model, "layer_range": [i * size, (i + 1) * size]}]
            for model, count in counts.items()
            for i in range(count // size)
            if near is None or abs(i - block * (count // size - 1) / max(number - 1, 1)) <= near + 0.5
        ]
        slices.append({"sources": {"choices": choices}})
    out: dict[str, Any] = {"merge_method": "passthrough", "slices": slices}
    return out | ({"dtype": dtype} if dtype else {})


def _count(model: str) -> int:
    """The layers of a model on disk."""
    from fastmerge.checkpoint import Checkpoint
    from fastmerge.planning.structure import structure
    from fastmerge.recipe.refs import model_ref

    checkpoint = Checkpoint.open(model_ref(model).path)
    main = structure(checkpoint.tensors, checkpoint.config or {}).main
    if main is None:
        raise RecipeError(f"{model}: its tensor names show no list of layers, or several of the same size")
    return main.count
