"""The coefficients of the experts: how many there are, which tensor has which, and what is learned of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fastmerge.errors import hint
from fastmerge.ops.segments import F64

Granularity = Literal["task", "model", "layer", "tensor", "module"]
"""Which tensors share their coefficients.

``task`` (also ``model``): all; the paper's task-wise. ``layer`` (also ``tensor``): none, each parameter tensor has its
own; the paper's layer-wise. ``module``: those whose names differ in numbers alone, as one weight does from layer to
layer.
"""

Parametrisation = Literal["clamp", "softmax", "free"]
"""What is learned. ``clamp``: the coefficients, held within 0 .. 1, where nothing beyond has a gradient (the paper's).
``softmax``: their logits, so that they add up to one. ``free``: the coefficients, without bounds.
"""

GRANULARITIES = ("task", "model", "layer", "tensor", "module")
PARAMETRISATIONS = ("clamp", "softmax", "free")


def word(name: str, value: object, known: Sequence[str]) -> list[str]:
    """A problem where a setting is none of the words that it may be."""
    if value in known:
        return []
    return [f"{name}: expected one of {', '.join(known)}; got {value!r}{hint(str(value), known)}"]


def settings(granularity: object, parametrisation: object, prior: object) -> list[str]:
    """Everything that is wrong with how coefficients shall be."""
    found = word("granularity", granularity, GRANULARITIES)
    found += word("parametrisation", parametrisation, PARAMETRISATIONS)
    if prior is None:
        return found
    if parametrisation == "softmax":
        found.append("prior: with parametrisation softmax the models start with equal shares")
    elif isinstance(prior, bool) or not isinstance(prior, int | float) or not math.isfinite(prior):
        found.append(f"prior: expected a finite number; got {prior!r}")
    return found


def rows_of(names: Sequence[str], granularity: Granularity) -> tuple[int, ...]:
    """The row of coefficients of each tensor, counted from 0 in the order of the names."""
    if granularity in ("task", "model"):
        return (0,) * len(names)
    if granularity in ("layer", "tensor"):
        return tuple(range(len(names)))
    kinds: dict[str, int] = {}
    return tuple([kinds.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), len(kinds)) for name in names])


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of N experts, from numbers that an optimizer changes.

    Attributes:
        raw: fp64 ``[rows, N]`` on the CPU, ``[rows, N + 1]`` where the base has a share.
        row: of each tensor.
        parametrisation: how ``raw`` becomes coefficients.
        based: whether the base takes part in the softmax, as its first entry: a soup, whose shares add up to one.
    """

    raw: torch.nn.Parameter
    row: tuple[int, ...]
    parametrisation: Parametrisation = "clamp"
    based: bool = False

    def table(self) -> F64:
        """``[rows, N]``: the coefficients as they are now."""
        raw = self.raw.detach().cpu().double()
        if self.parametrisation == "softmax":
            raw = raw.softmax(dim=1)
        elif self.parametrisation == "clamp":
            raw = raw.clamp(0.0, 1.0)
        found: F64 = raw.numpy()
        return found[:, 1:] if self.based else found

    def values(self) -> F64:
        """``[P, N]``: those of every tensor."""
        return np.ascontiguousarray(self.table()[list(self.row)])

    def absorb(self, which: Sequence[int], slopes: F64) -> None:
        """Adds the gradient of ``raw`` that follows from gradients of some tensors' coefficients.

        Args:
            which: numbers of the tensors.
            slopes: ``[len(which), N]``.
        """
        touched, place = np.unique([self.row[p] for p in which], return_inverse=True)
        rows = np.zeros((len(touched), slopes.shape[1]))
        np.add.at(rows, place.reshape(-1), slopes)
        found = torch.from_numpy(rows)
        if self.based:
            found = torch.cat([torch.zeros(len(rows), 1, dtype=torch.float64), found], dim=1)
        raw = self.raw.detach()[touched.tolist()].cpu().double()
        if self.parametrisation == "softmax":
            share = raw.softmax(dim=1)
            found = share * (found - (share * found).sum(dim=1, keepdim=True))
        elif self.parametrisation == "clamp":
            found = torch.where((raw >= 0) & (raw <= 1), found, 0.0)
        if self.raw.grad is None:
            self.raw.grad = torch.zeros_like(self.raw)
        self.raw.grad[touched.tolist()] += found.to(self.raw)
