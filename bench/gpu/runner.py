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

from bench.gpu.plan import PARTS, ROOT, Context, Item, items
from bench.gpu.state import State
from bench.gpu.worker import ENDS

START = 30.0
"""Seconds that a worker may take to import what it needs before its first answer."""

END = 3.0
"""Seconds of the budget that are kept for ending processes and writing the table."""


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

    @property
    def start(self) -> float:
        """Seconds that it may take beyond those of its next item."""
        return START if self._fresh else 0.0

    def perform(self, part: str, item: Item, seconds: float, kept: object = None) -> dict[str, Any] | None:
        """Runs an item; None where it took longer than ``seconds``, and the process is then gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._fresh = False
        deadline = time.monotonic() + seconds
        try:
            asked = {"part": part, "item": item.name, "seconds": seconds, "kept": kept}
            self._process.stdin.write(f"{json.dumps(asked)}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._died()
        answer = b""
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
        if found["status"] in ENDS:
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


class Run:
    """What is left of some parts, and the process that works on it."""

    def __init__(
        self,
        parts: Sequence[str],
        context: Context,
        state: State,
        *,
        retry: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """Begins nothing yet.

        Args:
            parts: names, in order.
            context: what items may know.
            state: receives every result at once.
            retry: run again what failed before.
            say: takes progress lines.
        """
        self.parts = parts
        self._context = context
        self._state = state
        self._retry = retry
        self._say = say
        self._again: set[tuple[str, str]] = set()
        self._worker: Worker | None = None

    def left(self, part: str) -> list[Item]:
        """Its items without a result, those that were cut off, and what failed where that is to run again."""

        def waits(item: Item) -> bool:
            known = self._state.entry(part, item.name)
            if known is None or known["status"] == "cut":
                return True
            return self._retry and known["status"] == "failed" and (part, item.name) not in self._again

        return [item for item in items(part, self._context) if waits(item)]

    def work(self, begin: float, budget: float) -> int:
        """Works until all is done or the budget is spent; how many items it did not come to.

        First comes what all others need; then every part up to the last one that is left a share, each no longer than
        the shares of those after it allow; then what is left of all parts, in order.

        Args:
            begin: when the budget began, on the monotonic clock.
            budget: seconds; an item that would not fit is not begun, one that does not fit is killed and not counted.
        """
        end = begin + budget - END
        try:
            self._all(end, budget)
        finally:
            self.stop()
        return sum(len(self.left(part)) for part in self.parts)

    def _all(self, end: float, budget: float) -> None:
        for part in (p for p in self.parts if PARTS[p].first):
            self._part(part, end)
            if self.left(part):
                return
        sharing = [i for i, part in enumerate(self.parts) if PARTS[part].least]
        for i, part in enumerate(self.parts[: max(sharing, default=-1) + 1]):
            kept = sum(PARTS[p].least for p in self.parts[i + 1 :] if self.left(p))
            self._part(part, min(end - kept * budget, time.monotonic() + PARTS[part].most * budget))
        for part in self.parts:
            self._part(part, end)

    def _part(self, part: str, until: float) -> None:
        """Its items in order; the first that does not fit ends it."""
        for item in self.left(part):
            remaining = until - time.monotonic()
            if remaining < item.needs:
                return
            self._say(f"{part}: {item.name}")
            if self._worker is None or not self._worker.alive:
                self._worker = Worker(self._context)
            allowed = item.limit + self._worker.start
            known = self._state.entry(part, item.name) or {}
            found = self._worker.perform(part, item, min(allowed, remaining), known.get("kept"))
            if found is None and remaining < allowed:
                self._say("    cut off: the next call begins it anew")
                return
            entry = found or {"status": "failed", "reason": f"took longer than {item.limit:.0f} s"}
            self._say(f"    {line(entry)}")
            self._state.record(part, item.name, entry)
            self._again.add((part, item.name))

    def stop(self) -> None:
        """Ends the process."""
        if self._worker is not None:
            self._worker.stop()


def line(entry: dict[str, Any]) -> str:
    """One result as one line."""
    if entry["status"] != "ok":
        return f"{entry['status']}: {entry['reason']}"
    return "  ".join(f"{k} {v}" for k, v in entry["row"].items() if not isinstance(v, (dict, list)))
