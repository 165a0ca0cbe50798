"""Where the inputs and the results of pieces go in memory. No data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from fastmerge.checkpoint import Place, of_fields
from fastmerge.ops.coded import Coded, fits
from fastmerge.ops.coded import coded as coded_input
from fastmerge.ops.packing import Packed
from fastmerge.ops.sources import ALIGN, FileRange, Made, Memory, Result
from fastmerge.ops.spec import Op, Source, Spec
from fastmerge.runtime.schedule import BLOCK

if TYPE_CHECKING:
    from fastmerge.ops.packing import Packing
    from fastmerge.ops.quantised import Dequantised


class Run(NamedTuple):
    """Pieces of one input that follow each other where they come from, and so in the slot.

    Attributes:
        source: of the first.
        start: its first byte in the file; elsewhere its first element.
        nbytes: of all.
        pieces: how many.
    """

    source: Source
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
    sizes = {size: [n * size for n in lengths] for size in {d.size for d in spec.dtypes}}
    return [_column([op.inputs[m] for op in ops], firsts, sizes[d.size], d.size) for m, d in enumerate(spec.dtypes)]


def _column(sources: Sequence[Source], firsts: Sequence[int], sizes: Sequence[int], size: int) -> list[Run]:
    """The runs of one input: of 50,000 neighbours one."""
    runs: list[Run] = []
    head: Source | None = None
    begin = end = pieces = 0
    model = file = -1
    for source, e0, nbytes in zip(sources, firsts, sizes, strict=True):
        if type(source) is FileRange:
            info, of = source
            start = info.offset + e0 * size
            if start == end and info.file == file and of == model:
                end += nbytes
                pieces += 1
                continue
            if head is not None:
                runs.append(of_fields(Run, (head, begin, end - begin, pieces)))
            head, begin, end, pieces, model, file = source, start, start + nbytes, 1, of, info.file
            continue
        if head is not None:
            runs.append(of_fields(Run, (head, begin, end - begin, pieces)))
        runs.append(of_fields(Run, (source, e0, nbytes, 1)))
        head, model = None, -1
    if head is not None:
        runs.append(of_fields(Run, (head, begin, end - begin, pieces)))
    return runs


def coded_in(spec: Spec, runs: Sequence[Sequence[Run]]) -> tuple[bool, ...]:
    """Which inputs of a unit kernels can take as codes and scales; empty where there are none."""
    found = [
        all(fits(run.source, run.start, run.nbytes // d.size) for run in column)
        for d, column in zip(spec.dtypes, runs, strict=True)
    ]
    return tuple(found) if any(found) else ()


def spread(
    spec: Spec, runs: Sequence[Sequence[Run]], bases: Sequence[list[int]], lengths: Sequence[int]
) -> list[list[int]]:
    """Addresses of the pieces of every input, from those of its runs."""
    return [
        base if len(column) == len(lengths) else _pieces(column, base, [n * d.size for n in lengths])
        for d, column, base in zip(spec.dtypes, runs, bases, strict=True)
    ]


def _pieces(runs: Sequence[Run], bases: list[int], sizes: Sequence[int]) -> list[int]:
    out: list[int] = []
    at = 0
    for run, base in zip(runs, bases, strict=True):
        out += itertools.accumulate(sizes[at : at + run.pieces - 1], initial=base)
        at += run.pieces
    return out


def outs_of(
    ops: Sequence[Op], firsts: Sequence[int], lengths: Sequence[int], size: int, cursor: int
) -> tuple[list[list[int]], int]:
    """Addresses of the results by output, from a free byte on, and the first free byte behind them."""
    outs: list[int] = []
    shard = end = -1
    for op, e0, length in zip(ops, firsts, lengths, strict=True):
        for target in op.targets:
            if type(target) is Packed:  # the codes will lie where the values are
                codes = cast("Packing", op.spec.packing).ranges(target, e0, length)[0]
                place = codes.offset if codes.offset % ALIGN == 0 else 0
                cursor += (place - cursor) % BLOCK
                outs.append(cursor)
                cursor += length * size
                shard = -1
                continue
            if type(target) is not Place:
                outs.append(cast("Memory", target).address + e0 * size)
                continue
            start = target.offset + e0 * size
            if start != end or shard != target.shard:
                cursor += (start - cursor) % BLOCK
            shard, end = target.shard, start + length * size
            outs.append(cursor)
            cursor += length * size
    count = len(ops[0].targets)
    return [outs[i::count] for i in range(count)], cursor


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
