"""Ray: its scheduler, its placement and its actors. Only ids and results travel, never tensors."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.errors import BackendUnavailable
from fastmerge.farm.store import Store
from fastmerge.farm.worker import How, Worker, new_name
from fastmerge.sizes import parse_bytes

if TYPE_CHECKING:
    from fastmerge.farm.executors import Tick
    from fastmerge.farm.file import Ray

IN_FLIGHT = 2
"""Jobs that an actor has at a time: one in hand, and the next."""

OBJECT_STORE = 200 * 1000**2
"""Bytes of a Ray that is started here: what would be 30 % of the memory is wanted for models."""


def ray_module() -> Any:
    """Ray, imported.

    Raises:
        BackendUnavailable: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise BackendUnavailable("Ray is not installed: pip install 'fastmerge[farm]'") from None


def connect(address: str | None) -> Any:
    """Ray, connected: to a cluster by its address or the environment's ``RAY_ADDRESS``, else started here."""
    ray = ray_module()
    if not ray.is_initialized():
        where = address or os.environ.get("RAY_ADDRESS")
        own = {} if where else {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
        try:
            ray.init(address=where, log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, ValueError) as error:
            raise BackendUnavailable(f"no Ray at {where!r}: {error}") from None
    return ray


class Merger:
    """What an actor is: a worker that is told which job to try.

    Args:
        root: the store.
        label: how the name of its worker begins.
        here: what is so for this worker, as of :func:`fastmerge.farm.worker.work`.
    """

    def __init__(self, root: str, label: str, here: dict[str, Any]) -> None:
        store = Store(root)
        self._worker = Worker(store, How.of(store.settings, **here), f"{label}-{new_name()}")
        self._worker.__enter__()

    def try_one(self, identity: str) -> bool:
        """Whether the job was to be had, and its result is this worker's."""
        return self._worker.try_one(identity) is not None

    def ready(self) -> int:
        """The process, once there is one."""
        return os.getpid()


class RayActors:
    """Actors of a Ray cluster. Ray restarts them; which job is tried again, and how often, is up to the store.

    Args:
        workers: how many; None for as many as the cluster has room for.
        takes: what each of them takes of it, and where it is.
        memory: budget of each.
        devices: given out in turn; ``auto`` is what Ray gives an actor, or its CPU.
    """

    def __init__(
        self,
        workers: int | None,
        takes: Ray,
        *,
        memory: str | float | None = None,
        devices: Sequence[str] = ("auto",),
    ) -> None:
        self._workers = workers
        self._takes = takes
        self._memory = parse_bytes(memory) if memory is not None else None
        self._devices = devices
        self._ray = ray_module()

    def run(self, store: Store, tick: Tick) -> None:
        """As of :class:`fastmerge.farm.executors.Executor`."""
        ray = connect(self._takes.address)
        waiting = _by_inputs(store)
        count = min(self._workers or self._room(ray), len(waiting)) or 1
        made = ray.remote(Merger).options(
            num_cpus=self._takes.num_cpus,
            num_gpus=self._takes.num_gpus,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        labels = [f"actor{i}-{new_name()}" for i in range(count)]
        actors = [made.remote(str(store.root), label, self._here(i)) for i, label in enumerate(labels)]
        last = [""] * count
        flying: dict[Any, tuple[int, str]] = {}
        try:
            while True:
                for i in range(count):
                    while waiting and sum(1 for a, _ in flying.values() if a == i) < IN_FLIGHT:
                        last[i], identity = _next(waiting, last[i])
                        flying[actors[i].try_one.remote(identity)] = i, identity
                done, _ = ray.wait([*flying], timeout=1.0) if flying else ([], [])
                for ref in done:
                    self._land(store, ray, ref, labels, flying)
                tick()
                if waiting or (flying and done):
                    continue
                waiting = self._again(store, count, flying)
                if not waiting and not flying:
                    return
        finally:
            for actor in actors:
                ray.kill(actor)

    @staticmethod
    def _again(store: Store, count: int, flying: dict[Any, tuple[int, str]]) -> list[tuple[str, str]]:
        """Jobs without a result that no call is under way for; where actors are idle, also those of the others.

        These may be waiting for a place to start again. Who claims a job first has it.
        """
        every = _by_inputs(store)
        if not every:
            flying.clear()
            return []
        taken = {identity for _, identity in flying.values()}
        time.sleep(0.2)  # jobs that others have claimed are asked for again and again
        left = [(inputs, identity) for inputs, identity in every if identity not in taken]
        return left if left or len({a for a, _ in flying.values()}) == count else every

    def _here(self, number: int) -> dict[str, Any]:
        return {"memory": self._memory, "device": self._devices[number % len(self._devices)]}

    def _room(self, ray: Any) -> int:
        """Actors that the cluster has room for."""
        have = ray.cluster_resources()
        wants = {"CPU": self._takes.num_cpus, "GPU": self._takes.num_gpus}
        return max(1, min(int(have.get(name, 0) // n) for name, n in wants.items() if n) if any(wants.values()) else 1)

    def _land(
        self, store: Store, ray: Any, ref: Any, labels: Sequence[str], flying: dict[Any, tuple[int, str]]
    ) -> None:
        """Takes what a call gave. Of one whose actor died, the job's attempt is over, if it was begun at all."""
        number, identity = flying.pop(ref)
        try:
            ray.get(ref)
        except ray.exceptions.RayActorError as error:
            store.bury(labels[number], f"its actor died: {str(error).splitlines()[0][:200]}", [identity])


def _by_inputs(store: Store) -> list[tuple[str, str]]:
    """(inputs, id) of all open jobs: those of the same models stand together."""
    return sorted((store.job(identity).inputs, identity) for identity in store.open())


def _next(waiting: list[tuple[str, str]], inputs: str) -> tuple[str, str]:
    """A job with the inputs that an actor had last, if there is one: their headers are open, and their bytes warm."""
    for i, (mine, _) in enumerate(waiting):
        if mine == inputs:
            return waiting.pop(i)
    return waiting.pop(0)
