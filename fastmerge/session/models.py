"""The models of a session: opened as a merge opens them, and read into memory once, of this machine or of its GPUs."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.checkpoint import Checkpoint, Files, ShardFile, TensorInfo
from fastmerge.dtypes import BY_NAME
from fastmerge.errors import BudgetError, CheckpointError, FastMergeError, RecipeError, ShapeError
from fastmerge.ops.sources import Memory
from fastmerge.recipe.refs import ModelRef, model_ref
from fastmerge.runtime.devices import Buffer, cores
from fastmerge.runtime.workers import each
from fastmerge.session.homes import Homes, flat
from fastmerge.sizes import PROCESS, available, show_bytes
from fastmerge.tensors import check, extent

if TYPE_CHECKING:
    import torch

    from fastmerge.recipe import Recipe

READ = 16 << 20
"""Bytes that a thread reads at a time."""

Place = tuple[Path, tuple[int, ...], str]
"""A tensor of a file: the file, by path and identity, and the name in it."""


class Models:
    """Models in the memory of this machine, or of its GPUs.

    Files are read into memory of the session's own: a mapped file could be cut short by another process, which would
    end this one, and its pages are small. Tensors that a caller hands over stay where they are; a session on GPUs
    copies those that are on the CPU.

    Args:
        models: references (as recipes write them), or models by the names that recipes use: references, state
            dictionaries or modules.
        homes: the GPUs that they are brought to; None for the memory of this machine.

    Attributes:
        homes: as given.
        checkpoints: by the names that recipes use.
        places: where each tensor is.
        borrowed: the caller's tensors.

    Raises:
        RecipeError: for something that is no model, or an adapter by itself.
        CheckpointError, ShapeError: where models are damaged or tensors cannot be merged; all problems at once.
        BudgetError: where the memory that is free does not hold the files.
    """

    def __init__(self, models: Mapping[str, Any] | Sequence[Any], homes: Homes | None = None) -> None:
        self.homes = homes
        self.checkpoints: dict[str, Checkpoint] = {}
        self.places: dict[Place, Memory] = {}
        self.borrowed: list[torch.Tensor] = []
        self._lenders: dict[Place, torch.Tensor] = {}
        self._buffers: list[Buffer] = []
        self._paths: dict[str, str] = {}
        problems: list[str] = []
        kind: type[FastMergeError] = RecipeError
        for name, model in _named(models):
            try:
                self._open(name, model)
            except (RecipeError, CheckpointError) as error:
                problems += error.problems
                kind = type(error)
        if problems:
            raise kind(problems)
        if not self.checkpoints:
            raise RecipeError("models: expected at least one, got none")
        self._read()
        lenders = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in self._lenders.values()]
        held = [(m.address, m.address + m.dtype.nbytes(math.prod(m.shape))) for m in self.places.values()]
        ranges = sorted([*held, *lenders])
        self._starts = [start for start, _ in ranges]
        self._ends = [*itertools.accumulate((end for _, end in ranges), max)]

    def _open(self, name: str, model: Any) -> None:
        if isinstance(model, str | os.PathLike | ModelRef):
            try:
                ref = model_ref(model)
            except ValueError as error:
                raise RecipeError(f"models: {error}") from None
            base = ref.bare
            if name != str(ref):
                if ref.lora is not None:
                    raise RecipeError(
                        f"model {name!r}: expected a model without an adapter; recipes write 'name+adapter'"
                    )
                self.checkpoints[name] = Checkpoint.open(ref.path, revision=ref.revision)
                return
            for adapter in ref.adapters:
                from fastmerge.checkpoint.adapter import Adapter

                Adapter.open(adapter.path, revision=adapter.revision)
            if str(base) not in self.checkpoints:
                self.checkpoints[str(base)] = Checkpoint.open(base.path, revision=base.revision)
                self._paths[os.path.realpath(base.path)] = str(base)
            return
        config: Any = getattr(model, "config", None)
        state = model.state_dict() if hasattr(model, "state_dict") else model
        if not isinstance(state, Mapping):
            raise RecipeError(
                f"model {name!r}: expected a path, a hub id, a state dictionary or a module, got {type(model).__name__}"
            )
        settings = config.to_dict() if hasattr(config, "to_dict") else {}
        self.checkpoints[name] = self._lent(name, state, settings)

    def _lent(self, name: str, state: Mapping[str, Any], config: Mapping[str, Any]) -> Checkpoint:
        """A caller's tensors as a checkpoint in no file, where names of one tensor are known to be alike."""
        path = Path(f"{name} (in memory)")
        tensors: dict[str, TensorInfo] = {}
        alike: dict[str, str] = {}
        lent: dict[str, Memory] = {}
        lenders: dict[str, torch.Tensor] = {}
        first: dict[tuple[object, ...], str] = {}
        problems: list[str] = []
        for key, tensor in state.items():
            try:
                check(f"model {name!r}: {key}", tensor)
            except ShapeError as error:
                problems += error.problems
                continue
            dtype = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
            home = None if self.homes is None else self.homes.of_tensor(tensor)
            if dtype is None or (tensor.device.type != "cpu" and home is None):
                where = "the CPU" if self.homes is None else "the CPU or a GPU of the session"
                problems.append(
                    f"model {name!r}: {key}: expected a tensor on {where} of a type that files hold, "
                    f"got {tensor.dtype} on {tensor.device}"
                )
                continue
            held = tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()
            shape = tuple(tensor.shape)
            alike[key] = first.setdefault((extent(tensor), shape, tensor.stride(), dtype), key) if held.numel() else key
            tensors[key] = TensorInfo(key, dtype, shape, 0, 0, dtype.nbytes(held.numel()))
            self.borrowed.append(held)
            if alike[key] != key:
                lent[key] = lent[alike[key]]
            elif self.homes is None:
                lent[key] = Memory(held.data_ptr(), dtype, shape)
            else:
                place = self.homes.place(key, home)
                keep = self.homes.bring if home is None else self.homes.keep
                lent[key] = keep(held, dtype, shape, place if home is None else home)
            lenders[key] = held
        if problems:
            raise ShapeError(problems)
        text = json.dumps([[i.name, i.dtype.name, i.shape] for i in tensors.values()])
        file = ShardFile(path, 0, (0, 0, 0, 0), hashlib.sha256(text.encode()).hexdigest(), {})
        self.places |= {(path, file.identity, key): memory for key, memory in lent.items()}
        self._lenders |= {(path, file.identity, key): tensor for key, tensor in lenders.items()}
        return Checkpoint(name, path, (file,), tensors, config, alike=alike)

    def _read(self) -> None:
        """Brings every file to memory, each once."""
        files: dict[Path, tuple[Checkpoint, int, list[TensorInfo]]] = {}
        opened = [c for c in self.checkpoints.values() if c.alike is None]
        for checkpoint in opened:
            mine: list[list[TensorInfo]] = [[] for _ in checkpoint.files]
            for info in checkpoint.tensors.values():
                mine[info.file].append(info)
            for i, (file, infos) in enumerate(zip(checkpoint.files, mine, strict=True)):
                if infos:
                    files.setdefault(file.path, (checkpoint, i, infos))
        starts = {path: min(info.offset for info in infos) for path, (_, _, infos) in files.items()}
        sizes = {path: c.files[i].size - starts[path] for path, (c, i, _) in files.items()}
        total = sum(sizes.values())
        where, free = "free memory", available() - PROCESS
        if self.homes is not None and total <= (free := self.homes.free()):
            total, free = max(sizes.values(), default=0), available() - PROCESS  # one file at a time goes through it
        elif self.homes is not None:
            where = "free memory of the GPUs"
        if total > free:
            raise BudgetError(
                f"models: {show_bytes(total)} of weights do not fit the {show_bytes(max(free, 0))} of {where}"
            )
        rows: list[tuple[int, int, int, int]] = []
        with Files(opened) as source:
            for path, (checkpoint, i, infos) in files.items():
                start, size = starts[path], checkpoint.files[i].size
                buffer = Buffer.allocate(size - start)
                fd = source.fd(opened.index(checkpoint), i)
                rows += [(fd, at, buffer.address + at - start, min(READ, size - at)) for at in range(start, size, READ)]
                there = [Memory(buffer.address + info.offset - start, info.dtype, info.shape) for info in infos]
                if self.homes is None:
                    self._buffers.append(buffer)
                else:
                    _bring(source, rows)
                    rows = []
                    there = [self._moved(m, info.name, self.homes) for m, info in zip(there, infos, strict=True)]
                self.places |= {place_of(checkpoint, info): m for info, m in zip(infos, there, strict=True)}
            _bring(source, rows)
        for checkpoint in opened:
            checkpoint.recheck()

    @staticmethod
    def _moved(memory: Memory, name: str, homes: Homes) -> Memory:
        """A tensor of the host on its GPU."""
        return homes.bring(flat(memory, "cpu"), memory.dtype, memory.shape, homes.place(name))

    def readable(self, place: Place) -> Memory | None:
        """A caller's tensor where the host reads it; None for one that a file has."""
        tensor = self._lenders.get(place)
        if tensor is None:
            return None
        if tensor.device.type != "cpu":
            tensor = self._lenders[place] = tensor.cpu()
        known = self.places[place]
        return Memory(tensor.data_ptr(), known.dtype, known.shape)

    def keep(self, nbytes: int) -> int:
        """Memory that lives as long as the session; its address."""
        self._buffers.append(Buffer.allocate(nbytes))
        return self._buffers[-1].address

    def of(self, recipe: Recipe) -> dict[str, Checkpoint]:
        """The models of a recipe, as the planner takes them.

        Raises:
            RecipeError: where it names models that the session does not hold.
        """
        given = dict(self.checkpoints)
        stages = {name for name, _ in recipe.stages}
        unknown = []
        for ref in dict.fromkeys(r for _, one in (*recipe.stages, ("", recipe)) for r in one.refs):
            base = str(ref.bare)
            if base in given or base in stages:
                continue
            same = self._paths.get(os.path.realpath(ref.path))
            if same is None:
                unknown.append(base)
            else:
                given[base] = self.checkpoints[same]
        if unknown:
            held = ", ".join(map(repr, self.checkpoints))
            raise RecipeError([f"{name!r} is none of the session's models; expected one of {held}" for name in unknown])
        return given

    def lent(self, start: int, end: int) -> bool:
        """Whether a range of addresses has bytes of a model in it."""
        i = bisect.bisect_left(self._starts, end)
        return i > 0 and self._ends[i - 1] > start

    def close(self) -> None:
        """Gives the memory back."""
        for owned in (self.checkpoints, self.places, self.borrowed, self._lenders, self._buffers):
            owned.clear()
        if self.homes is not None:
            self.homes.close()


def place_of(checkpoint: Checkpoint, info: TensorInfo) -> Place:
    """The key of a tensor in :attr:`Models.places`."""
    file = checkpoint.files[info.file]
    return file.path, file.identity, info.name


def _named(models: Mapping[str, Any] | Sequence[Any]) -> list[tuple[str, Any]]:
    """Pairs of the name that recipes use, and the model."""
    if isinstance(models, Mapping):
        return [(str(name), model) for name, model in models.items()]
    if isinstance(models, str | os.PathLike) or not isinstance(models, Sequence):
        raise RecipeError(f"models: expected a list of references or a mapping of names to models, got {models!r:.80}")
    wrong = [type(m).__name__ for m in models if not isinstance(m, str | os.PathLike | ModelRef)]
    if wrong:
        raise RecipeError(
            f"models: expected references, got {wrong[0]}; name state dictionaries and modules in a mapping"
        )
    return [(_written(model), model) for model in models]


def _written(model: Any) -> str:
    try:
        return str(model_ref(model))
    except ValueError:
        return ""  # refused where it is opened


def _bring(source: Files, rows: list[tuple[int, int, int, int]]) -> None:
    """Reads rows (file, offset, address, bytes), on as many threads as there are cores."""
    if rows:
        each(lambda row: source.read(np.array([row], np.int64)), rows, threads=cores(), name="read")
