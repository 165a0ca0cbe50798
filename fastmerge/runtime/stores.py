"""Where the stream's inputs come from and its results go: checkpoints on disk, tensors in memory, or both."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from fastmerge.checkpoint import Files, Place, Writer
from fastmerge.errors import CheckpointError
from fastmerge.ops.segments import HEADER, I64, OUT, Segments, segment_table
from fastmerge.ops.sources import FileRange, Made, Memory, Packed, Result
from fastmerge.ops.spec import Op, Source, Spec
from fastmerge.runtime.devices import Buffer
from fastmerge.runtime.finite import NonFinite
from fastmerge.runtime.kept import NOTHING, Kept, Room
from fastmerge.runtime.laying import Laid, Run, coded_in, lay, outs_of, results_of, runs_of, spread
from fastmerge.runtime.losses import Losses
from fastmerge.runtime.results import Results
from fastmerge.runtime.schedule import BLOCK, Job, Unit

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastmerge.ops.coded import Coded

COMPARE_BYTES = 1 << 20
"""Bytes of integer tensors that are compared at a time."""


class OpStore:
    """Brings the inputs of ops, whatever they come from, and keeps their results, wherever they go.

    Args:
        ops: the plan's.
        files: of the checkpoints that the plan reads; None where everything is in memory.
        writer: of the output; None likewise.
        finite: looks for NaN and Inf; None where nobody asks.
        room: memory for inputs that would be read twice from a disk.
        results: makes those of other ops; None where no op takes any.
        losses: takes what codes are wrong by; None where nothing is written as codes.
        coded: whether kernels take the quantised inputs of a spec as codes and scales.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        files: Files | None = None,
        writer: Writer | None = None,
        finite: NonFinite | None = None,
        room: Room = NOTHING,
        results: Results | None = None,
        losses: Losses | None = None,
        coded: Callable[[Spec], bool] = lambda _: False,
    ) -> None:
        self._ops = ops
        self._files = files
        self._writer = writer
        self._finite = finite
        self._results = results
        self._losses = losses
        self._coded = coded
        self._kept: Kept[Laid] = Kept(room)
        self._members: dict[int, Mapping[int, int]] = {}

    @property
    def durable(self) -> bool:
        """Results in files have to be synced."""
        return self._writer is not None

    # ---- inputs ----------------------------------------------------------------------------------------

    def reads(self, unit: Unit) -> bool:
        """Whether :meth:`load` brings the unit's inputs, or they are kept from an earlier pass."""
        return unit not in self._kept

    def load(self, job: Job, unit: Unit, buffer: Buffer, *, again: bool = False) -> Segments:
        """Lays the unit out in the buffer, one run per model and contiguous file range, and reads it.

        Tensors in memory are used where they are. Where the unit is asked for ``again`` later, what a disk has to bring
        is kept until its result is stored, as long as there is room; so is what is made.
        """
        group_of = _positions(job, self._members)
        numbers, firsts, lengths = zip(*unit.pieces, strict=True)
        ops = [self._ops[o] for o in numbers]
        spec = ops[0].spec
        runs = runs_of(spec, ops, firsts, lengths)
        once = job.resident or spec.grain == "element"
        keep = again and not self.done(job, unit)
        laid = self._inputs(spec, runs, unit, buffer, once=once, keep=keep)
        inputs = spread(spec, runs, laid.bases, lengths)
        outs, end = outs_of(ops, results_of(ops, firsts, lengths, spec.out_dtype.size), lengths, laid.end)
        _check(end, buffer)
        table = segment_table(ops, [group_of[o] for o in numbers], firsts, lengths, outs, inputs)
        counters = np.zeros(len(table), np.int64)
        return Segments(table, spec.dtypes, spec.out_dtype, counters, coded=laid.coded)

    def _inputs(
        self, spec: Spec, runs: Sequence[Sequence[Run]], unit: Unit, buffer: Buffer, *, once: bool, keep: bool
    ) -> Laid:
        """Lays out the runs of every input; ``end`` is the first free byte of the buffer.

        What files hold is read, and what is made is made. What is read more than once and not kept goes through the
        page cache, which may have it the next time.
        """
        kept = self._kept.laid(unit)
        if kept is not None:
            return kept._replace(end=buffer.address)
        coded = coded_in(spec, runs) if self._coded(spec) else ()
        laid = lay(spec, runs, buffer.address, self._fd, coded=coded)
        _check(laid.end, buffer)
        home: Buffer | None = None
        rows = np.array(laid.reads, np.int64)
        cold = self._cold(rows) if laid.reads and (once or keep) else []
        if not once and (any(cold) or (keep and laid.made)):
            home = self._kept.take()
            cold = cold if home is not None else []
        if home is not None or any(cold):
            moved = lay(spec, runs, (home or buffer).address, self._fd, cold, coded)
            if home is not None:
                _check(moved.end, home)
            if home is not None or moved.end - laid.end <= buffer.nbytes - unit.nbytes:  # beside the results
                laid, rows = moved, np.array(moved.reads, np.int64)
            cold = [c and not (r[1] - r[2]) % BLOCK for c, r in zip(cold, laid.reads, strict=True)]
        if laid.reads:
            self._read(rows, cold)
        self._make(laid.made)
        if home is None:
            return laid
        self._kept.keep(unit, home, laid)
        return laid._replace(end=buffer.address)

    def bring(self, source: Source, runs: I64) -> None:
        """Brings runs (first element, elements, address) of a source to memory."""
        size = source.dtype.size
        if isinstance(source, FileRange):
            rows = np.empty((len(runs), 4), np.int64)
            rows[:, 0] = self._fd(source)
            rows[:, 1] = source.info.offset + runs[:, 0] * size
            rows[:, 2] = runs[:, 2]
            rows[:, 3] = runs[:, 1] * size
            self._read(rows, ())
            return
        if isinstance(source, Result):
            self._make([(source, e0, n, address) for e0, n, address in runs.tolist()])
            return
        for e0, n, address in runs.tolist():
            if isinstance(source, Memory):
                ctypes.memmove(address, source.address + e0 * size, n * size)
            else:
                cast("Made", source).fill(self.bring, e0, n, address)

    def inputs(
        self, ops: Sequence[Op], firsts: Sequence[int], lengths: Sequence[int], address: int
    ) -> tuple[list[list[int]], int]:
        """Brings the inputs of pieces of ops of one kind to an address; where each is, and the first free byte."""
        spec = ops[0].spec
        runs = runs_of(spec, ops, firsts, lengths)
        laid = lay(spec, runs, address, self._fd)
        if laid.reads:
            self._read(np.array(laid.reads, np.int64), ())
        self._make(laid.made)
        return spread(spec, runs, laid.bases, lengths), laid.end

    def _make(self, made: Sequence[tuple[Made | Result | Coded, int, int, int]]) -> None:
        results = [(source, e0, n, address) for source, e0, n, address in made if isinstance(source, Result)]
        if results:
            assert self._results is not None
            self._results.make(self, results)
        if len(results) == len(made):
            return
        from fastmerge.ops.coded import Coded

        coded: dict[Coded, list[tuple[int, int, int]]] = {}
        for source, e0, n, address in made:
            if isinstance(source, Coded):
                coded.setdefault(source, []).append((e0, n, address))
            elif not isinstance(source, Result):
                source.fill(self.bring, e0, n, address)
        for packed, runs in coded.items():
            packed.fill(self.bring, np.array(runs, np.int64))

    def _fd(self, source: FileRange) -> int:
        assert self._files is not None
        return self._files.fd(source.model, source.info.file)

    def _cold(self, rows: I64) -> list[bool]:
        assert self._files is not None
        return self._files.cold(rows)

    def _read(self, rows: I64, cold: Sequence[bool]) -> None:
        assert self._files is not None
        if any(cold):
            self._files.read_past(rows, cold)
        else:
            self._files.read(rows)

    # ---- results ---------------------------------------------------------------------------------------

    def store(self, unit: Unit, segments: Segments) -> None:
        """Writes the results, adjacent ones in one piece; those in memory are where they belong."""
        if self._finite is not None:
            self._finite.check(self._ops, unit, segments)
        if self._writer is not None:
            self._write(self._writer, unit, segments)
        self._kept.drop(unit)

    def _write(self, writer: Writer, unit: Unit, segments: Segments) -> None:
        numbers, firsts, lengths = zip(*unit.pieces, strict=True)
        ops, size = [self._ops[o] for o in numbers], segments.out_dtype.size
        columns = (OUT, *range(HEADER + len(segments.dtypes), segments.table.shape[1]))
        rows: list[tuple[int, int, int, int]] = []
        scales: list[npt.NDArray[np.uint8]] = []  # they are written before they go
        for column, runs in zip(columns, results_of(ops, firsts, lengths, size), strict=True):
            at = 0
            for target, start, nbytes, count in runs:
                address = int(segments.table[at, column])
                if type(target) is Packed:
                    scales.append(self._pack(ops[at], target, (start, nbytes // size, address), rows))
                elif type(target) is Place and nbytes:
                    rows.append((target.shard, start, address, nbytes))
                at += count
        if rows:
            writer.write(np.array(rows, np.int64))

    def _pack(
        self, op: Op, target: Packed, piece: tuple[int, int, int], rows: list[tuple[int, int, int, int]]
    ) -> npt.NDArray[np.uint8]:
        """Turns a piece (first element, elements, address) of a result into codes; gives the bytes of its scales."""
        packing = op.spec.packing
        assert packing is not None
        e0, length, address = piece
        raw, loss = packing.encode(op.name, e0, length, address)
        if self._losses is not None:
            self._losses.add(op.name, loss)
        for (shard, offset, nbytes), at in zip(
            packing.ranges(target, e0, length), (address, raw.ctypes.data), strict=True
        ):
            rows.append((shard, offset, at, nbytes))
        return raw

    def copy(self, unit: Unit) -> None:
        """Copies byte ranges, neighbours together; compares what must be equal first."""
        rows: list[list[int]] = []
        for o, start, nbytes in unit.pieces:
            op = self._ops[o]
            if start == 0:
                self._compare(op)
            for target in op.targets:
                source = op.inputs[0]
                if not (isinstance(source, FileRange) and isinstance(target, Place)):
                    self._move(source, target, start, nbytes)
                    continue
                fd = self._fd(source)
                row = [fd, source.info.offset + start, target.shard, target.offset + start, nbytes]
                last = rows[-1] if rows else None
                if (
                    last
                    and last[0] == fd
                    and last[2] == row[2]
                    and last[1] + last[4] == row[1]
                    and last[3] + last[4] == row[3]
                ):
                    last[4] += nbytes
                elif nbytes:
                    rows.append(row)
        if rows:
            assert self._writer is not None
            assert self._files is not None
            self._files.use(np.array(rows, np.int64), self._writer.copy)

    def _move(self, source: Source, target: object, start: int, nbytes: int) -> None:
        """Copies bytes that are not both in files, through memory of a bounded size."""
        size = source.dtype.size
        for at in range(start, start + nbytes, COMPARE_BYTES):
            data = self._bytes(source, at, min(COMPARE_BYTES, start + nbytes - at) // size)
            if isinstance(target, Memory):
                ctypes.memmove(target.address + at, data.ctypes.data, data.nbytes)
            else:
                assert self._writer is not None
                place = cast("Place", target)
                row = [place.shard, place.offset + at, data.ctypes.data, data.nbytes]
                self._writer.write(np.array([row], np.int64))

    def _compare(self, op: Op) -> None:
        """Integer and bool tensors are copied only where every model has the same bytes."""
        first, *others = op.inputs
        step = COMPARE_BYTES // first.dtype.size
        for e0 in range(0, op.spec.numel if others else 0, step):
            n = min(step, op.spec.numel - e0)
            mine = self._bytes(first, e0 * first.dtype.size, n)
            for other in others:
                if not np.array_equal(self._bytes(other, e0 * first.dtype.size, n), mine):
                    raise CheckpointError(
                        f"{op.name}: {op.spec.out_dtype.name} tensors are copied, not merged, and {_who(other)} "
                        f"differs from {_who(first)}; expected equal bytes"
                    )

    def _bytes(self, source: Source, at: int, n: int) -> npt.NDArray[np.uint8]:
        data = np.empty(n * source.dtype.size, np.uint8)
        self.bring(source, np.array([[at // source.dtype.size, n, data.ctypes.data]], np.int64))
        return data

    def done(self, job: Job, unit: Unit) -> bool:
        """Whether an interrupted run wrote every output range of the unit, or others write it."""
        if self._writer is None or not self._writer.skips:
            return False
        for o, start, length in unit.pieces:
            op = self._ops[o]
            size = 1 if job.copy else op.spec.out_dtype.size
            for target in op.targets:
                if isinstance(target, Memory):
                    return False
                if isinstance(target, Packed):
                    assert op.spec.packing is not None
                    if not all(self._writer.done(*r) for r in op.spec.packing.ranges(target, start, length)):
                        return False
                    continue
                place = cast("Place", target)
                if not self._writer.done(place.shard, place.offset + start * size, length * size):
                    return False
        return True

    def sync(self) -> None:
        """Persists what has been written and journals it."""
        if self._writer is not None:
            self._writer.sync()


def _check(cursor: int, buffer: Buffer) -> None:
    if cursor > buffer.address + buffer.nbytes:
        raise AssertionError(f"a unit of {cursor - buffer.address} bytes in a slot of {buffer.nbytes}")


def _who(source: Source) -> str:
    return f"model {source.model}" if isinstance(source, FileRange) else "a tensor in memory"


def _positions(job: Job, cache: dict[int, Mapping[int, int]]) -> Mapping[int, int]:
    """Group index of each op of a job; kept for jobs of many units only."""
    if job.resident:
        return {o: i for i, o in enumerate(job.ops)}
    number = job.units[0].job
    if number not in cache:
        cache[number] = {o: i for i, o in enumerate(job.ops)}
    return cache[number]
