"""Whole merges of recipes as people publish them, by fastmerge and by mergekit 0.1.5 (``make conformance``).

The recipes are structures: keys and values of public ones, with placeholders for the models and layers scaled to 12.
Each is merged by both tools from the same stand-ins and by mergekit in fp64. Names, shapes, types, configuration and
every token's row are the same, no tensor's RMS error is more than 1.001 times mergekit's, and transformers generates.
"""

import pytest
import torch

pytest.importorskip("mergekit")

import fastmerge as fm
from tests.conformance import judge, standins

torch.set_num_threads(1)

QUICK = {"02", "06", "26", "31"}
"""Those that ``make test`` runs as well."""


def marked(path):
    quick = path.name[:2] in QUICK
    return pytest.param(path, id=path.stem, marks=() if quick else pytest.mark.conformance)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    return standins.Family(tmp_path_factory.mktemp("standins"))


MISSPELT = next(p for p in judge.RECIPES if "misspelt" in p.name)


@pytest.mark.parametrize("path", [marked(p) for p in judge.RECIPES if p != MISSPELT])
def test_recipe(path, family, tmp_path):
    assert judge.judge(judge.filled(path.read_text(), family), tmp_path / "work") == []


def test_a_misspelt_key_is_refused(family):
    text = judge.filled(MISSPELT.read_text(), family)
    with pytest.raises(fm.RecipeError, match="did you mean 'dtype'"):
        fm.plan(text)


@pytest.mark.conformance
def test_the_misspelt_key_corrected(family, tmp_path):
    text = MISSPELT.read_text().replace("dype:", "dtype:")
    text = text.replace("select_topk: .15", "parameters: {select_topk: .15}")
    assert judge.judge(judge.filled(text, family), tmp_path / "work") == []


def test_the_judge_sees_what_differs():
    """A value off by more than mergekit's error, a lost name, another type."""
    truth = {"w": torch.ones(8, dtype=torch.float64), "v": torch.ones(2, dtype=torch.float64)}
    theirs = {k: t.bfloat16() for k, t in truth.items()}
    wrong = {**theirs, "w": theirs["w"] + torch.tensor([0.0] * 7 + [0.01])}
    assert judge.values(theirs, theirs, truth, types=True) == []
    (line,) = judge.values({**theirs, "w": wrong["w"].bfloat16()}, theirs, truth, types=True)
    assert line.startswith("w: RMS error")
    (line,) = judge.values({"w": theirs["w"]}, theirs, truth, types=True)
    assert "not here ['v']" in line
    (line,) = judge.values({**theirs, "v": truth["v"].half()}, theirs, truth, types=True)
    assert line.startswith("v: torch.float16")


def test_every_method_of_mergekit_has_a_recipe():
    from mergekit.merge_methods import registered_methods

    said = "".join(p.read_text() for p in judge.RECIPES)
    assert [m for m in (m.spec.name for m in registered_methods()) if f"merge_method: {m}\n" not in said] == []
