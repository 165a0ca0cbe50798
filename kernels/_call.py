"""One call on the device, prepared once: one upload, one allocation, a list of launches.

What kernels read and write beside the weights has a :class:`Place`: tables that the host fills, counters that start at
zero, and room for what kernels make. :meth:`Call.run` sends the first two in one copy from page-locked memory and
launches; it decides nothing and waits for nothing, so the same call can run again, or be captured as a CUDA graph.

A launch goes through the compiled kernel itself: Triton's ordinary way binds and hashes all arguments each time, which
costs the host tens of microseconds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton

from ._ptx import unpacked

log = logging.getLogger("fastmerge")

Array = npt.NDArray[Any]

ALIGN = 64
"""Bytes at a multiple of which every array starts; Triton asks for 16 to move 128 bits at a time."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Options of every launch: no multiply-add is ever contracted (design law L1)."""

TORCH = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.uint64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.uint32): torch.int32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint8): torch.uint8,
}
"""Types of places: unsigned keys travel as signed ones of the same bits."""

POISON = 0xA5
"""What the interpreter fills scratch with, so that tests see what is read before it is written."""


INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on CPU addresses (TRITON_INTERPRET=1 at import)."""


class Place(NamedTuple):
    """An array of a call on the device.

    Attributes:
        sent: whether the host fills it (or it starts at zero); else it is scratch.
        offset: bytes from the start of its part.
        dtype: of its elements.
        shape: of the array.
    """

    sent: bool
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return self.dtype.itemsize * math.prod(self.shape)


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs, one to three dimensions.
        args: runtime arguments in order: places, tensors of the device, numbers.
        constants: ``tl.constexpr`` arguments in order.
        options: of the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: tuple[Any, ...]
    options: dict[str, Any]


class Gpu:
    """What a call asks of a device; tests count what goes through it."""

    # Triton compiles and loads at the first launch and sets up a loaded kernel in steps that another thread can see;
    # the interpreter patches the language while a kernel runs. Nobody waits for a device inside.
    _turn = threading.Lock()
    _compiled: dict[tuple[Any, ...], Any] = {}  # noqa: RUF012  of all devices, once per process

    def __init__(self, device: torch.device) -> None:
        """Takes the device; ``cuda`` without a number is the current one of the thread that calls."""
        self.device = device

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The device's context, and the launches of one call without those of others in between."""
        if self.device.type == "cpu":
            with self._turn, np.errstate(all="ignore"):
                yield
        else:
            with self._turn, torch.cuda.device(self.device):
                yield

    def host(self, nbytes: int) -> torch.Tensor:
        """Page-locked memory of the host, uint8: a copy from other memory waits for the stream."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory of the device, uint8."""
        room = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if self.device.type == "cpu":
            room.fill_(POISON)
        return room

    def send(self, there: torch.Tensor, here: torch.Tensor) -> None:
        """Copies to the device, in the order of the current stream, without waiting."""
        there.copy_(here, non_blocking=True)

    def bring(self, there: torch.Tensor) -> torch.Tensor:
        """A copy in the host's memory, once all that this thread has launched is done."""
        here = torch.empty_like(there, device="cpu", pin_memory=self.device.type == "cuda")
        here.copy_(there, non_blocking=True)
        if self.device.type == "cuda":
            done = torch.cuda.Event(blocking=True)
            done.record()
            done.synchronize()
        return here

    def graph(self, launches: list[Callable[[], None]]) -> Callable[[], None] | None:
        """The launches as one CUDA graph, on whatever stream is current then; None where that cannot be.

        They have run before: nothing is compiled or loaded meanwhile.
        """
        if self.device.type != "cuda" or INTERPRETED or torch.cuda.is_current_stream_capturing():
            return None
        found = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                found.capture_begin(capture_error_mode="thread_local")
                try:
                    for launch in launches:
                        launch()
                finally:
                    found.capture_end()
        except RuntimeError as error:  # the launches themselves do the same
            log.warning("no CUDA graph of %d launches: %s", len(launches), error)
            return None
        replay: Callable[[], None] = found.replay
        return replay

    def runner(self, launch: Launch) -> Callable[..., None]:
        """What a launch calls with its arguments, addresses (tensors in the interpreter) and constants."""
        if INTERPRETED:
            return functools.partial(launch.kernel[launch.grid], **launch.options)
        found: Callable[..., None] = self.compiled(launch)[(*launch.grid, 1, 1)[:3]]
        return found

    def compiled(self, launch: Launch) -> Any:
        """The kernel of a launch, compiled once for its types, constants and options.

        Numbers are not specialised on (``do_not_specialize``), and every address is a multiple of 16.
        """
        index = torch.cuda.current_device() if self.device.type == "cuda" else -1
        kinds = [None if type(a) is int else a.dtype for a in launch.args]
        key = (id(launch.kernel), index, *kinds, *launch.constants, *launch.options.values())
        found = self._compiled.get(key)
        if found is None:
            types = [a if t is None else TORCH.get(t, t) for a, t in zip(launch.args, kinds, strict=True)]
            with unpacked():
                found = launch.kernel.warmup(*types, *launch.constants, grid=(1,), **launch.options)
            self._compiled[key] = found
        return found


class Call:
    """Tables, room and launches of one call."""

    def __init__(self, gpu: Gpu) -> None:
        """An empty call."""
        self._gpu = gpu
        self._given: list[tuple[int, bytes]] = []
        self._image = bytearray()
        self._runners: list[Callable[..., None]] | None = None
        self._sent = self._room = 0
        self._launches: list[Launch] = []
        self._bound: list[Callable[[], None]] | None = None
        self._tried = False  # a graph of the launches
        self._here: torch.Tensor | None = None
        self._there: torch.Tensor | None = None

    @property
    def scratch(self) -> int:
        """Bytes of device memory that the call takes."""
        return self._sent + self._room

    @property
    def shape(self) -> tuple[int, int, list[Launch]]:
        """What does not depend on the tables' contents: their bytes, those of scratch, and the launches."""
        return self._sent, self._room, self._launches

    # ---- preparing -----------------------------------------------------------------------------------------

    def put(self, array: Any) -> Place:
        """A table of the host; copied now, sent with the rest."""
        place = self.zeros(array.shape, array.dtype)
        self._given.append((place.offset, array.tobytes()))
        return place

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Place:
        """An array that starts at zero each time that the call runs."""
        kind = np.dtype(dtype)
        place = Place(True, self._sent, kind, shape)
        self._sent += (kind.itemsize * math.prod(shape) + ALIGN) & -ALIGN
        return place

    def room(self, shape: tuple[int, ...], dtype: Any) -> Place:
        """An array that kernels write before they read it."""
        kind = np.dtype(dtype)
        place = Place(False, self._room, kind, shape)
        self._room += (kind.itemsize * math.prod(shape) + ALIGN) & -ALIGN
        return place

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], *constants: Any, **options: Any
    ) -> None:
        """Adds a launch; one without programs is left out."""
        if 0 not in grid:
            self._launches.append(Launch(kernel, grid, args, constants, {**OPTIONS, **options}))

    # ---- running -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Sends the tables and launches; the first time it also allocates, and compiles what is new.

        From the second time on the launches are one graph, where the device has such and there are several.
        """
        with self._gpu.turn():
            if self._bound is None:
                self._bind()
            elif not self._tried:
                self._tried = True
                graph = self._gpu.graph(self._bound) if len(self._bound) > 1 else None
                self._bound = [graph] if graph is not None else self._bound
            if self._sent and self._bound:
                assert self._there is not None
                if self._here is None:
                    self._here = self._gpu.host(self._sent)
                    memoryview(self._here.numpy())[:] = self._image  # type: ignore[arg-type]
                self._gpu.send(self._there[: self._sent], self._here)
            for launch in self._bound or ():
                launch()

    def rewrite(self, place: Place, array: Array) -> None:
        """Other contents of a table, for the runs to come: what was sent before may still be under way."""
        self._image[place.offset : place.offset + place.nbytes] = array.tobytes()
        self._here = None

    def take(self, other: Call) -> bool:
        """The tables of a call that has the same launches, for the runs to come; False where it has others."""
        if self.shape != other.shape:
            return False
        self._given.clear()
        self._image, self._here = other.image(), None
        return True

    def release(self) -> None:
        """Gives the device's memory back, in the order of the stream; the next run gets some again."""
        self._there = self._bound = None
        self._tried = False

    def image(self) -> bytearray:
        """The tables as they are sent."""
        if self._given:
            self._image = bytearray(self._sent)
            for offset, a in self._given:
                self._image[offset : offset + len(a)] = a
            self._given.clear()
        return self._image

    def _bind(self) -> None:
        self.image()
        self._there = self._gpu.allocate(self.scratch)
        sent = self._there.data_ptr()
        room = sent + self._sent

        def pointer(arg: Any) -> Any:
            if type(arg) is Place:
                if INTERPRETED:
                    return self.tensor(arg)
                return (sent if arg.sent else room) + arg.offset
            return arg if type(arg) is int or INTERPRETED else arg.data_ptr()

        if self._runners is None:
            self._runners = [self._gpu.runner(x) for x in self._launches]
        pairs = zip(self._runners, self._launches, strict=True)
        self._bound = [functools.partial(run, *map(pointer, x.args), *x.constants) for run, x in pairs]

    def tensor(self, place: Place) -> torch.Tensor:
        """The array on the device, once the call has run."""
        assert self._there is not None
        start = place.offset + (0 if place.sent else self._sent)
        raw = self._there[start : start + max(place.nbytes, place.dtype.itemsize)]
        flat = raw.view(TORCH[place.dtype])
        return flat[: place.nbytes // place.dtype.itemsize].reshape(place.shape)

    def bring(self, *pairs: tuple[Place, Array]) -> None:
        """Copies results into arrays of the host: one wait for all of them, for what this thread has launched."""
        wanted = [(self.tensor(place), array) for place, array in pairs if array.size]
        if not wanted:
            return
        with self._gpu.turn():
            parts = [t.reshape(-1).view(torch.uint8) for t, _ in wanted]
            flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        here = self._gpu.bring(flat).numpy()
        at = 0
        for _, array in wanted:
            np.copyto(array, here[at : at + array.nbytes].view(array.dtype).reshape(array.shape))
            at += array.nbytes
