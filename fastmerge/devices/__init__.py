"""Where units are computed: a CPU core, a GPU, or a fake one that proves the stream.

A core is a device with its own worker thread, which runs single-threaded native kernels with the GIL
released. Every device offers the same four things, so that the scheduler cannot tell them apart.
"""

from __future__ import annotations

from typing import Any, Protocol

from fastmerge.devices.buffer import Buffer
from fastmerge.devices.cpu import CpuDevice, cores
from fastmerge.methods.base import Segments

__all__ = ["Buffer", "CpuDevice", "Device", "cores"]


class Device(Protocol):
    """One place where kernels run.

    Attributes:
        name: ``cpu``, ``cuda:0``, ``fake:1``.
        kernels: the kernel backend that runs here, or None for the reference backend.
    """

    @property
    def name(self) -> str: ...  # noqa: D102  described above

    @property
    def kernels(self) -> Any: ...  # noqa: D102  described above

    def allocate(self, nbytes: int) -> Buffer:
        """A host slot of ``nbytes`` for the worker of this device."""

    def upload(self, host: Segments) -> Segments:
        """Brings the inputs to where the kernels reach them; on the CPU they are there already."""

    def download(self, device: Segments, host: Segments) -> None:
        """Brings the outputs back to the addresses of ``host``."""
