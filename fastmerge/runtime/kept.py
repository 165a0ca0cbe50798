"""Inputs that stay in memory from the statistics of their tensor to its result: a disk is read, a stage made, once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from fastmerge.ops.sources import ALIGN, Memory
from fastmerge.ops.spec import Op
from fastmerge.runtime.devices import Buffer
from fastmerge.runtime.schedule import BLOCK, Job, Unit

L = TypeVar("L")


class Room(NamedTuple):
    """What the inputs of units may take beside the slots.

    Attributes:
        nbytes: of the inputs of the largest unit.
        number: of units.
    """

    nbytes: int = 0
    number: int = 0


NOTHING = Room()


def room(ops: Sequence[Op], jobs: Sequence[Job], left: int) -> Room:
    """What ``left`` bytes hold of the units that are read for statistics and again for the result."""
    largest = total = 0
    for job in jobs:
        if twice(ops, job):
            sizes = [_nbytes(ops, unit) for unit in job.units]
            largest, total = max(largest, *sizes), total + len(sizes)
    return Room(largest, min(total, max(0, left) // largest)) if largest else NOTHING


def twice(ops: Sequence[Op], job: Job) -> bool:
    """Whether a job has statistics, and more units than a slot holds."""
    return not (job.copy or job.resident) and ops[job.ops[0]].spec.grain != "element"


def _nbytes(ops: Sequence[Op], unit: Unit) -> int:
    """Bytes of the inputs that are read or made, each with blocks of its own."""
    inputs = [s.dtype.size for s in ops[unit.pieces[0][0]].inputs if type(s) is not Memory]
    apart = (ALIGN + 2 * BLOCK) * len(inputs) * len(unit.pieces)
    return sum(inputs) * sum([length for _, _, length in unit.pieces]) + apart


class Kept(Generic[L]):
    """Memory for the inputs of units. What has no room is read twice.

    Args:
        room: for how many.
    """

    def __init__(self, room: Room = NOTHING) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._left = room.number
        self._free: list[Buffer] = []
        self._held: dict[Unit, tuple[Buffer, L]] = {}

    def __contains__(self, unit: Unit) -> bool:
        return unit in self._held

    def laid(self, unit: Unit) -> L | None:
        """Where the unit's inputs are; None for a unit that is not kept."""
        found = self._held.get(unit)
        return found[1] if found is not None else None

    def take(self) -> Buffer | None:
        """Memory for the inputs of one unit: what was used last, where some is free, as its pages are there."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if not self._left:
                return None
            self._left -= 1
        return Buffer.allocate(self._room.nbytes)

    def keep(self, unit: Unit, buffer: Buffer, laid: L) -> None:
        """From now on the unit's inputs are there."""
        self._held[unit] = buffer, laid

    def drop(self, unit: Unit) -> None:
        """The unit's inputs are not asked for again; nothing for one that is not kept."""
        found = self._held.pop(unit, None)
        if found is not None:
            with self._lock:
                self._free.append(found[0])
