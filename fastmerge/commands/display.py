"""What commands print: text for people, JSON, and how far a merge is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from fastmerge.errors import printable

if TYPE_CHECKING:
    from fastmerge.planning import Plan
    from fastmerge.runtime.stream import Stats


def say(text: object, *, err: bool = False) -> None:
    """Prints text for people: nothing in it, whoever wrote it, acts on the terminal."""
    click.echo(printable(text, lines=True), err=err)


def show_json(value: object, *, indent: int | None = None) -> None:
    """Prints JSON, which escapes by itself."""
    import json

    click.echo(json.dumps(value, indent=indent))


@contextlib.contextmanager
def progress(planned: Plan) -> Iterator[Callable[[Stats], None]]:
    """A bar of output bytes on a terminal; a plain line every 10 s elsewhere."""
    from fastmerge.sizes import show_bytes

    total = sum(p.nbytes for p in planned.layout.places.values())
    started = last = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), "{task.fields[by]}")
        with Progress("merging", *columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("merging", total=total, by="")
            yield lambda s: bar.update(task, completed=int(s.bytes_written), by=f"bound by {s.bottleneck}")
        return

    def line(stats: Stats) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10:
            last = now
            share = 100 * stats.bytes_written / max(total, 1)
            rate = (stats.bytes_read + stats.bytes_written) / (now - started) / 1e9
            click.echo(f"{share:.0f} % of {show_bytes(total)}, {rate:.2f} GB/s, bound by {stats.bottleneck}", err=True)

    yield line


@contextlib.contextmanager
def json_lines(planned: Plan) -> Iterator[Callable[[Stats], None]]:
    """One JSON event per second."""
    last = time.monotonic()
    show_json({"event": "start", "ts": time.time(), **planned.summary()})

    def line(stats: Stats) -> None:
        nonlocal last
        if time.monotonic() - last >= 1:
            last = time.monotonic()
            names = ("bytes_read", "bytes_written", "read", "compute", "write", "units")
            show_json({"event": "progress", "ts": time.time(), **{n: getattr(stats, n) for n in names}})

    yield line
