"""Times of work on a device, alternated with what it is compared to, and the bandwidths of that device.

Works are timed by events (:mod:`bench.clock`) and alternated, so that a change of clocks meets all of them; medians,
with the fastest and the slowest. Working sets are far beyond the L2 cache, which is what empties it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench import clock
from bench.calls import Work
from bench.gpu.plan import Row
from bench.process import Spread

if TYPE_CHECKING:
    import torch


class Times(Spread):
    """Seconds of several runs of one work, printed as milliseconds."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{self.median * 1e3:.3f} ({self.least * 1e3:.3f}..{self.most * 1e3:.3f})"


@dataclass(frozen=True, slots=True)
class Bench:
    """A device and how much work it is given.

    Attributes:
        device: ``cuda:0``; ``cpu`` in a dry run.
        bytes: of a working set.
        runs: counted runs.
        warm: runs before them: the first compiles, the second tells how long the host takes.
    """

    device: str
    bytes: int
    runs: int
    warm: int = 2

    @classmethod
    def of(cls, *, dry: bool) -> Bench:
        """4 GiB and 15 runs; half a tile and one run where nothing is measured."""
        return cls("cpu", 1 << 18, 1, 0) if dry else cls("cuda:0", 4 << 30, 15)

    def elements(self, arrays: float) -> int:
        """How many bf16 elements each of so many arrays has: whole tiles, the working set in all; few in a dry run."""
        if self.device == "cpu":
            return 1 << 15  # more than what one program selects from: the way of large tensors
        return max(1, int(self.bytes / 2 / arrays) >> 16) << 16

    def alternate(self, works: Mapping[str, Work], *, runs: int | None = None) -> dict[str, Times]:
        """Device times of works, in turn."""
        seconds: dict[str, list[float]] = {name: [] for name in works}
        issue = dict.fromkeys(works, clock.SHORT)
        for count in range(-self.warm, runs or self.runs):
            for name, work in works.items():
                took, issued = self._once(work, issue[name])
                if count >= 0:
                    seconds[name].append(took)
                if count != -2:
                    issue[name] = issued if count == -1 else min(issue[name], issued)
        return {name: Times.of(some) for name, some in seconds.items()}

    def _once(self, work: Work, issue: float) -> tuple[float, float]:
        """Device seconds of one call, and the host's seconds of issuing it."""
        if self.device == "cpu":
            start = time.perf_counter()
            work()
            took = time.perf_counter() - start
            return took, took
        return clock.once(work, issue)

    def wall(self, works: Mapping[str, Work], *, runs: int, seconds: float = math.inf) -> dict[str, Times]:
        """Wall times of calls that leave the device idle, in turn: what a user waits for.

        Args:
            works: by name; what they do the first time is done.
            runs: rounds at most.
            seconds: after which no round begins but the first.
        """
        found: dict[str, list[float]] = {name: [] for name in works}
        begin = time.perf_counter()
        for count in range(runs):
            if count and time.perf_counter() - begin > seconds:
                break
            for name, work in works.items():
                found[name].append(self.once(work))
        return {name: Times.of(some) for name, some in found.items()}

    def once(self, work: Work) -> float:
        """Wall seconds of one call."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()


class Probes:
    """The device's own bandwidth, from buffers of half a working set each: copy (bytes read and written), and write."""

    def __init__(self, bench: Bench) -> None:
        """Allocates the buffers."""
        import torch

        self.nbytes = max(1 << 16, min(bench.bytes // 2, 2 << 30))
        self._from = torch.ones(self.nbytes // 4, dtype=torch.int32, device=bench.device)
        self._to = torch.zeros_like(self._from)

    def copy(self) -> torch.Tensor:
        """Moves ``2 * nbytes``."""
        return self._to.copy_(self._from)

    def fill(self) -> torch.Tensor:
        """Writes ``nbytes``."""
        return self._to.fill_(7)


def beside(bench: Bench, works: Mapping[str, tuple[Work, float]], *, runs: int | None = None) -> Row:
    """Works beside the copy of the same run.

    Args:
        bench: the device.
        works: by name, the call and the bytes that it must move; the shares are of the copy's bandwidth.
        runs: counted runs.

    Returns:
        ``share`` of all works together, then per work milliseconds, GB/s and share, and the copy's GB/s.
    """
    probes = Probes(bench)
    found = bench.alternate({"copy": probes.copy, **{name: w for name, (w, _) in works.items()}}, runs=runs)
    copy = 2 * probes.nbytes / found["copy"].median
    moved = sum(nbytes for _, nbytes in works.values())
    took = sum(found[name].median for name in works)
    row: Row = {"share": round(moved / took / copy, 4), "GB": round(moved / 1e9, 3)}
    for name, (_, nbytes) in works.items():
        rate = nbytes / found[name].median
        row[f"{name} ms"] = str(found[name])
        row[f"{name} GB/s"] = round(rate / 1e9, 1)
        if len(works) > 1:
            row[f"{name} share"] = round(rate / copy, 4)
    return {**row, "copy GB/s": round(copy / 1e9, 1), "copy ms": str(found["copy"])}


def ratio(some: float, other: float) -> float:
    """A quotient for a table."""
    return round(some / max(other, 1e-12), 3)
