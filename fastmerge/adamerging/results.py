"""What was learned: coefficients, the merged weights, and the recipe that makes them anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastmerge.adamerging.recipe import Path, parameters, recipe
from fastmerge.adamerging.states import States
from fastmerge.adamerging.streams import dtype_of
from fastmerge.adamerging.trim import PRESET
from fastmerge.api.tensors import merge_state_dicts
from fastmerge.dtypes import DType
from fastmerge.errors import RecipeError
from fastmerge.recipe import Recipe


@dataclass(frozen=True)
class AdaMerged:
    """Learned coefficients of task vectors.

    Attributes:
        states: base and experts that they are for.
        coefficients: one per expert, by the name of the tensor.
        losses: of each task, by step.
        density: share of each task vector that was kept before the election, of AdaMerging++; else None.
        backend: that computed, and computes :meth:`state_dict`.
    """

    states: States = field(repr=False)
    coefficients: dict[str, list[float]]
    losses: list[list[float]] = field(repr=False)
    density: float | None = None
    backend: str | None = None

    def recipe(self, base: Path, models: Sequence[Path]) -> Recipe:
        """The recipe of the same merge for models on disk: ``task_arithmetic``, or ``ties`` of AdaMerging++.

        ``fastmerge merge`` of it gives the bytes of :meth:`state_dict`; :meth:`~fastmerge.Recipe.to_yaml` writes it.

        Args:
            base: the base's directory, or ``org/name`` on the hub.
            models: those of the experts, in their order.

        Raises:
            RecipeError: for another number of models, and where a recipe cannot say the result's types.
        """
        every = self.coefficients | {name: self.coefficients[owner] for name, owner in self.states.tied.items()}
        return recipe(every, base, models, out_dtype=out_dtype(self.states), **self._how())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The merged weights by the names of the base, of its types; tied names are one tensor."""
        how, wanted = self._how(), out_dtype(self.states)
        merged = merge_state_dicts(
            self.states.dicts,
            how["method"],
            preset=how.get("preset"),
            parameters={"weight": parameters(self.coefficients), **how.get("shared", {})},
            base=0,
            out_dtype=None if wanted is None else getattr(torch, wanted),
            backend=self.backend,
        )
        merged |= {name: merged[owner] for name, owner in self.states.tied.items()}
        return merged | {name: t.detach().clone() for name, t in self.states.others.items()}

    def _how(self) -> dict[str, Any]:
        if self.density is None:
            return {"method": "task_arithmetic"}
        return {"method": "ties", "preset": PRESET, "shared": {"density": self.density, "lambda": 1.0}}


def out_dtype(states: States) -> str | None:
    """The result's type for a recipe; None where the inputs promote to the base's anyway.

    Raises:
        RecipeError: where the base has several types and an expert has others: no recipe says that.
    """
    kinds = {tuple(dtype_of(x) for x in group) for group in states.inputs}
    if all(len(set(dtypes)) == 1 for dtypes in kinds):
        return None
    bases: set[DType] = {dtypes[0] for dtypes in kinds}
    if len(bases) > 1:
        names = ", ".join(sorted(d.name for d in bases))
        raise RecipeError(f"the base has tensors of {names} and experts have others: convert them to the base's types")
    return bases.pop().name
