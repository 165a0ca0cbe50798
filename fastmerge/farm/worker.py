"""What merges the jobs of a farm: one process, one job at a time, with a sign of life beside it."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from fastmerge.api.merge import merge
from fastmerge.checkpoint.io import FULL
from fastmerge.errors import FastMergeError, Interrupted, NoSpace, OutputError, RecipeError
from fastmerge.farm.jobs import Planner
from fastmerge.farm.store import Claim, Result, Store

if TYPE_CHECKING:
    from typing_extensions import Self

TOUCHES = 6
"""Signs of life per lease."""

STALE = 8
"""Jobs in a row that others have, though the listing knew of nobody: then it is too old."""

LOOKS = 16
"""Parts of a store in a row without a job to be had after which one of very many workers ends: thousands that look
through all of it would keep the filesystem busy for many minutes."""

PATIENCE = 15.0
"""Seconds after which a worker without work looks again, at most."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

FULL_STORE = "the store is full; nothing that was finished is lost"
"""What workers say of it; others know it by that."""


class ScoreFailed(FastMergeError):
    """A score could not be had."""


@dataclass(frozen=True)
class How:
    """How a worker merges.

    Attributes:
        device, backend, memory: as of :func:`fastmerge.merge`.
        score, keep, lease: as of :class:`fastmerge.farm.file.File`.
        home: where the farm was started: scores are computed there.
    """

    device: str = "auto"
    backend: str | None = None
    memory: int | None = None
    score: str | None = None
    keep: int | None = None
    lease: float = 120.0
    home: str | None = None

    @classmethod
    def of(cls, settings: dict[str, Any], **here: Any) -> How:
        """From the settings of a store, and what is so for this worker."""
        device = settings.get("device") or "auto"
        how = cls(
            device=device if isinstance(device, str) else device[0],
            **{name: settings[name] for name in ("backend", "score", "keep", "home") if settings.get(name) is not None},
            lease=float(settings.get("lease") or cls.lease),
        )
        return replace(how, **{name: value for name, value in here.items() if value is not None})


class Worker:
    """Merges jobs of a store. A context: leaving it gives up what is claimed.

    Args:
        store: of the farm.
        how: see there.
        name: of the worker, which no other has; made up where None.
    """

    def __init__(self, store: Store, how: How, name: str | None = None) -> None:
        self.store = store
        self.how = how
        self.name = name or new_name()
        self._planner = Planner()
        self._ranks = Ranks(store, how.keep)
        self._claim: Claim | None = None
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="fastmerge-farm", daemon=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._heart.join()

    def run(self, *, wait: bool = True, looks: int | None = None, parent: int | None = None) -> int:
        """Merges until every job has a result; how many this worker merged.

        Args:
            wait: for jobs that others have, as these may die; False returns where none is to be had.
            looks: parts of the store in a row without a job to be had after which it ends; None for all of them.
            parent: the process without which nobody wants the results any more.
        """
        merged, pause = 0, 0.05
        left = self.store.shards()
        secrets.SystemRandom().shuffle(left)  # workers that start together go different ways
        while left and not _orphan(parent):
            before, fruitless = merged, 0
            for shard in list(left):
                done, found = self._shard(shard, parent)
                merged += found
                fruitless = 0 if found else fruitless + 1
                if done:
                    left.remove(shard)
                if fruitless == looks:
                    return merged
            if merged == before and left:
                if not wait:
                    break
                time.sleep(pause)
            pause = 0.05 if merged > before else min(2 * pause, PATIENCE, self.how.lease / 4)
        return merged

    def _shard(self, shard: str, parent: int | None) -> tuple[bool, int]:
        """Merges what is to be had of a shard: whether nothing of it is open, and how many."""
        found = 0
        while not _orphan(parent):
            ids, attempts = self.store.open(shard), self.store.attempts(shard)
            secrets.SystemRandom().shuffle(ids)
            misses = 0
            for identity in ids:
                if misses == STALE or _orphan(parent):
                    break
                won = self.try_one(identity, attempts.get(identity)) is not None
                found, misses = found + won, 0 if won else misses + (identity not in attempts)
            if misses < STALE:
                return not ids, found
        return False, found

    def try_one(self, identity: str, attempts: Any = None) -> Result | None:
        """Claims a job and merges it; None where it is not to be had, or its result is not this worker's.

        Raises:
            NoSpace: the store is full. That is no fault of the job's, and no other job has more luck.
        """
        claim = self.store.claim(identity, self.name, self.how.lease, attempts)
        if claim is None:
            return None
        started = time.monotonic()
        self._claim = claim
        try:
            result = self._result(claim)
            published = self.store.publish(claim.staging, replace(result, seconds=time.monotonic() - started))
        except Interrupted:
            self.store.end(claim.id, claim.number, "released", "its worker was stopped")
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, another worker may have more luck
            text = "".join(traceback.format_exception_only(error)).strip()[-2000:]
            if not _no_space(error):
                self.store.end(claim.id, claim.number, "lost", text)
                return None
            shutil.rmtree(claim.staging, ignore_errors=True)  # which makes room to say so
            with contextlib.suppress(OSError):
                self.store.end(claim.id, claim.number, "released", text)
            raise NoSpace(f"{self.store.root}: {FULL_STORE}: {error}") from None
        else:
            self._ranks.prune()
            return result if published else None
        finally:
            self._claim = None
            shutil.rmtree(claim.staging, ignore_errors=True)

    def _result(self, claim: Claim) -> Result:
        job = self.store.job(claim.id)
        result = Result(job.id, job.name, job.recipe, "done", self.name, 0.0)
        model = claim.staging / "model"
        try:
            planned = self._planner.again(job)
            how = {"device": self.how.device, "backend": self.how.backend, "memory": self.how.memory}
            merge(planned, model, **how)  # type: ignore[arg-type]
        except (Interrupted, OutputError):
            raise
        except FastMergeError as error:
            return replace(result, state="failed", error=f"{type(error).__name__}: {error}")
        score = None if self.how.score is None else scored(self.how.score, model, self.how.home)
        if not self._ranks.stays(score, job.id):
            shutil.rmtree(model)
        return replace(result, score=score, bytes=planned.layout.total)

    def _beat(self) -> None:
        while not self._over.wait(self.how.lease / TOUCHES):
            claim = self._claim
            if claim is not None:
                with contextlib.suppress(OSError):
                    self.store.touch(claim)


class Ranks:
    """Which models stay: the best by score, and of equal ones those with the smaller id.

    The score below which none stays never falls, so any process may take away what is below it at any time.
    """

    def __init__(self, store: Store, keep: int | None) -> None:
        self._store = store
        self._keep = keep
        self._seen: set[str] = set()
        self._kept: list[tuple[float, str]] = []

    def stays(self, score: float | None, identity: str) -> bool:
        """Whether a new model is among the best so far."""
        if self._keep is None or score is None:
            return True
        self._refresh()
        return len([k for k in self._kept if k < (-score, identity)]) < self._keep

    def prune(self) -> None:
        """Makes virtual what is not among the best."""
        if self._keep is not None:
            self._refresh()

    def _refresh(self) -> None:
        assert self._keep is not None
        for identity in self._store.finished() - self._seen:
            result = self._store.result(identity)
            if result is None:
                continue
            self._seen.add(identity)
            if result.score is not None:
                self._kept.append((-result.score, identity))
        self._kept.sort()
        for _, identity in self._kept[self._keep :]:
            self._store.make_virtual(identity)
        del self._kept[self._keep :]


def scored(how: str, model: Path, home: str | None = None) -> float:
    """The score of a model, by a command or a function.

    Args:
        how: see :class:`fastmerge.farm.file.File`.
        model: its directory.
        home: where the command runs, and the function's module is looked for first.

    Raises:
        ScoreFailed: there is no finite number.
        RecipeError: there is no such function.
    """
    if _FUNCTION.fullmatch(how):
        module, _, name = how.partition(":")
        if home is not None and home not in sys.path:
            sys.path.insert(0, home)
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"score {how!r}: {error}") from None
        said = function(model)
    else:
        words = [word.replace("{model}", str(model)) for word in shlex.split(how)]
        try:
            done = subprocess.run(words, capture_output=True, check=False, cwd=home)
        except OSError as error:
            raise ScoreFailed(f"score {how!r}: {error.strerror}") from None
        if done.returncode:
            text = done.stderr.decode(errors="replace").strip()
            raise ScoreFailed(f"score {how!r}: exit status {done.returncode}: {text[-1000:]}")
        said = (done.stdout.decode(errors="replace").split() or [""])[-1]
    try:
        score = float(said)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ScoreFailed(f"score {how!r}: expected a finite number, last; got {str(said)[:80]!r}")
    return score


def new_name() -> str:
    """A name that no other worker has."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", os.uname().nodename)[:32]
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def work(
    root: str | os.PathLike[str],
    *,
    name: str | None = None,
    wait: bool = True,
    looks: int | None = None,
    parent: int | None = None,
    **here: Any,
) -> int:
    """Merges jobs of a store until every one has a result: the whole life of a worker.

    Args:
        root: the store.
        name: see :class:`Worker`.
        wait: see :meth:`Worker.run`.
        looks: see there.
        parent: see there.
        here: fields of :class:`How` that are not as the store has them.

    Returns:
        Jobs that it merged.

    Raises:
        Interrupted: after SIGTERM or SIGINT; the job in hand is open for others.
        NoSpace: the store is full; the job in hand is open again.
    """
    store = Store(root)
    with names_the_store(root), _stoppable(), Worker(store, How.of(store.settings, **here), name) as worker:
        return worker.run(wait=wait, looks=looks, parent=parent)


@contextlib.contextmanager
def names_the_store(root: str | os.PathLike[str]) -> Iterator[None]:
    """Says which store is full, where a write of its own files says only that something is.

    Raises:
        NoSpace: it is.
    """
    try:
        yield
    except OSError as error:
        if not _no_space(error):
            raise
        raise NoSpace(f"{os.fspath(root)}: {FULL_STORE}: {error.strerror}") from None


def _no_space(error: Exception) -> bool:
    return isinstance(error, NoSpace) or (isinstance(error, OSError) and error.errno in FULL)


def _orphan(parent: int | None) -> bool:
    return parent is not None and os.getppid() != parent


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Between merges signals end a worker as they end a merge."""

    def stop(number: int, _: FrameType | None) -> None:
        error = Interrupted(f"stopped by {signal.Signals(number).name}")
        error.exit_code = 128 + number
        raise error

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
