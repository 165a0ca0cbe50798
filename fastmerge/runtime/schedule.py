"""From a plan to units of work within a byte budget: pure, no data, no threads.

A *unit* is what one device works on at a time: a bundle of small tensors, one tensor, or a chunk of a
large one. A *job* is what must finish together: the units of one tensor (or of the whole model, for
methods whose threshold is global) share their statistics. Units are small on purpose: warm files arrive
faster in a buffer that stays in the cache, and what arrived is still there for the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastmerge.checkpoint import without_gc
from fastmerge.errors import BudgetError
from fastmerge.methods.base import TILE, Group
from fastmerge.planning import Output

UNIT_ELEMENTS = 1 << 20
"""Elements per unit on CPU cores, where the budget allows it: 2 MiB per bf16 model. Devices may prefer others."""

COPY_BYTES = 64 << 20
"""Bytes per ``copy_file_range`` unit."""

ALIGN = 64
"""Alignment of every run of input bytes inside a slot."""

BLOCK = 4096
"""A run of output bytes has the same place in a block of memory as in one of its file: direct writes ask for that."""


ROW_BYTES = 300
"""Bytes of sums and coefficients per row, for methods that work by row, with some to spare."""

SPARE = 100 << 20
"""What tables may take beside the budget: the law allows 300 MB, and the interpreter takes 60."""


class Unit(NamedTuple):
    """One piece of work.

    Attributes:
        job: index of its job.
        pieces: (output, first element, elements); bytes in place of elements for copies.
        nbytes: slot bytes that its inputs and outputs take.
    """

    job: int
    pieces: tuple[tuple[int, int, int], ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Job:
    """Units that share their statistics.

    Attributes:
        kind: ``copy`` (bytes as they are) or ``merge``.
        outputs: positions in the plan's outputs; a piece's group is its output's place in this tuple.
        units: what one full pass over the job's data reads.
        resident: whether all passes run on one read (a single unit).
    """

    kind: Literal["copy", "merge"]
    outputs: tuple[int, ...]
    units: tuple[Unit, ...]

    @property
    def resident(self) -> bool:
        """A job of one unit keeps its data in the slot from pass to pass."""
        return len(self.units) == 1


@dataclass(frozen=True, slots=True)
class Schedule:
    """All jobs in file order, and the slots that they need.

    Attributes:
        jobs: in the order of the output's bytes.
        slot_bytes: the largest unit.
        slots: how many units may be in flight: at most one per worker, fewer where the budget is small.
        elements: elements per unit that the budget allowed.
    """

    jobs: tuple[Job, ...]
    slot_bytes: int
    slots: int
    elements: int


def piece_bytes(group: Group, length: int, pieces: int = 1) -> int:
    """Slot bytes of pieces of ``length`` elements together: all inputs and the output."""
    width = sum([d.size for d in group.dtypes]) + group.out_dtype.size
    return length * width + pieces * (ALIGN * len(group.dtypes) + BLOCK)


@without_gc()
def schedule(
    outputs: Sequence[Output],
    *,
    workers: int,
    memory: int | None,
    whole: bool = False,
    elements: int | None = None,
    largest: int | None = None,
    beside: float = 0.0,
) -> Schedule:
    """Cuts the outputs of a plan into units that fit the budget.

    Args:
        outputs: the plan's outputs, in file order.
        workers: how many units could run at a time.
        memory: budget in bytes for all slots together; None for no limit.
        whole: never cut a tensor (the reference backend works on whole ones).
        elements: per unit where the budget allows it; None for :data:`UNIT_ELEMENTS`.
        largest: slot bytes that a device has room for; None for no limit. Where not even the smallest unit fits,
            the slots are larger: what to say then, the caller knows.
        beside: host bytes that a worker may need for each byte of its slot, where a method has statistics.

    Raises:
        BudgetError: if one smallest unit does not fit ``memory``; the message states the minimum.
    """
    elements = elements or UNIT_ELEMENTS
    reach = kinds(outputs)
    scopes = {kind.scope for kind in reach}
    tables = max((_row_tables(o) for o, kind in zip(outputs, reach, strict=True) if kind.scope == "row"), default=0)
    if memory is not None and tables > memory:
        raise BudgetError(
            f"--memory {memory} bytes: this recipe works by row, and the sums of its longest tensor's rows alone take "
            f"{tables} bytes: expected more than that"
        )
    apart = tables if tables > SPARE else 0
    room = None if memory is None else memory - apart
    charge = 1.0 + (beside if scopes & {"tensor", "model"} else 0.0)
    while True:
        jobs = tuple(_jobs(outputs, reach, elements, whole=whole))
        slot = max((u.nbytes for j in jobs if j.kind == "merge" for u in j.units), default=0)
        fits = largest is None or slot <= largest
        needed = math.ceil(slot * charge)
        if fits and (room is None or needed * workers <= room):
            return Schedule(jobs, slot, workers, elements)
        if elements <= TILE:
            break
        elements //= 2
    if room is not None and needed > room:
        least = needed + apart
        raise BudgetError(f"--memory {memory} bytes is below the minimum of this recipe: expected >= {least} bytes")
    slots = workers if room is None else max(1, min(workers, room // needed))
    return Schedule(jobs, slot, slots, elements)


class Kind(NamedTuple):
    """What decides how the stream may cut an output, and with which others it may share a unit.

    Attributes:
        scope: what each result depends on (:meth:`Method.scope`); ``copy`` where nothing is computed.
        batch: equal for tensors of one kernel call: method, types, inputs, and every parameter that is no number.
    """

    scope: str
    batch: tuple[object, ...]


_COPY = Kind("copy", ())


def kinds(outputs: Sequence[Output]) -> list[Kind]:
    """The kind of each output; asked once per set of parameters, which tensors share."""
    known: dict[tuple[int, ...], Kind] = {}
    out = []
    for o in outputs:
        g = o.group
        if o.method is None or g is None:
            out.append(_COPY)
            continue
        key = (id(o.method), id(g.params), id(g.dtypes), id(g.out_dtype), id(g.indices), id(g.models))
        if key not in known:
            words = tuple(sorted((k, v) for k, v in g.params.items() if isinstance(v, (str, bool))))
            batch = (o.method, g.dtypes, g.out_dtype, g.has_base, g.indices, words)
            known[key] = Kind(o.method.scope(g), batch)
        out.append(known[key])
    return out


def _jobs(outputs: Sequence[Output], reach: Sequence[Kind], elements: int, *, whole: bool) -> Iterator[Job]:
    """Jobs in file order; consecutive small tensors of one kind share a unit."""
    number = 0
    bundle: list[tuple[int, int, int]] = []
    bundle_key: object = None
    bundle_size = 0
    model: list[int] = []

    def flush() -> Iterator[Job]:
        nonlocal number, bundle, bundle_size
        if bundle:
            yield Job("merge", tuple([o for o, _, _ in bundle]), (_unit(number, outputs, bundle),))
            number += 1
        bundle, bundle_size = [], 0

    copies: list[int] = []
    for position, out in enumerate(outputs):
        if out.method is None or out.group is None:
            copies.append(position)
            continue
        scope, key = reach[position]
        scope = "whole" if whole else scope
        if scope == "model":
            model.append(position)
            continue
        n = out.group.numel
        if bundle and (key != bundle_key or bundle_size + n > elements):
            yield from flush()
        # A tensor with statistics that is a little too large is cheaper to keep than to read twice.
        if n <= (2 * elements if scope == "tensor" else elements) or scope == "whole":
            bundle.append((position, 0, n))
            bundle_key = key
            bundle_size += n
            continue
        step = max(1, elements // out.group.row) * out.group.row if scope == "row" else elements
        pieces = [(position, e0, min(step, n - e0)) for e0 in range(0, n, step)]
        yield Job("merge", (position,), tuple(_unit(number, outputs, [p]) for p in pieces))
        number += 1
    yield from flush()
    if model:
        yield _model_job(number, outputs, model, reach, elements)
        number += 1
    for units in _copy_units(outputs, copies):
        yield Job("copy", tuple(dict.fromkeys(o for o, _, _ in units)), (Unit(number, units, 0),))
        number += 1


def _row_tables(out: Output) -> int:
    """Bytes that a method by row keeps of a whole tensor between its passes."""
    return ROW_BYTES * (out.group.numel // max(1, out.group.row)) if out.group else 0


def _numel(out: Output) -> int:
    return out.group.numel if out.group else 0


def _unit(job: int, outputs: Sequence[Output], pieces: Sequence[tuple[int, int, int]]) -> Unit:
    group = outputs[pieces[0][0]].group  # of one kind with all the others
    nbytes = piece_bytes(group, sum([length for _, _, length in pieces]), len(pieces)) if group else 0
    return Unit(job, tuple(pieces), nbytes)


def _model_job(
    number: int, outputs: Sequence[Output], members: Sequence[int], reach: Sequence[Kind], elements: int
) -> Job:
    """One job over every tensor of a whole-model method; its units are bundles and chunks as usual."""
    units: list[Unit] = []
    bundle: list[tuple[int, int, int]] = []
    size, key = 0, reach[members[0]].batch
    for o in members:
        n = _numel(outputs[o])
        k = reach[o].batch
        for e0 in range(0, max(n, 1), elements):
            length = min(elements, n - e0)
            if bundle and (k != key or size + length > elements):
                units.append(_unit(number, outputs, bundle))
                bundle, size = [], 0
            bundle.append((o, e0, length))
            size += length
            key = k
    if bundle:
        units.append(_unit(number, outputs, bundle))
    return Job("merge", tuple(members), tuple(units))


def sample_units(
    outputs: Sequence[Output], job: Job, pieces: Iterable[tuple[int, int, int]], slot_bytes: int
) -> Iterator[Unit]:
    """Units for a pass that reads only some pieces of a job, each within one slot.

    Args:
        outputs: the plan's outputs.
        job: whose pass it is.
        pieces: (group, first element, elements); a piece longer than a tile starts at one.
        slot_bytes: 0 where nothing is read into slots.
    """
    number = job.units[0].job
    bundle: list[tuple[int, int, int]] = []
    size, key = 0, _COPY.batch
    reach = kinds([outputs[o] for o in job.outputs])
    for index, start, total in pieces:
        o = job.outputs[index]
        group = outputs[o].group
        if group is None:
            continue
        mine = reach[index].batch
        for e0 in range(start, start + max(total, 1), TILE):
            length = min(TILE, start + total - e0)
            nbytes = piece_bytes(group, length)
            if bundle and (mine != key or (slot_bytes and size + nbytes > slot_bytes)):
                yield Unit(number, tuple(bundle), size)
                bundle, size = [], 0
            key = mine
            bundle.append((o, e0, length))
            size += nbytes
    if bundle:
        yield Unit(number, tuple(bundle), size)


def _copy_units(outputs: Sequence[Output], members: Sequence[int]) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """Byte ranges of copied tensors, bundled up to :data:`COPY_BYTES`."""
    bundle: list[tuple[int, int, int]] = []
    size = 0
    for o in members:
        total = outputs[o].inputs[0].nbytes
        for start in range(0, max(total, 1), COPY_BYTES):
            length = min(COPY_BYTES, total - start)
            if bundle and size + length > COPY_BYTES:
                yield tuple(bundle)
                bundle, size = [], 0
            bundle.append((o, start, length))
            size += length
    if bundle:
        yield tuple(bundle)
