"""Where units are computed: a CPU core, or a GPU.

A core is a device with its own worker thread, which runs single-threaded native kernels with the GIL
released; on a GPU several workers share the streams, each with a slot of its own. Every device offers the same
few things, so that the scheduler cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

from fastmerge.ops.segments import Segments
from fastmerge.runtime.devices.buffer import Buffer
from fastmerge.runtime.devices.cpu import CpuDevice, cores

__all__ = ["Buffer", "CpuDevice", "Device", "cores"]

P = ParamSpec("P")
T = TypeVar("T")


class Device(Protocol):
    """One place where kernels run.

    Attributes:
        name: ``cpu``, ``cuda:0``.
    """

    @property
    def name(self) -> str: ...  # noqa: D102  described above

    def allocate(self, nbytes: int) -> Buffer:
        """A host slot of ``nbytes``; called once, by the worker's own thread, before anything else here."""

    def run(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Calls ``work``, which uploads, computes and downloads one unit, and may be called again after a failure."""

    def upload(self, host: Segments) -> Segments:
        """Brings the inputs to where the kernels reach them; on the CPU they are there already."""

    def download(self, device: Segments, host: Segments) -> None:
        """Brings the outputs back to the addresses of ``host``."""
