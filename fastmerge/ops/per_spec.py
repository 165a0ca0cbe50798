"""Tables with a row per op, of which each kind is made once: a model of 18,867 tensors has a few dozen specs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from fastmerge.ops.segments import F64
from fastmerge.ops.spec import Op, Spec

if TYPE_CHECKING:
    import numpy.typing as npt

T = TypeVar("T")


class PerSpec(Generic[T]):
    """A value of each spec of some ops.

    Attributes:
        specs: in order of their first op.
        each: their values.
        index: ``[P]`` which one is an op's.
    """

    def __init__(self, make: Callable[[Spec], T], ops: Sequence[Op]) -> None:
        """``make(op.spec)``, called once per spec."""
        specs = [op.spec for op in ops]
        self.specs = [*dict.fromkeys(specs)]  # compared by identity
        number = {spec: i for i, spec in enumerate(self.specs)}
        self.index = np.array([number[spec] for spec in specs], np.int64)
        self.each = [make(spec) for spec in self.specs]

    @classmethod
    def of_each(cls, ops: Sequence[Op], values: Sequence[T]) -> PerSpec[T]:
        """A value of each op, where specs do not decide it."""
        out: PerSpec[T] = cls.__new__(cls)
        out.index = np.arange(len(ops))
        out.specs, out.each = [op.spec for op in ops], list(values)
        return out

    def __getitem__(self, op: int) -> T:
        """Of an op."""
        return self.each[int(self.index[op])]

    def __len__(self) -> int:
        return len(self.index)

    def all(self) -> list[T]:
        """Of all ops."""
        return [self.each[i] for i in self.index.tolist()]

    def rows(self, row: Callable[[T], object]) -> F64:
        """A table of numbers: a row per op."""
        return np.array([row(value) for value in self.each], np.float64)[self.index]

    def integers(self, row: Callable[[Spec, T], object], dtype: Any = np.int64) -> npt.NDArray[Any]:
        """The same of whole numbers."""
        return np.array([row(*pair) for pair in zip(self.specs, self.each, strict=True)], dtype)[self.index]

    def some(self, ops: Sequence[int]) -> PerSpec[T]:
        """Of some of the ops."""
        if len(ops) == len(self.index):
            return self
        out: PerSpec[T] = PerSpec.__new__(PerSpec)
        out.index = self.index[list(ops)]
        out.specs, out.each = self.specs, self.each
        return out
