"""A GPU as a device: three streams, pinned host slots, device slots that mirror them, events.

Several workers share one GPU. Each reads into its own pinned slot, copies the inputs to its device slot on the
stream ``h2d``, has its kernels run on ``compute``, and gets the outputs back on ``d2h``; events order the three,
so that one worker's copies overlap another's kernels. A device slot has the layout of its host slot: addresses
differ by a constant, and a table of segments is moved by adding it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from fastmerge.errors import FastMergeError
from fastmerge.ops.segments import HEADER, I64, LENGTH, OUT, Segments
from fastmerge.runtime.devices.buffer import Buffer
from fastmerge.runtime.devices.streams import NoRoom, Streams
from fastmerge.sizes import show_bytes

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
T = TypeVar("T")

MOST_WORKERS = 8
"""Workers per GPU. An estimate: a thread's ``preadv`` brings some 6 GB/s, PCIe 5 x16 takes some 50."""

LEAST_WORKERS = 3
"""One reads, one computes, one writes."""

UNIT_ELEMENTS = 1 << 25
"""Elements per unit on a GPU: 64 MiB per bf16 model; by estimate 1.3 ms of PCIe 5, against 1 ms of Python."""

SLOT_SHARE = 3
"""Slots take a third of the free memory, by default. What kernels need beside a slot stays below twice its bytes: at
worst 4 bytes (8 in fp64) per element and model for the keys of small tensors that are ranked whole, next to the 2 (8)
of the model itself. (Methods by row add 40 bytes per row.)"""

ALIGN = 512
"""Alignment of device slots; host slots start at pages."""


def arena(slots: int, nbytes: int) -> int:
    """Bytes of device memory from which ``slots`` of ``nbytes`` are carved, wherever it starts."""
    return slots * _aligned(nbytes) + ALIGN


def largest_slot(slots: int, nbytes: int) -> int:
    """Bytes of the largest slots of which ``arena(slots, ...)`` stays within ``nbytes``."""
    return max(0, nbytes - ALIGN) // slots // ALIGN * ALIGN


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


class Gpu:
    """One logical GPU: its streams, and the one allocation that its workers' slots are carved from."""

    def __init__(self, name: str, streams: Streams, *, share: int = 1) -> None:
        """Takes the name for messages, the streams, and how many logical devices share the GPU."""
        self.name = name
        self.streams = streams
        self.share = share
        self.nbytes = 0

    @property
    def room(self) -> int:
        """Bytes that the slots of all that share the GPU may take by default."""
        return self.streams.free() // SLOT_SHARE

    def reserve(self, slots: int, nbytes: int) -> list[CudaDevice]:
        """One worker per slot of ``nbytes``; their host slots are locked one by one, by :meth:`CudaDevice.pin`.

        Raises:
            NoRoom: if the device has not that much memory.
        """
        self.nbytes = slots * nbytes
        stride = _aligned(nbytes)
        try:
            block = self.streams.reserve(arena(slots, nbytes))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise NoRoom(f"{self.name}: {slots} slots of {nbytes} bytes do not fit in its memory", self.name) from None
        start = -int(block.data_ptr()) % ALIGN
        return [CudaDevice(self, block[start + i * stride : start + i * stride + nbytes]) for i in range(slots)]


class CudaDevice:
    """One worker's share of a GPU: a pinned host slot and the device slot that mirrors it."""

    def __init__(self, gpu: Gpu, slot: torch.Tensor) -> None:
        """Takes the GPU and the piece of its memory."""
        self.name = gpu.name
        self._gpu = gpu
        self._streams = gpu.streams
        self._slot: Any = slot
        self._host: Any = None
        self._buffer: Buffer | None = None

    def pin(self) -> None:
        """Gets and locks the host slot.

        Raises:
            NoRoom: if the machine refuses.
        """
        nbytes = len(self._slot)
        try:
            buffer = Buffer.allocate(nbytes)
            if nbytes:
                self._host = self._streams.pin(buffer)
        except OSError as error:
            raise NoRoom(f"{nbytes} bytes of host memory cannot be had ({error.strerror or error})") from None
        self._buffer = buffer

    def close(self) -> None:
        """Gives both slots back; nothing may be under way."""
        buffer, pinned = self._buffer, self._host is not None
        self._slot = self._host = self._buffer = None
        if buffer is not None and pinned:
            self._streams.unpin(buffer)

    def allocate(self, nbytes: int) -> Buffer:
        """The slot that :meth:`pin` got; makes the GPU and its compute stream the calling thread's own."""
        if self._buffer is None or nbytes > self._buffer.nbytes:
            raise AssertionError(f"{self.name}: a slot of {nbytes} bytes was not reserved")
        self._streams.enter()
        return self._buffer

    def run(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Calls ``work``; where memory runs out, once more with an empty cache.

        Raises:
            NoRoom: if it does not fit then.
            FastMergeError: for a failing GPU.
        """
        device = True
        for _ in range(2):
            with _failures(self.name):
                try:
                    return work(*args, **named)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    device = _of_device(error)
                # Only here has the error let go of the tensors in its frames.
                self._streams.synchronize()
        what, nbytes = "memory" if device else "pinned host memory", self._gpu.nbytes * self._gpu.share
        text = f"{self.name}: out of {what} for the kernels' temporaries beside slots of {show_bytes(nbytes)}"
        raise NoRoom(text, self.name if device else None)

    def upload(self, host: Segments) -> Segments:
        """Copies all inputs in one range, and moves the table to the device slot."""
        import numpy as np

        assert self._buffer is not None
        table = host.table.copy()
        sizes = np.array([d.size for d in host.dtypes], np.int64)
        there, here = self._range(table[:, HEADER : HEADER + len(sizes)], table[:, LENGTH : LENGTH + 1] * sizes)
        if len(here):
            self._streams.h2d(there, here)
        shift = int(self._slot.data_ptr()) - self._buffer.address
        table[:, HEADER:] += shift
        table[:, OUT] += np.where(table[:, OUT] != 0, shift, 0)
        return replace(host, table=table, nonfinite=self._streams.zeros(len(table)))

    def download(self, device: Segments, host: Segments) -> None:
        """Copies all outputs in one range, and the counters of non-finite ones; waits for this unit only."""
        nbytes = host.table[:, LENGTH : LENGTH + 1] * host.out_dtype.size
        outputs = [OUT, *range(HEADER + len(host.dtypes), host.table.shape[1])]
        there, here = self._range(host.table[:, outputs], nbytes)
        host.nonfinite[:] = self._streams.d2h(here, there, cast("torch.Tensor", device.nonfinite))

    def _range(self, addresses: I64, nbytes: I64) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest range of the slot that holds everything, on the device and on the host."""
        assert self._buffer is not None
        some = nbytes > 0
        start = int(addresses[some].min(initial=1 << 62)) - self._buffer.address
        end = int((addresses + nbytes)[some].max(initial=0)) - self._buffer.address
        place = slice(start, end) if some.any() else slice(0)
        return self._slot[place], self._host[place]


def out_of_memory(error: BaseException) -> bool:
    """Whether device or pinned memory ran out, be it torch, the driver or Triton that says so."""
    return isinstance(error, RuntimeError) and "out of memory" in str(error)


def _of_device(error: RuntimeError) -> bool:
    """Whether it is the device's memory that ran out: torch's allocator says so in these words, Triton under its name.

    Where torch cannot have pinned memory, it passes on the runtime's ``CUDA error: out of memory``.
    """
    return "CUDA out of memory. Tried" in str(error) or "Triton" in str(error)


@contextmanager
def _failures(name: str) -> Iterator[None]:
    """Errors of CUDA as fastmerge's own, in one line."""
    try:
        yield
    except RuntimeError as error:
        if "CUDA" not in str(error) and type(error).__name__ != "AcceleratorError":
            raise
        line = str(error).splitlines()[0]
        raise FastMergeError(f"{name}: {line}; continue with --resume, there or on another --device") from error
