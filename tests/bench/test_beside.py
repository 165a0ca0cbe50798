"""Two builds in one run: which package a process imports, what is judged, and suites of either kind."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

import beside
from merges import Bench
from process import Run, fastmerge


def bench(tmp_path, *, quick=False):
    return Bench(tmp_path, tmp_path, 1, 0, quick, (), ())


def runs(*seconds, megabytes=100.0):
    return [Run(s, s, s / 2, int(megabytes * 1e6), 0, "") for s in seconds]


def test_a_build_is_that_of_its_tree(tmp_path):
    (tmp_path / "fastmerge").mkdir()
    (tmp_path / "fastmerge" / "__init__.py").write_text("")
    (tmp_path / "fastmerge" / "__main__.py").write_text("import sys; print('of the tree', sys.argv[1:])")
    done = subprocess.run([*fastmerge(tmp_path), "plan"], capture_output=True, text=True, check=True)
    assert done.stdout == "of the tree ['plan']\n"


def test_slower_or_larger_by_3_percent_is_not_met(tmp_path):
    def met(now, megabytes=100.0):
        return beside.compared(bench(tmp_path), "x", runs(9.0, 10.0, 30.0), runs(*now, megabytes=megabytes))["met"]

    assert met((10.2, 10.2, 99.0)) == "yes"
    assert met((10.4, 10.4, 1.0)) == "NO"
    assert met((5.0, 5.0, 5.0), megabytes=104.0) == "NO"
    rounds = [({"a": 10.0, "gone": 1.0, "b": 10.0}, {"a": 9.6, "new": 1.0, "b": 9.9})] * 3
    rows = {row["what"]: row["met"] for row in beside.fastest(rounds, bench(tmp_path))}
    assert rows == {"a": "NO", "b": "yes"}
    assert next(beside.fastest(rounds, bench(tmp_path, quick=True)))["met"] == "not judged"


def test_a_suite_from_before_pytest_benchmark_is_read(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "kernels.py").write_text(
        "import sys\nassert sys.argv[1:] == ['--no-save', '--sections', 'hot', '--kernels', 'gram']\n"
        "print('== hot\\nkernel      type  models  where  G elements/s  GB/s moved\\n"
        "gram delta  bf16  3       hot    1.2           9.61')\n"
    )
    assert beside.rates(tmp_path, "gram", "hot") == {"gram delta bf16 3 hot": 9.61}
