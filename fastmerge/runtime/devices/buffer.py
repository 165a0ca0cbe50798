"""A slot of host memory."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

HUGE = 2 << 20
"""Bytes of a huge page: a slot of 10 MiB has more small pages than a core's TLB has entries."""


@dataclass(frozen=True)
class Buffer:
    """Memory that one worker reuses for every unit, so that its pages are touched once.

    Attributes:
        data: owns the memory.
        address: first byte, at the start of a huge page.
        nbytes: usable bytes.
    """

    data: npt.NDArray[np.uint8]
    address: int
    nbytes: int

    @classmethod
    def allocate(cls, nbytes: int) -> Buffer:
        """Ordinary memory of ``nbytes``, not yet touched."""
        import numpy as np

        if not nbytes:
            return cls(np.zeros(0, np.uint8), 0, 0)
        memory = mmap.mmap(-1, max(nbytes, 1) + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        data = np.frombuffer(memory, np.uint8)
        address = (data.ctypes.data + HUGE - 1) & -HUGE
        return cls(data, address, nbytes)
