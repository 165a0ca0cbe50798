"""Tensors by their names on disk to a transformers module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.header import listing
from fastmerge.errors import BackendUnavailable, CheckpointError

if TYPE_CHECKING:
    import torch


def build(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The module that ``from_pretrained`` would give for the same files.

    Args:
        config: as in config.json, with ``model_type`` and ``architectures``.
        state: tensors by their names on disk.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of other shapes than the configuration says.
        BackendUnavailable: transformers is not installed, or does not know the architecture.
    """
    try:
        import transformers
    except ImportError:
        raise BackendUnavailable("a module needs transformers: pip install transformers") from None
    names = config.get("architectures") or [None]
    cls: Any = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise BackendUnavailable(f"transformers {transformers.__version__} has no class {names[0]!r}")
    settings = cls.config_class.from_dict(dict(config))
    dtype = max((t.dtype for t in state.values() if t.is_floating_point()), key=[t.dtype for t in state.values()].count)
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, said = cls.from_pretrained(
            None, config=settings, state_dict=dict(state), dtype=dtype, output_loading_info=True
        )
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    problems = [f"{what}: {listing(sorted(map(str, said[what])))}" for what in said if said[what]]
    if problems:
        raise CheckpointError([f"the made tensors are not those of {names[0]}: {p}" for p in problems])
    model.eval()
    return model
