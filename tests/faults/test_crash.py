"""kill -9 at random moments of merges, then ``--resume``: the same bytes each time. ``make conformance`` has 50."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


@pytest.mark.parametrize(
    ("moments", "mode"),
    [
        (12, "fresh"),
        (6, "overwrite"),
        pytest.param(35, "fresh", marks=pytest.mark.conformance),
        pytest.param(15, "overwrite", marks=pytest.mark.conformance),
    ],
)
def test_killed_at_any_moment_and_resumed(tmp_path, moments, mode):
    paths = tiny.family(tmp_path / "models", hidden=128, vocab=8000, layers=3)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(tiny.recipe(paths, "ties", weight=0.5, density=0.3))
    root = tmp_path / "work"
    root.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.crash", str(recipe), str(root), str(moments), "1", mode],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["moments"] == moments
    assert facts["resumed"] >= moments // 6, "kills must hit merges that are under way"
