"""Kills merges with SIGKILL at random moments and resumes them; run by test_crash.py in a process of its own.

The process has no threads, so that it may fork: a child merges, the parent kills it after a random part of
the time that a whole merge takes, looks at the target, and lets another child resume.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from fastmerge.api import merge as engine
from fastmerge.runtime import schedule, stream
from fastmerge.sizes import parse_bytes

FILES_THAT_TELL_TIMES = {"merge_report.json"}


def digest(directory):
    """sha256 over names and bytes of everything but the report."""
    h = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.name not in FILES_THAT_TELL_TIMES:
            h.update(path.name.encode() + b"\0" + path.read_bytes())
    return h.hexdigest()


def staging(out):
    """Where the output grows."""
    return out.with_name(f".{out.name}.fastmerge-staging")


def child(recipe, out, **how):
    """Forks a merge; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            engine.merge(recipe, out, memory=parse_bytes("64MB"), **how)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def main(recipe, root, moments, seed, overwrite):
    schedule.UNIT_ELEMENTS = 1 << 16
    stream.SYNC_SECONDS = 0.01
    root = Path(root)
    spans = []
    for name in ("whole", "again"):  # the first one fills caches
        started = time.monotonic()
        assert os.waitpid(child(recipe, root / name / "out"), 0)[1] == 0
        spans.append(time.monotonic() - started)
    span = min(spans)
    good = digest(root / "whole" / "out")
    rng = random.Random(seed)
    killed = resumed = 0
    for i in range(moments):
        out = root / f"moment{i}" / "out"
        out.parent.mkdir()
        old = None
        if overwrite:
            out.mkdir()
            (out / "model.safetensors").write_text("the old output")
            old = digest(out)
        pid = child(recipe, out, overwrite=overwrite)
        time.sleep(rng.random() * span * 1.1)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        killed += os.WIFSIGNALED(status)
        assert not out.exists() or digest(out) in (good, old), f"moment {i}: the target looks complete and is not"
        if not out.exists() or digest(out) != good:
            assert os.waitpid(child(recipe, out, resume=True, overwrite=overwrite), 0)[1] == 0, f"moment {i}: no resume"
            resumed += 1
        assert digest(out) == good, f"moment {i}: different bytes after --resume"
        if staging(out).exists():  # killed between the rename and the clean-up
            assert os.waitpid(child(recipe, out, resume=True, overwrite=overwrite), 0)[1] == 0
            assert digest(out) == good
        left = [p.name for p in out.parent.iterdir() if p != out]
        assert not left, f"moment {i}: left behind {left}"
        shutil.rmtree(out.parent)
    print(json.dumps({"moments": moments, "killed": killed, "resumed": resumed, "seconds": round(span, 3)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "overwrite")
