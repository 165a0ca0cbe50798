"""Results that are written as codes and scales: scales by each format's own rule, then codes by rounding.

==============  ==========================================================================================
``reciprocal``  ``f = (1 / amax) 448``, ``scale = 1 / f``, codes of ``x f`` (transformers' ``fp8``)
``power``       the same, with scales up to the next power of two (``scale_fmt: ue8m0``)
``divide``      ``scale = amax / 448`` in the type that it is stored in, codes of ``x / scale`` (compressed-tensors)
``mx``          ``scale = 2^e`` of the largest magnitude, of which 7/4 and more count as the next power of two, over 4
                (MXFP4 of compressed-tensors; OCP Microscaling Formats 1.0)
==============  ==========================================================================================

Codes are the nearest ones, ties to even; what is beyond the largest code is that one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from fastmerge.dtypes import BF16, F16, F32, DType
from fastmerge.errors import OutputError
from fastmerge.ops.made import array
from fastmerge.ops.quantised import I64, NUMBERS, Coding, F32Array, extension, two_to, values
from fastmerge.ops.sources import Packed, Range

if TYPE_CHECKING:
    import numpy.typing as npt

Rule = Literal["reciprocal", "power", "divide", "mx"]

WRITTEN = frozenset({"float8_e4m3fn", "float4_e2m1fn"})
"""Kinds of codes that results are rounded to."""

_MOST = 448.0
"""The largest float8_e4m3fn."""


class Loss(NamedTuple):
    """What codes are wrong by.

    Attributes:
        squares: sum of the squares of the values.
        errors: sum of the squares of the differences.
        most: the largest difference.
    """

    squares: float = 0.0
    errors: float = 0.0
    most: float = 0.0

    def and_(self, other: Loss) -> Loss:
        """Of both together."""
        return Loss(self.squares + other.squares, self.errors + other.errors, max(self.most, other.most))

    @property
    def relative(self) -> float:
        """Root of the mean square of the differences, over that of the values."""
        return math.sqrt(self.errors / self.squares) if self.squares else 0.0


@dataclass(frozen=True)
class Packing:
    """How results of one kind are written.

    Attributes:
        coding: how codes and scales lie.
        scale: type of the scales.
        rule: by which they are chosen.
    """

    coding: Coding
    scale: DType
    rule: Rule

    @property
    def cut(self) -> int:
        """Elements at whose multiples results may be cut: whole rows of scales."""
        rows, columns, block = self.coding.rows, self.coding.columns, self.coding.block[0]
        whole = block == rows or (rows % block and self.coding.matrices > 1)
        return max(1, (rows if whole else block) * columns)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales of a tensor."""
        coding = self.coding
        return sum(r.nbytes for r in self.ranges(_NOWHERE, 0, coding.matrices * coding.rows * coding.columns))

    def ranges(self, target: Packed, e0: int, n: int) -> tuple[Range, Range]:
        """Where the codes and the scales of elements ``e0 .. e0 + n`` go, which begin and end where they may be cut."""
        coding = self.coding
        half = 2 if coding.four else 1
        first = coding.scale_rows(e0 // coding.columns)
        last = coding.scale_rows((e0 + n) // coding.columns - 1)
        per = coding.grid[1] * self.scale.size
        codes, scales = target
        return (
            Range(codes.shard, codes.offset + e0 // half, n // half),
            Range(scales.shard, scales.offset + first * per, (last - first + 1) * per),
        )

    def encode(self, name: str, e0: int, n: int, address: int) -> tuple[npt.NDArray[np.uint8], Loss]:
        """Puts the codes of fp32 values in their place, and gives the bytes of their scales.

        Args:
            name: of the tensor, for errors.
            e0: the first of them, where results may be cut.
            n: how many.
            address: of the values; their codes lie there afterwards, without gaps.

        Raises:
            OutputError: NaN or infinity is among them.
        """
        coding = self.coding
        width, block = coding.columns, coding.block[1]
        rows = np.arange(e0 // width, (e0 + n) // width, dtype=np.int64)
        at = coding.scale_rows(rows)
        at -= at[0]
        most = np.zeros((int(at[-1]) + 1, coding.grid[1]), np.float32)
        x = address + 4 * width * np.arange(len(rows))
        at *= 4 * coding.grid[1]
        largest(x, width, block, most.ctypes.data + at)
        if not np.isfinite(most).all():
            raise OutputError(
                f"{name}: NaN or Inf values, which {coding.code} with scales cannot hold: expected finite ones; "
                f"--nan zero stores 0 in their place"
            )
        scale, factor, raw = self._scales(most)
        codes = address + width // (2 if coding.four else 1) * np.arange(len(rows))
        found = round_to(
            coding.code,
            block,
            x=x,
            n=width,
            factors=factor.ctypes.data + at,
            scales=scale.ctypes.data + at,
            codes=codes,
            divide=self.rule in ("divide", "mx"),
        )
        return raw, found

    def _scales(self, most: F32Array) -> tuple[F32Array, F32Array, npt.NDArray[np.uint8]]:
        """Scales, what values are multiplied with (or divided by), and the scales as they are stored."""
        if self.rule == "mx":
            exponent = (most.view(np.uint32) + np.uint32(1 << 21)) >> np.uint32(23)
            raw = (np.clip(exponent, 2, 256) - np.uint32(2)).astype(np.uint8)
            scale = two_to(raw)
            return scale, scale, raw.reshape(-1)
        one, limit = np.float32(1), np.float32(_MOST)
        with np.errstate(all="ignore"):
            if self.rule == "divide":
                scale, raw = stored(most / limit, self.scale)
                tiny = scale == 0
                if tiny.any():  # as compressed-tensors does where all values are 0
                    scale, raw = stored(np.where(tiny, _eps(self.scale), scale), self.scale)
                return scale, scale, raw
            factor: F32Array = np.where(most > 0, one / most * limit, one).astype(np.float32)
            np.minimum(factor, np.finfo(np.float32).max, out=factor)
            scale = one / factor
            if self.rule == "power":
                bits = scale.view(np.uint32)
                up = (bits >> np.uint32(23)) + ((bits & np.uint32(0x7FFFFF)) > 0)
                scale = two_to(np.clip(up, 1, 253).astype(np.uint8))
            scale, raw = stored(scale, self.scale)
            if self.rule == "power" or self.scale is not F32:
                factor = one / scale
        return scale, factor, raw


_NOWHERE = Packed(Range(0, 0, 0), Range(0, 0, 0))


def _eps(dtype: DType) -> np.float32:
    """The distance of 1 to the next number of a type."""
    return np.float32({F32: 2**-23, BF16: 2**-7, F16: 2**-10}[dtype])


def stored(scale: F32Array, dtype: DType) -> tuple[F32Array, npt.NDArray[np.uint8]]:
    """Scales rounded to a type, as fp32, and their bytes."""
    scale = np.ascontiguousarray(scale, np.float32)
    if dtype is F32:
        return scale, scale.view(np.uint8).reshape(-1)
    if dtype is F16:
        half = scale.astype(np.float16)
        return half.astype(np.float32), half.view(np.uint8).reshape(-1)
    bits = scale.view(np.uint32)
    if dtype is BF16:
        near = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
            np.uint16
        )
        return (near.astype(np.uint32) << 16).view(np.float32), near.view(np.uint8).reshape(-1)
    raw = (bits >> np.uint32(23)).astype(np.uint8)  # powers of two
    return two_to(raw), raw.reshape(-1)


def largest(x: I64, n: int, width: int, out: I64) -> None:
    """Raises the fp32 numbers at ``out`` to the largest magnitude of each block of a row.

    Args:
        x: addresses of the rows, of fp32.
        n: their columns.
        width: columns of a block.
        out: address of each row's blocks; rows may share them.
    """
    if (native := extension()) is not None:
        table = np.ascontiguousarray(np.stack([x, np.full_like(x, n), out], axis=1))
        native.largest(table.ctypes.data, len(table), width)
        return
    starts = np.arange(0, n, width)
    for row, to in zip(x.tolist(), out.tolist(), strict=True):
        most = array(to, len(starts), np.float32)
        np.maximum(most, np.maximum.reduceat(np.abs(array(row, n, np.float32)), starts), out=most)


def round_to(code: str, width: int, *, x: I64, n: int, factors: I64, scales: I64, codes: I64, divide: bool) -> Loss:
    """Codes of rows of fp32 values, which may lie where the values are, each row at or before its own.

    Args:
        code: of what kind.
        width: columns of a block.
        x: addresses of the rows.
        n: their columns.
        factors: addresses of what the blocks of each row are multiplied with.
        scales: addresses of what their codes will be multiplied with.
        codes: addresses of the results.
        divide: values are divided by the factors.
    """
    if (native := extension()) is not None:
        table = np.ascontiguousarray(np.stack([x, np.full_like(x, n), factors, scales, codes], axis=1))
        return Loss(*native.quantise(table.ctypes.data, len(table), width, NUMBERS[code], divide))
    block, count = np.arange(n) // width, -(-n // width)
    known, loss = values(code), Loss()
    with np.errstate(all="ignore"):
        for row, factor, scale, to in zip(x.tolist(), factors.tolist(), scales.tolist(), codes.tolist(), strict=True):
            v, f = array(row, n, np.float32).copy(), array(factor, count, np.float32)[block]
            found = nearest(code, v / f if divide else v * f)
            wrong = (known[found] * array(scale, count, np.float32)[block] - v).astype(np.float64)
            if len(known) == 16:
                found = found[::2] | (found[1::2] << np.uint8(4))
            array(to, len(found), np.uint8)[:] = found
            loss = loss.and_(Loss(float(v.astype(np.float64) @ v), float(wrong @ wrong), float(np.abs(wrong).max())))
    return loss


def nearest(code: str, x: F32Array) -> npt.NDArray[np.uint8]:
    """The code that is nearest to each value, of two that are as near the even one."""
    known = values(code)[: len(values(code)) // 2]
    finite = known[np.isfinite(known)]  # ascending; the other half is negative
    a = np.minimum(np.abs(x), finite[-1])
    above = np.clip(np.searchsorted(finite, a), 1, len(finite) - 1)
    low, high = a.astype(np.float64) - finite[above - 1], finite[above] - a.astype(np.float64)
    up = (high < low) | ((high == low) & (above % 2 == 0))
    sign = x < 0 if code == "float4_e2m1fn" else np.signbit(x)
    found = np.where(up, above, above - 1) | np.where(sign, len(known), 0)
    return np.asarray(found, np.uint8)
