"""Quantised inputs as kernels take them: codes and scales, of which a block at a time becomes fp32 in the kernel.

``Coded`` in ``csrc/kernels.h`` is what lies in memory. A model that is float8 takes a quarter of what its weights do in
fp32, which then never leave a core's cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastmerge.ops.made import array
from fastmerge.ops.quantised import NUMBERS, Dequantised, F32Array, decode
from fastmerge.ops.sources import ALIGN, Bring
from fastmerge.ops.spec import Source

WORDS = 12
"""Integers of 64 bits at the address of a coded input."""

_HEAD = -(-8 * WORDS // ALIGN) * ALIGN


class Coded(NamedTuple):
    """A run of a quantised tensor as it is stored, with scales (and zeros) in fp32.

    Attributes:
        of: the tensor, whose rows of codes have no gaps between them.
    """

    of: Dequantised

    def _rows(self, e0: int, n: int) -> tuple[int, int]:
        """The first row of blocks, of all matrices, and how many there are."""
        coding = self.of.coding
        down, high = coding.grid[0], coding.block[0]
        first, last = ((e // coding.columns) for e in (e0, e0 + n - 1))
        begin, end = (row // coding.rows * down + row % coding.rows // high for row in (first, last))
        return begin, end - begin + 1

    def _codes(self, e0: int, n: int) -> tuple[int, int]:
        """The first element of the codes as they are stored, and how many there are."""
        each = _each(self.of)
        return e0 // each, -(-(e0 + n) // each) - e0 // each

    def room(self, e0: int, n: int) -> int:
        """Bytes of elements ``e0 .. e0 + n``."""
        cells = self._rows(e0, n)[1] * self.of.coding.grid[1] * 4
        return _HEAD + cells * (1 if self.of.zero is None else 2) + self._codes(e0, n)[1] * self.of.codes.dtype.size

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Brings elements ``e0 .. e0 + n`` to an address."""
        of, coding = self.of, self.of.coding
        row, rows = self._rows(e0, n)
        start, count = self._codes(e0, n)
        each, size = _each(of), of.codes.dtype.size
        tables = [of.multipliers(bring, row, rows)]
        if of.zero is not None:
            tables.append(of.zeros(bring, row, rows))
        at, cells = _HEAD, tables[0].size
        for table in tables:
            array(address + at, cells, np.float32)[:] = table.reshape(-1)
            at += 4 * cells
        bring(of.codes, np.array([[start, count, address + at]], np.int64))
        if coding.code == "int8" and size > 1:
            array(address + at, count * size, np.uint8)[:] ^= 128
        zeros = _HEAD + 4 * cells if of.zero is not None else 0
        array(address, WORDS, np.int64)[:] = (
            at + count * size,
            start * each,
            count * each,
            _HEAD,
            zeros,
            at,
            row,
            coding.rows,
            coding.columns,
            *coding.block,
            NUMBERS[coding.code],
        )


def _each(source: Dequantised) -> int:
    """Codes of an element of what is stored."""
    return source.codes.dtype.size * (2 if source.coding.four else 1)


def fits(source: Source, e0: int, n: int) -> bool:
    """Whether a run of a source can be a coded input, and is no larger then than in fp32."""
    if type(source) is not Dequantised or source.transposed or source.coding.columns % _each(source):
        return False
    return n > 0 and Coded(source).room(e0, n) <= source.dtype.size * n


def values_at(address: int, e0: int, n: int) -> F32Array:
    """Elements ``e0 .. e0 + n`` of the coded input at an address."""
    _, first, _, scales, zeros, codes, row, height, columns, high, width, number = array(
        address, WORDS, np.int64
    ).tolist()
    code = next(name for name, known in NUMBERS.items() if known == number)
    rows = np.arange(e0 // columns, -(-(e0 + n) // columns), dtype=np.int64)
    begin = np.maximum(rows * columns, e0)
    count = np.minimum((rows + 1) * columns, e0 + n) - begin
    half = 2 if code in ("int4", "float4_e2m1fn") else 1
    down, across = -(-height // high), -(-columns // width)
    at = 4 * across * (rows // height * down + rows % height // high - row)
    out = np.empty(n, np.float32)
    decode(
        code,
        width,
        codes=address + codes + (rows * columns - first) // half,
        first=begin - rows * columns,
        count=count,
        scales=address + scales + at,
        zeros=address + zeros + at if zeros else None,
        to=out.ctypes.data + 4 * (begin - e0),
    )
    return out
