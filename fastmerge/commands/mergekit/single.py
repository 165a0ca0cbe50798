"""One safetensors file, written tensor by tensor: its header is known when all of them are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

    from fastmerge.dtypes import DType

ALIGN = 64
"""Bytes to which the data begins; headers are padded with blanks."""


def room(names: Iterable[tuple[str, int]]) -> int:
    """Bytes that the header of tensors takes at most, from their names and ranks."""
    return 256 + sum(len(json.dumps(name)) + 120 + 22 * rank for name, rank in names)


class SingleFile:
    """A new file. Memory is the caller's alone.

    Args:
        path: where; must not exist.
        room: bytes of the header at most, as of :func:`room`.
    """

    def __init__(self, path: Path, room: int) -> None:
        self._start = -(-(8 + room) // ALIGN) * ALIGN
        self._at = 0
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._file = path.open("xb")
        self._file.seek(self._start)

    def add(self, name: str, dtype: DType, shape: Sequence[int], data: memoryview) -> None:
        """Appends a tensor."""
        self._entries[name] = {
            "dtype": dtype.tag, "shape": list(shape), "data_offsets": [self._at, self._at + data.nbytes],
        }  # fmt: skip
        self._file.write(data)
        self._at += data.nbytes

    def close(self) -> None:
        """Writes the header, and waits for the disk."""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write((self._start - 8).to_bytes(8, "little") + header.ljust(self._start - 8))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def bytes_of(tensor: Any) -> memoryview:
    """The bytes of a torch tensor on the CPU, in order."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
