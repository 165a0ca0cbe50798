"""``fastmerge farm``: many recipes, whose results lie in a store that all workers share."""

from __future__ import annotations

import time
from typing import Any

import click

from fastmerge.commands import display
from fastmerge.farm import run as farms
from fastmerge.farm.store import Store
from fastmerge.farm.worker import work
from fastmerge.sizes import parse_bytes

_STORE = click.argument("store", type=click.Path(exists=True, file_okay=False))
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_EVERY = 10.0
"""Seconds between lines of progress."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def farm() -> None:
    """Merge many recipes: on this machine, a Ray cluster or Slurm.

    Results lie in a store, a directory. Every process may be killed at any time: the same command goes on.
    """


@farm.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
@_JSON
def run(file: str, quiet: bool, as_json: bool) -> None:
    """Merge every recipe of FILE that its store has no result of. Exit code 0: all are done, 1: some are not."""
    last = time.monotonic()

    def tick(store: Store) -> None:
        nonlocal last
        if not quiet and time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            display.say(f"{len(store.finished())} of {len(store.jobs())} jobs", err=True)

    try:
        found = farms.status(farms.run(file, tick=tick))
    except KeyboardInterrupt:
        display.say("fastmerge: stopped; nothing that was finished is lost, the same command goes on", err=True)
        raise SystemExit(130) from None
    if not quiet or as_json:
        _show(found, as_json=as_json)
    if not found.ok:
        raise SystemExit(1)


@farm.command()
@_STORE
@_JSON
def status(store: str, as_json: bool) -> None:
    """Show what is queued, running, done, failed and quarantined in STORE, and the best scores."""
    _show(farms.status(Store(store)), as_json=as_json)


@farm.command()
@_STORE
@click.option("--device", help="auto, cpu, cuda, or cuda:0,cuda:1.  [default: the store's]")
@click.option("--memory", help="Budget of this worker, e.g. 8GB.  [default: 8GB or half of what is free]")
@click.option("--name", hidden=True)
@click.option("--parent", type=int, hidden=True)
@click.option("--no-wait", is_flag=True, help="End where the jobs that are left are others'.")
def worker(store: str, device: str | None, memory: str | None, name: str | None, parent: int | None,
           no_wait: bool) -> None:  # fmt: skip
    """Merge jobs of STORE until every one has a result: start as many as you like, on any machine that sees it."""
    nbytes = parse_bytes(memory) if memory is not None else None
    work(store, name=name, wait=not no_wait, parent=parent, device=device, memory=nbytes)


@farm.command()
@_STORE
@click.option("--keep", type=click.IntRange(0), help="Models that stay, the best by score.  [default: the store's]")
@click.option("--retry", is_flag=True, help="Open failed and quarantined jobs again.")
def gc(store: str, keep: int | None, retry: bool) -> None:
    """Remove from STORE what dead workers left, and models that are not among the best."""
    for text in farms.tidy(Store(store), keep=keep, retry=retry):
        display.say(text)


@farm.command()
@_STORE
@click.argument("result")
@click.argument("out", type=click.Path())
@click.option("--memory", help="Budget for data in flight, e.g. 8GB.  [default: 8GB or half of what is free]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, or cuda:0,cuda:1.")
@click.option("--resume", is_flag=True, help="Continue an interrupted merge.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output, atomically.")
def make(store: str, result: str, out: str, **how: Any) -> None:
    """Merge RESULT of STORE, an id or a name, once more into the new directory OUT."""
    display.say(farms.make(Store(store), result, out, **how))


def _show(found: farms.Status, *, as_json: bool) -> None:
    if as_json:
        display.show_json(found.facts(), indent=2)
    else:
        display.say(found)


ALL = {"farm": farm}
