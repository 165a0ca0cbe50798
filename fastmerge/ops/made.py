"""Sources that are made from others, a run at a time, in the slot.

============  ====================================================
``Rows``      rows of other sources, in any order, with gaps
``Wide``      8-bit floats as bfloat16, which holds each exactly
``Constant``  one value
``Noise``     normal random numbers
============  ====================================================

:mod:`fastmerge.ops.low_rank` and :mod:`fastmerge.ops.row_lengths` have those of adapters.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastmerge.dtypes import BF16, F16, F32, F64, DType, promote
from fastmerge.ops.sources import Bring, FileRange, Memory, workspace
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt

PANEL = 1 << 16
"""Elements that are computed at a time: they stay in the cache."""

BLOCK, PART = 1 << 17, 1 << 17
"""Elements of rows that are brought to be put in order at a time, and rows that are looked at at a time."""

NEAR = 16384
"""Bytes that are as well read as a run is begun: runs that lie closer are read with what is between them."""

NUMPY: dict[DType, type[np.floating[Any]]] = {F64: np.float64, F32: np.float32, F16: np.float16}


def array(address: int, n: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Memory as an array."""
    numbers = np.dtype(dtype)
    if not n:
        return np.empty(0, numbers)
    memory: Any = (ctypes.c_char * (n * numbers.itemsize)).from_address(address)
    return np.frombuffer(memory, numbers)


def load(bring: Bring, source: Source, e0: int, n: int) -> npt.NDArray[Any]:
    """A run of a source in memory of its own, as fp32 (fp64 stays)."""
    out = np.empty(n, np.float64 if source.dtype is F64 else np.float32)
    _load(bring, source, e0, out)
    return out


def _load(bring: Bring, source: Source, e0: int, out: npt.NDArray[Any]) -> None:
    """A run of a source, as fp32 (fp64 stays), into memory that is there."""
    if source.dtype.size == out.itemsize:
        bring(source, np.array([[e0, out.size, out.ctypes.data]], np.int64))
        return
    raw = np.empty(out.size * source.dtype.size, np.uint8)
    bring(source, np.array([[e0, out.size, raw.ctypes.data]], np.int64))
    widen(raw, source.dtype, out)


def widen(raw: npt.NDArray[np.uint8], dtype: DType, out: npt.NDArray[Any]) -> None:
    """Floats as fp32 or fp64, which hold them exactly."""
    if dtype is BF16:
        wide = out if out.itemsize == 4 else np.empty(out.size, np.float32)
        np.left_shift(raw.view(np.uint16), np.uint32(16), out=wide.view(np.uint32))
        if wide is not out:
            out[:] = wide
    else:
        out[:] = raw.view(NUMPY[dtype])


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of other sources: row ``r`` is row ``index[r]`` of ``sources``, one below the other; -1 is a row of zeros.

    Attributes:
        sources: ``[R, ...]`` each, alike but for R.
        index: int64 ``[K]``, -1 .. sum of R - 1.
    """

    sources: tuple[Source, ...]
    index: npt.NDArray[np.int64]

    @property
    def dtype(self) -> DType:
        """That which all sources go into."""
        return functools.reduce(promote, [s.dtype for s in self.sources])

    @property
    def shape(self) -> tuple[int, ...]:
        """``[K, ...]``."""
        return (len(self.index), *self.sources[0].shape[1:])

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it takes rows of."""
        return self.sources

    @property
    def workspace(self) -> int:
        """Sixteen numbers for each row of a part; rows as they are, widened, and in their order; what sources take."""
        apart = 24 * max(BLOCK, math.prod(self.shape[1:]))
        return 128 * min(len(self.index), PART) + apart + max(map(workspace, self.sources))

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Neighbouring rows are read together, and rows that lie close in any order."""
        width, dtype = math.prod(self.shape[1:]), self.dtype
        for first in range(e0 // width, -(-(e0 + n) // width), PART) if n and width else ():
            rows = np.arange(first, min(first + PART, -(-(e0 + n) // width)))
            begin = np.maximum(rows * width, e0)
            length = np.minimum((rows + 1) * width, e0 + n) - begin
            of = self.index[rows[0] : rows[-1] + 1]
            to = address + (begin - e0) * dtype.size
            for i in np.flatnonzero(of < 0).tolist():
                ctypes.memset(int(to[i]), 0, int(length[i]) * dtype.size)
            above = 0
            for source in self.sources:
                mine = np.flatnonzero((of >= above) & (of < above + source.shape[0]))
                if len(mine):
                    start = of[mine] - above
                    start = start * width + (begin - rows * width)[mine]
                    _take(bring, source, dtype, width, np.stack([start, length[mine], to[mine]], axis=1))
                above += source.shape[0]


def _take(bring: Bring, source: Source, dtype: DType, width: int, rows: npt.NDArray[np.int64]) -> None:
    """Brings rows of one source (first element, elements, address), of which all but the ends are whole."""
    start, length, to = rows.T
    # A run ends where the next row does not follow, here or there.
    ends = np.flatnonzero((start[1:] != start[:-1] + length[:-1]) | (to[1:] != to[:-1] + length[:-1] * dtype.size))
    heads = np.concatenate([[0], ends + 1])
    near = (int(start.max() - start.min()) + width) * dtype.size <= len(heads) * NEAR
    if source.dtype is dtype and (len(heads) == 1 or (isinstance(source, FileRange | Memory) and not near)):
        bring(source, np.stack([start[heads], np.add.reduceat(length, heads), to[heads]], axis=1))
        return
    # Places in the low bits of what is sorted: a fifth of the time of numpy's stable argsort.
    tagged = np.sort(start * PART + np.arange(len(start)))
    start, order = tagged // PART, tagged % PART
    length, to = length[order], to[order]
    most = max(BLOCK, width)
    raw = np.empty(most * source.dtype.size, np.uint8)
    wide: npt.NDArray[Any] = raw if source.dtype is dtype else np.empty(most, NUMPY[dtype])
    blocks = np.concatenate([[0], np.flatnonzero(np.diff((start - start[0]) // (most - width + 1))) + 1])
    firsts = start[blocks]
    counts = np.maximum.reduceat(start + length, blocks) - firsts  # a row may be there twice, once in part
    ends = np.append(blocks[1:], len(start))
    rows[:, 0] = wide.ctypes.data + (start - np.repeat(firsts, ends - blocks)) * dtype.size  # from here on: moves
    rows[:, 1], rows[:, 2] = to, length * dtype.size
    reads = np.stack([firsts, counts, np.full(len(blocks), raw.ctypes.data)], axis=1)
    for i, (at, end, n) in enumerate(zip(blocks.tolist(), ends.tolist(), counts.tolist(), strict=True)):
        bring(source, reads[i : i + 1])
        if wide is not raw:
            widen(raw[: n * source.dtype.size], source.dtype, wide[:n])
        _move(rows[at:end])


def _move(rows: npt.NDArray[np.int64]) -> None:
    """Copies rows (from, to, bytes) of memory."""
    try:
        from fastmerge import _native
    except ImportError:
        for start, to, nbytes in rows.tolist():
            ctypes.memmove(to, start, nbytes)
        return
    _native.move_some(rows, 0, 0)


def brought(bring: Bring, source: Source, e0: int, n: int, dtype: DType) -> npt.NDArray[np.uint8]:
    """The bytes of a run of a source, widened to a type."""
    raw = np.empty(n * source.dtype.size, np.uint8)
    bring(source, np.array([[e0, n, raw.ctypes.data]], np.int64))
    if source.dtype is dtype:
        return raw
    wide = np.empty(n, NUMPY[dtype])
    widen(raw, source.dtype, wide)
    return wide.view(np.uint8)


@dataclass(frozen=True, eq=False)
class Wide:
    """A source of 8-bit floats, each as the bfloat16 of the same value."""

    source: Source

    @property
    def dtype(self) -> DType:
        """bfloat16."""
        return BF16

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the source."""
        return self.source.shape

    @property
    def inputs(self) -> tuple[Source, ...]:
        """What it widens."""
        return (self.source,)

    @property
    def workspace(self) -> int:
        """A panel of bytes, and of numpy's indices."""
        return 9 * PANEL + workspace(self.source)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """One look-up per element, a panel at a time."""
        table, out = bfloat16_bits(self.source.dtype.name), array(address, n, np.uint16)
        space = np.empty(min(n, PANEL), np.uint8)
        for at in range(0, n, PANEL):
            raw = space[: n - at]
            bring(self.source, np.array([[e0 + at, raw.size, raw.ctypes.data]], np.int64))
            np.take(table, raw, out=out[at : at + raw.size], mode="clip")  # no other mode writes where it is told


@functools.cache
def bfloat16_bits(name: str) -> npt.NDArray[np.uint16]:
    """The bfloat16 bits of all 256 values of an 8-bit float type (OCP 8-bit Floating Point Specification 1.0)."""
    mantissa, bias = {"float8_e4m3fn": (3, 7), "float8_e5m2": (2, 15)}[name]
    byte = np.arange(256)
    exponent, fraction = (byte & 0x7F) >> mantissa, byte & ((1 << mantissa) - 1)
    normal = np.ldexp(1 + fraction / (1 << mantissa), exponent - bias)
    value = np.where(exponent == 0, np.ldexp(fraction / (1 << mantissa), 1 - bias), normal)
    if name == "float8_e4m3fn":
        value = np.where((byte & 0x7F) == 0x7F, np.nan, value)
    else:
        value = np.where(exponent == 31, np.where(fraction == 0, np.inf, np.nan), value)
    bits = (value.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits = np.where(np.isnan(value), 0x7FC0, bits)
    return (bits | ((byte & 0x80) << 8)).astype(np.uint16)


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float
    dtype: DType
    shape: tuple[int, ...]

    inputs: ClassVar[tuple[Source, ...]] = ()
    workspace: ClassVar[int] = 0

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Repeats the value, rounded once."""
        one = rounded(self.value, self.dtype)
        array(address, n, one.dtype)[:] = one


@dataclass(frozen=True)
class Noise:
    """Normal random numbers times ``sigma``, a function of (key, index, element).

    Attributes:
        key: 64-bit Philox key.
        index: position of the model, or number of the expert.
        sigma: standard deviation.
        dtype: float32 or float64: others would round twice.
        shape: of the tensor.
    """

    key: int
    index: int
    sigma: float
    dtype: DType
    shape: tuple[int, ...]

    inputs: ClassVar[tuple[Source, ...]] = ()
    workspace: ClassVar[int] = 64 * PANEL  # what a panel of random bits becomes on its way, and the table of normals

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """The numbers of the run, a panel at a time."""
        from fastmerge.philox import NOISE, u16

        try:
            from fastmerge._native import philox_u16 as draw
        except ImportError:
            draw = u16
        work = NUMPY[self.dtype]
        out = array(address, n, work)
        for at in range(0, n, PANEL):
            part = out[at : at + PANEL]
            drawn = draw(self.key & 0xFFFFFFFFFFFFFFFF, self.index, NOISE, e0 + at, part.size)
            np.multiply(_normals()[drawn], work(self.sigma), part, dtype=work)


@functools.cache
def _normals() -> npt.NDArray[np.float32]:
    """The normal number of each value of 16 bits: looking it up takes a tenth of the time of computing it."""
    from fastmerge.philox import normal_of

    return normal_of(np.arange(1 << 16).astype(np.uint16))


def rounded(value: float, dtype: DType) -> npt.NDArray[Any]:
    """One element of a type; one rounding to nearest even, and the canonical NaN."""
    exact = np.array([value], np.float64)
    with np.errstate(over="ignore"):
        if dtype is not BF16:
            return np.abs(exact).astype(NUMPY[dtype]) if np.isnan(value) else exact.astype(NUMPY[dtype])
        near = exact.astype(np.float32)
    if np.isnan(value):
        return np.array([0x7FC0], np.uint16)
    # Rounding to odd first makes the second rounding the only one.
    above = np.abs(near.astype(np.float64)) > np.abs(exact)
    bits = near.view(np.uint32)
    bits = np.where(near != exact, (bits - above) | 1, bits)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
