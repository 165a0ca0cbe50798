"""Every test that carries the mark ``gpu``: one item per file that has some, with compiled kernels on the GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.plan import ROOT, Context, Item, Row

PROCESSES = 8
"""At most: what takes long is compiling kernels, which cores do; all share the one GPU."""


LIGHT = "tests/test_style.py"
"""What a dry run takes: a file without such tests, which imports little."""


def items(context: Context) -> Sequence[Item]:
    """One item per test file that names the mark, wherever it lies."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [str(p.relative_to(ROOT)) for p in files if "mark.gpu" in p.read_text()]
    return [
        Item(name, functools.partial(pytest, name, context), needs=60, limit=450)
        for name in ([LIGHT] if context.dry else names)
    ]


def pytest(name: str, context: Context) -> Row:
    """Runs the marked tests of a file; warnings are shown, and fail nothing: drivers and their packages have their own.

    Raises:
        AssertionError: with the first failures.
    """
    cores = min(PROCESSES, len(os.sched_getaffinity(0)))
    spread = ["-n", str(cores)] if importlib.util.find_spec("xdist") and not context.dry else []
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory) / "junit.xml"
        words = ["-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={junit}", *spread, name]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=ROOT, env=context.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False,
        )  # fmt: skip
        tail = [line for line in done.stdout.splitlines() if line.strip()][-1:]
        if done.returncode not in (0, 5) or not junit.exists():  # 5: nothing is marked
            raise AssertionError(f"{' '.join(tail)}; {'; '.join(failures(junit)) or done.stdout[-600:]}")
        suites = list(ET.parse(junit).getroot().iter("testsuite"))  # noqa: S314  our own file
    count = {k: sum(int(s.get(k) or 0) for s in suites) for k in ("tests", "failures", "errors", "skipped")}
    if not context.dry and count["tests"] == count["skipped"]:
        raise AssertionError(f"none of {count['tests']} tests ran: {' '.join(tail)}")
    return {**count, "summary": " ".join(tail).strip("= ")}


def failures(junit: Path) -> list[str]:
    """The first failing tests with their messages."""
    if not junit.exists():
        return []
    found = []
    for case in ET.parse(junit).getroot().iter("testcase"):  # noqa: S314
        for kind in ("failure", "error"):
            what = case.find(kind)
            if what is not None:
                found.append(f"{case.get('name')}: {' '.join((what.get('message') or '').split())[:150]}")
    return found[:5]
