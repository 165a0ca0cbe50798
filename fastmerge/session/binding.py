"""A recipe bound to the tensors that it is rendered into: planned once, rendered with any numbers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Source, Spec
from fastmerge.planning.numbers import renumbered

if TYPE_CHECKING:
    import torch

    from fastmerge.planning import Plan
    from fastmerge.recipe import Recipe


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


class Due(NamedTuple):
    """A tensor of a target, and what it is to hold.

    Attributes:
        op: over memory.
        tensor: where it writes.
        address: of that.
        content: equal where the bytes are: inputs, method with its numbers, and all else that counts; None where other
            numbers count as well: those of a stage, or of all tensors together.
        inputs: addresses; None where a stage makes some of them.
    """

    op: Op
    tensor: torch.Tensor
    address: int
    content: tuple[object, ...] | None
    inputs: tuple[int, ...] | None


class Contents:
    """What a session wrote where, so that nothing is written twice.

    A tensor counts as changed since where torch has counted a change: by an optimiser, ``copy_``, ``load_state_dict``.
    What goes past that count (``.data``, numpy, another program) only the caller knows; of tensors that were made in
    inference mode torch keeps no count, and nothing is known.
    """

    def __init__(self) -> None:
        self._known: dict[int, Written] = {}

    def holds(self, due: Due) -> bool:
        """Whether a tensor has what it is to hold already."""
        known = self._known.get(due.address)
        return (
            known is not None
            and known.content is not None
            and known.content == due.content
            and known.tensor() is due.tensor
            and known.version == _version(due.tensor)
        )

    def forget(self, due: Sequence[Due]) -> None:
        """Nothing is known of some tensors."""
        for one in due:
            self._known.pop(one.address, None)

    def keep(self, due: Sequence[Due]) -> None:
        """The tensors hold what they were to."""
        if len(self._known) > 2 * len(due) + 1024:
            self._known = {at: known for at, known in self._known.items() if known.tensor() is not None}
        import torch

        counted = [one for one in due if not one.tensor.is_inference()]
        torch.autograd.graph.increment_version([one.tensor for one in counted])  # so that autograd knows as well
        for one in counted:
            self._known[one.address] = Written(weakref.ref(one.tensor), _version(one.tensor), one.content)


def _version(tensor: torch.Tensor) -> int:
    """How often torch has counted a change."""
    found: int = tensor._version  # noqa: SLF001  it has no other name
    return found


def _kind(spec: Spec) -> tuple[object, ...] | None:
    """What a spec says of the bytes (-0.0 is not 0.0); None where other tensors say something as well."""
    if spec.grain == "model":
        return None
    return repr(spec.method), spec.out_dtype, spec.has_base, spec.models


class Bound:
    """A plan with its targets."""

    def __init__(self, plan: Plan, ops: Sequence[Op], tensors: Sequence[torch.Tensor]) -> None:
        """Takes the plan of a recipe, its ops over memory, and the tensor that each op writes to."""
        self._plan = plan
        self._first = ops
        self._tensors = [weakref.ref(t) for t in tensors]
        self._inputs = [_addresses(op.inputs) for op in ops]
        self._outputs = [cast("Memory", op.targets[0]).address for op in ops]
        self.use({})

    def all(self) -> list[Due]:
        """What each tensor is to hold with the numbers in effect; of those that are still there."""
        every = zip(self._ops, self._tensors, self._outputs, self._contents, self._inputs, strict=True)
        return [Due(op, t, out, content, inputs) for op, ref, out, content, inputs in every if (t := ref()) is not None]

    def use(self, specs: Mapping[Spec, Spec]) -> None:
        """Takes other numbers: for each spec of the plan that they change the new one."""
        news = {op.spec: specs.get(op.spec, op.spec) for op in self._first}
        kinds = {old: _kind(new) for old, new in news.items()}
        self._ops = [Op(op.name, news[op.spec], *op[2:]) for op in self._first]
        self._contents = [
            (op.inputs, op.key, *kind) if inputs is not None and (kind := kinds[op.spec]) is not None else None
            for op, inputs in zip(self._first, self._inputs, strict=True)
        ]

    def set(self, recipe: Recipe) -> bool:
        """Takes the numbers of a recipe of the same skeleton; False where only planning again can.

        Raises:
            RecipeError: where its parameters do not fit.
        """
        if self._plan.documents or any(ref() is None for ref in self._tensors):  # others may be where those were
            return False
        specs = renumbered(self._plan, recipe)
        if specs is not None:
            self.use(specs)
        return specs is not None


def _addresses(inputs: Sequence[Source]) -> tuple[int, ...] | None:
    """Of inputs in memory; None where some are made first."""
    return tuple([s.address for s in inputs if type(s) is Memory]) if all(type(s) is Memory for s in inputs) else None
