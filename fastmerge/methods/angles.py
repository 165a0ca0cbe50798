"""Sine, cosine and their inverses from +, -, *, / and square root only.

The tables of geometric methods are computed once, in numpy fp64 on the host. The transcendental functions of
numpy and libm differ in the last place between machines; these do not, because every operation in them is a
single IEEE one. Errors stay below 1e-15 relative to pi.
"""

from __future__ import annotations

import math

import numpy as np

from fastmerge.ops.segments import F64

_PI_PARTS = (3.1415926534682512, 1.2154201012607932e-10, 4.044532497591901e-21)
"""pi as a sum; products of the first two parts (32 bits each) with integers up to 2^21 are exact."""

_SIN = tuple((-1) ** i / math.factorial(2 * i + 1) for i in range(12))
_ATAN = tuple((-1) ** i / (2 * i + 1) for i in range(11))


def _odd(x: F64, coefficients: tuple[float, ...]) -> F64:
    """``x * (c0 + c1 x^2 + c2 x^4 + ...)`` by Horner's rule."""
    square = x * x
    total = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        total *= square
        total += c
    return total * x


def sin(x: F64) -> F64:
    """Sine of angles of moderate size (a million turns at most)."""
    turns = np.rint(x / math.pi)
    rest = x
    for part in _PI_PARTS:
        rest = rest - turns * part
    value = _odd(rest, _SIN)
    return np.where(turns - 2 * np.floor(turns / 2) == 0, value, -value)


def cos(x: F64) -> F64:
    """Cosine, as the sine of the complement."""
    return sin(math.pi / 2 - x)


def atan(x: F64) -> F64:
    """Arc tangent for 0 <= x <= 1: three halvings of the angle, then the series."""
    for _ in range(3):
        x = x / (1 + np.sqrt(1 + x * x))
    return 8 * _odd(x, _ATAN)


def acos(c: F64) -> F64:
    """Arc cosine; arguments beyond +-1 are clamped, NaN stays NaN."""
    c = np.minimum(np.maximum(c, -1.0), 1.0)
    size = np.abs(c)
    angle = 2 * atan(np.sqrt((1 - size) / (1 + size)))
    return np.where(c < 0, math.pi - angle, angle)


def chord_angle(chord2: F64) -> F64:
    """Angle between unit vectors from the square of their distance: exact where a cosine would cancel."""
    sine2 = np.minimum(np.maximum(chord2, 0.0), 4.0) / 4
    small = sine2 <= 0.5
    low = np.where(small, sine2, 1 - sine2)
    angle = atan(np.sqrt(low / (1 - low)))
    return 2 * np.where(small, angle, math.pi / 2 - angle)
