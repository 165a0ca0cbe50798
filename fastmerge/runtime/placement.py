"""Which units run where: devices, their slots, and a schedule that fits both budgets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from fastmerge.backends.choose import Backend, cpu_backend, devices, host_kernels, say
from fastmerge.errors import BudgetError
from fastmerge.planning import Output
from fastmerge.runtime.devices import Device, cores
from fastmerge.runtime.devices.cuda import (
    LEAST_WORKERS,
    MOST_WORKERS,
    UNIT_ELEMENTS,
    CudaDevice,
    Gpu,
    arena,
    largest_slot,
)
from fastmerge.runtime.devices.streams import CudaStreams, NoRoom
from fastmerge.runtime.schedule import Schedule, schedule

SMALLEST = 1 << 22
"""Elements per unit below which a GPU rather has fewer workers: 8 MiB per bf16 model."""

LISTS = 1.9
"""Host bytes beside each byte of a slot, for methods with statistics: selection lists at most every 16th key of a
model, 20 bytes each, which exist up to three times while they come back. (On the CPU, whose units are 32 times
smaller, that is part of the law's 300 MB.)"""


@dataclass(frozen=True)
class Placement:
    """A schedule and the workers that run it, one per slot, with the backend that they belong to."""

    chosen: Backend
    work: Schedule
    workers: Sequence[Device]


@dataclass(frozen=True)
class Vram:
    """What the slots of each GPU may take.

    Attributes:
        nbytes: of one GPU.
        share: how many logical devices share these.
        said: how errors name the number.
        gpu: name of the GPU that it depends on; None for ``--max-vram``.
    """

    nbytes: int
    share: int = 1
    said: str = "--max-vram"
    gpu: str | None = None


class NoVram(BudgetError):
    """What slots may take of a GPU's memory is too little for one.

    Attributes:
        gpu: as in :class:`Vram`.
    """

    def __init__(self, text: str, gpu: str | None) -> None:
        super().__init__(text)
        self.gpu = gpu


@contextlib.contextmanager
def place(
    outputs: Sequence[Output], chosen: Backend, *, memory: int, max_vram: int | None = None
) -> Iterator[Placement]:
    """Cuts the work to the budgets and holds the GPUs' slots, which are there before any data is written.

    Args:
        outputs: the plan's outputs.
        chosen: the backend, which knows its devices. GPUs that were not named are left out where the smallest unit
            does not fit; without any, the CPU takes over. Either is a warning.
        memory: budget in bytes for all host slots together.
        max_vram: bytes for the slots of each GPU; None for a third of what is free.

    Raises:
        BudgetError: if the smallest unit does not fit, or its memory cannot be had; the message states the minimum.
    """
    while chosen.gpus:
        gpus = logical(chosen)
        try:
            work, slots = _reserve(outputs, gpus, memory, _limit(gpus, max_vram))
        except NoVram as error:
            chosen = _without(error, chosen, gpus)
            continue
        try:
            yield Placement(chosen, work, slots)
        finally:
            _release(gpus, slots)
        return
    workers = devices(chosen)
    work = schedule(outputs, workers=len(workers), memory=memory, whole=chosen.whole)
    yield Placement(chosen, work, workers[: work.slots])


def logical(chosen: Backend) -> list[Gpu]:
    """The GPUs of a backend; one that is named twice shares its memory."""
    native = host_kernels()
    return [
        Gpu(f"cuda:{i}", chosen.kernels, CudaStreams(i), native=native, share=chosen.gpus.count(i)) for i in chosen.gpus
    ]


def _limit(gpus: Sequence[Gpu], max_vram: int | None) -> Vram:
    """``--max-vram``, or what the GPU with the least free memory can spare."""
    if max_vram is not None:
        return Vram(max_vram, max(g.share for g in gpus))
    room, share, name = min(((g.room, g.share, g.name) for g in gpus), key=lambda r: r[0] // r[1])
    return Vram(room, share, f"a third of the free memory of {name}:", name)


def _without(error: NoVram, chosen: Backend, gpus: Sequence[Gpu]) -> Backend:
    """The backend without the GPU that has no room; the one for the CPU where no other is left."""
    if chosen.otherwise is None or error.gpu is None:
        raise error
    left = tuple(i for i, g in zip(chosen.gpus, gpus, strict=True) if g.name != error.gpu)
    if left:
        say(f"{error.gpu} not used: {error}")
        return replace(chosen, gpus=left)
    other = without_gpus(chosen, str(error))
    if other is None:
        raise error
    return other


def without_gpus(chosen: Backend, reason: str) -> Backend | None:
    """The backend for the CPU, with a warning; None where the GPUs or their backend were named."""
    if chosen.otherwise in (None, chosen.name):
        return None
    say(f"GPUs not used: {reason}; merging on the CPU")
    return cpu_backend(chosen.otherwise)


def workers_each(gpus: int) -> int:
    """Workers per GPU, where the budgets allow them."""
    return min(MOST_WORKERS, max(LEAST_WORKERS, cores() // gpus))


def fit(outputs: Sequence[Output], gpus: int, *, memory: int, vram: Vram | None) -> Schedule:
    """A schedule for GPUs: as many workers as bring the bytes; fewer before units get small.

    Args:
        outputs: the plan's outputs.
        gpus: how many.
        memory: host bytes for all slots together.
        vram: what the slots of each GPU may take; None for no limit.

    Raises:
        BudgetError: if not even one slot per GPU fits; :class:`NoVram` where it is for ``vram``.
    """

    def slots(each: int) -> Schedule:
        largest = None if vram is None else largest_slot(each, vram.nbytes // vram.share)
        work = schedule(
            outputs, workers=each * gpus, memory=memory, elements=UNIT_ELEMENTS, largest=largest, beside=LISTS
        )
        if vram is not None and largest is not None and work.slot_bytes > largest:
            least = vram.share * arena(1, work.slot_bytes)
            raise NoVram(
                f"{vram.said} {vram.nbytes} bytes is below the minimum of this recipe: expected >= {least} bytes",
                vram.gpu,
            )
        return work

    for each, least in ((workers_each(gpus), SMALLEST), (LEAST_WORKERS, 0), (2, 0)):
        with contextlib.suppress(BudgetError):
            work = slots(each)
            if work.slots == each * gpus and work.elements >= least:
                break
    else:
        work = slots(1)
    # No more slots than units: they would be locked for nothing.
    return replace(work, slots=max(1, min(work.slots, sum(len(j.units) for j in work.jobs))))


def _reserve(
    outputs: Sequence[Output], gpus: Sequence[Gpu], memory: int, vram: Vram
) -> tuple[Schedule, list[CudaDevice]]:
    """A schedule and its slots; half the budget, again and again, for memory that cannot be had."""
    refused, gpu, tried = "", None, (0, 0)
    while True:
        try:
            work = fit(outputs, len(gpus), memory=memory, vram=vram)
        except BudgetError as error:
            error.args = (f"{refused}{error}",)
            raise
        if (work.slots, work.slot_bytes) != tried:  # half of a budget may still be more than the slots take
            tried = (work.slots, work.slot_bytes)
            try:
                return work, _slots(work, gpus)
            except NoRoom as error:
                refused, gpu = f"{error}; ", error.gpu
                if not work.slot_bytes:
                    raise BudgetError(str(error)) from None
        if gpu is None:
            memory //= 2
        else:
            vram = replace(vram, nbytes=vram.nbytes // 2, said=f"half the budget of {gpu}:", gpu=gpu)


def _slots(work: Schedule, gpus: Sequence[Gpu]) -> list[CudaDevice]:
    """One device slot and one pinned host slot per worker; neighbours in the list are on different GPUs.

    Raises:
        NoRoom: if any cannot be had; those that could are given back.
    """
    every: list[CudaDevice] = []
    try:
        each = [g.reserve(len(range(i, work.slots, len(gpus))), work.slot_bytes) for i, g in enumerate(gpus)]
        every = [each[i % len(gpus)][i // len(gpus)] for i in range(work.slots)]
        with ThreadPoolExecutor(len(every), thread_name_prefix="fastmerge-pin") as pool:
            for done in [pool.submit(slot.pin) for slot in every]:
                done.result()
    except BaseException:
        _release(gpus, every)
        raise
    return every


def _release(gpus: Sequence[Gpu], slots: Sequence[CudaDevice]) -> None:
    """Waits for the GPUs, frees the slots and gives the memory back; what a GPU that has failed refuses, it refuses."""
    _settle(gpus)
    for slot in slots:
        with contextlib.suppress(RuntimeError):
            slot.close()
    _settle(gpus)


def _settle(gpus: Sequence[Gpu]) -> None:
    for gpu in gpus:
        with contextlib.suppress(RuntimeError):
            gpu.streams.settle()
