"""What the host tells the programs of a launch: how many there are, and how each finds its piece of which tensor.

A kernel of sums has one program per tile of 65,536 elements, an elementwise one per block of 2048. The host makes one
prefix table of programs per launch, with a row per segment; a program finds its segment by 32 rows at a time (two loads
deep for 147 tensors, three for 18,867, which all hit a cache), so nothing is made or sent per tile. Launches are split
in two by speed, never by result: *unmasked* programs have 16-byte aligned addresses and full blocks only, so their
kernel has no masks and moves 128 bits per access; the rest (the last elements of a tensor, views at odd addresses) runs
in the masked variant of the same kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ._call import INTERPRETED, Call, Place
from ._jit import HEADER, LANES, TILE

I64 = npt.NDArray[np.int64]

SIZES = (8, 4, 2, 2)
"""Bytes per element of each type code."""

CONFIGS: dict[str, dict[str, int]] = {
    # Elementwise kernels: elements per program and warps. 2048 / 4 warps is two 128-bit accesses of bf16 per thread and
    # input: the scalar prologue over 16 elements. At the 128 registers of TIES with eight models (tests/kernels/aot.py)
    # 512 threads are resident with 288 bytes each in flight. On an H100 2048 / 8 and 1024 / 4 were up to 3 % faster
    # with eight models (see MANY of consensus.py), and otherwise the same.
    "combine": {"BLOCK": 2048, "num_warps": 4},
    "consensus": {"BLOCK": 2048, "num_warps": 4},
    "delta_keys": {"BLOCK": 2048, "num_warps": 4},
    # Tile kernels: one program per tile of 65,536, 2048 lanes a step. 8 warps hold 8 lanes per thread and column.
    "gram": {"BLOCK": LANES, "num_warps": 8},
    "dot": {"BLOCK": LANES, "num_warps": 8},
    "l1": {"BLOCK": LANES, "num_warps": 8},
    "count": {"BLOCK": LANES, "num_warps": 8},
    "votes": {"BLOCK": LANES, "num_warps": 8},
    "cuts": {"BLOCK": LANES, "num_warps": 8},
}
"""Launch table: data, with the reason beside it. Results do not depend on it."""

INTERPRETER_BLOCK = 16_384
"""Elements per program of elementwise kernels in the interpreter, whose cost is per program."""

GRAM_PAIRS = 10
"""Inner products of one launch: 10 columns (four inputs) keep 80 running sums a thread, within 128 registers."""

DOT_MODELS = 8
"""Models of one launch of a gradient's inner products: one running sum each, as many registers as eight pairs."""

L1_MODELS = 4
"""Models of one launch of the L1 sums: two running sums each."""


class Walk(NamedTuple):
    """The programs of one launch.

    Attributes:
        unmasked: which variant they run.
        prefix: int64 ``[S + 1]``, programs before each segment.
        skip: int64 ``[S]``, units (blocks or tiles) of each segment, or of each of its rows, that the other variant
            takes before theirs.
    """

    unmasked: bool
    prefix: I64
    skip: I64

    @property
    def programs(self) -> int:
        """How many there are."""
        return int(self.prefix[-1])

    def places(self, call: Call) -> tuple[Place, Place, int]:
        """The arguments ``prefix``, ``skip`` and ``segments`` of its kernel."""
        return call.put(self.prefix), call.put(self.skip), len(self.skip)


def runs(table: I64, *, per_row: bool) -> tuple[I64, I64]:
    """How many runs of elements with one row of parameters each segment has, and how long they are."""
    length = table[:, 1]
    if not per_row:
        return (length > 0).astype(np.int64), length
    row = np.maximum(table[:, 3], 1)
    return length // row, row


def walks(
    table: I64,
    codes: Sequence[int],
    out_code: int = -1,
    *,
    unit: int,
    block: int,
    per_row: bool = False,
    lanes: bool = False,
) -> Iterator[Walk]:
    """The launches that cover all segments: unmasked, then masked; those without programs are left out.

    Args:
        table: segments int64 ``[S, 7 + M]``; by row, whole rows.
        codes: type code of each input.
        out_code: type code of the output; -1 where the kernel does not write to the segment's address.
        unit: elements per program.
        block: elements per step of the kernel; an unmasked piece is a multiple of it.
        per_row: programs restart at each row.
        lanes: the kernel draws random numbers, eight elements at a time where unmasked.
    """
    count, length = runs(table, per_row=per_row)
    sizes = [SIZES[c] for c in codes]
    addresses = table[:, HEADER : HEADER + len(codes)]
    odd = np.bitwise_or.reduce(addresses, axis=1)
    if out_code >= 0:
        odd = odd | table[:, 0]
        sizes.append(SIZES[out_code])
    if per_row:
        odd = odd | np.where(count > 1, length * min(sizes), 0)
    ok = odd % 16 == 0
    if lanes:
        e0 = table[:, 2]
        ok &= (e0 % 8 == 0) & ((e0 % block == 0) | (e0 >> 35 == e0 + table[:, 1] - 1 >> 35))
    units, tail = -(-length // unit), length % unit
    full = np.where(ok, length // unit + ((tail > 0) & (tail % block == 0)), 0)
    for unmasked, each, skip in ((True, full, np.zeros_like(full)), (False, units - full, full)):
        prefix = np.zeros(len(table) + 1, np.int64)
        np.cumsum(count * each, out=prefix[1:])
        if prefix[-1]:
            yield Walk(unmasked, prefix, skip)


def pack(codes: Sequence[int]) -> int:
    """Type codes as one integer, four bits each, input 0 lowest: a constexpr of the kernels."""
    word = 0
    for i, code in enumerate(codes):
        word |= int(code) << (4 * i)
    return word


def bounds(keys: npt.NDArray[np.uint64], *, wide: bool) -> I64:
    """Thresholds as signed keys; one above every key stays so."""
    most = np.iinfo(np.int64 if wide else np.int32).max
    return np.minimum(keys, np.uint64(most)).astype(np.int64)


def registers(*, fast: bool) -> dict[str, int]:
    """Options of a kernel of sums: how many registers it may take.

    At most 128 where speed counts, so that two programs share a multiprocessor (the compiler would take more);
    elsewhere all, so that nothing spills.
    """
    return {"maxnreg": 128 if fast else 255}


def config(name: str) -> dict[str, int]:
    """Launch configuration of an elementwise kernel, the caller's to change."""
    cfg = CONFIGS[name]
    return {**cfg, "BLOCK": INTERPRETER_BLOCK} if INTERPRETED else {**cfg}


def tiles_of(table: I64, *, per_row: bool = False) -> I64:
    """int64 ``[S + 1]``: tiles before each segment."""
    count, length = runs(table, per_row=per_row)
    out = np.zeros(len(table) + 1, np.int64)
    np.cumsum(count * -(-length // TILE), out=out[1:])
    return out
