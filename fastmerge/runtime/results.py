"""Makes results of ops that no file holds, a panel at a time, for the ops that take them as inputs.

A result is made as often as it is asked for, always the same: nothing of it is kept. What its op finds out about a
whole tensor first (a threshold, an angle) is kept while other parts of the tensor may be asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from fastmerge.backends.choose import Backend
from fastmerge.ops.program import Program
from fastmerge.ops.segments import TILE, Segments, segment_table
from fastmerge.ops.sources import (
    ALIGN,
    PANEL,
    PIECES,
    FileRange,
    Memory,
    Result,
    kinds_of,
    panel,
    panel_bytes,
    results_of,
)
from fastmerge.ops.spec import Op
from fastmerge.runtime.finite import NanPolicy, NonFinite
from fastmerge.runtime.making import KEPT
from fastmerge.runtime.schedule import Unit
from fastmerge.runtime.stream import compute

Pieces = Sequence[tuple[int, int, int]]


class Inputs(Protocol):
    """What brings the inputs of ops of one kind: the store that asks for results, which may be among them."""

    def inputs(
        self, ops: Sequence[Op], firsts: Sequence[int], lengths: Sequence[int], address: int
    ) -> tuple[list[list[int]], int]:
        """Brings the inputs of pieces to an address; where each is, and the first free byte."""


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
        made = [op.inputs for op in ops] if kinds_of(ops) - {FileRange, Memory} else []
        self._most = KEPT * max((sum(1 for s in inputs for _ in results_of(s)) for inputs in made), default=0)

    def make(self, store: Inputs, runs: Sequence[tuple[Result, int, int, int]]) -> None:
        """Makes runs (result, first element, elements, address); small tensors of one kind together."""
        small: dict[object, list[tuple[Op, int]]] = {}
        rest: dict[int, tuple[Result, list[tuple[int, int, int]]]] = {}
        for result, e0, n, address in runs:
            spec = result.op.spec
            if n == spec.numel <= PANEL and not result.together and not self._backend.whole(spec):
                small.setdefault((spec.batch, spec.grain), []).append((result.op, address))
            elif n:
                rest.setdefault(id(result.op), (result, []))[1].append((e0, n, address))
        for found in small.values():
            for bundle in _bundles(found):
                self._small(store, bundle)
        for result, mine in rest.values():
            self._runs(store, result, mine)

    def _small(self, store: Inputs, bundle: Sequence[tuple[Op, int]]) -> None:
        """Whole tensors at once, each where it belongs."""
        ops = [op for op, _ in bundle]
        pieces = [(i, 0, op.spec.numel) for i, op in enumerate(ops)]
        with self._memory(panel_bytes(ops[0].spec, sum(n for _, _, n in pieces), len(ops))) as memory:
            segments, _ = self._load(store, ops, pieces, memory, [address for _, address in bundle])
            compute(self._backend.program(ops), segments)
            self._finite.check(ops, Unit(0, tuple(pieces), 0), segments)

    def _runs(self, store: Inputs, result: Result, runs: Sequence[tuple[int, int, int]]) -> None:
        """Runs of one result. Where runs share a tile (samples do), it is made once for all of them."""
        op, spec = result.op, result.op.spec
        size = panel(spec, whole=self._backend.whole(spec))
        if size >= spec.numel and not result.together:
            program: Program = self._backend.program([op])
            self._panels(store, op, lambda segments: compute(program, segments), runs, spec.numel, spec.numel)
            return
        solution = self._solution(result, kept=sum(n for _, n, _ in runs) < spec.numel or bool(result.together))
        solution.settle(self, store)
        step = spec.row if spec.grain == "row" else TILE
        self._panels(store, op, solution.program.apply, runs, size, step, solution.group(op))

    def _panels(
        self,
        store: Inputs,
        op: Op,
        apply: Callable[[Segments], None],
        runs: Sequence[tuple[int, int, int]],
        size: int,
        step: int,
        group: int = 0,
    ) -> None:
        """Computes the panels around runs, from a multiple of ``step`` on; in its place what one run has all of."""
        spec, width = op.spec, op.spec.out_dtype.size
        waiting = deque(sorted(runs))
        begun: list[tuple[int, int, int]] = []
        at = 0
        while waiting or begun:
            if not begun:
                at = max(at, waiting[0][0] // step * step)
            stop = min(at + size, spec.numel)
            while waiting and waiting[0][0] < stop:
                begun.append(waiting.popleft())
            stop = min(stop, -(-max(e0 + n for e0, n, _ in begun) // step) * step)
            e0, n, address = begun[0]
            alone = len(begun) == 1 and e0 <= at and stop <= e0 + n
            with self._memory(panel_bytes(spec, stop - at)) as memory:
                outs = [address + (at - e0) * width] if alone else None
                piece = (group, at, stop - at)
                segments, made = self._load(store, [op], [piece], memory, outs)
                apply(segments)
                self._finite.check([op], Unit(0, ((0, *piece[1:]),), 0), segments)
                for e0, n, address in begun if not alone else ():
                    first, last = max(at, e0), min(stop, e0 + n)
                    ctypes.memmove(address + (first - e0) * width, made + (first - at) * width, (last - first) * width)
            begun = [run for run in begun if run[0] + run[1] > stop]
            at = stop

    def _load(
        self, store: Inputs, ops: Sequence[Op], pieces: Pieces, memory: int, outs: Sequence[int] | None = None
    ) -> tuple[Segments, int]:
        """Pieces (group, first element, elements) of ops, a result's address with each; and where results may go.

        Without addresses, results go behind the inputs.
        """
        groups, firsts, lengths = zip(*pieces, strict=True)
        inputs, end = store.inputs(ops, firsts, lengths, memory)
        spec, behind = ops[0].spec, -(-end // ALIGN) * ALIGN
        if outs is None:
            outs = [*itertools.accumulate([n * spec.out_dtype.size for n in lengths[:-1]], initial=behind)]
        table = segment_table(ops, groups, firsts, lengths, [outs], inputs)
        return Segments(table, spec.dtypes, spec.out_dtype, np.zeros(len(table), np.int64)), behind

    def statistics(self, store: Inputs, program: Program, op: Op, pieces: Pieces) -> Any:
        """Of pieces of one op."""
        with self._memory(panel_bytes(op.spec, sum(length for _, _, length in pieces), len(pieces))) as memory:
            return program.statistics(self._load(store, [op] * len(pieces), pieces, memory)[0])

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
                if g != last or length > room or len(out[-1]) == PIECES:
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


def _bundles(found: Sequence[tuple[Op, int]]) -> Iterator[list[tuple[Op, int]]]:
    """As many tensors at a time as a panel holds."""
    bundle: list[tuple[Op, int]] = []
    room = 0
    for op, address in found:
        if bundle and (op.spec.numel > room or len(bundle) == PIECES):
            yield bundle
            bundle = []
        room = (room if bundle else PANEL) - op.spec.numel
        bundle.append((op, address))
    yield bundle


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

    def settle(self, results: Results, store: Inputs) -> None:
        """Ends all passes of statistics, and waits for what other workers do of them."""
        try:
            while (i := self._take(results)) is not None:
                pieces = self._items[i]
                self._put(i, results.statistics(store, self.program, self._ops[pieces[0][0]], pieces))
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
