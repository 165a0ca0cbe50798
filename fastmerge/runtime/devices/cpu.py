"""A CPU core as a device."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from fastmerge.ops.segments import Segments
from fastmerge.runtime.devices.buffer import Buffer

P = ParamSpec("P")
T = TypeVar("T")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class CpuDevice:
    """One core: kernels read and write host memory directly."""

    name: str = "cpu"

    def allocate(self, nbytes: int) -> Buffer:
        """Ordinary memory."""
        return Buffer.allocate(nbytes)

    def run(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Once: on the CPU nothing is retried."""
        return work(*args, **named)

    def upload(self, host: Segments) -> Segments:
        """Nothing to move."""
        return host

    def download(self, device: Segments, host: Segments) -> None:
        """Nothing to move."""
