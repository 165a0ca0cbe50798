"""Sources that are made from others, a run at a time, in the slot.

============  ====================================================
``Rows``      rows of other sources, in any order, with gaps
``LowRank``   a weight and a low-rank update (LoRA)
``Wide``      8-bit floats as bfloat16, which holds each exactly
``Constant``  one value
``Noise``     normal random numbers
============  ====================================================
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastmerge.dtypes import BF16, F16, F32, F64, DType, promote
from fastmerge.ops.segments import GROUP, HEADER, LENGTH, OUT, ROW
from fastmerge.ops.sources import Bring, FileRange, Memory, workspace
from fastmerge.ops.spec import Source

PANEL = 1 << 16
"""Elements that are computed at a time: what all ranks of an update work on stays in the cache."""

BLOCK = 1 << 18
"""Elements of rows that are gathered at a time."""

_NUMPY: dict[DType, type[np.floating[Any]]] = {F64: np.float64, F32: np.float32, F16: np.float16}


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
    _widen(raw, source.dtype, out)


def _widen(raw: npt.NDArray[np.uint8], dtype: DType, out: npt.NDArray[Any]) -> None:
    """Floats as fp32 or fp64, which hold them exactly."""
    if dtype is BF16:
        wide = out if out.itemsize == 4 else np.empty(out.size, np.float32)
        np.left_shift(raw.view(np.uint16), np.uint32(16), out=wide.view(np.uint32))
        if wide is not out:
            out[:] = wide
    else:
        out[:] = raw.view(_NUMPY[dtype])


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
        """The runs of a part, ten numbers for each row; a part that is made or widened once more; what sources take."""
        runs = 80 * min(len(self.index), BLOCK // max(1, math.prod(self.shape[1:])) + 2)
        apart = not all(_there(s) and s.dtype is self.dtype for s in self.sources)
        return runs + 16 * BLOCK * apart + max(map(workspace, self.sources))

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """A part at a time; neighbouring rows are read together."""
        for at in range(0, n if math.prod(self.shape) else 0, BLOCK):
            self._part(bring, e0 + at, min(BLOCK, n - at), address + at * self.dtype.size)

    def _part(self, bring: Bring, e0: int, n: int, address: int) -> None:
        width, size = math.prod(self.shape[1:]), self.dtype.size
        first, last = e0 // width, (e0 + n - 1) // width
        rows = np.arange(first, last + 1)
        begin = np.maximum(rows * width, e0)
        length = np.minimum((rows + 1) * width, e0 + n) - begin
        of = self.index[first : last + 1]
        ends = np.cumsum([s.shape[0] for s in self.sources])
        which = np.where(of < 0, -1, np.searchsorted(ends, of, "right"))
        # A run ends where the next row does not follow in the same source.
        cuts = np.flatnonzero((of[1:] != of[:-1] + 1) | (which[1:] != which[:-1]) | (of[1:] < 0))
        heads = np.concatenate([[0], cuts + 1])
        totals = np.add.reduceat(length, heads)
        there = address + (begin[heads] - e0) * size
        start = of[heads] * width + (begin[heads] - rows[heads] * width)
        which = which[heads]
        for at, count in zip(there[which < 0].tolist(), totals[which < 0].tolist(), strict=True):
            ctypes.memset(at, 0, count * size)
        for i in np.unique(which[which >= 0]).tolist():
            source, mine = self.sources[i], which == i
            above = int(ends[i]) - source.shape[0]
            runs = np.stack([start[mine] - above * width, totals[mine], there[mine]], axis=1)
            if source.dtype is self.dtype and (_there(source) or len(runs) == 1):
                bring(source, runs)
            else:
                _scatter(bring, source, runs, self.dtype)


def _there(source: Source) -> bool:
    """Whether runs of a source only have to be brought."""
    return isinstance(source, FileRange | Memory)


def _scatter(bring: Bring, source: Source, runs: npt.NDArray[np.int64], dtype: DType) -> None:
    """Runs of a source by way of memory of its own: widened, and made at once where they follow each other there."""
    starts, lengths = runs[:, 0], runs[:, 1]
    n, size = int(lengths.sum()), source.dtype.size
    raw = np.empty(n * size, np.uint8)
    before = np.cumsum(lengths) - lengths
    if np.array_equal(starts, starts[0] + before):
        bring(source, np.array([[starts[0], n, raw.ctypes.data]], np.int64))
    else:
        bring(source, np.stack([starts, lengths, raw.ctypes.data + before * size], axis=1))
    if source.dtype is not dtype:
        wide = np.empty(n, _NUMPY[dtype])
        _widen(raw, source.dtype, wide)
        raw = wide.view(np.uint8)
    begin = raw.ctypes.data
    rows = zip(
        runs[:, 2].tolist(), (begin + before * dtype.size).tolist(), (lengths * dtype.size).tolist(), strict=True
    )
    for to, out_of, nbytes in rows:
        ctypes.memmove(to, out_of, nbytes)


def sums(left: npt.NDArray[Any], right: npt.NDArray[Any], out: npt.NDArray[Any], spare: npt.NDArray[Any]) -> None:
    """``left @ right`` where every product and every sum is rounded once, in the order of the inner index.

    The kernel for weighted sums does the same, several times as fast: a row of the result is a weighted sum of the
    rows of ``right``.

    Args:
        left: ``[rows, R]``, R >= 1.
        right: ``[R, columns]``; its rows are contiguous.
        out: ``[rows, columns]``, contiguous.
        spare: of the same shape and type, to work in.
    """
    rows, rank = left.shape
    try:
        from fastmerge import _native
    except ImportError:
        np.multiply(left[:, 0, None], right[0], out)
        for k in range(1, rank):
            np.add(out, np.multiply(left[:, k, None], right[k], spare), out)
        return
    table = np.zeros((rows, HEADER + rank), np.int64)
    table[:, OUT] = out.ctypes.data + np.arange(rows) * out.strides[0]
    table[:, LENGTH] = table[:, ROW] = out.shape[1]
    table[:, GROUP] = np.arange(rows)
    table[:, HEADER:] = right.ctypes.data + np.arange(rank) * right.strides[0]
    code = (F64 if out.itemsize == 8 else F32).code
    codes, ones, ignored = np.full(rank, code, np.int32), np.ones((rows, 2)), np.zeros(rows, np.int64)
    coefficients = np.ascontiguousarray(left, np.float64)
    _native.combine(table, codes, code, coefficients, ones, False, False, ignored)


@dataclass(frozen=True, eq=False)
class LowRank:
    """``base + scale (B A)``, as LoRA adapters state a weight; exact products and sums in fp32, in the order of ranks.

    Each element is ``x + s (b0 a0 + b1 a1 + ...)``, every operation rounded once to fp32 (fp64 for an fp64 base).

    Attributes:
        base: ``[O, I]``.
        b: ``[O, R]``.
        a: ``[R, I]``.
        scale: factor of the update.
        transposed: the base is stored as ``[I, O]`` (Conv1D, embeddings), and so is the result.
    """

    base: Source
    b: Source
    a: Source
    scale: float
    transposed: bool = False

    @property
    def dtype(self) -> DType:
        """fp32, or fp64: nothing is rounded to the base's type."""
        return F64 if self.base.dtype is F64 else F32

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self.base.shape

    @property
    def inputs(self) -> tuple[Source, ...]:
        """The weight, and the factors."""
        return (self.base, self.b, self.a)

    @property
    def workspace(self) -> int:
        """Both factors twice (as they are stored, and as they are used), two panels, and the kernel's tables."""
        rank, numbers = self.a.shape[0], sum(self.b.shape[:1] + self.a.shape[1:])
        return 2 * self.dtype.size * (rank * numbers + PANEL) + 32 * PANEL + workspace(self.base)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Panels that stay in the cache, each over all ranks: the order of a single element is that of the ranks."""
        if not n:
            return
        work = _NUMPY[self.dtype]
        width = self.shape[-1]
        first, last = e0 // width, (e0 + n - 1) // width
        left, right = (x.astype(work, copy=False) for x in self._factors(bring, first, last - first + 1))
        out = array(address, n, work)
        space = np.empty((2, min(n, PANEL)), work)
        at = e0
        while at < e0 + n:
            row, column = divmod(at, width)
            columns = min(width - column, e0 + n - at, PANEL)
            rows = max(1, min(e0 + n - at, PANEL) // max(width, HEADER + left.shape[1])) if columns == width else 1
            update, spare = space[:, : rows * columns]
            factors = left[row - first : row - first + rows], right[:, column : column + columns]
            sums(*factors, update.reshape(rows, columns), spare.reshape(rows, columns))
            np.multiply(update, work(self.scale), update)
            part = out[at - e0 : at - e0 + update.size]
            _load(bring, self.base, at, part)
            np.add(part, update, part)
            at += update.size

    def _factors(self, bring: Bring, first: int, rows: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """``[rows, R]`` and ``[R, columns]`` of some rows of the result; those of a transposed one are columns of A."""
        rank, width = self.a.shape[0], self.shape[-1]
        if not self.transposed:
            b = load(bring, self.b, first * rank, rows * rank).reshape(rows, rank)
            return b, load(bring, self.a, 0, rank * width).reshape(rank, width)
        columns = self.a.shape[1]
        a = np.stack([load(bring, self.a, k * columns + first, rows) for k in range(rank)], axis=1)
        b = load(bring, self.b, 0, width * rank).reshape(width, rank)
        return a, np.ascontiguousarray(b.T)


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
        table, out = _bfloat16(self.source.dtype.name), array(address, n, np.uint16)
        space = np.empty(min(n, PANEL), np.uint8)
        for at in range(0, n, PANEL):
            raw = space[: n - at]
            bring(self.source, np.array([[e0 + at, raw.size, raw.ctypes.data]], np.int64))
            np.take(table, raw, out=out[at : at + raw.size], mode="clip")  # no other mode writes where it is told


@functools.cache
def _bfloat16(name: str) -> npt.NDArray[np.uint16]:
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
        one = _rounded(self.value, self.dtype)
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
    workspace: ClassVar[int] = 64 * PANEL  # what a panel of random bits becomes on its way

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """The numbers of the run, a panel at a time."""
        from fastmerge.philox import NOISE, normal

        work = _NUMPY[self.dtype]
        out = array(address, n, work)
        for at in range(0, n, PANEL):
            part = out[at : at + PANEL]
            np.multiply(normal(self.key, self.index, NOISE, e0 + at, part.size), work(self.sigma), part, dtype=work)


def _rounded(value: float, dtype: DType) -> npt.NDArray[Any]:
    """One element of a type; one rounding to nearest even, and the canonical NaN."""
    exact = np.array([value], np.float64)
    with np.errstate(over="ignore"):
        if dtype is not BF16:
            return np.abs(exact).astype(_NUMPY[dtype]) if np.isnan(value) else exact.astype(_NUMPY[dtype])
        near = exact.astype(np.float32)
    if np.isnan(value):
        return np.array([0x7FC0], np.uint16)
    # Rounding to odd first makes the second rounding the only one.
    above = np.abs(near.astype(np.float64)) > np.abs(exact)
    bits = near.view(np.uint32)
    bits = np.where(near != exact, (bits - above) | 1, bits)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
