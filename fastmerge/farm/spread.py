"""One merge over the nodes of a Ray cluster: each reads and writes its part, and one of them publishes.

The nodes share a filesystem, which holds the models and the output; through Ray go a recipe and a report. The bytes are
those of one machine, as every part of a plan is. A node that is lost loses a part: Ray runs that again elsewhere, where
it goes on from its journal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from fastmerge import errors
from fastmerge.api.merge import merge, plan
from fastmerge.errors import FastMergeError, OutputError
from fastmerge.farm.cluster import connect, ray_module
from fastmerge.farm.jobs import absolute
from fastmerge.recipe import Recipe
from fastmerge.report import Report

PATIENCE = 180.0
"""Seconds until the locks of a lost node are given up by the filesystem, at most."""

RETRIES = 5
"""Times that a part may lose its node."""


def merge_spread(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    out: str | os.PathLike[str],
    *,
    parts: int | None = None,
    address: str | None = None,
    num_cpus: float | None = None,
    num_gpus: float = 0,
    strict: bool = False,
    allow_missing: bool = False,
    **how: Any,
) -> Report:
    """Merges on the nodes of a Ray cluster.

    Args:
        recipe: as of :func:`fastmerge.merge`.
        out: the directory, by a path that all nodes know.
        parts: how many; None for one per node.
        address: of the cluster; None for the environment's, or a Ray that is started here.
        num_cpus: what each part takes of a node; None for all of the smallest node, so that each has one part.
        num_gpus: likewise.
        strict: as of :func:`fastmerge.plan`.
        allow_missing: likewise.
        how: as of :func:`fastmerge.merge`; ``memory`` is that of each node.

    Raises:
        BackendUnavailable: there is no Ray.
        FastMergeError: of any part; what others did is kept, and the same call goes on.
    """
    ray_module()
    loaded = Recipe.load(recipe, strict=strict)
    if allow_missing:
        loaded = loaded.having(missing="merge")
    names = ("seed", "shard_size", "layout")
    plan(loaded, strict=strict, **{name: how[name] for name in names if name in how})  # every problem, before anything
    ray = connect(address)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cpus = num_cpus if num_cpus is not None else max(1, min(int(n["Resources"].get("CPU", 1)) for n in nodes))
    count = parts or len(nodes)
    how["out"] = os.path.abspath(out)  # noqa: PTH100  not resolved: other machines may know other paths
    task = ray.remote(_part).options(
        num_cpus=cpus, num_gpus=num_gpus, max_retries=RETRIES, retry_exceptions=False, scheduling_strategy="SPREAD"
    )
    text = loaded.to_yaml(absolute(loaded))
    said = ray.get([task.remote(text, (number, count), how) for number in range(1, count + 1)])
    problems = [entry for entry in said if entry is not None]
    if problems:
        kind, first = problems[0]
        raise getattr(errors, kind, FastMergeError)(first)
    # Whichever part was last has published; where it could not know that it was, this does.
    return merge(text, part=(1, count), **{**how, "device": "cpu", "backend": None})


def _part(text: str, part: tuple[int, int], how: dict[str, Any]) -> tuple[str, str] | None:
    """Writes one part; what is wrong, where something is: errors of ours need not be known to Ray."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            merge(text, part=part, **how)
        except OutputError as error:
            if "already running" not in str(error) or time.monotonic() > until:
                return type(error).__name__, str(error)
            time.sleep(1)
        except FastMergeError as error:
            return type(error).__name__, str(error)
        else:
            return None
