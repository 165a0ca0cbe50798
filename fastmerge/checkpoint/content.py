"""What tells the content of files apart without reading all of it: for a merge that is continued later."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastmerge.checkpoint.seal import mark
from fastmerge.checkpoint.system import open_regular
from fastmerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastmerge.checkpoint.model import Checkpoint

SAMPLES = 64
SAMPLE_BYTES = 4096
_BLOB = r"[0-9a-f]{40}|[0-9a-f]{64}"


def of(paths: Iterable[Path]) -> str:
    """A hash over the content of files, in order.

    Blobs of the Hugging Face cache are named by theirs. Of other files it takes the size, the times of change (that
    of the inode too, which nobody can set back) and 64 sampled blocks of 4 KiB, which are all of a small file.

    Raises:
        CheckpointError: a file cannot be read, or is no regular file.
    """
    h = hashlib.sha256()
    for path in paths:
        real = Path(os.path.realpath(path))
        if real.parent.name == "blobs" and re.fullmatch(_BLOB, real.name):
            h.update(f"blob {real.name}\n".encode())
            continue
        try:
            fd = open_regular(path)
            try:
                info = os.fstat(fd)
                h.update(f"file {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}\n".encode())
                for i in range(SAMPLES):
                    h.update(os.pread(fd, SAMPLE_BYTES, info.st_size * i // SAMPLES))
            finally:
                os.close(fd)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read: {error.strerror}") from None
    return h.hexdigest()


def inputs(checkpoints: Iterable[Checkpoint], carried: Iterable[tuple[str, Path | bytes]]) -> str:
    """A hash over everything that a merge reads or copies: equal ones give equal outputs.

    It costs 64 small reads per file, so a merge takes it when it starts, and a plan does without.

    Args:
        checkpoints: the models.
        carried: names of files that are taken over (tokenizer, generation settings) with their place or content.

    Raises:
        CheckpointError: a file cannot be read.
    """
    h = hashlib.sha256()
    for checkpoint in checkpoints:
        h.update(f"model {checkpoint.content_id()}\n".encode())
        for name in ("config.json", "adapter_config.json"):
            path = checkpoint.path / name
            try:
                h.update(f"{name} {mark(path) if path.exists() else ''}\n".encode())
            except OSError as error:
                raise CheckpointError(f"{path}: cannot read: {error.strerror}") from None
    for name, data in carried:
        said = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else of([data])
        h.update(f"{name} {said}\n".encode("utf-8", "surrogatepass"))
    return h.hexdigest()[:16]
