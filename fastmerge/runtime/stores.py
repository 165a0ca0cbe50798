"""Where the stream's inputs come from and its outputs go: checkpoints on disk, or tensors in memory."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastmerge.checkpoint import Files, TensorInfo, Writer
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, OutputError
from fastmerge.methods.base import HEADER, I64, Segments
from fastmerge.planning import Output, Plan
from fastmerge.runtime.devices import Buffer
from fastmerge.runtime.schedule import ALIGN, BLOCK, Job, Unit
from fastmerge.runtime.stream import segment_row

COMPARE_BYTES = 1 << 20
"""Bytes of integer tensors that are compared at a time."""

NanPolicy = Literal["warn", "error", "zero"]
"""What to do with NaN and Inf in outputs; see :class:`Finite`."""


class Finite:
    """Keeps the books of NaN and Inf.

    A non-finite output element with a non-finite input at its place is counted and reported (``warn``), refused
    (``error``) or stored as 0 (``zero``). One whose own inputs are all finite is an error in every case: the
    merge overflowed (fp16) or divided by zero, or a NaN elsewhere in the tensor spoilt its statistics.
    """

    def __init__(self, policy: NanPolicy) -> None:
        self.policy = policy
        self.found: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def check(self, outputs: Sequence[Output], unit: Unit, segments: Segments) -> None:
        """Looks at what the kernels counted; almost always nothing.

        Raises:
            OutputError: by the policy, or for values that no input explains.
        """
        if not segments.nonfinite.any():
            return
        for s in np.flatnonzero(segments.nonfinite).tolist():
            out = outputs[unit.pieces[s][0]]
            row = segments.table[s].tolist()
            bad = _nonfinite(row[0], row[1], segments.out_dtype)
            given = np.zeros_like(bad)
            for address, dtype in zip(row[HEADER:], segments.dtypes, strict=True):
                given |= _nonfinite(address, row[1], dtype)
            made = int((bad & ~given).sum())
            if made:
                raise OutputError(
                    f"{out.name}: the merge made {made} NaN or Inf values out of finite inputs "
                    f"(stored as {segments.out_dtype.name}); expected finite ones: try out_dtype float32"
                )
            if self.policy == "error":
                raise OutputError(f"{out.name}: {int(bad.sum())} NaN or Inf values from its inputs (--nan error)")
            if self.policy == "zero":
                _bits(row[0], row[1], segments.out_dtype)[0][bad] = 0
            with self._lock:
                self.found[out.name] += int(bad.sum())


def _bits(address: int, n: int, dtype: DType) -> tuple[npt.NDArray[Any], int]:
    """Elements in memory as unsigned integers, and the mask of their exponents."""
    word, exponent = {
        0: (np.uint64, 0x7FF0000000000000),
        1: (np.uint32, 0x7F800000),
        2: (np.uint16, 0x7C00),
        3: (np.uint16, 0x7F80),
    }[dtype.code]
    memory: Any = (ctypes.c_char * (n * dtype.size)).from_address(address)
    return np.frombuffer(memory, np.dtype(word)), exponent


def _nonfinite(address: int, n: int, dtype: DType) -> npt.NDArray[np.bool_]:
    """Which elements are NaN or Inf: all bits of the exponent are set."""
    bits, exponent = _bits(address, n, dtype)
    return np.asarray((bits & bits.dtype.type(exponent)) == exponent)


class FileStore:
    """Checkpoints in, a staged checkpoint out."""

    def __init__(self, plan: Plan, files: Files, writer: Writer, finite: Finite) -> None:
        self._outputs = plan.outputs
        self._places = plan.layout.places
        self._files = files
        self._writer = writer
        self._finite = finite
        self._members: dict[int, Mapping[int, int]] = {}

    def load(self, job: Job, unit: Unit, buffer: Buffer) -> Segments:
        """Lays the unit out in the buffer, one run per model and contiguous file range, and reads it."""
        group_of = _positions(job, self._members)
        outs = [self._outputs[o] for o, _, _ in unit.pieces]
        first = outs[0].group
        assert first is not None
        cursor = buffer.address
        reads: list[tuple[int, int, int, int]] = []
        addresses: list[list[int]] = []
        for m, dtype in enumerate(first.dtypes):
            column: list[int] = []
            fd = begin = end = at = -1
            file: tuple[int, int] | None = None
            for out, (_, e0, length) in zip(outs, unit.pieces, strict=True):
                info = out.inputs[m]
                start = info.offset + e0 * dtype.size
                if start != end or file != (out.models[m], info.file):
                    if end > begin:
                        reads.append((fd, begin, at, end - begin))
                    file = (out.models[m], info.file)
                    fd = self._files.fd(*file)
                    begin = end = start
                    cursor = at = (cursor + ALIGN - 1) & -ALIGN
                column.append(cursor)
                cursor += length * dtype.size
                end += length * dtype.size
            if end > begin:
                reads.append((fd, begin, at, end - begin))
            addresses.append(column)
        rows = []
        size = first.out_dtype.size
        shard = end = -1
        for out, (o, e0, length), inputs in zip(outs, unit.pieces, zip(*addresses, strict=True), strict=True):
            place = self._places[out.name]
            start = place.offset + e0 * size
            if start != end or shard != place.shard:
                cursor += (start - cursor) % BLOCK
            shard, end = place.shard, start + length * size
            assert out.group is not None
            rows.append(segment_row(cursor, length, e0, out.group, group_of[o], inputs))
            cursor += length * size
        if cursor > buffer.address + buffer.nbytes:
            raise AssertionError(f"a unit of {cursor - buffer.address} bytes in a slot of {buffer.nbytes}")
        self._files.read(np.array(reads, np.int64).reshape(-1, 4))
        table = np.array(rows, np.int64)
        return Segments(table, first.dtypes, first.out_dtype, np.zeros(len(rows), np.int64))

    def store(self, unit: Unit, segments: Segments) -> None:
        """Writes the outputs, adjacent ones in one piece."""
        self._finite.check(self._outputs, unit, segments)
        size = segments.out_dtype.size
        rows: list[list[int]] = []
        for (o, e0, length), address in zip(unit.pieces, segments.table[:, 0].tolist(), strict=True):
            place = self._places[self._outputs[o].name]
            offset, nbytes = place.offset + e0 * size, length * size
            last = rows[-1] if rows else None
            if last and last[0] == place.shard and last[1] + last[3] == offset and last[2] + last[3] == address:
                last[3] += nbytes
            elif nbytes:
                rows.append([place.shard, offset, address, nbytes])
        if rows:
            self._writer.write(np.array(rows, np.int64))

    def copy(self, unit: Unit) -> None:
        """Copies byte ranges in the kernel, neighbours together; compares what must be equal first."""
        rows: list[list[int]] = []
        for o, start, nbytes in unit.pieces:
            out = self._outputs[o]
            if start == 0:
                self._compare(out)
            place = self._places[out.name]
            fd = self._files.fd(out.models[0], out.inputs[0].file)
            row = [fd, out.inputs[0].offset + start, place.shard, place.offset + start, nbytes]
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
            self._writer.copy(np.array(rows, np.int64))

    def _compare(self, out: Output) -> None:
        """Integer and bool tensors are copied only where every model has the same bytes."""
        (model, info), *others = zip(out.models, out.inputs, strict=True)
        for at in range(0, info.nbytes if others else 0, COMPARE_BYTES):
            mine = self._bytes(model, info, at)
            for other, theirs in others:
                if not np.array_equal(self._bytes(other, theirs, at), mine):
                    raise CheckpointError(
                        f"{out.name}: {out.dtype.name} tensors are copied, not merged, and model {other} differs "
                        f"from model {model}; expected equal bytes"
                    )

    def _bytes(self, model: int, info: TensorInfo, at: int) -> npt.NDArray[np.uint8]:
        fd = self._files.fd(model, info.file)
        data = np.empty(min(COMPARE_BYTES, info.nbytes - at), np.uint8)
        self._files.read(np.array([[fd, info.offset + at, data.ctypes.data, data.nbytes]], np.int64))
        return data

    def done(self, job: Job, unit: Unit) -> bool:
        """Whether the journal of the interrupted run covers every output range of the unit."""
        if not self._writer.resumed:
            return False
        for o, start, length in unit.pieces:
            out = self._outputs[o]
            size = 1 if job.kind == "copy" else out.dtype.size
            place = self._places[out.name]
            if not self._writer.done(place.shard, place.offset + start * size, length * size):
                return False
        return True

    def sync(self) -> None:
        """Persists what has been written and journals it."""
        self._writer.sync()


class MemoryStore:
    """Tensors that the caller owns: kernels read and write them in place.

    Args:
        outputs: what is merged.
        inputs: per output, the address of each contiguous input, base first.
        results: per output, the address of its contiguous result.
    """

    def __init__(self, outputs: Sequence[Output], inputs: Sequence[Sequence[int]], results: Sequence[int]) -> None:
        self._outputs = outputs
        self._inputs = inputs
        self._results = results
        self._members: dict[int, Mapping[int, int]] = {}

    def load(self, job: Job, unit: Unit, buffer: Buffer) -> Segments:
        """Addresses only: nothing is moved."""
        group_of = _positions(job, self._members)
        rows = []
        first = self._outputs[unit.pieces[0][0]].group
        assert first is not None
        for o, e0, length in unit.pieces:
            group = self._outputs[o].group
            assert group is not None
            sources = [a + e0 * d.size for a, d in zip(self._inputs[o], group.dtypes, strict=True)]
            result = self._results[o] + e0 * group.out_dtype.size
            rows.append(segment_row(result, length, e0, group, group_of[o], sources))
        table: I64 = np.array(rows, np.int64)
        return Segments(table, first.dtypes, first.out_dtype, np.zeros(len(rows), np.int64))

    def store(self, unit: Unit, segments: Segments) -> None:
        """The results are where they belong."""

    def copy(self, unit: Unit) -> None:
        """Never scheduled: the caller copies tensors that are not merged."""

    def done(self, job: Job, unit: Unit) -> bool:
        """Nothing survives a run in memory."""
        return False

    def sync(self) -> None:
        """Nothing to persist."""


def _positions(job: Job, cache: dict[int, Mapping[int, int]]) -> Mapping[int, int]:
    """Group index of each output of a job; kept for jobs of many units only."""
    if job.resident:
        return {o: i for i, o in enumerate(job.outputs)}
    number = job.units[0].job
    if number not in cache:
        cache[number] = {o: i for i, o in enumerate(job.outputs)}
    return cache[number]
