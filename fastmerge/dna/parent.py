"""The model that a request starts from: a directory, a state dictionary or a module, all read the same way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import Checkpoint
from fastmerge.dtypes import BY_NAME
from fastmerge.errors import CheckpointError, ShapeError
from fastmerge.ops.sources import FileRange, Memory
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Parent:
    """A model with its configuration, whose tensors are sources.

    Attributes:
        ref: what it is called in messages and reports.
        config: its ``config.json``; nobody changes it.
        tensors: where each tensor is, by its name on disk. Of tensors that are one (a tied head) there is the first.
        tied: names that are another tensor, with the name of that.
        checkpoint: where it is on disk; None in memory.
        kept: tensors of a model in memory by their names on disk, which live as long as the sources.
    """

    ref: str
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, Source] = field(repr=False)
    tied: Mapping[str, str] = field(default_factory=dict, repr=False)
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, model: Any, *, config: Mapping[str, Any] | None = None, at: int = 0) -> Parent:
        """Takes a model as people have it.

        Args:
            model: a path or hub id, a :class:`~fastmerge.checkpoint.Checkpoint`, a transformers module, or a state
                dictionary with the names that files have.
            config: of a state dictionary: ``config.json`` as a mapping.
            at: position among the plan's checkpoints, of a model on disk.

        Raises:
            CheckpointError: with every problem of the model.
            ShapeError: a tensor in memory is no dense one on the CPU, or there is no configuration.
        """
        if isinstance(model, Parent):
            return model
        if isinstance(model, str | os.PathLike):
            model = Checkpoint.open(model)
        if isinstance(model, Checkpoint):
            if not model.config:
                raise CheckpointError(f"{model.path}: expected a config.json, which says what the tensors are")
            tensors = {name: FileRange(info, at) for name, info in model.tensors.items()}
            return cls(model.ref, model.config, tensors, checkpoint=model)
        if hasattr(model, "state_dict"):
            given = getattr(model, "config", None)
            if config is None and hasattr(given, "to_dict"):
                config = config_of(model)
            state = on_disk(model, dict(model.state_dict()))
            ref = type(model).__name__
        elif isinstance(model, Mapping):
            state, ref = dict(model), "the state dictionary"
        else:
            raise ShapeError(
                f"model: expected a path, a module or a state dictionary, got {type(model).__module__}."
                f"{type(model).__qualname__}"
            )
        if not config:
            raise ShapeError(f"{ref}: expected a configuration, which says what the tensors are (config=...)")
        return cls._in_memory(ref, config, state)

    @classmethod
    def _in_memory(cls, ref: str, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Parent:
        import torch

        tensors: dict[str, Source] = {}
        tied: dict[str, str] = {}
        kept: dict[str, torch.Tensor] = {}
        owners: dict[tuple[object, ...], str] = {}
        # Of a tied pair the embedding comes first, as in files; transformers sorts the names of what it has loaded.
        for name, tensor in sorted(state.items(), key=lambda item: str(item[0]).endswith("lm_head.weight")):
            if not isinstance(name, str):
                raise ShapeError(f"{name!r:.80}: expected the name of a tensor")
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
                raise ShapeError(f"{name}: expected a dense tensor with data, got {type(tensor).__name__}")
            dtype = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
            if dtype is None:
                raise ShapeError(f"{name}: {tensor.dtype} cannot be stored")
            identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            owner = owners.setdefault(identity, name) if tensor.numel() else name
            if owner != name:
                tied[name] = owner
                continue
            here = tensor.detach().to("cpu").contiguous()
            kept[name] = here
            tensors[name] = Memory(here.data_ptr(), dtype, tuple(here.shape))
        return cls(ref, config, tensors, tied, kept=kept)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The model on disk, if it is one."""
        return () if self.checkpoint is None else (self.checkpoint,)


def checkpoints(parents: Iterable[Parent]) -> tuple[Checkpoint, ...]:
    """Those of several parents, in their order: parents on disk are opened with their positions in it."""
    return tuple([c for p in parents for c in p.checkpoints()])


def config_of(model: Any) -> dict[str, Any]:
    """What ``save_pretrained`` of a transformers module would write to config.json."""
    found: dict[str, Any] = model.config.to_dict()
    found["architectures"] = [type(model).__name__]
    for key in ("_name_or_path", "transformers_version"):
        found.pop(key, None)
    dtype = next((p.dtype for p in model.parameters()), None)
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    return found


def on_disk(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a module by the names that ``save_pretrained`` writes; transformers 5 fuses experts in memory."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return state
    if not hasattr(model, "save_pretrained"):
        return state
    return dict(revert_weight_conversion(model, state))
