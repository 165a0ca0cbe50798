"""The sources of a plan, in the memory of a session: files are there, and what is made of them is made once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmerge.checkpoint import Checkpoint, Files
from fastmerge.ops.sources import FileRange, Made, Memory, Result, results_of
from fastmerge.ops.spec import Op, Source
from fastmerge.runtime.devices import cores
from fastmerge.runtime.stores import OpStore
from fastmerge.runtime.workers import each
from fastmerge.session.models import Models, place_of

PART = 1 << 20
"""Elements of a source that a thread makes at a time."""


class Sources:
    """Gives the ops of plans inputs in memory.

    Adapters are applied, 8-bit floats widened, rows put in the order of another vocabulary: all of that is done when
    a recipe first asks for it, and kept. Only what a recipe's own stages make is made anew for each render.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self._made: dict[object, Memory] = {}

    def ops(self, ops: Sequence[Op], checkpoints: Sequence[Checkpoint]) -> list[Op]:
        """The same ops over memory.

        Args:
            ops: of a plan.
            checkpoints: of that plan.

        Raises:
            CheckpointError: where an adapter cannot be read any more.
        """
        with Files(checkpoints) as files:
            mover = _Mover(self._models, self._made, checkpoints, OpStore((), files))
            return [op._replace(inputs=tuple([mover(s) for s in op.inputs])) for op in ops]

    def close(self) -> None:
        """Forgets what was made."""
        self._made.clear()


class _Mover:
    """Moves the sources of one plan."""

    def __init__(
        self, models: Models, made: dict[object, Memory], checkpoints: Sequence[Checkpoint], store: OpStore
    ) -> None:
        self._models = models
        self._made = made
        self._checkpoints = checkpoints
        self._store = store
        self._results: dict[int, Op] = {}

    def __call__(self, value: Any) -> Any:
        """A source in memory; anything else as it is."""
        if type(value) is FileRange:
            place = place_of(self._checkpoints[value.model], value.info)
            if place not in self._models.places:
                self._models.places[place] = self._make(value)
            return self._models.places[place]
        if type(value) is tuple:
            return tuple([self(v) for v in value])
        if type(value) is Result:
            return Result(self._op(value.op), tuple([self._op(op) for op in value.together]))
        if isinstance(value, Made):
            key = self._key(value) if not any(results_of(value)) else None
            if key not in self._made:
                fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
                moved: Made = type(value)(**{name: self(v) for name, v in fields.items()})
                if key is None:  # of what a stage makes
                    return moved
                self._made[key] = self._make(moved)
            return self._made[key]
        return value

    def _op(self, op: Op) -> Op:
        """The op of a result, once."""
        if id(op) not in self._results:
            self._results[id(op)] = op._replace(inputs=tuple([self(s) for s in op.inputs]))
        return self._results[id(op)]

    def _make(self, source: Source) -> Memory:
        """Computes a source, or reads it, into memory of the session."""
        count, size = math.prod(source.shape), source.dtype.size
        address = self._models.keep(source.dtype.nbytes(count))

        def bring(e0: int) -> None:
            runs = np.array([[e0, min(PART, count - e0), address + e0 * size]], np.int64)
            self._store.bring(source, runs)

        each(bring, range(0, count, PART), threads=cores(), name="make")
        return Memory(address, source.dtype, source.shape)

    def _key(self, value: Any) -> object:
        """Equal for sources that are made alike of the same bytes."""
        if type(value) is FileRange:
            return (place_of(self._checkpoints[value.model], value.info), value.info.dtype.name, value.info.shape)
        if isinstance(value, np.ndarray):
            return (value.dtype.str, value.shape, value.tobytes())
        if type(value) is tuple:
            return tuple([self._key(v) for v in value])
        if isinstance(value, Made):
            parts = [self._key(getattr(value, f.name)) for f in dataclasses.fields(value)]  # type: ignore[arg-type]
            return (type(value).__name__, *parts)
        return value
