"""Checkpoints: strict reading of safetensors models, pure layout and durable writing of the result."""

from fastmerge.checkpoint.files import Files
from fastmerge.checkpoint.header import TensorInfo
from fastmerge.checkpoint.io import Io
from fastmerge.checkpoint.layout import Layout, Place, Shard, layout
from fastmerge.checkpoint.model import Checkpoint, ShardFile
from fastmerge.checkpoint.writer import Writer

__all__ = ["Checkpoint", "Files", "Io", "Layout", "Place", "Shard", "ShardFile", "TensorInfo", "Writer", "layout"]
