"""One merge from disk to disk: recipe, plan, schedule, stream, commit."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge import planning
from fastmerge.backends.choose import choose, device_for, program_factory
from fastmerge.errors import BudgetError, RecipeError
from fastmerge.planning import Plan
from fastmerge.recipe import Recipe
from fastmerge.runtime.devices.cuda import OutOfMemory
from fastmerge.runtime.placement import Placement, place, without_gpus
from fastmerge.sizes import default_memory, parse_bytes
from fastmerge.version import __version__

if TYPE_CHECKING:
    import torch

    from fastmerge.checkpoint import Writer
    from fastmerge.report import Report
    from fastmerge.runtime.stores import Finite, NanPolicy
    from fastmerge.runtime.stream import Stats

    Progress = Callable[[Stats], None]

log = logging.getLogger("fastmerge")


def plan(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    *,
    seed: int | None = None,
    shard_size: str | float = "5GB",
) -> Plan:
    """Plans a merge: reads the recipe and the models' headers, no weights.

    Args:
        recipe: a file, YAML text, a mapping, or a :class:`Recipe`.
        seed: of the random methods; None takes the recipe's own, else 0.
        shard_size: largest output file, in bytes.

    Raises:
        RecipeError, CheckpointError: with every problem that was found.
    """
    loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    return planning.plan(loaded, seed=seed, shard_size=parse_bytes(shard_size))


def merge(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe | Plan,
    out: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    memory: str | float | None = None,
    max_vram: str | float | None = None,
    seed: int | None = None,
    backend: str | None = None,
    shard_size: str | float = "5GB",
    resume: bool = False,
    overwrite: bool = False,
    nan: NanPolicy = "warn",
    progress: Callable[[Plan], AbstractContextManager[Progress]] | None = None,
) -> Report:
    """Merges checkpoints into a new directory, which appears complete or not at all.

    Args:
        recipe: a file, YAML text, a mapping, a :class:`Recipe` or a :class:`Plan`.
        out: the directory to create.
        device: ``auto`` (all GPUs that can be used, else the CPU), ``cpu``, ``cuda`` or ``cuda:0,cuda:1``.
        memory: budget in bytes (``"8GB"``); peak memory stays below it plus 300 MB (and a GPU's context).
        max_vram: bytes for the slots of each GPU; None for a third of what is free. Where kernels run out of memory
            beside them it is halved, with a warning, and the merge goes on from its journal.
        seed: of the random methods; None takes the recipe's own, else 0.
        backend: ``native``, ``triton``, ``reference`` or None for the best one.
        shard_size: largest output file, in bytes.
        resume: continue an interrupted merge of the same recipe and inputs.
        overwrite: replace an existing output, atomically.
        nan: ``warn``, ``error`` or ``zero`` for NaN and Inf that come from the inputs. Tensors that are copied
            byte for byte are looked at for ``error`` and ``zero`` only.
        progress: from the plan, a context that gives what is called about every 50 ms with the running statistics.

    Returns:
        Bytes, seconds and everything noticed; also written to ``merge_report.json``.

    Raises:
        FastMergeError: a subclass that says what is wrong; the target is untouched, and work that was done
            is kept for ``resume``.
    """
    from fastmerge.checkpoint import Writer
    from fastmerge.report import Report

    if nan not in ("warn", "error", "zero"):
        raise RecipeError(f"nan: expected warn, error or zero; got {nan!r}")
    started = time.perf_counter()
    planned = recipe if isinstance(recipe, Plan) else plan(recipe, seed=seed, shard_size=shard_size)
    if nan != "warn":
        planned = _look_at_copies(planned, nan)
    chosen = choose(device_for(str(device), planned.outputs, backend), backend)
    budget = parse_bytes(memory) if memory is not None else default_memory()
    vram = parse_bytes(max_vram) if max_vram is not None else None
    for text in planned.warnings:
        log.warning("%s", text)
    short = ""
    while True:
        try:
            with place(planned.outputs, chosen, memory=budget, max_vram=vram) as placed:
                # After the budgets were found to do: a new run discards what an interrupted one left.
                writer = Writer(
                    Path(out),
                    planned.layout,
                    fingerprint=planned.fingerprint,
                    resume=resume or bool(short),
                    overwrite=overwrite,
                    inputs=[c.path for c in planned.checkpoints],
                )
                if writer.finished:
                    return Report.load(writer.target)
                with writer:
                    report = _merge(planned, str(out), placed, writer, started, nan, progress)
            return replace(report, seconds=time.perf_counter() - started)
        except OutOfMemory as error:
            short, chosen, vram = str(error), placed.chosen, error.nbytes // 2
            error.__traceback__ = None  # its frames hold a slot
            log.warning("%s; going on with half of that", short)
        except BudgetError as error:
            if not short:
                raise
            short = f"{short}, and less does not do ({error})"
            other = without_gpus(chosen, short)
            if other is None:
                raise BudgetError(f"{short}; continue with --resume, there or on another --device") from None
            chosen = other


def _merge(
    planned: Plan,
    out: str,
    placed: Placement,
    writer: Writer,
    started: float,
    nan: NanPolicy,
    progress: Callable[[Plan], AbstractContextManager[Progress]] | None,
) -> Report:
    """Runs what is planned and placed, and publishes it."""
    from fastmerge.checkpoint import Files
    from fastmerge.runtime.stores import FileStore, Finite
    from fastmerge.runtime.stream import Runner

    with Files(planned.checkpoints) as files:
        finite = Finite(nan)
        store = FileStore(planned, files, writer, finite)
        runner = Runner(planned.outputs, placed.work, store, placed.workers, program_factory(placed.chosen))
        with progress(planned) if progress else nullcontext() as tick:
            stats = runner.run(progress=tick)
        for checkpoint in planned.checkpoints:
            checkpoint.recheck()
    if writer.resumed:
        stats.notes.append("resumed: NaN and Inf were counted in this run's part only; fastmerge verify counts all")
    report = _report(planned, out, started, stats, placed, finite)
    _extras(planned, writer, report)
    writer.commit()
    return report


def _look_at_copies(planned: Plan, nan: str) -> Plan:
    """Sends tensors that would be copied through a kernel, so that the policy sees their NaN and Inf."""
    from fastmerge.methods.passthrough import Passthrough
    from fastmerge.methods.resolve import make_group

    outputs = tuple(
        o._replace(method=Passthrough, group=make_group(Passthrough, o.name, o.shape, [o.dtype], has_base=False))
        if o.method is None and o.dtype.mergeable
        else o
        for o in planned.outputs
    )
    return replace(planned, outputs=outputs, fingerprint=f"{planned.fingerprint}-{nan}")


def _report(planned: Plan, out: str, started: float, stats: Stats, placed: Placement, finite: Finite) -> Report:
    from fastmerge.report import Report

    warnings = [*planned.warnings, *stats.notes]
    for name, count in sorted(finite.found.items()):
        warnings.append(f"{name}: {count} NaN or Inf values, from the inputs")
    for text in warnings[len(planned.warnings) :]:
        log.warning("%s", text)
    return Report(
        out=out,
        seconds=time.perf_counter() - started,
        bytes_read=int(stats.bytes_read),
        bytes_written=int(stats.bytes_written),
        stages={"read": stats.read, "compute": stats.compute, "write": stats.write},
        bottleneck=stats.bottleneck,
        tensors=len(planned.outputs),
        fingerprint=planned.fingerprint,
        devices=tuple(d.name for d in placed.workers),
        backend=placed.chosen.name,
        nonfinite=dict(finite.found),
        warnings=tuple(warnings),
        details={
            "fastmerge": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seed": planned.seed,
            "recipe": planned.recipe.to_yaml(),
            "inputs": [{"ref": c.ref, "path": str(c.path), "identity": c.identity} for c in planned.checkpoints],
        },
    )


def _extras(planned: Plan, writer: Writer, report: Report) -> None:
    """Everything in the output directory that is not weights."""
    from fastmerge.recipe.dump import dump
    from fastmerge.report.card import card
    from fastmerge.report.names import Names

    if planned.config:
        writer.add("config.json", (json.dumps(planned.config, indent=2) + "\n").encode())
    for name, path in planned.carry:
        writer.add(name, path)
    names = Names(planned.recipe, planned.checkpoints)
    text = dump(names.plain())
    writer.add("mergekit_config.yml", text.encode())
    method = next((o.method for o in planned.outputs if o.method is not None), None)
    name, formula, paper = (method.name, method.formula, method.paper) if method else ("passthrough", "copy", "")
    writer.add("README.md", card(Path(report.out).name, name, formula, paper, names.shown, text).encode())
    writer.sync()
    checksums = [list(c) for c in writer.checksums()]
    full = replace(report, details={**report.details, "features": writer.features, "checksums": checksums})
    writer.add("merge_report.json", full.to_json().encode())
