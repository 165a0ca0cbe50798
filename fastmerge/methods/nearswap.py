"""NearSwap: take over the other model's elements where they are near the base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.methods.base import Contract, shared
from fastmerge.methods.elementwise import Elementwise, number
from fastmerge.ops.elementwise import Array
from fastmerge.ops.segments import I64

if TYPE_CHECKING:
    from fastmerge.ops.spec import Op, Spec

NEAREST = 1e-6
"""Differences that are smaller count as this (mergekit's constant)."""


@dataclass(frozen=True, kw_only=True)
class Nearswap(Elementwise):
    r"""Move each element of the base ``a`` by at most ``t`` towards the other model ``b``.

    .. math:: w b + (1 - w) a, \quad w = \min\Bigl(1, \frac{t}{|a - b|}\Bigr)

    Shapes: ``a, b: [*S]`` -> ``[*S]``.
    Numerics: fp32 (fp64 where an input is fp64), one division, one rounding. Differences below 1e-6 count as that.
    Paper: alchemonaut, "QuartetAnemoi-70B".
    """

    name = "nearswap"
    summary = "The base, with elements of the other model where they are within t of it."
    formula = "out = w b + (1 - w) a, w = min(1, t / |a - b|)"
    paper = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    contract = Contract("required", least=1, most=1)
    cases = ({"t": 1e-3}, {"t": 0.0})

    t: float = shared("how far an element moves at most", low=0.0)

    def merged(self, op: Op, xs: list[Array], counts: I64) -> Array:
        """Element by element."""
        a, b = xs
        one = number(1.0, a)
        w = np.minimum(number(self.t, a) / np.maximum(np.abs(a - b), number(NEAREST, a)), one)
        return w * b + (one - w) * a

    def warn(self, spec: Spec) -> list[str]:
        """Names a t that does nothing."""
        return [] if self.t else ["nearswap: t = 0 moves nothing: the result is the base"]
