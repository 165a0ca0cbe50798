"""Device time: CUDA events around a call, with the device kept busy until the host has issued it.

What is measured is then the device's own time, tables and launches included, and not the host's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.calls import Work

CYCLES = 2e9
"""Cycles a second, at most: how long the device is kept busy is given in cycles."""

SHORT, LONG = 5e-3, 0.5
"""Seconds that the host is taken to need before it is known, and those that the device is kept busy at most."""


class Mark:
    """A point in the current stream; the difference of two is seconds. It is a timer of pytest-benchmark's."""

    def __init__(self) -> None:
        """Records an event; does not wait."""
        import torch

        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, other: Mark) -> float:
        """Waits until the device is there."""
        import torch

        torch.cuda.synchronize()
        return float(other.event.elapsed_time(self.event)) / 1e3


def busy(issue: float) -> None:
    """Empties the device, then keeps it busy for three times what the host needs to issue the next call."""
    import torch

    torch.cuda.synchronize()
    torch.cuda._sleep(int(CYCLES * min(LONG, 3 * issue + 2e-4)))  # noqa: SLF001  the only way to keep it busy


def once(work: Work, issue: float) -> tuple[float, float]:
    """Device seconds of one call, and the host's seconds of issuing it.

    Args:
        work: issues the call.
        issue: about how long that takes.
    """
    busy(issue)
    first = Mark()
    start = time.perf_counter()
    work()
    issued = time.perf_counter() - start
    return Mark() - first, issued


def finished() -> float:
    """The time when the device has done everything: wall time of calls, as a timer of pytest-benchmark's."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()
