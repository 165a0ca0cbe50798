"""compute-sanitizer over the extension (memcheck and racecheck), and over one Triton kernel.

The extension's kernels are what is not checked elsewhere: raw addresses, nothing between them and the device. torch's
caching allocator is switched off, so that every tensor is an allocation of its own, and an access past its end shows.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

from bench.gpu.plan import ROOT, Absent, Context, Item, Row

TOOLS = ("memcheck", "racecheck")
MARK = "========="
"""Begins every line of the tool; all others are the program's."""

REFUSALS = ("Device not supported", "not supported on this")
"""What the tool says of a machine that it cannot work on. Whatever else stops it is a failure."""


def items(context: Context) -> Sequence[Item]:
    """Both tools over the extension, memcheck over Triton."""
    work = [(tool, "extension") for tool in TOOLS] + [("memcheck", "triton")]
    return [
        Item(f"{tool} {what}", functools.partial(check, tool, what, context), needs=40, limit=240)
        for tool, what in work
    ]


def check(tool: str, what: str, context: Context) -> Row:
    """Runs :mod:`bench.gpu.drive` under one tool.

    Raises:
        Absent: where the tool is missing or refuses this machine, or there is nothing to check.
        AssertionError: where it found something.
    """
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise Absent("compute-sanitizer is not installed")
    words = ["--tool", tool, "--error-exitcode", "86", "--target-processes", "application-only"]
    done = subprocess.run(
        [sanitizer, *words, sys.executable, "-m", "bench.gpu.drive", what],
        env={**context.environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    absent = re.search(r"^absent: (.*)$", done.stdout, re.MULTILINE)
    if absent:
        raise Absent(absent.group(1))
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout)
    driven = re.findall(r"^driven: .*", done.stdout, re.MULTILINE)
    clean = summary and driven and all(re.search(r"SUMMARY: 0 ", s) for s in summary)
    if clean and done.returncode == 0:
        return {"summary": summary[-1], "driven": driven[-1].removeprefix("driven: ")}
    said = [text for text in done.stdout.splitlines() if text.startswith(MARK)]
    refused = next((r for r in REFUSALS if any(r in text for text in said)), None)
    if refused is not None and not any(re.search(r"SUMMARY: [1-9]", s) for s in summary if driven):
        raise Absent(f"compute-sanitizer refuses this machine: {refused}")
    raise AssertionError(f"status {done.returncode}: {' '.join(summary)} {' '.join(done.stdout[-600:].split())}")
