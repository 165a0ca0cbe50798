"""Tensors by their names on disk to a transformers module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.header import listing
from fastmerge.errors import BackendUnavailable, CheckpointError

if TYPE_CHECKING:
    import torch

    from fastmerge.dna.parent import Parent


def build(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The module that ``from_pretrained`` would give for the same files.

    Args:
        config: as in config.json, with ``model_type`` and ``architectures``.
        state: tensors by their names on disk.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of other shapes than the configuration says.
        BackendUnavailable: transformers is not installed, or does not know the architecture.
    """
    cls = _class(config)
    settings = cls.config_class.from_dict(dict(config))
    dtype = max((t.dtype for t in state.values() if t.is_floating_point()), key=[t.dtype for t in state.values()].count)
    return _loaded(cls, None, config=settings, state_dict=dict(state), dtype=dtype)


def opened(parent: Parent, head: str) -> torch.nn.Module:
    """A module of a model, in evaluation mode; it is read from where it is.

    Args:
        parent: the model.
        head: name of the class, where the configuration has none.

    Raises:
        CheckpointError: its tensors are not those that transformers expects.
        BackendUnavailable: transformers is not installed, or does not know the architecture.
    """
    config = {**parent.config, "architectures": parent.config.get("architectures") or [head]}
    if parent.checkpoint is not None:
        return _loaded(_class(config), parent.checkpoint.path, dtype="auto")
    return build(config, parent.kept)


def _class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that a configuration names."""
    try:
        import transformers
    except ImportError:
        raise BackendUnavailable("a module needs transformers: pip install transformers") from None
    names = config.get("architectures") or [None]
    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise BackendUnavailable(f"transformers {transformers.__version__} has no class {names[0]!r}")
    return cls


def _loaded(cls: Any, path: Any, **how: Any) -> Any:
    """``from_pretrained`` without a progress bar, and complete."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, said = cls.from_pretrained(path, output_loading_info=True, **how)
    finally:
        if shown:
            logging.enable_progress_bar()
    problems = [f"{what}: {listing(sorted(map(str, said[what])))}" for what in said if said[what]]
    if problems:
        raise CheckpointError([f"the tensors are not those of {cls.__name__}: {p}" for p in problems])
    model.eval()
    return model
