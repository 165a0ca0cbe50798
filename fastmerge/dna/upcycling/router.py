"""Weights that a router starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastmerge.dtypes import F32, DType
from fastmerge.ops.made import PANEL, array
from fastmerge.ops.sources import Bring
from fastmerge.ops.spec import Source
from fastmerge.philox import NOISE, u16


@dataclass(frozen=True)
class Uniform:
    """Uniform random numbers of ``-scale .. scale``: ``scale (u + 1/2 - 32768) / 32768`` of the element's 16 bits.

    Attributes:
        key: 64-bit Philox key.
        scale: half the width.
        shape: of the tensor.
    """

    key: int
    scale: float
    shape: tuple[int, ...]

    dtype: ClassVar[DType] = F32
    inputs: ClassVar[tuple[Source, ...]] = ()
    workspace: ClassVar[int] = 64 * PANEL  # what a panel of random bits becomes on its way

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """The numbers of the run, a panel at a time."""
        out = array(address, n, np.float32)
        for at in range(0, n, PANEL):
            part = out[at : at + PANEL]
            bits = u16(self.key, 0, NOISE, e0 + at, part.size).astype(np.float64)
            part[:] = (bits - 32767.5) * (self.scale / 32768)
