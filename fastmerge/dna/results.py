"""From a draft to a model: a directory, a state dictionary, or a transformers module. The ops are the same."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint import Checkpoint, Layout, Place, layout
from fastmerge.dna.draft import Draft
from fastmerge.dna.parent import Parent, checkpoints
from fastmerge.errors import CheckpointError
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Target
from fastmerge.planning import ENGINE, carry
from fastmerge.planning.config_json import canonical
from fastmerge.planning.plan import Plan
from fastmerge.sizes import parse_bytes
from fastmerge.version import __version__

if TYPE_CHECKING:
    import torch

    from fastmerge.report import Report
    from fastmerge.runtime.stream import Stats

    Progress = Callable[[Plan], AbstractContextManager[Callable[[Stats], None]]]

log = logging.getLogger("fastmerge")

REPORT = "fastmerge_report.json"
"""The file beside config.json that says what was asked for and what became of it."""


def plan(draft: Draft, *, shard_size: str | float = "5GB") -> Plan:
    """The plan that writes a draft to a directory.

    Raises:
        CheckpointError: the draft is not whole, or a parent is in memory.
    """
    draft.check()
    absent = [p.ref for p in draft.parents if p.checkpoint is None]
    if absent:
        raise CheckpointError(f"{absent[0]} is in memory: expected models on disk, to write from disk to disk")
    models = checkpoints(draft.parents)
    donor = models[0]
    text = draft.request.canonical([c.identity for c in models], draft.seed)
    metadata = {"format": "pt", "fastmerge": ENGINE, "fastmerge_recipe": text}
    tensors = [(name, t.dtype, t.shape) for name, t in draft.tensors.items()]
    where = layout(tensors, shard_size=parse_bytes(shard_size), metadata=metadata)
    config = dict(draft.config)
    files, notes = carry.carry(None, donor, donor, models, [], config)
    facts = {"operation": draft.request.operation, "seed": draft.seed, "options": dict(draft.request.options)}
    more: dict[str, Path | bytes] = {REPORT: (json.dumps({**facts, **draft.facts}, indent=2) + "\n").encode()}
    warnings = dict.fromkeys([*[w for c in models for w in c.warnings], *draft.warnings, *notes])
    return Plan(
        recipe=draft.request,
        seed=draft.seed,
        checkpoints=models,
        ops=tuple(sorted(_placed(draft, functools.partial(_place, where, draft)), key=_first)),
        layout=where,
        config=config,
        carry=(*files, *draft.files.items(), *more.items()),
        warnings=tuple(warnings),
        fingerprint=_fingerprint(text, models, where, config, draft),
        card=False,
    )


def write(
    draft: Draft,
    out: str | os.PathLike[str],
    *,
    memory: str | float | None = None,
    shard_size: str | float = "5GB",
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    backend: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Writes a draft from disk to disk, streamed; arguments and guarantees are those of :func:`fastmerge.merge`.

    Raises:
        FastMergeError: as of :func:`fastmerge.merge`.
    """
    from fastmerge.api.merge import merge

    return merge(
        plan(draft, shard_size=shard_size),
        out,
        device=device,
        memory=memory,
        resume=resume,
        overwrite=overwrite,
        backend=backend,
        progress=progress,
    )


def state_dict(draft: Draft, *, backend: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a draft in memory, on the CPU, by their names on disk; none shares memory with another.

    Raises:
        CheckpointError: the draft is not whole.
    """
    import torch

    from fastmerge.api.tensors import run
    from fastmerge.ops.blocks import torch_dtype

    draft.check()
    made = {name: torch.empty(t.shape, dtype=torch_dtype(t.dtype)) for name, t in draft.tensors.items()}
    addresses = {name: t.data_ptr() for name, t in made.items()}

    def place(name: str, first: int, op: Op) -> Target:
        spec = op.spec
        return Memory(addresses[name] + first * spec.out_dtype.size, spec.out_dtype, spec.shape)

    run(list(_placed(draft, place)), torch.device("cpu"), backend, checkpoints(draft.parents))
    return made


def module(draft: Draft, *, backend: str | None = None) -> torch.nn.Module:
    """A transformers module of a draft, in evaluation mode.

    Raises:
        CheckpointError: the draft is not whole, or its tensors are not those that transformers expects.
        BackendUnavailable: transformers is not installed.
    """
    from fastmerge.dna.modules import build

    return build(draft.config, state_dict(draft, backend=backend))


class Made(NamedTuple):
    """A model that was made from a state dictionary.

    Attributes:
        state_dict: its tensors, by their names on disk.
        config: what its config.json says.
    """

    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any]


def deliver(draft: Draft, given: Any, out: str | os.PathLike[str] | None = None, **options: Any) -> Any:
    """A draft in the form in which its (first) model was given.

    Args:
        draft: whole.
        given: that model: a module, a state dictionary, or where one is on disk.
        out: directory to write; needed for models on disk, and for those alone.
        options: of :func:`write`; in memory ``backend`` alone.

    Returns:
        A module for a module (on its device), a :class:`Made` for a state dictionary, a
        :class:`~fastmerge.report.Report` for a model on disk. What was given is not changed, and shares no memory.

    Raises:
        CheckpointError: ``out`` is there for a model in memory, or is not for one on disk.
    """
    check_out(draft.parents[0], out)
    for text in draft.warnings if out is None else ():
        log.warning("%s", text)
    if out is not None:
        return write(draft, out, **options)
    if not hasattr(given, "state_dict"):
        return Made(state_dict(draft, **options), draft.config)
    device = next((p.device for p in given.parameters()), None)
    return module(draft, **options).to(device)


def check_out(parent: Parent, out: str | os.PathLike[str] | None) -> None:
    """Holds that there is a directory to write for a model on disk, and for that alone.

    Raises:
        CheckpointError: it is the other way round.
    """
    on_disk = parent.checkpoint is not None
    if on_disk != (out is not None):
        where = "out: the directory to write" if on_disk else "no out: a model in memory gives one in memory"
        raise CheckpointError(f"{parent.ref}: expected {where}")


def _placed(draft: Draft, place: Callable[[str, int, Op], Target]) -> Sequence[Op]:
    return [op._replace(targets=tuple([place(s.name, s.first, op) for s in slots])) for op, slots in draft.pieces]


def _place(where: Layout, draft: Draft, name: str, first: int, op: Op) -> Place:
    shard, offset, _ = where.places[name]
    size = draft.tensors[name].dtype.size
    return Place(shard, offset + first * size, op.spec.out_dtype.nbytes(op.spec.numel))


def _first(op: Op) -> Any:
    return min(op.targets)  # type: ignore[type-var]


def _fingerprint(text: str, models: Sequence[Checkpoint], where: Layout, config: Any, draft: Draft) -> str:
    """128 bits over everything that decides the directory's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    files = [[[f.header_hash, f.size, f.identity[3]] for f in c.files] for c in models]
    parts = [ENGINE, __version__, text, json.dumps(files), where.digest, canonical(config), canonical(draft.facts)]
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()
