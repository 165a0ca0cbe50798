"""The store of a farm: a directory on a filesystem that all workers share, and all that a farm knows.

::

    farm.json               how workers merge
    jobs/ab/ID.json         what is to be merged; ID is the hash of recipe, inputs and engine, and begins with ab
    claims/ab/ID.1          who works on it: created by one, touched while its owner lives
    claims/ab/ID.1.ended    why that attempt gave no result
    claims/ab/ID.2          the next attempt: the first has ended, or was not touched for a lease
    staging/ID.OWNER/       a result while it grows
    ab/ID/                  the result: result.json and, unless it is virtual, model/; there in one rename, or not

A worker lists 1/256 of all at a time.

Nothing is ever written in place but times. Claims are files that only one process can create (``O_EXCL``, which NFS has
as well), and none is ever taken away: whoever finds an attempt expired creates the next one, so two that find it at
once cannot both have it. An owner that went on past its lease does no harm: results appear by a rename that fails where
one is. Times are the filesystem's, not those of the machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastmerge.checkpoint import system
from fastmerge.errors import OutputError

FORMAT = 1
LOSSES = 2
"""Different workers that a job may cost before it is quarantined."""

ATTEMPTS = 4
"""Attempts at a job that may be lost, whoever lost them."""

State = Literal["queued", "running", "done", "failed", "quarantined"]


@dataclass(frozen=True)
class Job:
    """A recipe to be merged.

    Attributes:
        id: 64 hex digits: equal ones give equal bytes.
        name: for people.
        recipe: YAML, with absolute paths.
        seed: of the random methods.
        shard_size: largest output file, in bytes.
        inputs: equal where jobs read the same models.
    """

    id: str
    name: str
    recipe: str
    seed: int
    shard_size: int
    inputs: str


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Attributes:
        id, name, recipe: as of the job.
        state: ``done``, ``failed`` (an error that would come again) or ``quarantined`` (its workers died).
        worker: whose result it is.
        seconds: from the claim to the result.
        score: of a result that was scored.
        bytes: of the model's weights.
        error: why there is none.
    """

    id: str
    name: str
    recipe: str
    state: State
    worker: str
    seconds: float
    score: float | None = None
    bytes: int = 0
    error: str = ""


class Claim(NamedTuple):
    """An attempt at a job: the ``number``-th, by a worker.

    Attributes:
        path: of the claim.
        staging: where its result grows.
    """

    id: str
    number: int
    worker: str
    path: Path
    staging: Path


@dataclass
class Attempts:
    """What the names in ``claims`` say of a job."""

    last: int = 0
    ended: set[int] = field(default_factory=set)


class Store:
    """A store that is there.

    Args:
        root: its directory.

    Raises:
        OutputError: it is no store.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100  not resolved: other machines may know other paths
        facts = read_json(self.root / "farm.json")
        if facts is None or facts.get("farm") != FORMAT:
            raise OutputError(f"{self.root}: expected the store of a farm: without farm.json, or of another version")

    @classmethod
    def create(cls, root: str | os.PathLike[str], settings: Mapping[str, Any]) -> Store:
        """Makes a store, or opens the one that is there, and sets how workers merge.

        Raises:
            OutputError: there is something else at this path.
        """
        path = Path(root)
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: exists and is not a directory")
        mine = {"jobs", "claims", "staging", "logs"}
        if path.is_dir() and not (path / "farm.json").exists():
            others = {p.name for p in path.iterdir() if not p.name.startswith(".farm.json.")}
            if others - mine:  # without them it is a store whose making was cut short
                raise OutputError(f"{path}: holds other files, and no store of a farm")
        for name in sorted(mine):
            (path / name).mkdir(parents=True, exist_ok=True)
        system.write_whole(path / "farm.json", _text({"farm": FORMAT, "settings": settings}))
        return cls(root)

    @property
    def settings(self) -> dict[str, Any]:
        """How workers merge."""
        return dict((read_json(self.root / "farm.json") or {}).get("settings", {}))

    # ---- jobs and results --------------------------------------------------------------------------------

    def add(self, job: Job) -> bool:
        """Adds a job; False where it is there already."""
        path = self._job_path(job.id)
        if path.exists():
            return False
        for directory in (path.parent, self.claim_path(job.id, 1).parent):
            directory.mkdir(exist_ok=True)
        system.write_whole(path, _text(asdict(job)))
        return True

    def job(self, identity: str) -> Job:
        """A job by its id.

        Raises:
            OutputError: there is none.
        """
        facts = read_json(self._job_path(identity))
        if facts is None:
            raise OutputError(f"{self.root}: no job {identity}")
        return Job(**facts)

    def shards(self) -> list[str]:
        """What ids of jobs begin with, sorted."""
        return sorted(names(self.root / "jobs"))

    def jobs(self, shard: str | None = None) -> list[str]:
        """The ids of all jobs, or of those of a shard, sorted."""
        found = [n for s in self._shards(shard) for n in names(self.root / "jobs" / s)]
        return sorted(n[:-5] for n in found if n.endswith(".json") and n[0] != ".")

    def entry(self, identity: str) -> Path:
        """Where the result of a job is, or will be."""
        return self.root / identity[:2] / identity

    def finished(self, shard: str | None = None) -> set[str]:
        """The ids of all results, or of those of a shard."""
        return {name for s in self._shards(shard) for name in names(self.root / s)}

    def open(self, shard: str | None = None) -> list[str]:
        """The ids of jobs without a result, or of those of a shard, sorted."""
        done = self.finished(shard)
        return [i for i in self.jobs(shard) if i not in done]

    def _shards(self, shard: str | None) -> list[str]:
        return self.shards() if shard is None else [shard]

    def _job_path(self, identity: str) -> Path:
        return self.root / "jobs" / identity[:2] / f"{identity}.json"

    def result(self, identity: str) -> Result | None:
        """What became of a job; None before."""
        facts = read_json(self.entry(identity) / "result.json")
        return Result(**facts) if facts is not None else None

    def results(self) -> Iterator[Result]:
        """All results, by id."""
        for identity in sorted(self.finished()):
            found = self.result(identity)
            if found is not None:
                yield found

    # ---- claims ------------------------------------------------------------------------------------------

    def attempts(self, shard: str | None = None) -> dict[str, Attempts]:
        """The attempts at all jobs, or at those of a shard."""
        found: dict[str, Attempts] = {}
        for name in [name for s in self._shards(shard) for name in names(self.root / "claims" / s)]:
            identity, _, rest = name.partition(".")
            number, _, end = rest.partition(".")
            if number.isdigit():
                mine = found.setdefault(identity, Attempts())
                mine.last = max(mine.last, int(number))
                if end == "ended":
                    mine.ended.add(int(number))
        return found

    def claim(self, identity: str, worker: str, lease: float, attempts: Attempts | None = None) -> Claim | None:
        """Claims a job for a worker; None where it is done or somebody else's.

        A job that cost :data:`LOSSES` workers, or :data:`ATTEMPTS` attempts, is quarantined instead.

        Args:
            identity: of the job.
            worker: whose claim it is to be.
            lease: seconds without a touch after which a claim counts no more.
            attempts: at this job, as far as they are known.
        """
        known = attempts or self.attempts(identity[:2]).get(identity, Attempts())
        if self.entry(identity).exists() or not self._over(identity, known, lease):
            return None
        losses = self.losses(identity, known.last)
        if len({worker for worker, _ in losses}) >= LOSSES or len(losses) >= ATTEMPTS:
            self._quarantine(identity, losses)
            return None
        path = self.claim_path(identity, known.last + 1)
        try:
            since = {"since": self.now()}
            write_new(path, {"worker": worker, "host": os.uname().nodename, "pid": os.getpid(), **since})
        except FileExistsError:
            return None
        staging = self.root / "staging" / f"{identity}.{worker}"
        claim = Claim(identity, known.last + 1, worker, path, staging)
        if self.entry(identity).exists():
            self.end(claim.id, claim.number, "released", "it was done")
            return None
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        return claim

    def _over(self, identity: str, known: Attempts, lease: float) -> bool:
        """Whether nobody works on a job: all attempts ended, or were not touched for a lease."""
        if not known.last or known.last in known.ended:
            return True
        try:
            touched = self.claim_path(identity, known.last).stat().st_mtime
        except FileNotFoundError:
            return False
        return self.now() - touched > lease

    def losses(self, identity: str, last: int) -> list[tuple[str, str]]:
        """(worker, why) of each attempt at a job that ended without its worker's will."""
        found = []
        for number in range(1, last + 1):
            path = self.claim_path(identity, number)
            end = read_json(path.with_name(f"{path.name}.ended")) or {"why": "lost", "text": "its lease expired"}
            if end["why"] == "lost":
                found.append(((read_json(path) or {}).get("worker", path.name), str(end["text"])))
        return found

    def touch(self, claim: Claim) -> None:
        """Says that the owner of a claim lives."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(claim.path)

    def end(self, identity: str, number: int, why: Literal["lost", "released"], text: str) -> None:
        """Ends an attempt: its worker is ``lost``, which counts against the job, or gave it up."""
        path = self.claim_path(identity, number)
        with contextlib.suppress(FileExistsError):
            write_new(path.with_name(f"{path.name}.ended"), {"why": why, "text": text})

    def bury(self, worker: str, text: str, among: Iterable[str] | None = None) -> int:
        """Ends the attempts of a worker that is known to be dead; how many there were.

        Args:
            worker: its name, or how that begins.
            text: how it died.
            among: ids of the jobs that it may have had; all where None.
        """
        found = 0
        every = self.attempts()
        for identity in every if among is None else among:
            known = every.get(identity)
            if known is None or known.last in known.ended or self.entry(identity).exists():
                continue
            claimed = read_json(self.claim_path(identity, known.last)) or {}
            if str(claimed.get("worker", "")).startswith(worker):
                self.end(identity, known.last, "lost", text)
                found += 1
        return found

    def now(self) -> float:
        """The time by the filesystem's clock, which is that of claims."""
        path = self.root / "staging" / f".clock.{os.uname().nodename}.{os.getpid()}"
        while True:
            path.touch()
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_mtime

    def claim_path(self, identity: str, number: int) -> Path:
        """Where an attempt is claimed, or will be."""
        return self.root / "claims" / identity[:2] / f"{identity}.{number}"

    def _quarantine(self, identity: str, losses: list[tuple[str, str]]) -> None:
        """Gives up on a job whose workers die."""
        job = self.job(identity)
        said = "; ".join(f"{worker}: {text}" for worker, text in losses)
        error = f"{len(losses)} attempts ended without a result: {said}"
        staging = self.root / "staging" / f"{identity}.quarantine.{os.uname().nodename}.{os.getpid()}"
        staging.mkdir(exist_ok=True)
        self.publish(staging, Result(job.id, job.name, job.recipe, "quarantined", "", 0.0, error=error))

    # ---- results -----------------------------------------------------------------------------------------

    def publish(self, staging: Path, result: Result) -> bool:
        """Makes a staging directory the result of a job; False, and it is removed, where there is one already.

        A result that is done takes the place of one that says its workers died: the last of them did not.
        """
        system.write_whole(staging / "result.json", _text(asdict(result)))
        entry = self.entry(result.id)
        entry.parent.mkdir(exist_ok=True)
        for _ in range(2):
            try:
                staging.rename(entry)
            except OSError:
                there = self.result(result.id)
                if there is None:
                    raise
                if result.state != "done" or there.state != "quarantined":
                    shutil.rmtree(staging, ignore_errors=True)
                    return False
                self.discard(result.id)
                continue
            system.sync_directory(entry.parent)
            return True
        shutil.rmtree(staging, ignore_errors=True)
        return False

    def discard(self, identity: str) -> None:
        """Takes a result away at once; the job is open again."""
        self._trash(self.entry(identity))

    def forget_attempts(self, identity: str) -> None:
        """Removes the claims of a job, of which nothing is to be known any more."""
        for path in self.claim_path(identity, 1).parent.glob(f"{identity}.*"):
            path.unlink(missing_ok=True)

    def make_virtual(self, identity: str) -> None:
        """Takes the model of a result away at once; recipe and score stay."""
        self._trash(self.entry(identity) / "model")

    def _trash(self, path: Path) -> None:
        trash = self.root / "staging" / f".trash.{path.parent.name}.{path.name}.{os.uname().nodename}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def names(directory: Path) -> list[str]:
    """What is in a directory; nothing where there is none."""
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries]
    except FileNotFoundError:
        return []


def read_json(path: Path) -> dict[str, Any] | None:
    """A file that holds a JSON object; None where there is no such file, or it is not whole."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_new(path: Path, facts: Mapping[str, Any]) -> None:
    """Creates a file that no two processes can create.

    Raises:
        FileExistsError: it is there.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.write(fd, _text(facts))
    finally:
        os.close(fd)


def _text(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode()
