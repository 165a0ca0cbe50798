"""Runs ops whose inputs are on GPUs: sequences of launches, bound once, that get other numbers from render to render.

A batch of tensors of one kind is one sequence. Its tables are what depends on the numbers of a recipe: a render with
others makes them anew on the host and sends them in one copy; addresses, launches and memory stay, and from the second
run on the launches are a CUDA graph. Where passes are due that nobody has made yet, another sequence has them before
the merge, and what they find is kept (:mod:`fastmerge.session.statistics`).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fastmerge.errors import BackendUnavailable
from fastmerge.ops.program import Bound
from fastmerge.ops.segments import Segments
from fastmerge.ops.sources import Memory, Result, results_of
from fastmerge.ops.spec import Op, Spec
from fastmerge.runtime.resident import batches
from fastmerge.runtime.stream import compute
from fastmerge.session.homes import Homes, flat
from fastmerge.session.statistics import Statistics

if TYPE_CHECKING:
    import torch

MOST = 128
"""Sequences that are kept, each with its scratch on the device: tables, a little for each tensor, and where thresholds
are selected some hundredths of a model."""


class Work(NamedTuple):
    """An op to run.

    Attributes:
        home: its GPU.
        passing: whether an input is what a stage has just made, of which nothing is known and nothing is kept.
        op: over memory.
    """

    home: int
    passing: bool
    op: Op


class Ready(NamedTuple):
    """A sequence that has run.

    Attributes:
        bound: its launches.
        specs: of its ops, in order: the numbers in its tables.
    """

    bound: Bound
    specs: list[Spec]


class Started(NamedTuple):
    """A sequence under way.

    Attributes:
        bound: its launches.
        ops: of its tensors.
        asks: what of it is to be kept; None for nothing.
    """

    bound: Bound
    ops: list[Op]
    asks: Sequence[Hashable] | None


class Launching:
    """Renders of a session on GPUs.

    Args:
        homes: the GPUs, and which tensor is where.
        known: what passes have found; receives what they find.
    """

    def __init__(self, homes: Homes, known: Statistics) -> None:
        self._homes = homes
        self._known = known
        self._ready: dict[Hashable, Ready] = {}
        self._rooms: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}

    def check(self, ops: Sequence[Op]) -> None:
        """Refuses what has no way to run on GPUs, and says once what runs as its definition.

        Raises:
            BackendUnavailable: with the tensor and the reason.
        """
        every = [*ops, *(result.op for op in ops for source in op.inputs for result in results_of(source))]
        self._homes.all[0].backend.check(every)
        for op in every:
            made = [s for s in op.inputs if type(s) not in (Memory, Result)]
            if made:
                raise BackendUnavailable(
                    f"{op.name}: a session on GPUs makes nothing of what a stage makes ({type(made[0]).__name__}); "
                    "expected device='cpu' for this recipe, or the stage merged on disk"
                )
            if op.spec.grain == "model" and len(self._homes) > 1:
                raise BackendUnavailable(
                    f"{op.name}: this ranks all tensors together, and the session's are on {len(self._homes)} GPUs; "
                    "expected a session on one"
                )

    def run(self, ops: Sequence[Op], tensors: Sequence[torch.Tensor]) -> None:
        """Computes all ops; results may still be under way, in the order of the current streams.

        Args:
            ops: with inputs on GPUs; those of the same inputs next to each other.
            tensors: the target of each, on its GPU or elsewhere.

        Raises:
            OutputError: of a method that its data does not suit; results may be written in part then.
        """
        at = [self._homes.of(op) for op in ops]
        settled, made = self._settled(ops, at)
        work: list[Work] = []
        later: list[tuple[Memory, int, Memory, str]] = []
        for given, op, tensor, home in zip(ops, settled, tensors, at, strict=True):
            target, device, passing = cast("Memory", op.targets[0]), str(tensor.device), op is not given
            if op.spec.grain == "copy":
                later.append((cast("Memory", op.inputs[0]), home, target, device))
            elif self._homes.all[home].has(tensor):
                work.append(Work(home, passing, op))
            else:
                room = self._room(target, tensor, home)
                work.append(Work(home, passing, op._replace(targets=(room,))))
                later.append((room, home, target, device))
        if again := self._launch(work, wait=True):
            self._launch(again, wait=False)
        for source, home, target, device in later:
            with self._homes.all[home].current():
                flat(target, device).copy_(self._homes.flat(source, home), non_blocking=device != "cpu")
        del made  # the results of stages, which the launches above have read, in the order of their streams

    def close(self) -> None:
        """Gives all memory back."""
        self._ready.clear()
        self._rooms.clear()

    # ---- where inputs and results are ----------------------------------------------------------------------

    def _settled(self, ops: Sequence[Op], at: Sequence[int]) -> tuple[list[Op], list[torch.Tensor]]:
        """Ops whose inputs are there: what stages make is made, each tensor once."""
        due = {id(one): one for op in ops for s in op.inputs if type(s) is Result for one in (s.op, *s.together)}
        if not due:
            return list(ops), []
        rooms = {key: self._new(op, self._homes.of(op)) for key, op in due.items()}
        memory = {key: Memory(rooms[key].data_ptr(), op.spec.out_dtype, op.spec.shape) for key, op in due.items()}
        self.run([op._replace(targets=(memory[key],)) for key, op in due.items()], list(rooms.values()))
        kept = list(rooms.values())
        out = []
        for op, home in zip(ops, at, strict=True):
            inputs: list[Any] = []
            for source in op.inputs:
                if type(source) is not Result:
                    inputs.append(source)
                    continue
                made = rooms[id(source.op)]
                if self._homes.of(source.op) != home:
                    kept.append(self._new(source.op, home).copy_(made))
                    made = kept[-1]
                inputs.append(Memory(made.data_ptr(), source.dtype, source.shape))
            same = not any(type(source) is Result for source in op.inputs)
            out.append(op if same else op._replace(inputs=tuple(inputs)))
        return out, kept

    def _new(self, op: Op, home: int) -> torch.Tensor:
        """Room for the result of an op."""
        import torch

        return self._homes.all[home].new((op.spec.out_dtype.nbytes(op.spec.numel),), torch.uint8)

    def _room(self, target: Memory, tensor: torch.Tensor, home: int) -> Memory:
        """Room on a GPU for a target that is elsewhere, as long as that lives."""
        import torch

        found = self._rooms.get(target.address)
        if found is None or found[0]() is not tensor or not self._homes.all[home].has(found[1]):
            self._rooms = {at: pair for at, pair in self._rooms.items() if pair[0]() is not None}
            room = self._homes.all[home].new((tensor.numel() * tensor.element_size(),), torch.uint8)
            found = self._rooms[target.address] = weakref.ref(tensor), room
        return target._replace(address=found[1].data_ptr())

    # ---- what runs -------------------------------------------------------------------------------------------

    def _launch(self, work: Sequence[Work], *, wait: bool) -> list[Work]:
        """Launches everything on all GPUs, then asks for errors and for what is to be kept.

        Args:
            work: to be done.
            wait: leave those to a second time whose statistics this one finds.

        Returns:
            What was left.
        """
        left: list[Work] = []
        started: list[tuple[int, Started]] = []
        for home, passing in sorted({(one.home, one.passing) for one in work}):
            with self._homes.all[home].working():
                for ops, segments in batches([one.op for one in work if one[:2] == (home, passing)]):
                    some, rest = self._start(home, ops, segments, passing=passing, wait=wait)
                    started += [(home, some)] if some is not None else []
                    left += [Work(home, passing, op) for op in rest]
        for home, some in started:
            with self._homes.all[home].current():
                some.bound.check()
                if some.asks is not None:
                    self._known.keep(some.ops, some.asks, some.bound.found())
        return left

    def _start(
        self, home: int, ops: list[Op], segments: Segments, *, passing: bool, wait: bool
    ) -> tuple[Started | None, list[Op]]:
        """Launches a batch; gives what is under way, and the ops that wait for its statistics."""
        kind, specs = (home, *ops[0].spec.batch, ops[0].spec.grain), [op.spec for op in ops]
        key = (kind, segments.table.tobytes(), False)
        known = self._ready.get(key)
        if known is not None and known.specs == specs:  # compared by identity
            known.bound.run()
            return Started(known.bound, ops, None), []
        backend, rest = self._homes.all[home].backend, list[Op]()
        program = backend.program(ops)
        asks = None if program.ready or passing else program.asks()
        if asks is not None:
            found = self._known.of(ops, asks)
            lacking = [i for i, one in enumerate(found) if one is None]
            if not lacking:
                program.give(found)
                asks = None
            elif wait and len(due := self._first(ops, asks, lacking)) < len(ops):
                rest = [op for i, op in enumerate(ops) if i not in due]
                ((ops, segments),) = batches([ops[i] for i in due])
                return self._start(home, ops, segments, passing=False, wait=False)[0], rest
        bound = program.bind(segments)
        if bound is None:  # pass by pass, or by its definition
            compute(program, segments)
            if asks is not None:
                self._known.keep(ops, asks, program.found())
            return None, rest
        key = (*key[:2], asks is not None)
        known = self._ready.pop(key, None)
        if known is not None and known.bound.take(bound):
            bound = known.bound
        self._ready[key] = Ready(bound, specs)
        while len(self._ready) > MOST:
            self._ready.pop(next(iter(self._ready)))
        bound.run()
        return Started(bound, ops, asks), rest

    @staticmethod
    def _first(ops: Sequence[Op], asks: Sequence[Hashable], lacking: Sequence[int]) -> dict[int, None]:
        """Of the ops whose statistics nobody has, the first of each inputs and ask."""
        first: dict[Hashable, int] = {}
        for i in lacking:
            first.setdefault((ops[i].inputs, asks[i]), i)
        return dict.fromkeys(first.values())
