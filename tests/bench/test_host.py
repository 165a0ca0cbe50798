"""What calls on resident tensors ask of a device: no wait before the last launch, one upload, one allocation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="tensors in memory need torch")
pytest.importorskip("triton", reason="the kernels need triton")

from fastmerge.kernels import TritonKernels
from tests import oracle
from tests.methods.test_methods import CASES

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
import json, math
from bench import host
found = {m: {s: vars(host.counted(m, s)) for s in ("one", "two", "147")} for m in host.GIVEN}
found["render"] = {r["method"]: r for r in host.renders(host.RENDERED, ["147"], 0)}
sizes = {s: sum(math.prod(x) for x in host.shapes(s).values()) for s in host.SIZES}
print(json.dumps([found, sizes, {s: len(host.shapes(s)) for s in host.SIZES}]))
"""


@pytest.fixture(scope="module")
def counted():
    """Counts of every method and size, from a process without the interpreter, and what models of each size hold."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_method_launches_everything_before_it_waits(counted):
    found = {method: sizes for method, sizes in counted[0].items() if method != "render"}
    specs = {method.name: oracle.op_of(method, method.cases[0], (4, 4), "bf16").spec for method, _ in CASES}
    bound = {name for name, spec in specs.items() if TritonKernels("cpu").supports(spec) is None}
    assert set(found) == bound - set(oracle.PASS_BY_PASS)
    for method, sizes in found.items():
        for size, some in sizes.items():
            assert some["launches"] >= 1, (method, size)
            assert some["between"] == 0, (method, size, some)
            assert some["waits"] <= 1, (method, size, some)
            assert some["uploads"] <= 2, (method, size, some)
            assert some["allocations"] <= 1, (method, size, some)


def test_launches_depend_on_the_kinds_of_tensors_and_not_on_their_number(counted):
    """Each kind that there is may add launches, once.

    A trim decides small tensors (norms) in a launch of their own, and tensors that are not aligned, or end in a part
    of a block, run in the masked variant of a kernel. So 147 tensors are compared with one matrix and one norm; a
    matrix alone takes at most as many.
    """
    for method, sizes in counted[0].items():
        if method == "render":
            continue
        one, two, many = (sizes[s]["launches"] for s in ("one", "two", "147"))
        assert many == two, method
        assert one <= two, method


def test_scratch_of_ties_is_a_twentieth_of_a_model_at_most(counted):
    """Of 4.5 billion parameters in bf16, with a base and two models."""
    found, sizes, tensors = counted
    assert tensors["147"] == 147
    assert 4.5e9 < sizes["147"] < 4.6e9
    assert found["ties"]["147"]["scratch"] <= 0.05 * 2 * sizes["147"]


def test_a_render_with_other_numbers_sends_a_table_and_launches_the_merge(counted):
    """Of 147 tensors, where what passes find is known: one upload, no scratch, no wait."""
    found = counted[0]["render"]
    for method, most in (("linear", 1), ("slerp", 1), ("ties", 3), ("dare_ties", 4)):
        some = found[f"render {method}"]
        assert 1 <= some["launches"] <= most, method
        assert (some["uploads"], some["allocations"], some["between"]) == (1, 0, 0), method
        assert some["waits"] == (method == "dare_ties"), method  # whose sums may not be finite


def test_the_table_is_printed_and_kept(tmp_path):
    words = ["--methods", "task_arithmetic", "--renders", "--seconds", "0", "--sizes", "64 elements", "147"]
    command = [sys.executable, str(ROOT / "bench" / "host.py"), *words, "--json", str(tmp_path / "host.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    head, *rows = done.stdout.splitlines()
    assert head.split()[:6] == ["method", "tensors", "launches", "uploads", "allocs", "waits"]
    assert [row.split()[:2] for row in rows] == [["task_arithmetic", "64"], ["task_arithmetic", "147"]]
    kept = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert [row["tensors"] for row in kept] == ["64 elements", "147"]
    assert all(row["launches"] == 1 and row["host ms"] > 0 and row["again ms"] > 0 for row in kept)
