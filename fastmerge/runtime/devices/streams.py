"""What a GPU does with bytes: memory, three streams, and copies that wait for no more than they must."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from fastmerge.errors import BudgetError
from fastmerge.runtime.devices.buffer import Buffer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

COPY_BYTES = 16 << 20
"""Bytes per copy command, by estimate 0.3 ms of PCIe 5: an engine ends one before it takes the
small tables of another stream."""


class NoRoom(BudgetError):
    """Memory within the budget could not be had: fewer or smaller slots may fit.

    Attributes:
        gpu: name of the GPU whose memory it is; None for the host's.
        nbytes: what the slots took, or would have taken: all of them on the host, those of one logical GPU on a
            device; 0 until it is known.
    """

    def __init__(self, text: str, gpu: str | None = None) -> None:
        super().__init__(text)
        self.gpu = gpu
        self.nbytes = 0


class Streams(Protocol):
    """What a GPU offers; host memory can stand in for it where Triton's interpreter runs the kernels."""

    def enter(self) -> None:
        """Makes ``compute`` the calling thread's current stream, and the GPU its current device."""

    def free(self) -> int:
        """Bytes of device memory that can be had."""

    def reserve(self, nbytes: int) -> torch.Tensor:
        """Uninitialised device memory, uint8 ``[nbytes]``."""

    def zeros(self, n: int) -> torch.Tensor:
        """int64 zeros ``[n]`` on the device, for use on ``compute``."""

    def pin(self, buffer: Buffer) -> torch.Tensor:
        """The memory of a buffer, page-locked, as a uint8 tensor."""

    def unpin(self, buffer: Buffer) -> None:
        """Undoes :meth:`pin`."""

    def h2d(self, there: torch.Tensor, here: torch.Tensor) -> None:
        """Copies a slot's inputs to the device, and waits for that alone."""

    def d2h(self, here: torch.Tensor, there: torch.Tensor, counters: torch.Tensor) -> npt.NDArray[np.int64]:
        """Copies a slot's outputs, and gives the counters, after the kernels launched so far; waits for that alone."""

    def synchronize(self) -> None:
        """Waits for everything and gives cached memory back."""


class CudaStreams:
    """The three streams of one logical GPU."""

    def __init__(self, index: int) -> None:
        """Makes the streams on GPU ``index``, whose context starts with them."""
        import torch

        self._torch = torch
        self._device = torch.device("cuda", index)
        self._uploads, self._compute, self._downloads = (torch.cuda.Stream(self._device) for _ in range(3))

    def enter(self) -> None:
        """Sets the calling thread's device and stream."""
        self._torch.cuda.set_stream(self._compute)

    def free(self) -> int:
        """What the driver has, and what torch keeps of freed tensors."""
        cuda = self._torch.cuda
        cached = cuda.memory_reserved(self._device) - cuda.memory_allocated(self._device)
        return int(cuda.mem_get_info(self._device)[0]) + int(cached)

    def reserve(self, nbytes: int) -> torch.Tensor:
        """One block of torch's allocator; the streams wait for whoever used it before."""
        cuda = self._torch.cuda
        cuda.empty_cache()  # one large block does not fit between cached ones
        block = self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)
        for stream in (self._uploads, self._compute, self._downloads):
            stream.wait_stream(cuda.current_stream(self._device))
        return block

    def zeros(self, n: int) -> torch.Tensor:
        """Zeros of the current stream, which is ``compute``."""
        return self._torch.zeros(n, dtype=self._torch.int64, device=self._device)

    def pin(self, buffer: Buffer) -> torch.Tensor:
        """Registers the buffer: torch's own pinned memory comes in powers of two, which no budget expects.

        Runs in a thread of its own, because an error of the runtime stays with the thread.
        """
        runtime = self._torch.cuda.cudart()
        with self._torch.cuda.device(self._device):
            code = runtime.cudaHostRegister(buffer.address, buffer.nbytes, 1)
        if code != runtime.cudaError.success:
            raise NoRoom(f"{buffer.nbytes} bytes of host memory cannot be page-locked ({code})")
        offset = buffer.address - buffer.data.ctypes.data
        return self._torch.from_numpy(buffer.data[offset : offset + buffer.nbytes])

    def unpin(self, buffer: Buffer) -> None:
        """Unregisters the buffer."""
        with self._torch.cuda.device(self._device):
            self._torch.cuda.cudart().cudaHostUnregister(buffer.address)

    def h2d(self, there: torch.Tensor, here: torch.Tensor) -> None:
        """Asynchronous copies, and an event on which the thread sleeps.

        The thread waits in the place of ``compute``: what waits in the shared stream would hold up the kernels of
        other workers, whose data is there already.
        """
        with self._torch.cuda.stream(self._uploads):
            _copy(there, here)
            done = self._event()
        done.synchronize()

    def d2h(self, here: torch.Tensor, there: torch.Tensor, counters: torch.Tensor) -> npt.NDArray[np.int64]:
        """The same the other way; the counters land in pinned memory of torch's."""
        self._downloads.wait_stream(self._compute)
        with self._torch.cuda.stream(self._downloads):
            _copy(here, there)
            landed = self._torch.empty_like(counters, device="cpu", pin_memory=True)
            landed.copy_(counters, non_blocking=True)
            done = self._event()
        done.synchronize()
        found: npt.NDArray[np.int64] = landed.numpy()
        return found

    def _event(self) -> Any:
        """An event behind what the current stream has; waiting for it sleeps, with the GIL released."""
        event = self._torch.cuda.Event(blocking=True)
        event.record()
        return event

    def synchronize(self) -> None:
        """Waits for the three streams, then empties torch's caches of device memory and of pinned memory."""
        for stream in (self._uploads, self._compute, self._downloads):
            stream.synchronize()
        self._torch.cuda.empty_cache()
        empty_host = getattr(self._torch._C, "_host_emptyCache", None)  # noqa: SLF001  no public name in torch 2.11
        if empty_host is not None:
            empty_host()


def _copy(to: torch.Tensor, of: torch.Tensor) -> None:
    for at in range(0, len(to), COPY_BYTES):
        to[at : at + COPY_BYTES].copy_(of[at : at + COPY_BYTES], non_blocking=True)
