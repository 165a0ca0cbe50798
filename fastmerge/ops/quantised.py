"""A source of weights that codes and scales stand for: floats of 8 bits, integers, and codes of 4 bits.

Every element is ``(value(code) - zero) * scale``, in fp32, with one rounding: that of the product. ``fastmerge`` has
no other definition of a quantised weight; what the libraries of each format compute is the same number.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from fastmerge.dtypes import BF16, F16, F32, DType
from fastmerge.ops.joined import matrices, scatter
from fastmerge.ops.made import array, bfloat16_bits
from fastmerge.ops.sources import Bring, workspace
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt

F32Array: TypeAlias = "npt.NDArray[np.float32]"
I64: TypeAlias = "npt.NDArray[np.int64]"
U8: TypeAlias = "npt.NDArray[np.uint8]"

N = TypeVar("N", int, I64)

PANEL = 1 << 19
"""Elements that are computed at a time, and one row at least."""

NUMBERS = {"float8_e4m3fn": 0, "float8_e5m2": 1, "int8": 2, "int4": 3, "float4_e2m1fn": 4}
"""What the kernels call each kind of code."""

FOUR_BITS = frozenset({"int4", "float4_e2m1fn"})
"""Kinds of codes of which two lie in a byte, the first one low."""


@functools.cache
def extension() -> Any:
    """The compiled extension; None where it was not built: everything is here in numpy as well."""
    try:
        from fastmerge import _native
    except ImportError:
        return None
    return _native


@functools.cache
def values(code: str) -> F32Array:
    """The value of every code: ``[256]``, or ``[16]`` for those of four bits."""
    if code == "float4_e2m1fn":
        half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        return np.array([*half, *(-x for x in half)], np.float32)
    if code == "int4":
        return np.arange(-8, 8).astype(np.float32)
    if code == "int8":
        return np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
    return (bfloat16_bits(code).astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Coding:
    """How the codes of a tensor and their scales lie.

    Attributes:
        code: one of :data:`NUMBERS`.
        matrices: ``[L]``, how many of ``[R, C]``.
        rows: R.
        columns: C.
        block: rows and columns of a matrix that share a scale; the last ones may be fewer.
    """

    code: str
    matrices: int
    rows: int
    columns: int
    block: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the scales of one matrix."""
        return -(-self.rows // self.block[0]), -(-self.columns // self.block[1])

    @property
    def four(self) -> bool:
        """Whether two codes lie in a byte."""
        return self.code in FOUR_BITS

    def scale_rows(self, rows: N) -> N:
        """The row of the scales, of all matrices, for a row of all matrices, or for several."""
        return rows // self.rows * self.grid[0] + rows % self.rows // self.block[0]


@functools.cache
def coding(code: str, stored: tuple[int, int, int], block: tuple[int, int]) -> Coding:
    """The coding of weights ``[L, R, C]``: one object for all that are alike."""
    return Coding(code, *stored, block)


@dataclass(frozen=True, eq=False)
class Dequantised:
    """``(value(code) - zero) * scale`` in fp32; where the scales have a divisor, they are divided by it first.

    Attributes:
        codes: ``[L, R, ...]``: bytes, or int32 words of 8 codes, or of 4 (int8 then lies in them with 128 added).
        scale: ``[L, *grid]``; unsigned bytes (and float8_e8m0fnu) are powers of two, 127 more than their exponent.
        coding: how they lie.
        shape: of the weights: ``[..., R, C]``, or ``[..., C, R]`` of transposed ones.
        transposed: each matrix is stored the other way round.
        zero: what is subtracted: int8 of the grid's shape, or int32 words of 8 of its rows (8 is added to each).
        divisor: one fp32.
    """

    codes: Source
    scale: Source
    coding: Coding
    shape: tuple[int, ...]
    transposed: bool = False
    zero: Source | None = None
    divisor: Source | None = None

    @property
    def dtype(self) -> DType:
        """fp32: nothing is rounded to the type that the model computes with."""
        return F32

    @property
    def inputs(self) -> tuple[Source, ...]:
        """The codes, and what turns them into values."""
        return tuple(s for s in (self.codes, self.scale, self.zero, self.divisor) if s is not None)

    @property
    def workspace(self) -> int:
        """A panel of codes, and of values that go elsewhere one by one; its scales and zeros; tables of its rows."""
        coding = self.coding
        rows = _panel_rows(coding.columns)
        scales = (rows // coding.block[0] + 2) * coding.grid[1]
        return 6 * max(rows * coding.columns, PANEL) + 32 * scales + 160 * rows + max(map(workspace, self.inputs))

    @property
    def stored(self) -> int:
        """Bytes of all that it is made from."""
        return sum(s.dtype.nbytes(math.prod(s.shape)) for s in self.inputs)

    @property
    def _stride(self) -> int:
        """Bytes from one row of codes to the next."""
        coding, size = self.coding, self.codes.dtype.size
        nbytes = -(-coding.columns // 2) if coding.four else coding.columns
        return -(-nbytes // size) * size

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Rows of codes, a panel at a time."""
        if not n:
            return
        if self.transposed:
            self._columns(bring, e0, n, address)
            return
        width = self.coding.columns
        last = e0 + n
        for first in range(e0 // width, -(-last // width), step := _panel_rows(width)):
            rows = np.arange(first, min(first + step, -(-last // width)), dtype=np.int64)
            begin = np.maximum(rows * width, e0) - rows * width
            count = np.minimum((rows + 1) * width, last) - rows * width - begin
            self._rows(bring, rows, begin, count, address + 4 * (rows * width + begin - e0))

    def _columns(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Elements of transposed matrices: all rows of codes, and of each the columns that the run touches."""
        coding, out = self.coding, array(address, n, np.float32)
        height = coding.rows
        size = height * coding.columns
        for matrix, begin, end in matrices(size, e0, n):
            mine = out[matrix * size + begin - e0 : matrix * size + end - e0]
            first, last = begin // height, (end - 1) // height + 1
            count, skip = last - first, begin - first * height
            for top in range(0, height, step := _panel_rows(max(coding.columns, count))):
                rows = np.arange(top, min(top + step, height), dtype=np.int64)
                part = np.empty((len(rows), count), np.float32)
                to = part.ctypes.data + 4 * count * np.arange(len(rows))
                self._rows(bring, rows + matrix * height, np.full_like(rows, first), np.full_like(rows, count), to)
                scatter(part, mine, skip, top, height)

    def _rows(self, bring: Bring, rows: I64, begin: I64, count: I64, to: I64) -> None:
        """Runs (first column, columns, address) of neighbouring rows of codes."""
        coding, stride = self.coding, self._stride
        size, half = self.codes.dtype.size, 2 if coding.four else 1
        start = (int(rows[0]) * stride + int(begin[0]) // half) // size
        end = -(-(int(rows[-1]) * stride + -(-int(begin[-1] + count[-1]) // half)) // size)
        raw = np.empty((end - start) * size, np.uint8)
        bring(self.codes, np.array([[start, end - start, raw.ctypes.data]], np.int64))
        if coding.code == "int8" and size > 1:
            raw ^= 128
        at = coding.scale_rows(rows)
        scales = self.multipliers(bring, int(at[0]), int(at[-1]) - int(at[0]) + 1)
        zeros = self.zeros(bring, int(at[0]), len(scales)) if self.zero is not None else None
        codes = raw.ctypes.data + rows * stride - start * size
        at = (at - at[0]) * 4 * coding.grid[1]
        decode(
            coding.code,
            coding.block[1],
            codes=codes,
            first=begin,
            count=count,
            scales=scales.ctypes.data + at,
            zeros=None if zeros is None else zeros.ctypes.data + at,
            to=to,
        )

    def multipliers(self, bring: Bring, first: int | I64, rows: int | I64) -> F32Array:
        """Rows of scales of all matrices, as they are multiplied with; of several runs one behind the other."""
        width = self.coding.grid[1]
        scales = floats(self.scale, bring, first * width, rows * width)
        if self.divisor is not None:
            with np.errstate(all="ignore"):
                scales = scales / floats(self.divisor, bring, 0, 1)
        return scales.reshape(-1, width)

    def zeros(self, bring: Bring, first: int, rows: int) -> F32Array:
        """Rows of zeros of all matrices."""
        assert self.zero is not None
        (height, width), size = self.coding.grid, self.zero.dtype.size
        if size == 1:
            raw = np.empty(rows * width, np.int8)
            bring(self.zero, np.array([[first * width, raw.size, raw.ctypes.data]], np.int64))
            return raw.astype(np.float32).reshape(rows, width)
        row = np.arange(first, first + rows)
        packed = -(-height // 8)
        word = row // height * packed + row % height // 8
        words = np.empty((int(word[-1] - word[0]) + 1, width), np.uint32)
        bring(self.zero, np.array([[int(word[0]) * width, words.size, words.ctypes.data]], np.int64))
        shift = (row % height % 8 * 4).astype(np.uint32)
        codes = words[word - word[0]] >> shift[:, None]
        zeros: F32Array = (codes & np.uint32(15)).astype(np.float32) - np.float32(8)
        return zeros


def decode(
    code: str, width: int, *, codes: I64, first: I64, count: I64, scales: I64, zeros: I64 | None, to: I64
) -> None:
    """Values of runs of rows of codes.

    Args:
        code: of what kind.
        width: columns that share a scale.
        codes: addresses of the rows.
        first: column of each row that its run begins with.
        count: columns of each run.
        scales: addresses of the fp32 scales of each row.
        zeros: of what is subtracted before; None for nothing.
        to: addresses of the results.
    """
    zeros = np.zeros_like(codes) if zeros is None else zeros
    table = np.ascontiguousarray(np.stack([codes, first, count, scales, zeros, to], axis=1), np.int64)
    if (native := extension()) is not None:
        native.dequantise(table.ctypes.data, len(table), width, NUMBERS[code])
        return
    known, half = values(code), 2 if code in FOUR_BITS else 1
    with np.errstate(all="ignore"):
        for start, at, n, scale, zero, address in table.tolist():
            block = np.arange(at, at + n) // width
            raw = array(start + at // half, (at + n - 1) // half - at // half + 1 if n else 0, np.uint8)
            if half == 2:
                raw = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[at % 2 :][:n]
            blocks = int(block[-1]) + 1 if n else 0
            found = known[raw]
            if zero:
                found = found - array(zero, blocks, np.float32)[block]
            array(address, n, np.float32)[:] = found * array(scale, blocks, np.float32)[block]


def floats(source: Source, bring: Bring, e0: int | I64, n: int | I64) -> F32Array:
    """Scales as fp32, of a run or of several ones; bytes are powers of two."""
    dtype, counts = source.dtype, np.atleast_1d(n)
    ends = np.cumsum(counts)
    raw = np.empty(int(ends[-1]) * dtype.size, np.uint8)
    bring(source, np.stack([np.atleast_1d(e0), counts, raw.ctypes.data + (ends - counts) * dtype.size], axis=1))
    if dtype is F32:
        return raw.view(np.float32)
    if dtype is BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype is F16:
        return raw.view(np.float16).astype(np.float32)
    if dtype.name == "float8_e4m3fn":
        return values(dtype.name)[raw]
    return two_to(raw)


def two_to(raw: U8) -> F32Array:
    """``2^(b - 127)`` of bytes: their exponent is that of fp32, but for the first and the last one."""
    if raw.size and raw.min() > 0 and raw.max() < 255:
        return (raw.astype(np.uint32) << np.uint32(23)).view(np.float32)
    return powers()[raw]


@functools.cache
def powers() -> F32Array:
    """``2^(b - 127)`` of every byte b; 255 is NaN (OCP Microscaling Formats 1.0, E8M0)."""
    return np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan)).astype(np.float32)


def _panel_rows(width: int) -> int:
    return max(1, PANEL // max(1, width))
