"""Which units run where: devices, their slots, and a schedule that fits both budgets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from fastmerge.devices import Device, cores
from fastmerge.devices.cuda import (
    LEAST_WORKERS,
    MOST_WORKERS,
    UNIT_ELEMENTS,
    CudaDevice,
    Gpu,
)
from fastmerge.devices.streams import CudaStreams, NoRoom
from fastmerge.dispatch import Backend, devices, host_kernels
from fastmerge.errors import BudgetError
from fastmerge.planning import Output
from fastmerge.schedule import Schedule, schedule

SMALLEST = 1 << 22
"""Elements per unit below which a GPU rather has fewer workers: 8 MiB per bf16 model."""


@dataclass(frozen=True)
class Placement:
    """A schedule and the workers that run it, one per slot."""

    work: Schedule
    workers: Sequence[Device]


@contextlib.contextmanager
def place(
    outputs: Sequence[Output], chosen: Backend, *, memory: int, max_vram: int | None = None
) -> Iterator[Placement]:
    """Cuts the work to the budgets and holds the GPUs' slots, which are there before anything is written.

    Args:
        outputs: the plan's outputs.
        chosen: the backend, which knows its devices.
        memory: budget in bytes for all host slots together.
        max_vram: bytes for the slots of each GPU; None for a third of what is free.

    Raises:
        BudgetError: if the smallest unit does not fit, or its memory cannot be had; the message states the minimum.
    """
    if not chosen.gpus:
        workers = devices(chosen)
        work = schedule(outputs, workers=len(workers), memory=memory, whole=chosen.whole)
        yield Placement(work, workers[: work.slots])
        return
    gpus = logical(chosen)
    work, slots = _reserve(outputs, gpus, memory, min(g.room for g in gpus) if max_vram is None else max_vram)
    try:
        yield Placement(work, slots)
    finally:
        _release(gpus, slots)


def logical(chosen: Backend) -> list[Gpu]:
    """The GPUs of a backend; one that is named twice shares its memory."""
    native = host_kernels()
    return [
        Gpu(f"cuda:{i}", chosen.kernels, CudaStreams(i), native=native, share=chosen.gpus.count(i)) for i in chosen.gpus
    ]


def workers_each(gpus: int) -> int:
    """Workers per GPU, where the budgets allow them."""
    return min(MOST_WORKERS, max(LEAST_WORKERS, cores() // gpus))


def fit(outputs: Sequence[Output], gpus: int, *, memory: int, vram: int | None) -> Schedule:
    """A schedule for GPUs: as many workers as bring the bytes; fewer before units get small.

    Args:
        outputs: the plan's outputs.
        gpus: how many.
        memory: host bytes for all slots together.
        vram: bytes of slots per GPU; None for no limit.

    Raises:
        BudgetError: if not even one slot fits.
    """

    def slots(each: int) -> Schedule:
        largest = None if vram is None else vram // each
        return schedule(outputs, workers=each * gpus, memory=memory, elements=UNIT_ELEMENTS, largest=largest)

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
    outputs: Sequence[Output], gpus: Sequence[Gpu], memory: int, vram: int
) -> tuple[Schedule, list[CudaDevice]]:
    """A schedule and its slots; half as much, again and again, where memory cannot be had."""
    refused = ""
    while True:
        try:
            work = fit(outputs, len(gpus), memory=memory, vram=vram)
        except BudgetError as error:
            raise BudgetError(f"{refused}{error}") from None
        try:
            return work, _slots(work, gpus)
        except NoRoom as error:
            refused = f"{error}; "
            if not work.slot_bytes:
                raise BudgetError(str(error)) from None
        memory = work.slot_bytes * work.slots // 2
        vram = work.slot_bytes * -(-work.slots // len(gpus)) // 2


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
    """Waits for the GPUs, then frees what was reserved; one that has failed has nothing to wait for."""
    for closing in (slots, ()):
        for gpu in gpus:
            with contextlib.suppress(RuntimeError):
                gpu.streams.settle()
        for slot in closing:
            slot.close()
