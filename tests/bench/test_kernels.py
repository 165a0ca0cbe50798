"""The benches of kernels, methods and calls run, and every kernel has one; nothing is measured here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastmerge._native", reason="the extension is not built")
pytest.importorskip("pytest_benchmark", reason="the benches are pytest-benchmark's")

ROOT = Path(__file__).resolve().parents[2]


def bench(*words):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    # In a worker of pytest-xdist pytest-benchmark measures nothing; this one is nobody's worker.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)


def test_every_bench_runs_and_every_kernel_has_some():
    done = bench("bench", "--benchmark-disable", "-rA")
    assert done.returncode == 0, done.stdout[-3000:]
    ran = [line.removeprefix("PASSED bench/") for line in done.stdout.splitlines() if line.startswith("PASSED")]
    kernels = {re.split(r"[\[\] ]", name)[1] for name in ran if "::test_cold" in name}
    assert kernels == {"combine", "gram", "dot", "delta_keys", "count", "l1", "votes", "consensus", "replicate"}
    assert {name.split("::")[0] for name in ran} == {p.name for p in (ROOT / "bench").glob("test_*.py")}


def test_the_table_has_shares_and_the_saved_run_has_where_it_was(tmp_path):
    done = bench(
        "bench/test_kernels.py",
        "--benchmark-only",
        "-k",
        "test_hot and combine",
        f"--benchmark-json={tmp_path / 'run.json'}",
    )
    assert done.returncode == 0, done.stdout[-3000:]
    head, *rows = done.stdout.split("== combine hot\n")[1].split("\n\n")[0].splitlines()
    assert head.split()[-3:] == ["share", "of", "memcpy"]
    assert [row.split()[1:3] for row in rows] == [["combine", "bf16"], ["combine", "delta"]]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["provenance"]["commit"]
    for entry in run["benchmarks"]:
        assert entry["extra_info"]["bytes"] > 0
        assert 0 < entry["extra_info"]["share of memcpy"] < 100


def test_the_test_suite_runs_no_benches(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert not any("benchmark" in option for option in pytestconfig.getini("addopts"))
