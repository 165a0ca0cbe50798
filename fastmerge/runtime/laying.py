"""Where the inputs and the results of pieces go in memory. No data."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from fastmerge.checkpoint import Place
from fastmerge.ops.sources import ALIGN, FileRange, Made, Memory, Packed, Result
from fastmerge.ops.spec import Op, Source, Spec, Target
from fastmerge.runtime.schedule import BLOCK

if TYPE_CHECKING:
    from fastmerge.ops.coded import Coded
    from fastmerge.ops.packing import Packing
    from fastmerge.ops.quantised import Dequantised

_FILE, _OFFSET = operator.attrgetter("file"), operator.attrgetter("offset")


class Run(NamedTuple):
    """Pieces of one input, or result, that follow each other where they come from, or go, and so in the slot.

    Attributes:
        end: where the first comes from, or goes.
        start: its first byte in the file; elsewhere its first element.
        nbytes: of all.
        pieces: how many.
    """

    end: Source | Target
    start: int
    nbytes: int
    pieces: int


class Laid(NamedTuple):
    """Where the inputs of a unit go.

    Attributes:
        end: the first free byte behind them.
        bases: address of every run, by input.
        reads: rows (fd, offset, address, nbytes), one per run in a file.
        made: (source, first element, elements, address).
        coded: which inputs are codes and scales; empty where none is.
    """

    end: int
    bases: list[list[int]]
    reads: list[tuple[int, int, int, int]]
    made: list[tuple[Made | Result | Coded, int, int, int]]
    coded: tuple[bool, ...] = ()


def runs_of(spec: Spec, ops: Sequence[Op], firsts: Sequence[int], lengths: Sequence[int]) -> list[list[Run]]:
    """The runs of every input of pieces (first element, elements) of ops of one kind."""
    columns = zip(*[op.inputs for op in ops], strict=True)
    return [_column(c, firsts, lengths, d.size) for c, d in zip(columns, spec.dtypes, strict=True)]


def results_of(ops: Sequence[Op], firsts: Sequence[int], lengths: Sequence[int], size: int) -> list[list[Run]]:
    """The runs of every result, of so many bytes per element."""
    return [_column(c, firsts, lengths, size) for c in zip(*[op.targets for op in ops], strict=True)]


def _column(ends: Sequence[Source | Target], firsts: Sequence[int], lengths: Sequence[int], size: int) -> list[Run]:
    """The runs of one input, or of one result: of 50,000 neighbours one. Step by step for all pieces."""
    runs: list[Run] = []
    at = 0
    for kind, group in itertools.groupby(map(type, ends)):
        stop = at + len([*group])
        mine, begin, count = ends[at:stop], firsts[at:stop], lengths[at:stop]
        nbytes = [n * size for n in count]
        at = stop
        if kind not in (FileRange, Place):
            runs += map(Run, mine, begin, nbytes, itertools.repeat(1))
            continue
        files: Sequence[object]
        offsets: Iterable[int]
        if kind is FileRange:
            infos, models = zip(*cast("Sequence[FileRange]", mine), strict=True)
            files, offsets = [*zip(models, map(_FILE, infos), strict=True)], map(_OFFSET, infos)
        else:
            files, offsets, _ = zip(*cast("Sequence[Place]", mine), strict=True)
        starts = [offset + e0 * size for offset, e0 in zip(offsets, begin, strict=True)]
        stops = [*map(operator.add, starts, nbytes)]
        parted = map(operator.or_, map(operator.ne, starts[1:], stops), map(operator.ne, files[1:], files))
        heads = [0, *itertools.compress(range(1, len(mine)), parted)]
        for i, j in itertools.pairwise([*heads, len(mine)]):
            runs.append(Run(mine[i], starts[i], stops[j - 1] - starts[i], j - i))
    return runs


def coded_in(spec: Spec, runs: Sequence[Sequence[Run]]) -> tuple[bool, ...]:
    """Which inputs of a unit kernels can take as codes and scales; empty where there are none."""
    if {type(run.end) for column in runs for run in column} <= {FileRange, Memory}:
        return ()
    from fastmerge.ops.coded import fits

    found = [
        all(fits(cast("Source", run.end), run.start, run.nbytes // d.size) for run in column)
        for d, column in zip(spec.dtypes, runs, strict=True)
    ]
    return tuple(found) if any(found) else ()


def spread(
    spec: Spec, runs: Sequence[Sequence[Run]], bases: Sequence[list[int]], lengths: Sequence[int]
) -> list[list[int]]:
    """Addresses of the pieces of every input, from those of its runs."""
    return [_pieces(column, base, lengths, d.size) for d, column, base in zip(spec.dtypes, runs, bases, strict=True)]


def _pieces(runs: Sequence[Run], bases: list[int], lengths: Sequence[int], size: int) -> list[int]:
    if len(runs) == len(lengths):
        return bases
    out: list[int] = []
    at = 0
    for run, base in zip(runs, bases, strict=True):
        sizes = [n * size for n in lengths[at : at + run.pieces - 1]]
        out += itertools.accumulate(sizes, initial=base)
        at += run.pieces
    return out


def outs_of(
    ops: Sequence[Op], results: Sequence[Sequence[Run]], lengths: Sequence[int], cursor: int
) -> tuple[list[list[int]], int]:
    """Addresses of the pieces of every result, from a free byte on, and the first free byte behind them."""
    size = ops[0].spec.out_dtype.size
    bases: list[list[int]] = []
    for column in results:
        at: list[int] = []
        first = 0
        for target, start, nbytes, count in column:
            packing = ops[first].spec.packing
            first += count
            if type(target) is Memory:
                at.append(target.address + start * size)
                continue
            place = start
            if type(target) is Packed:  # the codes will lie where the values are
                codes = cast("Packing", packing).ranges(target, start, nbytes // size)[0]
                place = codes.offset if codes.offset % ALIGN == 0 else 0
            cursor += (place - cursor) % BLOCK
            at.append(cursor)
            cursor += nbytes
        bases.append(at)
    return [_pieces(column, base, lengths, size) for column, base in zip(results, bases, strict=True)], cursor


def lay(
    spec: Spec,
    runs: Sequence[Sequence[Run]],
    cursor: int,
    fd: Callable[[FileRange], int],
    cold: Sequence[bool] = (),
    coded: Sequence[bool] = (),
) -> Laid:
    """Places for the runs of every input, from an address on.

    Args:
        spec: of the pieces.
        runs: of each input.
        cursor: the first free byte.
        fd: what the reads know a file by.
        cold: which reads go past the page cache; they get blocks of their own. None of them, where it is empty.
        coded: which inputs are codes and scales; none of them, where it is empty.
    """
    reads: list[tuple[int, int, int, int]] = []
    made: list[tuple[Made | Result | Coded, int, int, int]] = []
    bases: list[list[int]] = []
    for dtype, column, codes in zip(spec.dtypes, runs, coded or [False] * len(runs), strict=True):
        at: list[int] = []
        for source, start, size, _ in column:
            nbytes = size
            if type(source) is Memory:
                at.append(source.address + start * dtype.size)
                continue
            cursor = (cursor + ALIGN - 1) & -ALIGN
            past = False
            if codes:
                from fastmerge.ops.coded import coded as coded_input

                packed = cast("Coded", coded_input(cast("Dequantised", source)))
                made.append((packed, start, nbytes // dtype.size, cursor))
                nbytes = packed.room(start, nbytes // dtype.size)
            elif type(source) is not FileRange:
                made.append((cast("Made", source), start, nbytes // dtype.size, cursor))
            elif nbytes:
                past = bool(cold) and cold[len(reads)]
                if past and not start % dtype.size:
                    cursor = -(-cursor // BLOCK) * BLOCK + start % BLOCK
                reads.append((fd(source), start, cursor, nbytes))
            at.append(cursor)
            cursor += nbytes
            if past:
                cursor = -(-cursor // BLOCK) * BLOCK
        bases.append(at)
    return Laid(cursor, bases, reads, made, tuple(coded))
