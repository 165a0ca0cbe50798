"""How far a call walks through the code: files, moves between files, and depth, from the outside to the kernel.

    python bench/walks.py

Runs a TIES merge of two small tensors from disk, and ``merge_tensors`` of 64 elements, under Python's profiler, and
prints what their threads walked through. Works on any build that is on the path, so that two can be compared::

    PYTHONPATH=OLD python bench/walks.py && python bench/walks.py
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

import fastmerge as fm

ROOT = str(Path(fm.__file__).resolve().parent)


class Walk:
    """What one thread went through."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.moves = 0
        self.hops = 0
        self.way: list[str] = []
        self._last = ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Python's profile hook."""
        name = frame.f_code.co_filename
        inside = name.startswith(ROOT)
        if event == "call" and inside:
            self.files.add(name)
            self.moves += name != self._last
            self._last = name
        elif event == "c_call" and inside and getattr(arg, "__module__", "") == "fastmerge._native":
            way = []
            at: FrameType | None = frame
            while at is not None:
                if at.f_code.co_filename.startswith(ROOT):
                    way.append(at.f_code.co_qualname if sys.version_info >= (3, 11) else at.f_code.co_name)
                at = at.f_back
            if len(way) > self.hops:
                self.hops, self.way = len(way), way[::-1]


def walked(work: Any) -> dict[str, Walk]:
    """The walks of all threads of a call, by thread."""
    found: dict[str, Walk] = {}

    def start(*args: Any) -> None:
        walk = found.setdefault(threading.current_thread().name, Walk())
        sys.setprofile(walk)
        walk(*args)

    threading.setprofile(start)
    found["MainThread"] = Walk()
    sys.setprofile(found["MainThread"])
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return found


def main() -> None:
    """Prints both walks."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        rng = np.random.default_rng(0)
        for name in ("base", "a", "b"):
            (root / name).mkdir()
            state = {f"layers.{i}.w": rng.standard_normal((8, 8)).astype(np.float32) for i in range(2)}
            save_file(state, root / name / "model.safetensors")
        models = [{"model": str(root / n), "parameters": {"weight": 1.0, "density": 0.5}} for n in ("a", "b")]
        recipe = {"merge_method": "ties", "base_model": str(root / "base"), "models": models}
        fm.merge(recipe, root / "first", device="cpu")
        disk = walked(lambda: fm.merge(recipe, root / "out", device="cpu"))
    tensors = [torch.randn(8, 8) for _ in range(3)]

    def call() -> None:
        fm.merge_tensors(tensors, "linear", parameters={"weight": 1.0})

    call()
    for what, walks in (("a recipe of two tensors", disk), ("merge_tensors", walked(call))):
        for thread, walk in walks.items():
            if walk.files:
                print(
                    f"{what}, {thread}: {len(walk.files)} files, {walk.moves} moves, {walk.hops} hops to the extension"
                )
                if what == "merge_tensors" and walk.hops:
                    print("  " + " -> ".join(walk.way))


if __name__ == "__main__":
    main()
