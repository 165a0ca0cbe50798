"""Evolution finds at least what a grid of as many evaluations does, on the demo's specialists."""

import os
import sys
from pathlib import Path

import pytest

from tests.demo_fixture import fixture

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT / "bench") not in sys.path:
    sys.path.append(str(ROOT / "bench"))

import evolution


@pytest.mark.conformance
def test_evolution_is_at_least_as_good_as_the_grids():
    models = fixture(Path(os.environ.get("FASTMERGE_DEMO_CACHE") or ROOT / ".cache" / "demo"))
    rows = evolution.run(models, seeds=[0], steps=3, validation=100, held_out=100)
    found = {row["way"]: row for row in rows}
    assert {found[way]["evaluations"] for way in ("grid", "line", "genetic", "cma")} == {27}
    assert evolution.behind(rows) == []
    alone = [found[name]["held out"] for name in evolution.SKILLS]
    assert min(found[way]["held out"] for way in ("genetic", "cma")) > max(alone) + 20


def test_a_way_that_stays_behind_is_named():
    scores = {"grid": 90.0, "line": 95.0, "genetic": 94.0, "cma": 95.0}
    rows = [{"seed": 3, "way": way, "validation": score} for way, score in scores.items()]
    assert evolution.behind(rows) == ["seed 3: genetic 94.0 %, line 95.0 %"]
