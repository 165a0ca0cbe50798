"""Exponential and logarithm from +, -, *, / and powers of two only, for the reason that :mod:`angles` gives.

Errors stay below 1e-15 of the result, or near 1, where a logarithm is small, below 2e-16.
"""

from __future__ import annotations

import math

import numpy as np

from fastmerge.ops.segments import F64

_LN2_PARTS = (0.6931471803691238, 1.9082149292705877e-10)
"""ln 2 as a sum; products of the first part (33 bits) with integers up to 2^20 are exact."""

_EXP = tuple(1 / math.factorial(i) for i in range(14))
_LOG = tuple(2 / (2 * i + 1) for i in range(13))


def exp(x: F64) -> F64:
    """The exponential; results below the normal numbers may be 0."""
    x = np.where(x < -745.0, -745.0, x)
    turns = np.rint(x / math.log(2))
    rest = x - turns * _LN2_PARTS[0] - turns * _LN2_PARTS[1]
    total = np.full_like(rest, _EXP[-1])
    for c in _EXP[-2::-1]:
        total = total * rest + c
    with np.errstate(invalid="ignore"):
        return np.ldexp(total, np.where(np.isfinite(turns), turns, 0).astype(np.int32))


def log(x: F64) -> F64:
    """The natural logarithm of positive numbers."""
    part, power = np.frexp(x)
    low = part < math.sqrt(0.5)
    part, power = np.where(low, 2 * part, part), power - low
    s = (part - 1) / (part + 1)
    square = s * s
    total = np.full_like(s, _LOG[-1])
    for c in _LOG[-2::-1]:
        total = total * square + c
    out: F64 = power * _LN2_PARTS[0] + (power * _LN2_PARTS[1] + total * s)
    return out
