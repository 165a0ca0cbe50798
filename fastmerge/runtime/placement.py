"""Which units run where: devices, their slots, and a schedule that fits both budgets."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from fastmerge.backends.choose import Backend, cpu_backend, say
from fastmerge.errors import BudgetError
from fastmerge.ops.spec import Op
from fastmerge.runtime.budget import UNIT_ELEMENTS, Need, Slots, fit, need
from fastmerge.runtime.devices import CpuDevice, Device, cores
from fastmerge.runtime.devices import cuda as gpu
from fastmerge.runtime.devices.cuda import CudaDevice, Gpu
from fastmerge.runtime.devices.streams import NoRoom
from fastmerge.runtime.kept import NOTHING, Room, room
from fastmerge.runtime.making import making, uncut
from fastmerge.runtime.schedule import Job, schedule

WAITING = 6
"""Workers beyond the cores: while some wait for the disk, others compute. Reads of 8 MiB past the cache of a virtual
disk reached 0.92 to 1.44 GB/s with four in flight, 1.45 to 1.47 with eight (io_uring: 1.54 to 1.68, 1.41 to 1.73)."""

READERS = 4
"""How many of them are there only where inputs are on the disk only (writes need no more than two that wait), and where
memory allows slots of full size: smaller ones would make requests smaller. Averaging 16 checkpoints of 250 MB from the
page cache they cost 9 to 16 % of the processor time, as the kernel clears their slots, and 150 MB."""

SMALLEST = 1 << 22
"""Elements per unit below which a GPU rather has fewer workers: 8 MiB per bf16 model."""

LISTS = 1.9
"""Host bytes beside each byte of a slot of a GPU, for methods with statistics: selection lists at most every 16th key
of a model, 20 bytes each, and copies them twice on their way back. (The units of the CPU are 32 times smaller, so
that there it is part of the law's 300 MB.)"""


class Budget(NamedTuple):
    """What the user allows.

    Attributes:
        memory: host bytes for all slots together; None for no limit.
        vram: bytes of each GPU for slots; None for a third of what is free.
        host: bytes of all slots together, where the host refused twice as many; None for no limit.
        device: the same of the slots of one logical GPU, where a GPU refused.
        gpu: name of that GPU.
        halved: what was refused last; empty where nothing was.
    """

    memory: int | None
    vram: int | None = None
    host: int | None = None
    device: int | None = None
    gpu: str | None = None
    halved: str = ""


class Placement(NamedTuple):
    """A schedule and the workers that run it, one per slot, with the backend that they belong to.

    On CPU cores what the budget leaves beside the slots is for inputs that would be read twice from a disk.
    """

    chosen: Backend
    jobs: tuple[Job, ...]
    slot: int
    workers: Sequence[Device]
    room: Room = NOTHING


class VramLimit(NamedTuple):
    """What the slots of a GPU may take.

    Attributes:
        nbytes: of one GPU.
        share: how many logical devices share it.
        said: how errors name the number.
        gpu: name of the GPU whose free memory it depends on; None for ``--max-vram``.
    """

    nbytes: int
    share: int = 1
    said: str = "--max-vram"
    gpu: str | None = None


class TooSmall(BudgetError):
    """A budget is below what one smallest slot takes.

    Attributes:
        gpu: name of the GPU whose free memory is too little; None where a number of the user's is.
    """

    def __init__(self, text: str, gpu: str | None = None) -> None:
        super().__init__(text)
        self.gpu = gpu


@contextlib.contextmanager
def place(ops: Sequence[Op], chosen: Backend, budget: Budget, *, warm: bool = False) -> Iterator[Placement]:
    """Cuts the work to the budgets and holds the GPUs' slots, which are there before any data is written.

    Args:
        ops: the plan's.
        chosen: the backend, which knows its devices.
        budget: where memory cannot be had, :func:`smaller` says with what to try again.
        warm: whether the page cache holds the inputs.

    Raises:
        TooSmall: if the smallest unit does not fit; the message states the minimum.
        NoRoom: if memory within the budget could not be had.
    """
    if not chosen.gpus:
        whole = uncut(ops, chosen)
        wants = need(ops, whole=whole, defined=chosen.defined, made=making(chosen))
        slots = cpu_slots(wants, budget.memory, workers(chosen), warm=warm)
        jobs = schedule(ops, slot=slots.nbytes, elements=UNIT_ELEMENTS, whole=whole)
        left = room(ops, jobs, beside(wants, slots, budget.memory))
        yield Placement(chosen, jobs, slots.nbytes, [CpuDevice() for _ in range(slots.number)], left)
        return
    gpus = logical(chosen)
    whole = uncut(ops, chosen)
    wants = need(ops, elements=gpu.UNIT_ELEMENTS, whole=whole, defined=chosen.defined, made=making(chosen))
    slots = gpu_slots(wants, len(gpus), budget, _limit(gpus, budget))
    jobs = schedule(ops, slot=slots.nbytes, elements=gpu.UNIT_ELEMENTS, whole=whole)
    # No more slots than units: they would be locked for nothing.
    count = max(1, min(slots.number, sum(len(j.units) for j in jobs)))
    slots = Slots(slots.nbytes, count)
    try:
        held = _reserve(slots, gpus)
        try:
            yield Placement(chosen, jobs, slots.nbytes, held)
        finally:
            _release(gpus, held)
    except NoRoom as error:
        error.nbytes = slots.nbytes * (slots.number if error.gpu is None else -(-slots.number // len(gpus)))
        raise


def smaller(chosen: Backend, budget: Budget, error: BudgetError) -> tuple[Backend, Budget]:
    """With what to try again: half of the slots that could not be had; without a GPU that has no room for a slot.

    GPUs that the user did not name are left out, with a warning; without any, the CPU takes over.

    Raises:
        BudgetError: where nothing is left to try.
    """
    if isinstance(error, NoRoom) and error.nbytes > 1:
        half, why = error.nbytes // 2, str(error)
        if error.gpu is None:
            return chosen, budget._replace(host=half, halved=why)
        return chosen, budget._replace(device=half, gpu=error.gpu, halved=why)
    text = f"{budget.halved}, and less does not do ({error})" if budget.halved else str(error)
    lost = error.gpu if isinstance(error, TooSmall | NoRoom) else None
    again = Budget(budget.memory, budget.vram)
    if chosen.gpus and chosen.otherwise is not None and (lost is not None or budget.halved):
        left = tuple(i for i in chosen.gpus if f"cuda:{i}" != lost) if lost else ()
        if left:
            say(f"{lost} not used: {text}")
            return replace(chosen, gpus=left), again
        if chosen.otherwise != chosen.name:
            say(f"GPUs not used: {text}; merging on the CPU")
            return cpu_backend(chosen.otherwise), again
    if budget.halved:
        raise BudgetError(f"{text}; continue with --resume, there or on another --device") from None
    raise error


def workers(chosen: Backend) -> int:
    """Workers of a backend for CPU cores."""
    return cores() + WAITING if chosen.name == "native" else 1


def cpu_slots(wants: Need, memory: int | None, count: int, *, warm: bool = False) -> Slots:
    """Slots for ``count`` workers; fewer where memory is short or the inputs are ``warm``, in the page cache.

    Raises:
        TooSmall: if one smallest slot does not fit ``memory``.
    """
    few = count - READERS if count > READERS else count
    count = few if warm else count
    if memory is None:
        return Slots(wants.best, count)
    room = memory - wants.apart
    wanted = [*((n, wants.best) for n in range(count, few, -1)), *((n, 0) for n in range(few, 0, -1))]
    found = fit(wants.least, wants.best, wanted, lambda n: room // n - wants.beside)
    if found is None:
        raise _below(wants, memory, 1.0)
    return found


def beside(wants: Need, slots: Slots, memory: int | None) -> int:
    """Bytes that a budget leaves for inputs which would be read twice; none where there is no budget."""
    if memory is None:
        return 0
    return memory - wants.apart - slots.number * (slots.nbytes + wants.beside)


def _below(wants: Need, memory: int, charge: float) -> TooSmall:
    least = math.ceil((wants.least + wants.beside) * charge) + wants.apart
    rows = " (it works by row, and keeps sums of all rows of a tensor)" if wants.apart else ""
    return TooSmall(f"--memory {memory} bytes is below the minimum of this recipe: expected >= {least} bytes{rows}")


def gpu_slots(wants: Need, gpus: int, budget: Budget, vram: VramLimit | None) -> Slots:
    """Slots for GPUs: as many workers as bring the bytes; fewer before units get small.

    Args:
        wants: of the plan.
        gpus: how many.
        budget: of the user.
        vram: what the slots of a GPU may take; None for no limit.

    Raises:
        TooSmall: if not even one slot per GPU fits.
    """
    charge = 1.0 + (LISTS if wants.statistics else 0.0)
    worth = wants.best * SMALLEST // gpu.UNIT_ELEMENTS
    wanted = [(workers_each(gpus) * gpus, worth), (gpu.LEAST_WORKERS * gpus, 0), (2 * gpus, 0)]
    wanted += [(n, 0) for n in range(gpus, 0, -1)]
    refused = _refused(budget.device, wants.least), _refused(budget.host, wants.least)

    def largest(slots: int) -> int:
        device = wants.best if vram is None else gpu.largest_slot(-(-slots // gpus), vram.nbytes // vram.share)
        if refused[0] is not None:
            device = min(device, refused[0] // -(-slots // gpus))
        if refused[1] is not None:
            device = min(device, refused[1] // slots)
        if budget.memory is None:
            return device
        return min(device, int((budget.memory - wants.apart) / charge) // slots - wants.beside)

    found = fit(wants.least, wants.best, wanted, largest)
    if found is not None:
        return found
    if vram is not None and gpu.largest_slot(1, vram.nbytes // vram.share) < wants.least:
        least = vram.share * gpu.arena(1, wants.least)
        have = f"{vram.said} {vram.nbytes} bytes"
        raise TooSmall(f"{have} is below the minimum of this recipe: expected >= {least} bytes", vram.gpu)
    for limit, name in zip(refused, (budget.gpu, None), strict=True):
        if limit is not None and limit < wants.least:
            have = f"a slot of {limit} bytes"
            raise TooSmall(f"{have} is below the minimum of this recipe: expected >= {wants.least} bytes", name)
    raise _below(wants, budget.memory or 0, charge)


def _refused(half: int | None, least: int) -> int | None:
    """Half of what was refused; the smallest slot where that is more than half of it, but not all."""
    return least if half is not None and half < least < 2 * half else half


def workers_each(gpus: int) -> int:
    """Workers per GPU, where the budgets allow them."""
    return min(gpu.MOST_WORKERS, max(gpu.LEAST_WORKERS, cores() // gpus))


def logical(chosen: Backend) -> list[Gpu]:
    """The GPUs of a backend; one that is named twice shares its memory."""
    from fastmerge.runtime.devices.streams import CudaStreams

    return [Gpu(f"cuda:{i}", CudaStreams(i), share=chosen.gpus.count(i)) for i in chosen.gpus]


def _limit(gpus: Sequence[Gpu], budget: Budget) -> VramLimit:
    """``--max-vram``, or what the GPU with the least free memory can spare."""
    if budget.vram is not None:
        return VramLimit(budget.vram, max(g.share for g in gpus))
    room, share, name = min(((g.room, g.share, g.name) for g in gpus), key=lambda r: r[0] // r[1])
    return VramLimit(room, share, f"a third of the free memory of {name}:", name)


def _reserve(slots: Slots, gpus: Sequence[Gpu]) -> list[CudaDevice]:
    """One device slot and one pinned host slot per worker; neighbours in the list are on different GPUs.

    Raises:
        NoRoom: if any cannot be had; those that could are given back.
    """
    from fastmerge.runtime.workers import each

    every: list[CudaDevice] = []
    try:
        held = [g.reserve(len(range(i, slots.number, len(gpus))), slots.nbytes) for i, g in enumerate(gpus)]
        every = [held[i % len(gpus)][i // len(gpus)] for i in range(slots.number)]
        each(CudaDevice.pin, every, name="pin")  # a thread each: an error of the runtime stays with its thread
    except BaseException:
        _release(gpus, every)
        raise
    return every


def _release(gpus: Sequence[Gpu], slots: Sequence[CudaDevice]) -> None:
    """Waits for the GPUs, frees the slots and gives the memory back; errors of a GPU that has failed are ignored."""
    _settle(gpus)
    for slot in slots:
        with contextlib.suppress(RuntimeError):
            slot.close()
    _settle(gpus)


def _settle(gpus: Sequence[Gpu]) -> None:
    for one in gpus:
        with contextlib.suppress(RuntimeError):
            one.streams.synchronize()
