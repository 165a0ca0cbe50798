"""The page on learned coefficients runs as it stands, and names every setting."""

import dataclasses
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

from fastmerge.adamerging import AdaMergingConfig, MergedModule
from fastmerge.adamerging.coefficients import GRANULARITIES, PARAMETRISATIONS
from fastmerge.adamerging.objectives import OBJECTIVES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adamerging.md").read_text()


def test_its_examples_run(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/adamerging.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "merge_method: task_arithmetic" in printed
    assert names["recipe"].base_model.path == "models/base"
    assert set(names["merged"].__class__.__mro__) & {MergedModule}
    assert sum(names["soup"].weights["0.weight"]) == pytest.approx(1)
    assert len(names["result"].losses) == 20


def test_it_names_every_setting():
    words = (*GRANULARITIES, *PARAMETRISATIONS, *OBJECTIVES)
    assert [w for w in words if f"`{w}`" not in PAGE] == []
    known = {f.name for f in dataclasses.fields(AdaMergingConfig)} - {
        "backend",
        "seed",
        "steps",
        "prior",
        "learning_rate",
    }
    assert [w for w in known if f"`{w}`" not in PAGE] == []
