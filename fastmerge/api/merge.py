"""One merge from disk to disk: recipe, plan, schedule, stream, commit."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from fastmerge import planning
from fastmerge.backends.choose import choose, device_for
from fastmerge.errors import BudgetError, OutputError, RecipeError
from fastmerge.planning import Plan
from fastmerge.recipe import Recipe
from fastmerge.recipe.schema import Layout
from fastmerge.runtime.budget import SPARE
from fastmerge.runtime.placement import Budget, Placement, place, smaller
from fastmerge.sizes import default_memory, parse_bytes
from fastmerge.version import __version__

if TYPE_CHECKING:
    import torch

    from fastmerge.backends.choose import Backend
    from fastmerge.checkpoint import Writer
    from fastmerge.checkpoint.parts import Part
    from fastmerge.ops.spec import Op
    from fastmerge.report import Report
    from fastmerge.runtime.finite import NanPolicy, NonFinite
    from fastmerge.runtime.stream import Stats

    Progress = Callable[[Stats], None]

log = logging.getLogger("fastmerge")


def plan(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    *,
    seed: int | None = None,
    shard_size: str | float = "5GB",
    strict: bool = False,
    allow_missing: bool = False,
    layout: Layout | None = None,
) -> Plan:
    """Plans a merge: reads the recipe and the models' headers, no weights.

    Args:
        recipe: a file, YAML text, a mapping, or a :class:`Recipe`.
        seed: of the random methods; None takes the recipe's own, else 0.
        shard_size: largest output file, in bytes.
        strict: refuse what is otherwise warned of in the recipe: keys and parameters that nothing reads.
        allow_missing: merge a tensor that some models lack from the others, as ``missing: merge`` in the recipe.
        layout: of experts in the output, as ``layout`` in the recipe: ``base`` (as the base has them),
            ``per-expert`` (tensors of its own for each) or ``fused`` (stacks of all).

    Raises:
        RecipeError, CheckpointError: with every problem that was found.
    """
    loaded = Recipe.load(recipe, strict=strict)
    if allow_missing:
        loaded = loaded.having(missing="merge")
    if layout is not None:
        if layout not in get_args(Layout):
            raise RecipeError(f"layout: expected one of {', '.join(get_args(Layout))}; got {layout!r}")
        loaded = loaded.having(layout=layout)
    return planning.plan(loaded, seed=seed, shard_size=parse_bytes(shard_size), strict=strict)


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
    strict: bool = False,
    allow_missing: bool = False,
    layout: Layout | None = None,
    nan: NanPolicy = "warn",
    part: str | tuple[int, int] | None = None,
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
        strict: as of :func:`plan`; a plan has its own.
        allow_missing: as of :func:`plan`; a plan has its own.
        layout: likewise.
        nan: ``warn``, ``error`` or ``zero`` for NaN and Inf that come from the inputs. Tensors that are copied
            byte for byte are looked at for ``error`` and ``zero`` only.
        part: ``"3/8"``: write only the third of eight parts of the output, while other processes, perhaps on other
            machines with the same filesystem, write theirs. What is left of the same part is continued. The process
            that finds all parts done publishes the output; ``resume`` without a part does so too, and writes what
            is missing.
        progress: from the plan, a context that gives what is called about every 50 ms with the running statistics.

    Returns:
        Bytes, seconds and everything noticed; also written to ``merge_report.json``.

    Raises:
        FastMergeError: a subclass that says what is wrong; the target is untouched, and work that was done
            is kept for ``resume``.
    """
    from fastmerge.checkpoint.content import inputs
    from fastmerge.checkpoint.parts import Part
    from fastmerge.checkpoint.past import in_cache
    from fastmerge.runtime.making import host

    mine = Part.read(part) if part is not None else None
    if nan not in ("warn", "error", "zero"):
        raise RecipeError(f"nan: expected warn, error or zero; got {nan!r}")
    started = time.perf_counter()
    if isinstance(recipe, Plan):
        planned = recipe
    else:
        planned = plan(
            recipe, seed=seed, shard_size=shard_size, strict=strict, allow_missing=allow_missing, layout=layout
        )
    if nan != "warn":
        planned = _look_at_copies(planned, nan)
    # What a later --resume must find unchanged; of headers and times alone a replaced file can have the same.
    planned = replace(planned, fingerprint=f"{planned.fingerprint}-{inputs(planned.checkpoints, planned.carry)}")
    chosen = choose(device_for(str(device), planned.ops, backend), backend)
    chosen.check(planned.ops)
    host(chosen).check(_made(planned))
    budget = Budget(
        max(0, (parse_bytes(memory) if memory is not None else default_memory()) - _tables(planned)),
        parse_bytes(max_vram) if max_vram is not None else None,
    )
    for text in planned.warnings:
        log.warning("%s", text)
    warm = in_cache({file.path for checkpoint in planned.checkpoints for file in checkpoint.files})
    run = _Run(planned, out, chosen, budget, warm=warm, overwrite=overwrite, nan=nan, progress=progress)
    report = run.whole(resume=resume) if mine is None else run.part(mine, resume=resume)
    return replace(report, seconds=time.perf_counter() - started)


@dataclass
class _Run:
    """A planned merge and how it is to be done."""

    planned: Plan
    out: str | os.PathLike[str]
    chosen: Backend
    budget: Budget
    warm: bool
    overwrite: bool
    nan: NanPolicy
    progress: Callable[[Plan], AbstractContextManager[Progress]] | None

    def whole(self, *, resume: bool) -> Report:
        """All of it, or what an interrupted run and finished parts left of it."""
        from fastmerge.checkpoint import Writer

        return self._placed(self.planned, lambda again: Writer(**self._how(resume=resume or again)))

    def part(self, part: Part, *, resume: bool) -> Report:
        """One part; and all, where no other part is left."""
        from fastmerge.checkpoint.part_writer import PartWriter
        from fastmerge.planning.parts import share

        mine = share(self.planned.ops, part)
        made: list[PartWriter] = []

        def open_part(_: bool) -> PartWriter:
            made[:] = [PartWriter(**self._how(resume=resume), part=part, mine=mine.ranges)]
            return made[0]

        report = self._placed(replace(self.planned, ops=mine.ops), open_part)
        if made[0].finished or not made[0].all_done():
            return report
        try:
            return self.whole(resume=True)
        except OutputError as error:
            # Another part has just ended as well and publishes, or one that was done is run again.
            if "already running" not in str(error):
                raise
            return report

    def _how(self, *, resume: bool) -> dict[str, Any]:
        return {
            "out": self.out,
            "layout": self.planned.layout,
            "fingerprint": self.planned.fingerprint,
            "resume": resume,
            "overwrite": self.overwrite,
            "inputs": [c.path for c in self.planned.checkpoints],
        }

    def _placed(self, planned: Plan, opened: Callable[[bool], Writer]) -> Report:
        """Runs what is planned on what is chosen, with less memory where there is less than was thought."""
        from fastmerge.report import Report

        started, again = time.perf_counter(), False
        while True:
            try:
                with place(planned.ops, self.chosen, self.budget, warm=self.warm) as placed:
                    # After the budgets were found to do: a new run discards what an interrupted one left.
                    writer = opened(again)
                    if writer.finished:
                        return Report.load(writer.target)
                    if writer.said is not None:
                        writer.abort()
                        return Report.of(writer.said)
                    again = True
                    with writer:
                        return _merge(planned, str(self.out), placed, writer, started, self.nan, self.progress)
            except BudgetError as error:
                self.chosen, self.budget = smaller(self.chosen, self.budget, error)
                error.__traceback__ = None  # its frames hold a slot
                if self.budget.halved:
                    log.warning("%s; going on with half of that", error)


def _tables(planned: Plan) -> int:
    """Bytes of the tables of headers and ops that count against the budget: all, where they are more than the spare.

    Estimates, measured with CPython 3.11; models of one family share the tables of equal headers.
    """
    tables = (len(planned.ops) + 2 * sum(len(p.ops) for _, p in planned.documents)) * 900
    shared: set[int] = set()
    for checkpoint in planned.checkpoints:
        first = id(next(iter(checkpoint.tensors.values()), None))
        tables += len(checkpoint.tensors) * (160 if first in shared else 340)
        shared.add(first)
    return tables if tables > SPARE else 0


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
    from fastmerge.checkpoint.part_writer import PartWriter
    from fastmerge.runtime.finite import NonFinite
    from fastmerge.runtime.losses import Losses
    from fastmerge.runtime.making import host
    from fastmerge.runtime.results import Results
    from fastmerge.runtime.stores import OpStore
    from fastmerge.runtime.workers import Runner

    with Files(planned.checkpoints) as files:
        finite = NonFinite(nan)
        results = Results(host(placed.chosen), planned.ops, nan)
        losses = Losses()
        store = OpStore(planned.ops, files, writer, finite, placed.room, results, losses, placed.chosen.coded)
        program = placed.chosen.program
        runner = Runner(planned.ops, placed.jobs, store, placed.workers, program, slot=placed.slot)
        with progress(planned) if progress else nullcontext() as tick:
            stats = runner.run(progress=tick)
        for checkpoint in planned.checkpoints:
            checkpoint.recheck()
    if writer.resumed:
        stats.notes.append("resumed: NaN and Inf were counted in this run's part only; fastmerge verify counts all")
    report = _report(planned, out, started, stats, placed, finite, losses.facts())
    if isinstance(writer, PartWriter):
        report = replace(report, bytes_written=min(report.bytes_written, writer.nbytes))
        writer.finish(report.to_json())
        return report
    report = report.joined(writer.parts)
    _extras(planned, writer, report)
    writer.commit()
    return report


def _made(planned: Plan) -> list[Op]:
    """The ops of stages."""
    return [op for name, stage in planned.documents if name for op in stage.ops]


def _look_at_copies(planned: Plan, nan: str) -> Plan:
    """Sends tensors that would be copied through a kernel, so that the policy sees their NaN and Inf."""
    from fastmerge.methods.passthrough import Passthrough
    from fastmerge.ops.spec import Spec

    if planned.documents:
        from fastmerge.planning.stages import join

        every = tuple([(name, _look_at_copies(document, nan)) for name, document in planned.documents])
        return replace(planned, ops=join(every)[0], documents=every, fingerprint=f"{planned.fingerprint}-{nan}")
    specs: dict[Spec, Spec] = {}
    ops = []
    for op in planned.ops:
        spec = op.spec
        if spec.grain == "copy" and spec.out_dtype.mergeable:
            if spec not in specs:
                specs[spec] = Spec(Passthrough(scale=(None,)), spec.shape, spec.dtypes[:1], spec.out_dtype)
            ops.append(op._replace(spec=specs[spec], inputs=op.inputs[:1]))
        else:
            ops.append(op)
    return replace(planned, ops=tuple(ops), fingerprint=f"{planned.fingerprint}-{nan}")


def _report(
    planned: Plan,
    out: str,
    started: float,
    stats: Stats,
    placed: Placement,
    finite: NonFinite,
    lost: Mapping[str, Any],
) -> Report:
    from fastmerge.report import Report

    warnings = [*planned.warnings, *stats.notes]
    for name, count in sorted(finite.found.items()):
        warnings.append(f"{name}: {count} NaN or Inf values, from the inputs")
    for text in warnings[len(planned.warnings) :]:
        log.warning("%s", text)
    if lost:
        log.info(
            "quantised %d tensors: relative error %.3g, at most %.3g (%s)",
            lost["tensors"],
            lost["relative_error"],
            lost["worst"]["relative_error"],
            lost["worst"]["tensor"],
        )
    return Report(
        out=out,
        seconds=time.perf_counter() - started,
        bytes_read=round(stats.bytes_read),
        bytes_written=round(stats.bytes_written),
        stages={"read": stats.read, "compute": stats.compute, "write": stats.write},
        bottleneck=stats.bottleneck,
        tensors=len(planned.ops),
        fingerprint=planned.fingerprint,
        devices=tuple(d.name for d in placed.workers),
        backend=placed.chosen.name,
        nonfinite=dict(finite.found),
        warnings=tuple(warnings),
        account={"counts": planned.account.counts(), "dropped": planned.account.names()},
        details={
            "fastmerge": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seed": planned.seed,
            "recipe": planned.recipe.to_yaml(),
            **({"quantised": lost} if lost else {}),
            "inputs": [{"ref": c.ref, "path": str(c.path), "identity": c.identity} for c in planned.checkpoints],
        },
    )


def _extras(planned: Plan, writer: Writer, report: Report) -> None:
    """Everything in the output directory that is not weights."""
    from fastmerge.report.card import card
    from fastmerge.report.names import Names

    if planned.config:
        writer.add("config.json", (json.dumps(planned.config, indent=2) + "\n").encode())
    for name, path in planned.carry:
        writer.add(name, path)
    if planned.card:
        recipe = cast("Recipe", planned.recipe)
        every = [(cast("Recipe", plan.recipe), plan.checkpoints) for _, plan in planned.documents]
        names = Names(recipe, every or [(recipe, planned.checkpoints)])
        text = names.to_yaml()
        writer.add("mergekit_config.yml", text.encode())
        method = next((op.spec.method for op in planned.ops if op.spec.grain != "copy"), None)
        name, formula, paper = (method.name, method.formula, method.paper) if method else ("passthrough", "copy", "")
        title = Path(report.out).name
        writer.add("README.md", card(title, name, formula, paper, names.shown, text, names.licences).encode())
    writer.sync()
    checksums = [list(c) for c in writer.checksums()]
    facts = {"features": writer.features, "checksums": checksums, "files": writer.files()}
    full = replace(report, details={**report.details, **facts})
    writer.add("merge_report.json", full.to_json().encode())
