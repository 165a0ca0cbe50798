"""Checkpoints: strict reading of safetensors models, pure layout and durable writing of the result."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.header import Seen, TensorInfo, of_fields, without_gc
from fastmerge.checkpoint.layout import Layout, Place, Shard, layout
from fastmerge.checkpoint.model import Checkpoint, ShardFile

if TYPE_CHECKING:
    from fastmerge.checkpoint.files import Files
    from fastmerge.checkpoint.io import Io
    from fastmerge.checkpoint.writer import Writer

__all__ = [
    "Checkpoint",
    "Files",
    "Io",
    "Layout",
    "Place",
    "Seen",
    "Shard",
    "ShardFile",
    "TensorInfo",
    "Writer",
    "layout",
    "of_fields",
    "without_gc",
]

_LATER = {"Files": "files", "Io": "io", "Writer": "writer"}


def __getattr__(name: str) -> Any:
    """What moves bytes is loaded when bytes move: planning does without it."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
