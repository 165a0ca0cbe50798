"""The sources of a plan, in the memory of a session: files are there, and what is made of them is made once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmerge.checkpoint import Checkpoint, Files
from fastmerge.ops.sources import FileRange, Made, Memory, Result, inputs_of, results_of
from fastmerge.ops.spec import Op, Source
from fastmerge.runtime.devices import Buffer, cores
from fastmerge.runtime.stores import OpStore
from fastmerge.runtime.workers import each
from fastmerge.session.homes import Homes, flat
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
            return [mover.op(op) for op in ops]

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
                self._models.places[place] = self._make(value, value)
            return self._models.places[place]
        if type(value) is tuple:
            return tuple([self(v) for v in value])
        if type(value) is Result:
            return Result(self._op(value.op), tuple([self._op(op) for op in value.together]))
        if isinstance(value, Made):
            key = self._key(value) if not any(results_of(value)) else None
            if key not in self._made:
                fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
                move = self if self._models.homes is None or key is None else self._readable
                moved: Made = type(value)(**{name: move(v) for name, v in fields.items()})
                if key is None:  # of what a stage makes
                    return moved
                self._made[key] = self._make(moved, value)
            return self._made[key]
        return value

    def op(self, op: Op) -> Op:
        """The same op over memory; on GPUs that of one."""
        moved = op._replace(inputs=tuple([self(s) for s in op.inputs]))
        return moved if self._models.homes is None else self._models.homes.together(moved)

    def _op(self, op: Op) -> Op:
        """The op of a result, once."""
        if id(op) not in self._results:
            self._results[id(op)] = self.op(op)
        return self._results[id(op)]

    def _readable(self, value: Any) -> Any:
        """A source that the host can read: a caller's tensor in memory, all else from its file."""
        if type(value) is FileRange:
            return self._models.readable(place_of(self._checkpoints[value.model], value.info)) or value
        if type(value) is tuple:
            return tuple([self._readable(v) for v in value])
        if isinstance(value, Made):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
            return type(value)(**{name: self._readable(v) for name, v in fields.items()})
        return value

    def _home(self, source: Source, homes: Homes) -> int:
        """The GPU of what a source is made from, as far as that is there."""
        for part in inputs_of(source):
            if type(part) is FileRange and place_of(self._checkpoints[part.model], part.info) in self._models.places:
                return homes.place(part.info.name)
        return homes.fewest

    def _make(self, source: Source, whole: Source) -> Memory:
        """Computes a source, or reads it, into memory of the session.

        Args:
            source: as it is computed.
            whole: the same as the plan has it.
        """
        count, size, homes = math.prod(source.shape), source.dtype.size, self._models.homes
        room = Buffer.allocate(source.dtype.nbytes(count)) if homes is not None else None
        address = room.address if room is not None else self._models.keep(source.dtype.nbytes(count))

        def bring(e0: int) -> None:
            runs = np.array([[e0, min(PART, count - e0), address + e0 * size]], np.int64)
            self._store.bring(source, runs)

        each(bring, range(0, count, PART), threads=cores(), name="make")
        made = Memory(address, source.dtype, source.shape)
        if homes is None:
            return made
        return homes.bring(flat(made, "cpu"), made.dtype, made.shape, self._home(whole, homes))

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
