"""Who merges the jobs of a store: processes of this machine, actors of a Ray cluster, or a Slurm job array.

An executor keeps workers alive until every job has a result; everything that matters is in the store. So it may be
killed at any time, and another one, of any kind, goes on.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastmerge.errors import FastMergeError, NoSpace, OutputError
from fastmerge.farm.store import Store
from fastmerge.farm.worker import FULL_STORE, new_name
from fastmerge.runtime.devices import cores
from fastmerge.sizes import default_memory, parse_bytes

STILLBORN = 3
"""Workers in a row that may die before they claim anything."""

MOST_WORKERS = 4
"""Local workers where no number is given: a merge of large models is bound by the disk, and uses several cores."""

Tick = Callable[[], None]


class Executor(Protocol):
    """Keeps workers at the jobs of a store."""

    def run(self, store: Store, tick: Tick) -> None:
        """Returns when every job has a result.

        Args:
            store: of the farm.
            tick: called now and then, to show how far it is.

        Raises:
            FastMergeError: workers cannot be had.
            OutputError: a worker cannot use the store; NoSpace where that is full: the same command goes on once it is
                not.
        """


@dataclass
class _Process:
    """A worker process.

    Attributes:
        slot: which share of the machine it has.
        name: of the worker.
        running: the process.
    """

    slot: int
    name: str
    running: subprocess.Popen[bytes]


class Local:
    """Processes of this machine, which share its cores, its memory and its devices.

    Args:
        workers: how many; None for as many as there are cores or devices, at most four.
        memory: budget of all together.
        devices: given out in turn.
    """

    def __init__(
        self, workers: int | None = None, memory: str | float | None = None, devices: Sequence[str] = ("auto",)
    ) -> None:
        few = len(devices) if len(devices) > 1 else min(cores(), MOST_WORKERS)
        self.workers = workers or few
        total = parse_bytes(memory) if memory is not None else default_memory()
        self.memory = total // self.workers
        self.devices = devices

    def run(self, store: Store, tick: Tick) -> None:
        """As of :class:`Executor`."""
        count = min(self.workers, len(store.open()))
        running = [self._start(store, slot) for slot in range(count)]
        stillborn = 0
        try:
            while running:
                ended = [p for p in running if p.running.poll() is not None]
                running = [p for p in running if p.running.returncode is None]
                for process in ended:
                    code = process.running.returncode
                    if code == 0:
                        continue
                    if code == OutputError.exit_code:  # no other worker has more luck
                        said = self._said(store, process).removeprefix("fastmerge: ")
                        raise (NoSpace if FULL_STORE in said else OutputError)(said)
                    stillborn = 0 if store.bury(process.name, _death(code)) else stillborn + 1
                    if stillborn >= STILLBORN:
                        raise FastMergeError(f"workers end before they claim anything: {self._said(store, process)}")
                    if store.open():
                        running.append(self._start(store, process.slot))
                tick()
                if not ended:
                    time.sleep(0.05)
        finally:
            for process in running:
                process.running.terminate()
            for process in running:
                process.running.wait()

    def _start(self, store: Store, slot: int) -> _Process:
        name = new_name()
        command = [sys.executable, "-m", "fastmerge", "farm", "worker", str(store.root), "--name", name, "--memory"]
        command += [str(self.memory), "--parent", str(os.getpid())]
        command += ["--device", self.devices[slot % len(self.devices)]]
        with (store.root / "logs" / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        mine = share_of(sorted(os.sched_getaffinity(0)), slot, self.workers)
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, mine)  # before it has looked how many there are
        return _Process(slot, name, process)

    @staticmethod
    def _said(store: Store, process: _Process) -> str:
        text = (store.root / "logs" / f"{process.name}.log").read_bytes().decode(errors="replace").strip()
        return text[-1000:] or _death(process.running.returncode)


def share_of(every: Sequence[int], slot: int, workers: int) -> set[int]:
    """The cores of one of so many workers: neighbours, and none of another's unless there are more workers."""
    if workers >= len(every):
        return {every[slot % len(every)]}
    first, last = (len(every) * n // workers for n in (slot, slot + 1))
    return set(every[first:last])


def _death(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def executor_of(file: Any) -> Executor:
    """The executor that a farm's file asks for.

    Raises:
        BackendUnavailable: it is not installed.
    """
    devices = [file.device] if isinstance(file.device, str) else file.device
    if file.executor == "ray":
        from fastmerge.farm.cluster import RayActors

        return RayActors(file.workers, file.ray, memory=file.memory, devices=devices)
    if file.executor == "slurm":
        from fastmerge.farm.slurm import SlurmArray

        return SlurmArray(file.workers or 1, file.slurm, memory=file.memory)
    return Local(file.workers, file.memory, devices)
