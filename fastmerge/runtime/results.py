"""Makes results of ops that no file holds, a panel at a time, for the ops that take them as inputs.

A result is made as often as it is asked for, always the same: nothing of it is kept. What its op finds out about a
whole tensor first (a threshold, an angle) is kept while other parts of the tensor may be asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastmerge.backends.choose import Backend
from fastmerge.ops.program import Program
from fastmerge.ops.segments import OUT, TILE, Segments, segment_table
from fastmerge.ops.sources import ALIGN, Bring, Result, panel, panel_bytes, results_of
from fastmerge.ops.spec import Op
from fastmerge.runtime.finite import NanPolicy, NonFinite
from fastmerge.runtime.making import KEPT
from fastmerge.runtime.schedule import Unit
from fastmerge.runtime.stream import compute

Pieces = Sequence[tuple[int, int, int]]


class Results:
    """Makes results.

    Args:
        backend: see :func:`fastmerge.runtime.making.host`.
        ops: which take them.
        nan: what becomes of NaN and Inf in a result that come from its inputs; they are not counted.
    """

    def __init__(self, backend: Backend, ops: Sequence[Op], nan: NanPolicy) -> None:
        self._backend = backend
        self._finite = NonFinite(nan)
        self._lock = threading.Lock()
        self._free: list[Any] = []
        self._known: OrderedDict[int, _Solution] = OrderedDict()
        self._most = KEPT * max((sum(1 for s in op.inputs for _ in results_of(s)) for op in ops), default=0)

    def fill(self, bring: Bring, result: Result, e0: int, n: int, address: int) -> None:
        """Makes elements ``e0 .. e0 + n`` at an address."""
        op, spec = result.op, result.op.spec
        size = panel(spec, whole=self._backend.whole(spec))
        if not n:
            return
        if size >= spec.numel and not result.together:
            program: Program = self._backend.program([op])
            self._parts(
                bring, op, lambda segments: compute(program, segments), (e0, n, address), spec.numel, spec.numel
            )
            return
        solution = self._solution(result, kept=n < spec.numel or bool(result.together))
        solution.settle(self, bring)
        step = spec.row if spec.grain == "row" else TILE
        group = solution.group(op)
        self._parts(bring, op, solution.program.apply, (e0, n, address), size, step, group)

    def _parts(
        self, bring: Bring, op: Op, apply: Any, wanted: tuple[int, int, int], size: int, step: int, group: int = 0
    ) -> None:
        """Computes the panels around the wanted run; those that lie in it at once where they belong."""
        e0, n, address = wanted
        spec, width = op.spec, op.spec.out_dtype.size
        end = min(spec.numel, -(-(e0 + n) // step) * step)
        for at in range(e0 // step * step, end, size):
            stop = min(at + size, end)
            inside = at >= e0 and stop <= e0 + n
            with self._memory(panel_bytes(spec, stop - at)) as memory:
                out = address + (at - e0) * width if inside else 0
                segments = self.load(bring, op, [(group, at, stop - at)], memory, out)
                apply(segments)
                self._finite.check([op], Unit(0, ((0, at, stop - at),), 0), segments)
                if not inside:
                    first, last = max(at, e0), min(stop, e0 + n)
                    made = int(segments.table[0, OUT]) + (first - at) * width
                    ctypes.memmove(address + (first - e0) * width, made, (last - first) * width)

    def load(self, bring: Bring, op: Op, pieces: Pieces, memory: int, out: int = 0) -> Segments:
        """Pieces of an op's inputs, one behind the other in memory; the result goes behind them where ``out`` is 0."""
        groups, firsts, lengths = zip(*pieces, strict=True)
        spec, total = op.spec, sum(lengths)
        starts = np.cumsum([0, *lengths[:-1]])
        inputs = []
        for dtype, source in zip(spec.dtypes, op.inputs, strict=True):
            addresses = memory + starts * dtype.size
            bring(source, np.stack([np.array(firsts, np.int64), np.array(lengths, np.int64), addresses], axis=1))
            inputs.append(addresses.tolist())
            memory += -(-total * dtype.size // ALIGN) * ALIGN
        outs = ((out or memory) + starts * spec.out_dtype.size).tolist()
        table = segment_table([op] * len(pieces), groups, firsts, lengths, [outs], inputs)
        return Segments(table, spec.dtypes, spec.out_dtype, np.zeros(len(table), np.int64))

    def statistics(self, bring: Bring, program: Program, op: Op, pieces: Pieces) -> Any:
        """Of pieces of one op."""
        with self._memory(panel_bytes(op.spec, sum(length for _, _, length in pieces))) as memory:
            return program.statistics(self.load(bring, op, pieces, memory))

    def items(self, program: Program, ops: Sequence[Op]) -> list[list[tuple[int, int, int]]]:
        """The pieces that the due pass reads, as many of an op together as a panel holds."""
        asked = program.pieces()
        rows = [(g, 0, op.spec.numel) for g, op in enumerate(ops)] if asked is None else asked.tolist()
        out: list[list[tuple[int, int, int]]] = []
        room, last = 0, -1
        for g, start, total in rows:
            size = panel(ops[g].spec, whole=self._backend.whole(ops[g].spec)) or 1
            for e0 in range(start, start + max(total, 1), size):
                length = min(size, start + total - e0)
                if g != last or length > room:
                    out.append([])
                    room, last = size, g
                out[-1].append((g, e0, length))
                room -= length
        return out

    def _solution(self, result: Result, *, kept: bool) -> _Solution:
        ops = result.together or (result.op,)
        if not kept:
            return _Solution(self._backend.program(ops), ops)
        with self._lock:
            key = id(result.together or result.op)
            if key not in self._known:
                self._known[key] = _Solution(self._backend.program(ops), ops)
                if len(self._known) > self._most:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return self._known[key]

    @contextlib.contextmanager
    def _memory(self, nbytes: int) -> Iterator[int]:
        """Memory that was used before, where it is large enough; its address."""
        with self._lock:
            memory = self._free.pop() if self._free else None
        if memory is None or memory.size < nbytes + ALIGN:
            memory = np.empty(nbytes + ALIGN, np.uint8)
        yield -(-memory.ctypes.data // ALIGN) * ALIGN
        with self._lock:
            self._free.append(memory)


class _Solution:
    """A program on its way to :attr:`Program.ready`; all workers that ask for it bring it there together."""

    def __init__(self, program: Program, ops: Sequence[Op]) -> None:
        self.program = program
        self._ops = ops
        self._groups = {id(op): i for i, op in enumerate(ops)}
        self._condition = threading.Condition()
        self._items: list[list[tuple[int, int, int]]] = []
        self._next = self._left = 0
        self._partials: dict[int, Any] = {}
        self._error: BaseException | None = None

    def group(self, op: Op) -> int:
        """Its place among the ops."""
        return self._groups[id(op)]

    def settle(self, results: Results, bring: Bring) -> None:
        """Ends all passes of statistics, and waits for what other workers do of them."""
        try:
            while (i := self._take(results)) is not None:
                pieces = self._items[i]
                self._put(i, results.statistics(bring, self.program, self._ops[pieces[0][0]], pieces))
        except BaseException as error:
            with self._condition:
                self._error = self._error or error
                self._condition.notify_all()
            raise

    def _take(self, results: Results) -> int | None:
        with self._condition:
            while True:
                if self._error is not None:
                    raise self._error
                if not self._left:
                    if self.program.ready:
                        return None
                    self._items = results.items(self.program, self._ops)
                    self._next, self._left = 0, len(self._items)
                if self._next < len(self._items):
                    self._next += 1
                    return self._next - 1
                self._condition.wait()

    def _put(self, i: int, partial: Any) -> None:
        with self._condition:
            self._partials[i] = partial
            self._left -= 1
            if not self._left:
                partials = [self._partials[i] for i in range(len(self._items))]
                self._partials = {}
                self.program.advance(partials)
                self._condition.notify_all()
