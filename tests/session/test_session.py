"""Renders have the bytes of the merge on disk, the first time and every other."""

import pytest
import torch
import yaml

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


def wrong(got, directory):
    """Names of tensors whose bytes are not those on disk."""
    expected = load(directory)
    assert got.keys() == expected.keys()
    return [
        n
        for n, t in expected.items()
        if got[n].dtype != t.dtype or not torch.equal(got[n].view(torch.uint8), t.view(torch.uint8))
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_a_render_is_the_merge_on_disk(session, paths, name, tmp_path):
    text = recipe_of(paths, name)
    fm.merge(text, tmp_path / "out")
    target = session.render(text)
    assert wrong(target, tmp_path / "out") == []
    for tensor in target.values():
        tensor.fill_(float("nan"))
    session.render(text, target)
    assert wrong(target, tmp_path / "out") == []
