"""Quantised inputs as kernels take them: codes and scales, of which a block at a time becomes fp32 in the kernel.

``Coded`` in ``csrc/kernels.h`` is what lies in memory. A model that is float8 takes a quarter of what its weights do in
fp32, which then never leave a core's cache.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from fastmerge.ops.made import array
from fastmerge.ops.quantised import FOUR_BITS, I64, NUMBERS, Dequantised, F32Array, decode
from fastmerge.ops.sources import ALIGN, Bring
from fastmerge.ops.spec import Source

WORDS = 12
"""Integers of 64 bits at the address of a coded input."""

_HEAD = -(-8 * WORDS // ALIGN) * ALIGN


class Coded:
    """Runs of a quantised tensor as it is stored, each with its scales (and zeros) in fp32.

    Args:
        of: the tensor, whose rows of codes have no gaps between them.
    """

    def __init__(self, of: Dequantised) -> None:
        coding = of.coding
        self.of = of
        self._columns, self._height, self._high = coding.columns, coding.rows, coding.block[0]
        self._down, self._across = coding.grid
        self._size, self._each = of.codes.dtype.size, _each(of)
        self._tables = 1 if of.zero is None else 2

    def room(self, e0: int, n: int) -> int:
        """Bytes of elements ``e0 .. e0 + n``."""
        first, last = e0 // self._columns, (e0 + n - 1) // self._columns
        height, high, each = self._height, self._high, self._each
        rows = (last // height - first // height) * self._down + last % height // high - first % height // high + 1
        codes = -(-(e0 + n) // each) - e0 // each
        return _HEAD + 4 * rows * self._across * self._tables + codes * self._size

    def fill(self, bring: Bring, runs: I64) -> None:
        """Brings runs (first element, elements, address), each of at least one element."""
        of, coding = self.of, self.of.coding
        e0, n, address = runs.T
        row = coding.scale_rows(e0 // self._columns)
        rows = coding.scale_rows((e0 + n - 1) // self._columns) - row + 1
        start = e0 // self._each
        count = -(-(e0 + n) // self._each) - start
        cells = rows * self._across
        tables = [of.multipliers(bring, row, rows)]
        if of.zero is not None:
            pairs = zip(row.tolist(), rows.tolist(), strict=True)
            tables.append(np.concatenate([of.zeros(bring, first, some) for first, some in pairs]))
        at = _HEAD + 4 * cells * self._tables
        bring(of.codes, np.stack([start, count, address + at], axis=1))
        if coding.code == "int8" and self._size > 1:
            for to, items in zip((address + at).tolist(), count.tolist(), strict=True):
                array(to, items * self._size, np.uint8)[:] ^= 128
        words = np.empty((len(runs), WORDS), np.int64)
        words[:, 0], words[:, 1], words[:, 2] = at + count * self._size, start * self._each, count * self._each
        words[:, 3], words[:, 4], words[:, 5], words[:, 6] = _HEAD, 0, at, row
        if of.zero is not None:
            words[:, 4] = _HEAD + 4 * cells
        words[:, 7:] = coding.rows, coding.columns, *coding.block, NUMBERS[coding.code]
        behind = np.cumsum(cells) - cells
        for i, (to, some, skip) in enumerate(zip(address.tolist(), cells.tolist(), behind.tolist(), strict=True)):
            ctypes.memmove(to, words.ctypes.data + 8 * WORDS * i, 8 * WORDS)
            for t, table in enumerate(tables):
                ctypes.memmove(to + _HEAD + 4 * some * t, table.ctypes.data + 4 * skip, 4 * some)


def _each(source: Dequantised) -> int:
    """Codes of an element of what is stored."""
    return source.codes.dtype.size * (2 if source.coding.four else 1)


@functools.lru_cache(maxsize=64)
def coded(source: Dequantised) -> Coded | None:
    """A source as a coded input; None where it cannot be one."""
    if source.transposed or source.coding.columns % _each(source):
        return None
    return Coded(source)


def fits(source: Source, e0: int, n: int) -> bool:
    """Whether a run of a source can be a coded input, and is no larger then than in fp32."""
    if type(source) is not Dequantised:
        return False
    found = coded(source)
    return found is not None and n > 0 and found.room(e0, n) <= source.dtype.size * n


def values_at(address: int, e0: int, n: int) -> F32Array:
    """Elements ``e0 .. e0 + n`` of the coded input at an address."""
    words = array(address, WORDS, np.int64).tolist()
    _, first, _, scales, zeros, codes, row, height, columns, high, width, number = words
    code = next(name for name, known in NUMBERS.items() if known == number)
    rows = np.arange(e0 // columns, -(-(e0 + n) // columns), dtype=np.int64)
    begin = np.maximum(rows * columns, e0)
    count = np.minimum((rows + 1) * columns, e0 + n) - begin
    half = 2 if code in FOUR_BITS else 1
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
