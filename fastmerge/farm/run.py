"""A farm from its file to its results, and what is to be seen and tidied in a store."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmerge.api.merge import merge
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.farm.executors import Executor, executor_of
from fastmerge.farm.file import Wanted, load
from fastmerge.farm.jobs import Planner
from fastmerge.farm.store import Attempts, Job, Result, State, Store, read_json
from fastmerge.farm.worker import How, Ranks, names_the_store
from fastmerge.report import Report
from fastmerge.sizes import parse_bytes, show_bytes

TOP = 10
"""Scores that a table shows."""


@dataclass(frozen=True)
class Status:
    """What is to be seen of a store.

    Attributes:
        counts: jobs by state.
        running: (job, worker, seconds since the claim) of those that are claimed.
        best: results with the highest scores, or the first ones where there are none.
        problems: results that are failed or quarantined.
        bytes: of the models that are there.
    """

    counts: Mapping[State, int]
    running: Sequence[tuple[str, str, float]]
    best: Sequence[Result]
    problems: Sequence[Result]
    bytes: int

    @property
    def ok(self) -> bool:
        """Whether every job is done."""
        return set(self.counts) <= {"done"}

    def facts(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        running = [{"job": job, "worker": worker, "seconds": seconds} for job, worker, seconds in self.running]
        lists = {"running": running, "best": [*map(asdict, self.best)], "problems": [*map(asdict, self.problems)]}
        return {"counts": dict(self.counts), "bytes": self.bytes, **lists}

    def __str__(self) -> str:
        shown = ", ".join(f"{n} {state}" for state, n in self.counts.items() if n) or "no jobs"
        lines = [f"{shown}; models {show_bytes(self.bytes)}"]
        lines += [f"running      {name}  by {worker}, {seconds:.0f} s" for name, worker, seconds in self.running]
        for result in self.best:
            score = f"{result.score:.6g}" if result.score is not None else ""
            lines.append(f"done         {result.name}  {score}  {result.id[:12]}")
        lines += [f"{result.state:<12} {result.name}  {result.id[:12]}: {result.error}" for result in self.problems]
        return "\n".join(lines)


def run(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    executor: Executor | None = None,
    tick: Callable[[Store], None] | None = None,
) -> Store:
    """Merges every recipe of a farm's file that the store has no result of yet.

    Args:
        source: the file, or the same as a mapping.
        executor: who merges; None for what the file says.
        tick: called now and then with the store.

    Returns:
        The store, in which every job has a result.

    Raises:
        RecipeError, CheckpointError: of any recipe, before anything is merged; all are listed.
        BackendUnavailable: what is to merge is not installed.
        OutputError: the store cannot be used; NoSpace where it is full: the same call goes on once it is not.
    """
    file, wanted = load(source)
    who = executor or executor_of(file)
    jobs = jobs_of(wanted, parse_bytes(file.shard_size))
    with names_the_store(file.store):
        store = Store.create(file.store, file.settings)
        for job in jobs:
            store.add(job)
        tidy(store, lease=float(file.lease))
        if store.open():
            who.run(store, lambda: tick(store) if tick is not None else None)
        Ranks(store, file.keep).prune()
    return store


def jobs_of(wanted: Sequence[Wanted], shard_size: int) -> list[Job]:
    """The jobs of a farm's recipes.

    Raises:
        RecipeError, CheckpointError: with the problems of all.
    """
    planner = Planner()
    jobs, problems = [], []
    kind: type[RecipeError | CheckpointError] = RecipeError
    for name, recipe in ((w.name, w.recipe) for w in wanted):
        try:
            jobs.append(planner.job(name, recipe, seed=None, shard_size=shard_size)[0])
        except (RecipeError, CheckpointError) as error:
            kind = CheckpointError if isinstance(error, CheckpointError) else kind
            problems += [f"{name}: {text}" for text in error.problems]
    if problems:
        raise kind(problems)
    return jobs


def status(store: Store) -> Status:
    """What is to be seen of a store now."""
    results = {result.id: result for result in store.results()}
    attempts = store.attempts()
    lease = How.of(store.settings).lease
    counts: Counter[State] = Counter(result.state for result in results.values())
    running = []
    now = store.now()
    for identity in store.jobs():
        if identity in results:
            continue
        known = attempts.get(identity, Attempts())
        path = store.claim_path(identity, known.last)
        claimed = read_json(path) if known.last and known.last not in known.ended else None
        touched = _touched(path)
        if claimed is None or touched is None or now - touched > lease:
            counts["queued"] += 1
            continue
        counts["running"] += 1
        running.append((store.job(identity).name, str(claimed["worker"]), max(0.0, now - float(claimed["since"]))))
    done = [r for r in results.values() if r.state == "done"]
    best = sorted((r for r in done if r.score is not None), key=lambda r: (-(r.score or 0.0), r.id))[:TOP]
    problems = [r for r in results.values() if r.state != "done"]
    held = sum(r.bytes for r in done if (store.entry(r.id) / "model").is_dir())
    order: tuple[State, ...] = ("queued", "running", "done", "failed", "quarantined")
    return Status({state: counts[state] for state in order if counts[state]}, running, best, problems, held)


def tidy(store: Store, *, lease: float | None = None, keep: int | None = None, retry: bool = False) -> list[str]:
    """Removes what nobody needs: what workers left that are gone, and files of attempts at jobs that are done.

    Args:
        store: of the farm.
        lease: as of its settings.
        keep: models that stay, the best by score; None for as the settings say.
        retry: also the results that are failed or quarantined, with their attempts: these jobs are open again.

    Returns:
        What was removed.
    """
    how = How.of(store.settings)
    removed = []
    now, lease = store.now(), how.lease if lease is None else lease
    if retry:
        for result in [r for r in store.results() if r.state != "done"]:
            store.forget_attempts(result.id)
            store.discard(result.id)
            removed.append(f"{result.state}: {result.name}")
    done, attempts = store.finished(), store.attempts()
    for identity in attempts.keys() & done:
        store.forget_attempts(identity)
    for path in sorted((store.root / "staging").iterdir()):
        identity, _, worker = path.name.partition(".")
        known = attempts.get(identity)
        claim = store.claim_path(identity, known.last) if known else None
        alive = claim is not None and claim.exists() and (read_json(claim) or {}).get("worker") == worker
        touched = _touched(path)
        if not alive and touched is not None and now - touched > lease:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            removed.append(f"staging: {path.name}")
    Ranks(store, how.keep if keep is None else keep).prune()
    return removed


def _touched(path: Path) -> float | None:
    """When a file was touched; None where another process has just removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def find(store: Store, text: str) -> Result:
    """A result by its id, the beginning of it, or its name.

    Raises:
        RecipeError: there is none, or several.
    """
    ids = [i for i in store.finished() if i.startswith(text)] if len(text) >= 4 else []
    found = [r for i in ids if (r := store.result(i)) is not None] or [r for r in store.results() if r.name == text]
    if len(found) != 1:
        raise RecipeError(f"{store.root}: {len(found) or 'no'} results are called {text!r}; expected one id or name")
    return found[0]


def make(store: Store, text: str, out: str | os.PathLike[str], **how: Any) -> Report:
    """Merges what a result was made of into a new directory: the model of a virtual one, once more.

    Args:
        store: of the farm.
        text: as of :func:`find`.
        out: the directory.
        how: as of :func:`fastmerge.merge`.

    Raises:
        RecipeError: there is no such result.
        CheckpointError: the models have changed since.
    """
    job = store.job(find(store, text).id)
    return merge(Planner().again(job), out, **how)


__all__ = ["Status", "find", "make", "run", "status", "tidy"]
