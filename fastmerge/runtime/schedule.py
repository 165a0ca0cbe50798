"""From a plan to units of work within a byte budget: pure, no data, no threads.

A *unit* is what one device works on at a time: a bundle of small tensors, one tensor, or a chunk of a
large one. A *job* is what must finish together: the units of one tensor (or of the whole model, for
methods whose threshold is global) share their statistics. Units are small on purpose: warm files arrive
faster in a buffer that stays in the cache, and what arrived is still there for the kernel.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from fastmerge.checkpoint import without_gc
from fastmerge.ops.segments import TILE
from fastmerge.ops.sources import ALIGN, Memory
from fastmerge.ops.spec import Op, Spec

COPY_BYTES = 64 << 20
"""Bytes per ``copy_file_range`` unit."""

BLOCK = 4096
"""A run of output bytes has the same place in a block of memory as in one of its file: direct writes ask for that.

So has a run of input bytes that is read past the page cache, with the blocks around it to itself."""

Pieces = tuple[tuple[int, int, int], ...]


class Unit(NamedTuple):
    """One piece of work.

    Attributes:
        job: index of its job.
        pieces: (op, first element, elements); bytes in place of elements for copies.
        nbytes: slot bytes that its inputs and outputs take.
    """

    job: int
    pieces: Pieces
    nbytes: int


class Job(NamedTuple):
    """Units that share their statistics.

    Attributes:
        copy: bytes as they are; nothing is computed.
        ops: positions in the plan's ops; a piece's group is its op's place in this tuple.
        units: what one full pass over the job's data reads.
    """

    copy: bool
    ops: tuple[int, ...]
    units: tuple[Unit, ...]

    @property
    def resident(self) -> bool:
        """A job of one unit keeps its data in the slot from pass to pass."""
        return len(self.units) == 1


class Cost(NamedTuple):
    """Slot bytes of a kind of op: those of its pieces that are in the slot, not where a caller owns them.

    Attributes:
        element: bytes per element.
        piece: bytes per piece, for alignment.
        past: bytes of a unit, where there is room, by which its inputs can be read past the page cache.
    """

    element: int
    piece: int
    past: int = 0

    def of(self, elements: int, pieces: int = 1) -> int:
        """Bytes of pieces of so many elements together."""
        return elements * self.element + pieces * self.piece


def cost(op: Op) -> Cost:
    """The slot bytes of an op, the same for all ops of its spec."""
    inputs = [d.size for d, s in zip(op.spec.dtypes, op.inputs, strict=True) if not isinstance(s, Memory)]
    outputs = sum(1 for t in op.targets if not isinstance(t, Memory))
    piece = ALIGN * len(inputs) + BLOCK * outputs
    return Cost(sum(inputs) + outputs * op.spec.out_dtype.size, piece, 2 * BLOCK * len(inputs))


def least_piece(spec: Spec) -> int:
    """Elements of the smallest piece of a tensor that is cut; larger ones are multiples of it."""
    return math.lcm(spec.row or 1 if spec.grain == "row" else TILE, spec.cut)


@without_gc()
def schedule(
    ops: Sequence[Op], *, slot: int | None = None, elements: int, whole: Callable[[Spec], bool] = lambda _: False
) -> tuple[Job, ...]:
    """Cuts the ops of a plan into units that fit a slot.

    Args:
        ops: the plan's, in file order.
        slot: bytes of a slot, at least :func:`fastmerge.runtime.budget.least`; None for no limit.
        elements: per unit where the slot allows it.
        whole: whether tensors of a spec are never cut (the reference works on whole ones).

    Returns:
        All jobs, copies last.
    """
    return tuple(_Cutter(ops, slot, elements, whole).jobs())


class _Kind(NamedTuple):
    """What the cutter knows of a spec."""

    grain: str
    batch: tuple[object, ...]
    cost: Cost
    most: int
    """Elements of a tensor that is not cut."""
    step: int
    """Elements of the chunks of one that is."""


_CUT, _COPIED, _MODEL = -1, -2, -3
"""In place of a number of tensors that share units: a tensor in several units, bytes, one job for the whole model."""


class _Cutter:
    def __init__(self, ops: Sequence[Op], slot: int | None, elements: int, whole: Callable[[Spec], bool]) -> None:
        self._ops = ops
        self._slot = slot
        self._elements = elements
        self._whole = whole
        self._kinds: dict[int, _Kind] = {}
        self._jobs = 0

    def kind(self, op: Op) -> _Kind:
        """Of an op's spec; specs live as long as their ops."""
        found = self._kinds.get(id(op.spec))
        if found is None:
            found = self._kinds[id(op.spec)] = self._kind(op)
        return found

    def _kind(self, op: Op) -> _Kind:
        spec, price = op.spec, cost(op)
        grain = "whole" if spec.grain == "matrix" or (spec.grain != "copy" and self._whole(spec)) else spec.grain
        room = self._elements if self._slot is None else chunk(self._slot, price, self._elements)
        # A tensor with statistics that is a little too large is cheaper to keep than to read twice.
        most = self._elements * (2 if grain == "tensor" else 1)
        if grain == "whole":
            most = spec.numel
        elif self._slot is not None and price.element:
            most = min(most, (self._slot - price.piece) // price.element)
        step = max(1, room // spec.row) * spec.row if grain == "row" and spec.row else room
        if spec.packing is not None:
            least = least_piece(spec)
            step = max(1, step // least) * least
        return _Kind(grain, (*spec.batch, grain, price), price, most, step)

    def jobs(self) -> Iterator[Job]:
        """Jobs in file order; consecutive small tensors of one kind share a unit."""
        labels = [*map(self._labels().__getitem__, [op.spec for op in self._ops])]
        copies = [i for i, label in enumerate(labels) if label == _COPIED]
        model = [i for i, label in enumerate(labels) if label == _MODEL]
        rest = [i for i, label in enumerate(labels) if label >= _CUT]
        for label, run in itertools.groupby(rest, labels.__getitem__):
            if label != _CUT:
                yield from self._bundles([*run])
                continue
            for position in run:
                kind, n = self.kind(self._ops[position]), self._ops[position].spec.numel
                pieces = [(position, e0, min(kind.step, n - e0)) for e0 in range(0, n, kind.step)]
                units = tuple([Unit(self._jobs, (p,), kind.cost.of(p[2])) for p in pieces])
                self._jobs += 1
                yield Job(False, (position,), units)
        if model:
            units = tuple(self._model_units(model))
            self._jobs += 1
            yield Job(False, tuple(model), units)
        for copied in _copy_units(self._ops, copies):
            yield Job(True, tuple(dict.fromkeys(o for o, _, _ in copied)), (Unit(self._jobs, copied, 0),))
            self._jobs += 1

    def _labels(self) -> dict[Spec, int]:
        """For each spec which tensors it shares a unit with, by number, or why it shares none."""
        numbers: dict[tuple[object, ...], int] = {}
        labels = {}
        for spec, op in {op.spec: op for op in self._ops}.items():
            kind = self.kind(op)
            if kind.grain in ("copy", "model"):
                labels[spec] = _COPIED if kind.grain == "copy" else _MODEL
            else:
                labels[spec] = numbers.setdefault(kind.batch, len(numbers)) if spec.numel <= kind.most else _CUT
        return labels

    def _bundles(self, members: Sequence[int]) -> Iterator[Job]:
        """As many neighbours at a time as fit."""
        kind = self.kind(self._ops[members[0]])
        sizes = [self._ops[o].spec.numel for o in members]
        totals = [*itertools.accumulate(sizes, initial=0)]
        element, piece, _ = kind.cost
        costs = [total * element + count * piece for count, total in enumerate(totals)]
        start = 0
        while start < len(members):
            stop = bisect.bisect_right(totals, totals[start] + self._elements, start) - 1
            if self._slot is not None:
                stop = min(stop, bisect.bisect_right(costs, costs[start] + self._slot, start) - 1)
            stop = max(stop, start + 1)
            pieces = [(o, 0, n) for o, n in zip(members[start:stop], sizes[start:stop], strict=True)]
            yield self._job(pieces, kind, totals[stop] - totals[start])
            start = stop

    def _joins(self, first: _Kind, kind: _Kind, total: int, pieces: int) -> bool:
        """Whether one more tensor goes into a bundle."""
        if (kind is not first and kind.batch != first.batch) or total > self._elements:
            return False
        return self._slot is None or first.cost.of(total, pieces) <= self._slot

    def _job(self, bundle: Sequence[tuple[int, int, int]], kind: _Kind, total: int) -> Job:
        unit = Unit(self._jobs, tuple(bundle), kind.cost.of(total, len(bundle)))
        self._jobs += 1
        return Job(False, tuple([o for o, _, _ in bundle]), (unit,))

    def _model_units(self, members: Sequence[int]) -> Iterator[Unit]:
        """Bundles and chunks of every tensor of a whole-model method."""
        bundle: list[tuple[int, int, int]] = []
        total, first = 0, self.kind(self._ops[members[0]])
        for o in members:
            kind, n = self.kind(self._ops[o]), self._ops[o].spec.numel
            for e0 in range(0, max(n, 1), kind.step):
                length = min(kind.step, n - e0)
                if bundle and not self._joins(first, kind, total + length, len(bundle) + 1):
                    yield Unit(self._jobs, tuple(bundle), first.cost.of(total, len(bundle)))
                    bundle, total = [], 0
                if not bundle:
                    first = kind
                bundle.append((o, e0, length))
                total += length
        yield Unit(self._jobs, tuple(bundle), first.cost.of(total, len(bundle)))


def chunk(slot: int, price: Cost, elements: int) -> int:
    """Elements of the largest piece that fits a slot, in whole tiles, at most ``elements`` and at least a tile."""
    if not price.element:
        return elements
    return max(TILE, min(elements, (slot - price.piece - price.past) // price.element // TILE * TILE))


def sample_units(ops: Sequence[Op], job: Job, pieces: Iterable[tuple[int, int, int]], slot: int) -> Iterator[Unit]:
    """Units for a pass that reads only some pieces of a job, each within one slot.

    Args:
        ops: the plan's.
        job: whose pass it is.
        pieces: (group, first element, elements); a piece longer than a tile starts at one.
        slot: bytes; 0 where nothing is read into slots.
    """
    number = job.units[0].job
    bundle: list[tuple[int, int, int]] = []
    size, batch = 0, ops[job.ops[0]].spec.batch
    for index, start, total in pieces:
        o = job.ops[index]
        op = ops[o]
        price = cost(op)
        for e0 in range(start, start + max(total, 1), TILE):
            length = min(TILE, start + total - e0)
            nbytes = price.of(length)
            if bundle and (op.spec.batch != batch or (slot and size + nbytes > slot)):
                yield Unit(number, tuple(bundle), size)
                bundle, size = [], 0
            batch = op.spec.batch
            bundle.append((o, e0, length))
            size += nbytes
    if bundle:
        yield Unit(number, tuple(bundle), size)


def _copy_units(ops: Sequence[Op], members: Sequence[int]) -> Iterator[Pieces]:
    """Byte ranges of copied tensors, bundled up to :data:`COPY_BYTES`."""
    bundle: list[tuple[int, int, int]] = []
    size = 0
    for o in members:
        total = ops[o].spec.out_dtype.nbytes(ops[o].spec.numel)
        for start in range(0, max(total, 1), COPY_BYTES):
            length = min(COPY_BYTES, total - start)
            if bundle and size + length > COPY_BYTES:
                yield tuple(bundle)
                bundle, size = [], 0
            bundle.append((o, start, length))
            size += length
    if bundle:
        yield tuple(bundle)
