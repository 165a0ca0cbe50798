"""Renders have the bytes of the merge on disk."""

import pytest
import torch

import fastmerge as fm
from tests import tiny
from tests.api.test_merge import RECIPES, load, recipe_of


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), hidden=96, vocab=3000)


@pytest.fixture(scope="module")
def session(paths):
    with fm.Session(list(paths.values())) as opened:
        yield opened


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("name", RECIPES)
def test_a_render_is_the_merge_on_disk(session, paths, name, tmp_path):
    text = recipe_of(paths, name)
    fm.merge(text, tmp_path / "out")
    same(session.render(text), load(tmp_path / "out"))
