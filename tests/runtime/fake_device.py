"""A device made of a CPU core, latency and faults: it proves the stream without a GPU."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import numpy as np

from fastmerge.errors import FastMergeError
from fastmerge.ops.segments import HEADER, LENGTH, OUT, Segments
from fastmerge.runtime.devices.buffer import Buffer

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class FakeDevice:
    """Copies every unit to memory of its own, as a GPU would, with random delays and injected faults.

    Attributes:
        name: shown in errors.
        latency: longest random delay of a copy, in seconds.
        fail_at: number of the upload that fails; -1 never.
        seed: of the delays.
    """

    name: str = "fake:0"
    latency: float = 0.0
    fail_at: int = -1
    seed: int = 0
    uploads: int = 0
    _memory: list[Any] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def allocate(self, nbytes: int) -> Buffer:
        """A host slot full of a pattern that no test expects."""
        buffer = Buffer.allocate(nbytes)
        buffer.data[:] = 0xDD
        return buffer

    def run(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Once."""
        return work(*args, **named)

    def _pause(self) -> None:
        if self.latency:
            time.sleep(self._random.random() * self.latency)

    def upload(self, host: Segments) -> Segments:
        """Copies all inputs to fresh private memory; outputs get poisoned memory."""
        self.uploads += 1
        if self.uploads - 1 == self.fail_at:
            raise FastMergeError(f"{self.name}: injected fault at upload {self.fail_at}")
        self._pause()
        table = host.table.copy()
        self._memory = []
        for row in table:
            length = int(row[LENGTH])
            for column, dtype in enumerate(host.dtypes, HEADER):
                row[column] = self._keep(ctypes.string_at(int(row[column]), length * dtype.size))
            for column in _outputs(host):
                row[column] = row[column] and self._keep(b"\xdd" * (length * host.out_dtype.size))
        return Segments(table, host.dtypes, host.out_dtype, np.zeros(len(table), np.int64))

    def _keep(self, data: bytes) -> int:
        memory = np.frombuffer(data or b"\0", np.uint8).copy()
        self._memory.append(memory)
        return int(memory.ctypes.data)

    def download(self, device: Segments, host: Segments) -> None:
        """Copies the outputs back and forgets the private memory."""
        self._pause()
        for there, here in zip(device.table, host.table, strict=True):
            for column in _outputs(host):
                if there[column]:
                    ctypes.memmove(int(here[column]), int(there[column]), int(there[LENGTH]) * host.out_dtype.size)
        host.nonfinite[:] = device.nonfinite
        self._memory = []


def _outputs(segments: Segments) -> list[int]:
    """Columns of the results' addresses."""
    return [OUT, *range(HEADER + len(segments.dtypes), segments.table.shape[1])]
