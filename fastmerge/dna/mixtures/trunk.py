"""What several models have in common, merged by any method of the engine while their experts stay apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.dna.anatomy import Anatomy
from fastmerge.dna.draft import Draft, Slot
from fastmerge.dtypes import DType
from fastmerge.errors import RecipeError, ShapeError, hint
from fastmerge.methods import METHODS
from fastmerge.methods.called import called
from fastmerge.ops.spec import Source, Spec


class Trunk:
    """One method for the tensors that are no expert's.

    Args:
        method: a name of ``fastmerge methods``.
        parameters: as of :func:`fastmerge.merge_tensors`: scalars, lists in the order of ``models``, mappings by
            model, gradients over the layers, filters. ``linear`` without any is the mean.
        models: what the merged ones are called, without the base.
        base: what the base is called, where there is one.
        preset: a published variant of the method.

    Raises:
        RecipeError: an unknown method, a wrong parameter, or a number of models that the method does not take.
    """

    def __init__(
        self,
        method: str,
        parameters: Mapping[str, Any] | None,
        models: Sequence[str],
        *,
        base: str | None = None,
        preset: str | None = None,
    ) -> None:
        found = METHODS.get(method)
        if found is None:
            raise RecipeError(f"merge_method: unknown method {method!r}{hint(str(method), METHODS)}")
        if found.name == "linear" and not parameters and preset is None:
            preset = "soup"
        if base is not None and found.contract.base == "ignored":
            raise RecipeError(f"merge_method: {method} knows no base: expected it among the models, or left out")
        problem = found.contract.problem(method, len(models), has_base=base is not None)
        if problem:
            raise RecipeError(f"merge_method: {problem}")
        self._resolver = called(found, parameters, list(models), preset)
        self._count = len(models)
        self._has_base = base is not None
        self._checked: set[int] = set()

    @staticmethod
    def wants_base(method: str) -> bool:
        """Whether a method works on task vectors, so that it needs a base."""
        found = METHODS.get(method)
        return found is not None and found.contract.base == "required"

    def add(self, draft: Draft, to: str | Slot, name: str, sources: Sequence[Source], dtype: DType, t: float) -> None:
        """Merges one tensor.

        Args:
            draft: takes the op.
            to: where the result goes.
            name: of the tensor, for filters.
            sources: base first where there is one.
            dtype: of the result.
            t: place of its layer, 0 .. 1, for gradients.

        Raises:
            ShapeError: the models' tensors differ in shape.
            RecipeError: parameters that have no value here, or do not fit.
        """
        shape = sources[0].shape
        if any(s.shape != shape for s in sources):
            raise ShapeError(f"{name}: expected one shape to merge, got {[list(s.shape) for s in sources]}")
        method = self._resolver.method(name, [(i, name) for i in range(self._count)], t)
        draft.add([to], method, sources, dtype, shape, key=name, has_base=self._has_base)
        spec: Spec = draft.pieces[-1].op.spec
        if id(spec) not in self._checked:
            self._checked.add(id(spec))
            if problems := method.check(spec):
                raise RecipeError([f"{name}: {p}" for p in problems])


def place(model: Anatomy, layer: int | None) -> float:
    """Where a layer is in the stack, 0 .. 1; 0 for tensors outside."""
    return 0.0 if layer is None or model.layers < 2 else layer / (model.layers - 1)
