"""Every test that carries the mark ``gpu``, with compiled kernels on the GPU, all in one run of pytest.

Where its time ends before the tests do, it is cut off: what passed is kept, and the next call runs the others.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.plan import ROOT, Context, Cut, Item, Row, Turn

PROCESSES = 16
"""At most: what takes long is compiling kernels, which cores do; all share the one GPU."""

LIGHT = "tests/test_sizes.py"
"""What a dry run takes: a file without such tests, which imports little."""

MARGIN = 2.0
"""Seconds before the end of a turn in which pytest is stopped and its outcomes are read."""

ITEM = "marked tests"

OUTCOMES, DONE = "FASTMERGE_GPU_OUTCOMES", "FASTMERGE_GPU_DONE"
"""Variables that name the files of :mod:`bench.gpu.outcomes`."""


class Failed(AssertionError):
    """Tests failed; those that passed are kept, so that another try runs the others alone."""

    def __init__(self, reason: str, kept: Sequence[str]) -> None:
        """With the first messages."""
        super().__init__(reason)
        self.kept = kept


def items(context: Context) -> Sequence[Item]:
    """One, of every test file that names the mark, wherever it lies."""
    run = functools.partial(marked, [LIGHT] if context.dry else files(), context)
    return [Item(ITEM, run, needs=20, limit=450, stops=True)]


def files() -> list[str]:
    """The test files that name the mark."""
    every = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in every if "mark.gpu" in p.read_text()]


def marked(names: Sequence[str], context: Context, turn: Turn) -> Row:
    """Runs the marked tests of files; warnings fail nothing: drivers and their packages have their own.

    Raises:
        Cut: the time was over before the tests were.
        Failed: some failed, or none ran.
    """
    done = list(turn.kept or [])
    cores = min(PROCESSES, len(os.sched_getaffinity(0)))
    spread = ["-n", str(cores)] if importlib.util.find_spec("xdist") and not context.dry else []
    with tempfile.TemporaryDirectory() as directory:
        outcomes, earlier, log = (Path(directory) / name for name in ("outcomes", "done", "log"))
        outcomes.touch()
        earlier.write_text(json.dumps(done))
        words = ["-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider", "-p", "bench.gpu.outcomes", *spread]
        env = {**context.environment(), OUTCOMES: str(outcomes), DONE: str(earlier)}
        env.pop("PYTEST_XDIST_WORKER", None)  # of a run that this one is part of
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *words, *names], cwd=ROOT, env=env, stdout=out, stderr=out
            )
            try:
                status = process.wait(max(0.0, turn.seconds - MARGIN))
            except subprocess.TimeoutExpired:
                process.kill()  # what it started ends with this worker
                process.wait()
                status = None
        found = read(outcomes)
        said = [text for text in log.read_text(errors="replace").splitlines() if text.strip()]
        count = Path(f"{outcomes}.count")
        there = len(done) + int(count.read_text() or 0) if count.exists() else None
    failures = [f"{name.rsplit('::', 1)[-1]}: {why}" for name, how, why in found if how == "failed"]
    done += [name for name, how, _ in found if how == "passed"]
    by = Counter(how for _, how, _ in found)
    row: Row = {"tests": there, "passed": len(done), "failed": by["failed"], "skipped": by["skipped"]}
    if status is None:
        reason = f"{len(done)} of {there} tests passed before the time was over"
        raise Cut("; ".join([reason, *failures[:5]]), {**row, "failures": failures}, done)
    if status not in (0, 5) or failures:  # 5: nothing is marked, or nothing is left
        raise Failed(f"{' '.join(said[-1:])}; {'; '.join(failures[:5]) or ' '.join(said)[-600:]}", done)
    if not context.dry and not done:
        raise Failed(f"none of {there} tests ran: {' '.join(said[-1:])}", done)
    return {**row, "files": len(names), "summary": " ".join(said[-1:]).strip("= ")}


def read(outcomes: Path) -> list[Any]:
    """Name, outcome and message of every test; a line that was not written to its end is left out."""
    lines = outcomes.read_text().split("\n")[:-1]
    return [json.loads(text) for text in lines]
