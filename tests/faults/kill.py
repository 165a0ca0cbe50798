"""Kills merges with SIGKILL at every call that changes the disk; ``test_kill.py`` runs it in a process of its own.

In that process nothing is loaded that no merge on the CPU needs: a fork of one that holds torch and transformers takes
longer than the merge.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest

from fastmerge.checkpoint import staging, system
from tests.checkpoint.shim import names, save, tensor, tree
from tests.faults.test_output import WANT, run

STEPS = [
    (os, "fdatasync"),
    (os, "fsync"),
    (os, "ftruncate"),
    (os, "write"),
    (os, "pwrite"),
    (os, "unlink"),
    (os, "rmdir"),
    (Path, "rename"),
    (Path, "mkdir"),
    (Path, "unlink"),
    (Path, "rmdir"),
    (system, "rename_new"),
    (system, "rename_exchange"),
]
"""Calls around which a process is killed; reads change nothing."""


def die_at(step: int, patch: pytest.MonkeyPatch, *, plain: bool) -> None:
    """From now on, the process dies before its step-th call that changes the disk (the last one half done)."""
    count = 0

    def wrap(function, *, half: bool):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                if half:
                    function(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    if plain:
        patch.setattr(system, "rename_new", lambda a, b: errno.EINVAL)
        patch.setattr(system, "rename_exchange", lambda a, b: errno.EINVAL)
    for owner, name in STEPS:
        patch.setattr(owner, name, wrap(getattr(owner, name), half=name in {"write", "pwrite"}))


def no_waiting_for_the_disk(patch: pytest.MonkeyPatch) -> None:
    """Kill -9 loses nothing that was written: fsync is the answer to power loss, and most of the time here."""
    patch.setattr(os, "fdatasync", lambda fd: None)
    patch.setattr(os, "fsync", lambda fd: None)


def killed(out: Path, step: int, *, plain: bool = False, **kwargs) -> bool:
    """Runs a merge in a child that dies at a step; False if it came to its end before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            die_at(step, pytest.MonkeyPatch(), plain=plain)
            run(out, **kwargs)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def at_every_step(root: Path, *, plain: bool, overwrite: bool) -> tuple[int, int]:
    """Steps of a merge, and after how many of them a resumed one found work that was done."""
    step = steps_resumed = 0
    while True:
        step += 1
        out = root / str(step) / "out"
        if overwrite:
            save(out, {"model.safetensors": {"old": tensor("U8", 3)}})
            old = tree(out)
        dead = killed(out, step, plain=plain, overwrite=overwrite)
        if not dead:
            assert tree(out) == WANT
            break
        if out.exists():
            assert tree(out) == WANT or (overwrite and tree(out) == old)
        elif overwrite:
            # Only between the two renames, and then the old one is whole beside it.
            assert plain
            assert tree(staging.staging_path(out) / "old") == old
        whole = out.exists() and tree(out) == WANT
        left = staging.staging_path(out).exists()
        if whole and not left:
            continue
        if whole and not (staging.staging_path(out) / "journal.jsonl").exists():
            continue
        writer = run(out, resume=True, overwrite=overwrite)
        steps_resumed += writer.resumed > 0
        assert tree(out) == WANT
        assert names(out.parent) == ["out"]
    return step, steps_resumed


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patched:
        no_waiting_for_the_disk(patched)
        print(
            json.dumps(at_every_step(Path(sys.argv[1]), plain="plain" in sys.argv, overwrite="overwrite" in sys.argv))
        )
