"""What weights say of the experts of a layer: their norms, and how much they are alike. Read a panel at a time."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastmerge.dna.anatomy import Anatomy
from fastmerge.dna.mixtures.layout import expert, parts
from fastmerge.dna.reading import Reader
from fastmerge.errors import CheckpointError

if TYPE_CHECKING:
    import numpy.typing as npt

PANEL_BYTES = 64 << 20
"""Of fp64 numbers that are looked at at a time: of all experts together."""

F64: TypeAlias = "npt.NDArray[np.float64]"


def grams(reader: Reader, model: Anatomy, layer: int) -> list[F64]:
    """Inner products of the experts of a layer, ``[E, E]`` for each kind of matrix; biases do not count.

    Memory: :data:`PANEL_BYTES`, and as much again while a panel is multiplied.
    """
    experts = model.sizes["experts"]
    found = []
    for pattern, part in parts(model, layer):
        if part.role.endswith("_bias"):
            continue
        sources = [expert(model, layer, pattern, e) for e in range(experts)]
        n, step = prod(sources[0].shape), max(1, PANEL_BYTES // (8 * experts))
        gram = np.zeros((experts, experts))
        for e0 in range(0, n, step):
            panel = np.stack([reader.read(s, e0, min(step, n - e0)).astype(np.float64) for s in sources])
            gram += panel @ panel.T
        if not np.isfinite(gram).all():
            raise CheckpointError(f"{model.arch.layers}.{layer}.{pattern}: NaN or Inf; expected finite values")
        found.append(gram)
    return found


def norms(given: Sequence[F64]) -> F64:
    """``[E]``: the product of the norms of an expert's matrices, which scaling one up and another down leaves alone."""
    return np.asarray(np.prod([np.sqrt(np.diagonal(g)) for g in given], axis=0), np.float64)


def likeness(given: Sequence[F64]) -> F64:
    """``[E, E]``: the mean over the kinds of matrix of the cosine between two experts, to nine places.

    BLAS sums in an order of its own: rounded, a choice by it is the same on all machines but at exact ties.
    """
    cosines = []
    for gram in given:
        norm = np.sqrt(np.diagonal(gram))
        scale = np.outer(norm, norm)
        cosines.append(np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0))
    return np.asarray(np.round(np.mean(cosines, axis=0), 9), np.float64)
