"""Sine, cosine and their inverses on the device: :mod:`fastmerge.methods.angles` in fp64, operation by operation.

Nothing but +, -, *, /, square root and floor, each rounded once, so host and device give the same bits. Nothing is
left to a library and nothing is contracted (all kernels are compiled without fused multiply-add).

Three things differ in writing, not in bits:

- Python numbers are constants of Triton. In sums, products and selections with an fp64 block they are fp64, but a
  comparison rounds them to fp32 first: only numbers that fp32 holds are written there, others come from :func:`f64`.
- Rounding to the nearest integer is an addition of 1.5 * 2^52 and a subtraction: exact, ties to even, for numbers up
  to 2^51. It gives +0 where numpy's ``rint`` gives -0; only the sine of -0 could tell, see :func:`sin`.
- A limit is a comparison that a NaN fails, then a selection: a NaN stays, as with numpy's ``maximum``. A value equal
  to a limit of another sign of zero cannot occur but in :func:`chord_angle`, which says what it does. A minus is a
  product with -1, because Triton's own minus is ``0 - x`` and loses the sign of a zero.
"""

import math

import triton
import triton.language as tl

PI = tl.constexpr(math.pi)
HALF_PI = tl.constexpr(math.pi / 2)

PI_PARTS = tl.constexpr((3.1415926534682512, 1.2154201012607932e-10, 4.044532497591901e-21))
"""pi as a sum; products of the first two parts (32 bits each) with integers up to 2^21 are exact."""

SIN = tl.constexpr(tuple((-1) ** i / math.factorial(2 * i + 1) for i in range(12)))
ATAN = tl.constexpr(tuple((-1) ** i / (2 * i + 1) for i in range(11)))

INTEGERS = tl.constexpr(1.5 * 2.0**52)
"""Neighbours of this number are one apart."""


@triton.jit
def f64(NUMBER: tl.constexpr):
    """A number for comparisons with fp64: these would round what is written in them to fp32."""
    return tl.full((), NUMBER, tl.float64)


@triton.jit
def odd(x, COEFFICIENTS: tl.constexpr, N: tl.constexpr):
    """``x * (c0 + c1 x^2 + c2 x^4 + ...)`` of N coefficients by Horner's rule."""
    square = x * x
    total = tl.full(x.shape, COEFFICIENTS[N - 1], tl.float64)
    for i in tl.static_range(N - 1):
        total = total * square
        total = total + COEFFICIENTS[N - 2 - i]
    return total * x


@triton.jit
def sin(x):
    """Sine of angles of moderate size (a million turns at most)."""
    turns = (x / PI + INTEGERS) - INTEGERS
    rest = x + 0.0  # -0 becomes +0, as it does where numpy subtracts the -0 turns of it
    for i in tl.static_range(3):
        rest = rest - turns * PI_PARTS[i]
    value = odd(rest, SIN, 12)
    return tl.where(turns - tl.floor(turns / 2.0) * 2.0 == 0.0, value, value * -1.0)


@triton.jit
def cos(x):
    """Cosine, as the sine of the complement."""
    return sin(HALF_PI - x)


@triton.jit
def atan(x):
    """Arc tangent for 0 <= x <= 1: three halvings of the angle, then the series."""
    for _ in tl.static_range(3):
        x = x / (tl.sqrt(x * x + 1.0) + 1.0)
    return odd(x, ATAN, 11) * 8.0


@triton.jit
def unit(x):
    """The nearest number between -1 and 1; NaN stays NaN."""
    x = tl.where(x < -1.0, -1.0, x)
    return tl.where(x > 1.0, 1.0, x)


@triton.jit
def acos(c):
    """Arc cosine; arguments beyond +-1 are clamped, NaN stays NaN."""
    c = unit(c)
    size = tl.abs(c)
    angle = atan(tl.sqrt((1.0 - size) / (size + 1.0))) * 2.0
    return tl.where(c < 0.0, PI - angle, angle)


@triton.jit
def at_least_zero(x):
    """The larger of ``x`` and +0; -0 becomes +0, NaN stays NaN.

    A ``<=`` selects +0 for either zero: a processor's maximum, should a compiler make one of it, does the same.
    """
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def chord_angle(chord2):
    """Angle between unit vectors from the square of their distance: exact where a cosine would cancel."""
    sine2 = at_least_zero(chord2)
    sine2 = tl.where(sine2 > 4.0, 4.0, sine2) / 4.0
    small = sine2 <= 0.5
    low = tl.where(small, sine2, 1.0 - sine2)
    angle = atan(tl.sqrt(low / (1.0 - low)))
    return tl.where(small, angle, HALF_PI - angle) * 2.0
