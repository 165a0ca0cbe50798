"""Runs the items that are left, each in a worker with a time limit, until all are done or the budget is spent."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.gpu.plan import ROOT, Context, Item, items
from bench.gpu.state import State

START = 30.0
"""Seconds that a worker may take to import what it needs before its first answer."""


class Worker:
    """One process that runs items; it leads a process group, so that nothing it started outlives it."""

    def __init__(self, context: Context) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.worker", context.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=context.environment(),
            cwd=ROOT,
            start_new_session=True,
        )
        self._fresh = True

    def perform(self, part: str, item: Item, seconds: float) -> dict[str, Any] | None:
        """Runs an item; None where it took longer than ``seconds``, and the process is then gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        allowed = seconds + (START if self._fresh else 0)
        self._fresh = False
        try:
            self._process.stdin.write(f"{part}\t{item.name}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._died()
        answer = b""
        deadline = time.monotonic() + allowed
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not answer.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.stop()
                    return None
                some = os.read(self._process.stdout.fileno(), 1 << 16)
                if not some:
                    return self._died()
                answer += some
        found: dict[str, Any] = json.loads(answer)
        if found["status"] == "failed":
            self.stop()
        return found

    def _died(self) -> dict[str, Any]:
        self.stop()
        return {"status": "failed", "reason": f"the process ended with status {self._process.returncode}"}

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the process and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._process.wait()


def run(
    parts: Sequence[str],
    context: Context,
    state: State,
    *,
    budget: float,
    retry: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Runs what is left of the parts; how many items it did not come to.

    Args:
        parts: names, in order.
        context: what items may know.
        state: receives every result at once.
        budget: seconds; an item that would not fit is not begun, one that does not fit is killed and not counted.
        retry: run again what failed before.
        say: takes progress lines.
    """
    deadline = time.monotonic() + budget
    left = 0
    worker: Worker | None = None
    try:
        for part, item in ((p, i) for p in parts for i in items(p, context)):
            known = state.entry(part, item.name)
            if known is not None and not (retry and known["status"] == "failed"):
                continue
            remaining = deadline - time.monotonic()
            if left or remaining < item.needs:
                left += 1
                continue
            say(f"{part}: {item.name}")
            if worker is None or not worker.alive:
                worker = Worker(context)
            found = worker.perform(part, item, min(item.limit, remaining))
            if found is None and remaining < item.limit:
                left += 1
                continue
            entry = found or {"status": "failed", "reason": f"took longer than {item.limit:.0f} s"}
            say(f"    {line(entry)}")
            state.record(part, item.name, entry)
    finally:
        if worker is not None:
            worker.stop()
    return left


def line(entry: dict[str, Any]) -> str:
    """One result as one line."""
    if entry["status"] != "ok":
        return f"{entry['status']}: {entry['reason']}"
    return "  ".join(f"{k} {v}" for k, v in entry["row"].items() if not isinstance(v, (dict, list)))
