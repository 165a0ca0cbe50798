"""What every result carries: the machine, the versions, the commit and the command; and tables of rows."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

PACKAGES = ("mergekit", "numpy", "torch", "safetensors")

Row = Mapping[str, Any]


def provenance(directory: Path | None = None) -> dict[str, Any]:
    """Where and how a result came about.

    Args:
        directory: where the measured files lie; its filesystem is named.
    """
    engine, isa = _engine()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.executable).name, *command()]),
        "commit": commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "load_1min": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "filesystem": filesystem(directory) if directory else None,
        "python": platform.python_version(),
        "isa": isa,
        "versions": {"fastmerge": engine, **{name: version(name) for name in PACKAGES}},
    }


def command() -> list[str]:
    """The words of this process's command, without where the repository lies."""
    script, *words = sys.argv
    path = Path(script).resolve()
    return [str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name, *words]


def unfit(about: Mapping[str, Any]) -> str | None:
    """Why a run with this provenance is not kept, or None."""
    if about["load_1min"] < 1 and "+" not in about["commit"]:
        return None
    return "a result is kept only of a commit without changes, on an idle machine (or give --no-save)"


def version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def filesystem(directory: Path) -> str:
    """Type of the filesystem that holds a directory."""
    found, depth = "unknown", -1
    target = str(directory.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind = line.split()[:3]
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) > depth:
            found, depth = kind, len(mount)
    return found


def commit(here: Path = RESULTS.parent) -> str:
    """The commit of a work tree, and whether it has changes."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _engine() -> tuple[str | None, str | None]:
    """Version and instruction set of fastmerge, asked in a process of its own to keep this one small."""
    code = "from fastmerge import _native, version; print(version.__version__, _native.isa())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found = done.stdout.split()
    return (found[0], found[1]) if len(found) == 2 else (None, None)


def save(kind: str, sections: Mapping[str, Sequence[Row]], about: Mapping[str, Any]) -> Path:
    """Writes ``results/KIND-TIME.json`` and returns its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"provenance": dict(about), "sections": dict(sections)}, indent=2, default=str) + "\n")
    return path


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned columns; the first row names them."""
    if not rows:
        return "nothing to show"
    names = list(rows[0])
    cells = [names, *[["-" if row.get(n) is None else str(row[n]) for n in names] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)
