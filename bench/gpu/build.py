"""What has to be there before anything runs: packages that the machine lacks, and the extension with its CUDA part."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.plan import ROOT, Context, Item, Row

MODULES = {"click": "click", "numpy": "numpy", "pydantic": "pydantic", "yaml": "PyYAML", "rich": "rich",
           "xxhash": "xxhash", "torch": "torch", "triton": "triton", "pytest": "pytest",
           "hypothesis": "hypothesis", "safetensors": "safetensors", "pybind11": "pybind11"}  # fmt: skip
"""Modules that the run imports, with the packages that hold them; mergekit is compared where it is there."""


def items(context: Context) -> Sequence[Item]:
    """Packages, then the extension."""
    return [
        Item("packages", lambda: packages(context), needs=5, limit=180),
        Item("extension", lambda: extension(context), needs=60, limit=420),
    ]


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages(context: Context) -> Row:
    """Installs those wheels whose packages are missing into a folder of our own; nothing comes from a network."""
    wheels = sorted(Path(context.wheels).glob("*.whl")) if context.wheels else []
    there = {canonical(d.name) for d in importlib.metadata.distributions() if d.name}
    wanted = [w for w in wheels if canonical(w.name.split("-")[0]) not in there]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
           "--disable-pip-version-check", "--upgrade", "--target", str(context.site)]  # fmt: skip
    installed: list[str] = []
    refused: list[str] = []
    for wheel in wanted:  # one by one: a wheel for another Python is no reason to lack the others
        done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, check=False)
        (refused if done.returncode else installed).append(wheel.name)
    importlib.invalidate_caches()
    missing = [p for m, p in MODULES.items() if importlib.util.find_spec(m) is None]
    if missing:
        raise RuntimeError(f"missing packages: {', '.join(missing)}; WHEELS=dir may supply them")
    return {"python": platform.python_version(), "installed": installed, "refused": refused, "there": len(there)}


def extension(context: Context) -> Row:
    """Builds ``fastmerge._native`` for this Python with CMake, with the CUDA part where nvcc is found."""
    how = "not built in a dry run" if context.dry else configure(context)
    code = (
        "from fastmerge import _native as n; print(n.isa(), bool(getattr(n, 'has_cuda', bool)()), n.__file__, sep='|')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=context.environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the extension cannot be imported ({how}): {done.stderr.strip()[-500:]}")
    isa, cuda, path = done.stdout.strip().split("|")
    nvcc = shutil.which("nvcc") or "no"
    return {"file": Path(path).name, "isa": isa, "cuda": cuda == "True", "nvcc": nvcc, "how": how}


def configure(context: Context) -> str:
    """Runs CMake: configure, build, install into the source tree; says what happened."""
    cmake = shutil.which("cmake", path=context.environment()["PATH"])
    if cmake is None:
        return "cmake is not installed; WHEELS=dir may supply the wheels of cmake and ninja"
    found = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True)
    build = Path(context.cache) / f"build-{platform.python_version()}"
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=context.environment()["PATH"]) else []
    steps = [
        [cmake, "-S", str(ROOT), "-B", str(build), *generator, f"-Dpybind11_DIR={found.stdout.strip()}",
         f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"],
        [cmake, "--build", str(build), "--parallel", str(len(os.sched_getaffinity(0)))],
        [cmake, "--install", str(build), "--prefix", str(ROOT)],
    ]  # fmt: skip
    for step in steps:
        done = subprocess.run(
            step, env=context.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(step[:3])} failed: {done.stdout.strip()[-1500:]}")
    return "built with cmake"
