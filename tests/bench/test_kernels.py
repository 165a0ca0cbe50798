"""The bench of the CPU kernels runs, and its cases are valid calls."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastmerge._native", reason="the extension is not built")

SCRIPT = Path(__file__).resolve().parents[2] / "bench/kernels.py"


def test_every_kernel_has_a_row():
    command = [sys.executable, str(SCRIPT), "--quick", "--sections", "hot"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kernels = {line.split()[0] for line in done.stdout.splitlines()[2:] if line}
    assert kernels == {"combine", "gram", "delta_keys", "count", "l1", "votes", "consensus", "replicate"}
    assert "saved" not in done.stdout


def test_kernels_and_sections_can_be_chosen():
    words = ["--quick", "--sections", "types", "--kernels", "replicate"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=True)
    title, _, *rows = done.stdout.split("\n\n")[0].splitlines()
    assert title == "== types"
    assert [row.split()[:2] for row in rows if "noise" not in row] == [
        ["replicate", t] for t in ("bf16", "fp16", "fp32")
    ]
    assert len(rows) == 6
