"""A recipe bound to the tensors that it is rendered into: planned once, rendered with any numbers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Spec
from fastmerge.planning.numbers import renumbered

if TYPE_CHECKING:
    import torch

    from fastmerge.planning import Plan
    from fastmerge.recipe import Recipe


MOST = 4096
"""Specs whose numbers are kept as text."""


class Written(NamedTuple):
    """What a session last wrote to a tensor.

    Attributes:
        tensor: which one.
        version: torch's count of changes to it, afterwards.
        content: what was computed; None where that is not known.
    """

    tensor: weakref.ref[torch.Tensor]
    version: int
    content: tuple[object, ...] | None


class Contents:
    """What a session wrote where, so that nothing is written twice.

    A tensor counts as changed since where torch has counted a change: by an optimiser, ``copy_``, ``load_state_dict``.
    What goes past that count (``.data``, numpy, another program) only the caller knows; of tensors that were made in
    inference mode torch keeps no count, and nothing is known.
    """

    def __init__(self) -> None:
        self._known: dict[int, Written] = {}
        self._words: dict[Spec, str] = {}

    def holds(self, op: Op, tensor: torch.Tensor) -> bool:
        """Whether a tensor has the result of an op already."""
        known = self._known.get(tensor.data_ptr())
        return (
            known is not None
            and known.tensor() is tensor
            and known.version == _version(tensor)
            and known.content is not None
            and known.content == self._content(op)
        )

    def forget(self, tensors: Sequence[torch.Tensor]) -> None:
        """Nothing is known of some tensors."""
        for tensor in tensors:
            self._known.pop(tensor.data_ptr(), None)

    def keep(self, ops: Sequence[Op], tensors: Sequence[torch.Tensor]) -> None:
        """The tensors hold the results of the ops."""
        if len(self._known) > 2 * len(ops) + 1024:
            self._known = {at: known for at, known in self._known.items() if known.tensor() is not None}
        import torch

        for op, tensor in zip(ops, tensors, strict=True):
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)  # so that autograd knows as well
                self._known[tensor.data_ptr()] = Written(weakref.ref(tensor), _version(tensor), self._content(op))

    def _content(self, op: Op) -> tuple[object, ...] | None:
        """Equal where the bytes are: inputs, method with its numbers (-0.0 is not 0.0), and all else that counts.

        None where other numbers count: those of a stage, or of all tensors together.
        """
        spec = op.spec
        if spec.grain == "model" or any(type(source) is not Memory for source in op.inputs):
            return None
        words = self._words.get(spec)
        if words is None:
            if len(self._words) > MOST:
                self._words.clear()
            words = self._words[spec] = repr(spec.method)
        return (op.inputs, words, op.key, spec.out_dtype, spec.has_base, spec.models)


def _version(tensor: torch.Tensor) -> int:
    """How often torch has counted a change."""
    found: int = tensor._version  # noqa: SLF001  it has no other name
    return found


class Bound:
    """A plan with its targets.

    Attributes:
        ops: over memory, with the numbers in effect.
    """

    def __init__(self, plan: Plan, ops: Sequence[Op], tensors: Sequence[torch.Tensor]) -> None:
        """Takes the plan of a recipe, its ops over memory, and the tensor that each op writes to."""
        self.ops = ops
        self._plan = plan
        self._first = ops
        self._tensors = [weakref.ref(t) for t in tensors]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Where each op writes; fewer where some are gone."""
        return [t for ref in self._tensors if (t := ref()) is not None]

    def use(self, specs: Mapping[Spec, Spec]) -> None:
        """Takes other numbers: for each spec of the plan that they change the new one."""
        self.ops = [op._replace(spec=specs.get(op.spec, op.spec)) for op in self._first]

    def set(self, recipe: Recipe) -> bool:
        """Takes the numbers of a recipe of the same skeleton; False where only planning again can.

        Raises:
            RecipeError: where its parameters do not fit.
        """
        if self._plan.documents or len(self.tensors) < len(self.ops):  # others may be where the lost ones were
            return False
        specs = renumbered(self._plan, recipe)
        if specs is not None:
            self.use(specs)
        return specs is not None
