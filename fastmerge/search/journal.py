"""The directory of a search: what is searched, every evaluation as soon as it is done, and what was found.

``search.json`` says what is searched, ``evaluations.jsonl`` has a line for each evaluation, ``result.json`` and
``best.yml`` come at the end. A line is on disk before the next evaluation begins, so that a search that was killed goes
on from its last line: everything before it is read instead of computed, and the rest is what it would have been.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmerge.checkpoint import system
from fastmerge.checkpoint.io import FULL
from fastmerge.errors import NoSpace, OutputError
from fastmerge.search.pareto import Scores

VERSION = 1
SEARCH, EVALUATIONS, RESULT, BEST = "search.json", "evaluations.jsonl", "result.json", "best.yml"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of one candidate.

    Attributes:
        number: in the order of the search, from 0.
        generation: of the sampler, from 0.
        genes: the candidate's values as files write them: numbers, and the labels of choices.
        scores: the mean over the items, for each objective.
        items: how many items the mean is over.
        seconds: what rendering and evaluating took.
    """

    number: int
    generation: int
    genes: tuple[Any, ...]
    scores: Scores
    items: int
    seconds: float

    def plain(self, objectives: Sequence[str]) -> dict[str, Any]:
        """As a line of the file has it."""
        return {
            "number": self.number,
            "generation": self.generation,
            "genes": list(self.genes),
            "scores": written(objectives, self.scores),
            "items": self.items,
            "seconds": self.seconds,
        }


def written(objectives: Sequence[str], scores: Scores) -> dict[str, float | None]:
    """Scores by objective; null for one that is worse than any number."""
    return {name: s if math.isfinite(s) else None for name, s in zip(objectives, scores, strict=True)}


class Journal:
    """The files of a search; in memory alone without a directory.

    Args:
        directory: where they are; None keeps what they would hold in memory.
        facts: what is searched, as ``search.json`` has it.
        resume: whether to go on with a search that is there already.

    Attributes:
        recorded: the evaluations of an earlier run, in their order.
        result: what an earlier run found at its end; empty where none came to it.

    Raises:
        OutputError: the directory has a search and ``resume`` is not set, it has another search or is no search,
            another process works there, or a file is damaged.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, facts: Mapping[str, Any], *, resume: bool) -> None:
        self._facts: dict[str, Any] = json.loads(
            json.dumps({"version": VERSION, **facts}, default=lambda value: type(value).__name__)
        )
        self._objectives: list[str] = self._facts["objectives"]
        self.recorded: list[Evaluation] = []
        self.result: dict[str, Any] = {}
        self.directory = None if directory is None else Path(directory)
        self._file: io.FileIO | None = None
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = self._locked(self.directory / EVALUATIONS)
        try:
            self._begin(self.directory / SEARCH, resume=resume)
            self._read(self._file)
            if (self.directory / RESULT).exists():
                self.result = _json(self.directory / RESULT)
        except BaseException:
            self.close()
            raise

    def _locked(self, path: Path) -> io.FileIO:
        file = path.open("a+b", buffering=0)  # of what a full disk did not take nothing is left for later
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in system.UNSUPPORTED | {errno.ENOLCK}:
                return file  # nothing keeps two searches apart there
            file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise OutputError(f"{path.parent}: another search works in this directory") from None
        return file

    def _begin(self, path: Path, *, resume: bool) -> None:
        if not path.exists():
            if path.with_name(EVALUATIONS).stat().st_size:
                raise OutputError(f"{path.parent}: has {EVALUATIONS} and no {SEARCH}: what it is of is not known")
            self._write(SEARCH, json.dumps(self._facts, indent=1) + "\n")
            return
        if not resume:
            raise OutputError(
                f"{path.parent}: has a search already; continue it with --resume, or take another directory"
            )
        there = _json(path)
        other = [key for key in {**self._facts, **there} if self._facts.get(key) != there.get(key)]
        if other:
            shown = [f"{key}: {_short(there.get(key))} there, {_short(self._facts.get(key))} here" for key in other]
            raise OutputError(f"{path.parent}: is another search: {'; '.join(shown)}")

    def _read(self, file: io.FileIO) -> None:
        """Reads the evaluations; a last line that was not written to its end is dropped."""
        file.seek(0)
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            file.truncate(end)
        for i, line in enumerate(data[:end].splitlines()):
            try:
                entry = json.loads(line)
                scores = [entry["scores"][name] for name in self._objectives]
                self.recorded.append(
                    Evaluation(
                        int(entry["number"]),
                        int(entry["generation"]),
                        tuple(entry["genes"]),
                        tuple([-math.inf if s is None else float(s) for s in scores]),
                        int(entry["items"]),
                        float(entry["seconds"]),
                    )
                )
            except (ValueError, KeyError, TypeError):
                raise OutputError(f"{file.name}:{i + 1}: damaged: expected an evaluation, got {line[:80]!r}") from None

    def add(self, evaluation: Evaluation) -> None:
        """Writes an evaluation; it is on disk when this returns."""
        if self._file is not None:
            line = (json.dumps(evaluation.plain(self._objectives), ensure_ascii=False) + "\n").encode()
            with self._room():
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())

    def finish(self, result: Mapping[str, Any], best: str) -> None:
        """Writes what was found; ``best`` is a recipe, and empty where there is none."""
        if best:
            self._write(BEST, best)
        self._write(RESULT, json.dumps(result, indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        """Writes a file that is there as a whole or not at all."""
        if self.directory is None:
            return
        staged = self.directory / f".{name}.tmp"
        with self._room():
            with staged.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(self.directory / name)
            system.sync_directory(self.directory)

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Says what to do about a full disk, and of which search it is."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise NoSpace(
                f"{self.directory}: {error.strerror}: what was evaluated is kept; make room, and go on with --resume"
            ) from None

    def close(self) -> None:
        """Lets others work there."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _json(path: Path) -> dict[str, Any]:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(there, dict):
        raise OutputError(f"{path}: expected a mapping, got {type(there).__name__}")
    return there


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
