"""Family combine: weighted sums, no statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fastmerge.ops.kernels import Kernels
from fastmerge.ops.program import Bound, Launches, OnePass
from fastmerge.ops.segments import F64, Segments

USUAL = {False: 40, True: 400}
"""Exponents of two up to this are left alone, by whether the work is fp64: no product of a weight and a value of a
usual size leaves the normal numbers of the type."""


def exponent(values: Iterable[float]) -> int:
    """Of two, of the largest magnitude; 0 where all are 0."""
    most = max(map(abs, values))
    return math.frexp(most)[1] - 1 if most else 0


def shifted(values: Iterable[float], by: int) -> tuple[float, ...]:
    """Times a power of two: exact within fp64's range, beyond it infinite."""

    def one(v: float) -> float:
        return math.ldexp(v, by) if not v or exponent([v]) + by < 1024 else math.copysign(math.inf, v)

    return tuple(map(one, values))


def weights_in_range(weights: Sequence[float], div: float, *, double: bool) -> tuple[tuple[float, ...], float]:
    """Weights and divisor of the same quotient that the work type holds.

    Weights near the ends of fp32, legal as they are but ratios, would lose most of their digits, or become 0 or
    infinite. A power of two takes both into the middle. That changes no bit of a result that was exact before.

    Args:
        weights: of ``sum w_i x_i / div``.
        div: the divisor.
        double: whether the work type is fp64.
    """
    by = -exponent(weights)
    if abs(by) <= USUAL[double] and abs(exponent([div])) <= USUAL[double]:
        return tuple(weights), div
    most = 1022 if double else 126
    by = min(max(by, -most - exponent([div])), most - exponent([div]))
    return shifted(weights, by), math.ldexp(div, by)


def deltas_in_range(
    weights: Sequence[float], lam: float, div: float, *, double: bool
) -> tuple[tuple[float, ...], float, float]:
    """Weights, factor and divisor of the same ``lam (sum w_i d_i) / div`` that the work type holds.

    As :func:`weights_in_range`; what weights and factor are together, they share evenly.
    """
    w, f, d = exponent(weights), exponent([lam]), exponent([div])
    if max(abs(w), abs(f), abs(d)) <= USUAL[double]:
        return tuple(weights), lam, div
    half = (w + f - d) // 2
    return shifted(weights, half - w), shifted([lam], w - d - half)[0], math.ldexp(div, -d)


class CombineProgram(OnePass):
    """``(sum c_i x_i) / div``, or ``b + lambda (sum c_i (x_i - b)) / div``; ready at once."""

    def __init__(self, kernels: Kernels, coef: F64, scale: F64, *, delta: bool, wide: bool = False) -> None:
        """Takes the tables.

        Args:
            kernels: the backend.
            coef: ``[P, M]``, one row per tensor; with ``delta`` the base's coefficient is ignored.
            scale: ``[P, 2]`` lambda, divisor.
            delta: combine deltas from input 0 instead of the inputs.
            wide: work in fp64, whatever the inputs are.
        """
        self._kernels = kernels
        self._coef = coef
        self._scale = scale
        self._delta = delta
        self._wide = wide

    def bind(self, segments: Segments) -> Bound | None:
        """The same, as a launch."""
        if self._kernels.launcher is None:
            return None
        s = self._kernels.launcher.sequence(segments, wide=self._wide)
        s.combine(self._coef, self._scale, delta=self._delta, div=bool((self._scale[:, 1] != 1).any()))
        return Launches(s)

    def apply(self, segments: Segments) -> None:
        """One kernel call."""
        tables = self._coef, self._scale
        self._kernels.combine(segments, *tables, delta=self._delta, per_row=False, wide=self._wide)
