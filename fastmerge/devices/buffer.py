"""A slot of host memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Buffer:
    """Memory that one worker reuses for every unit, so that its pages are touched once.

    Attributes:
        data: owns the memory.
        address: first byte, 64-byte aligned.
        nbytes: usable bytes.
    """

    data: npt.NDArray[np.uint8]
    address: int
    nbytes: int

    @classmethod
    def allocate(cls, nbytes: int) -> Buffer:
        """Ordinary memory of ``nbytes``, not yet touched."""
        data = np.empty(nbytes + 64, np.uint8)
        address = (data.ctypes.data + 63) & ~63
        return cls(data, address, nbytes)
