"""Slurm, through submitit: an array of workers, each of which merges until every job of the store has a result."""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

from fastmerge.errors import BackendUnavailable, FastMergeError
from fastmerge.farm.worker import LOOKS, work
from fastmerge.sizes import parse_bytes

if TYPE_CHECKING:
    from fastmerge.farm.executors import Tick
    from fastmerge.farm.file import Slurm
    from fastmerge.farm.store import Store

WAITING = 8
"""Tasks that wait for what others have, as these may die; the rest end and make room."""

POLL = 1.0
"""Seconds between looks at the array."""


class SlurmArray:
    """A job array. Slurm may end and requeue its tasks; what they had in hand is another's after a lease.

    Args:
        workers: tasks of the array.
        asks: what for.
        memory: budget of each.
    """

    def __init__(self, workers: int, asks: Slurm, *, memory: str | float | None = None) -> None:
        self._workers = workers
        self._asks = asks
        self._memory = parse_bytes(memory) if memory is not None else None
        self._submitit = _submitit()

    def run(self, store: Store, tick: Tick) -> None:
        """As of :class:`fastmerge.farm.executors.Executor`."""
        executor = self._submitit.AutoExecutor(folder=store.root / "logs", cluster=self._asks.cluster)
        executor.update_parameters(**self.parameters())
        count = min(self._workers, len(store.open()))
        with executor.batch():
            how: dict[str, Any] = {"memory": self._memory}
            every = [how if i < WAITING else {**how, "wait": False, "looks": LOOKS} for i in range(count)]
            jobs = [executor.submit(work, str(store.root), **mine) for mine in every]
        while not all(job.done() for job in jobs):
            tick()
            time.sleep(POLL)
        if left := store.open():
            said = [str(job.exception())[-500:] for job in jobs if job.exception() is not None]
            why = said[0] if said else "all workers ended"
            raise FastMergeError(f"{len(left)} jobs have no result: {why}; the same command goes on")

    def parameters(self) -> dict[str, Any]:
        """What Slurm is asked for, as submitit has it."""
        asks = self._asks
        found: dict[str, Any] = {"timeout_min": asks.time, "name": "fastmerge-farm"}
        if asks.cpus_per_task is not None:
            found["cpus_per_task"] = asks.cpus_per_task
        if asks.gpus_per_node is not None:
            found["gpus_per_node"] = asks.gpus_per_node
        if asks.partition is not None:
            found["slurm_partition"] = asks.partition
        if asks.mem is not None:
            found["slurm_mem"] = asks.mem
        return found | {name if name.startswith("slurm_") else f"slurm_{name}": v for name, v in asks.more.items()}


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise BackendUnavailable("submitit is not installed: pip install 'fastmerge[farm]'") from None
