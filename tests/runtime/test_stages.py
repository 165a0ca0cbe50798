"""Recipes of several documents: the bytes of stage after stage through directories, and nothing of a stage on disk."""

import pytest

import fastmerge as fm
from fastmerge.ops import sources
from fastmerge.ops.segments import TILE
from tests import tiny

APART = {"README.md", "merge_report.json", "mergekit_config.yml"}
"""Files that tell how the output was made."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Matrices of two and three tiles of elements."""
    return tiny.family(tmp_path_factory.mktemp("models"), layers=1, hidden=256)


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch):
    monkeypatch.setattr(sources, "PANEL", TILE)


def files(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name not in APART}


def ways(tmp_path, documents, **options):
    """What stage after stage gives through directories, and what all at once give: {file: bytes} each."""
    places = {name: str(tmp_path / name) for name in documents}
    for name, text in documents.items():
        fm.merge(text.format(**places), places[name], **options)
    texts = [f"name: {name}\n{text}" if name != "last" else text for name, text in documents.items()]
    names = {name: name for name in documents}
    fm.merge("---\n".join(reversed(texts)).format(**names), tmp_path / "streamed", **options)
    return files(tmp_path / "last"), files(tmp_path / "streamed")


def merge(models, method, names="abc", base="base", extra="", dtype="bfloat16", **per_model):
    """A document; capitals are earlier ones."""
    known = {**models, "X": "{first}", "Y": "{second}"}
    return tiny.recipe(known, method, names=names, base=base, dtype=dtype, extra=extra, **per_model)


FIRST = {
    "element": lambda m: merge(m, "linear", base=None, weight="[0.2, 0.7]"),
    "random": lambda m: merge(m, "dare_linear", weight=0.4, density=0.3),
    "tensor": lambda m: merge(m, "ties", weight=0.6, density=0.4),
    "row": lambda m: merge(m, "della", weight=0.6, density=0.4),
    "model": lambda m: merge(m, "ties", extra="parameters: {{trim_scope: model}}", weight=0.6, density=0.4),
    "angles": lambda m: merge(m, "karcher", base=None),
    "definition": lambda m: merge(m, "ramplus_tl"),
    "copies": lambda m: merge(m, "passthrough", names="a", base=None),
}
LAST = {
    "element": lambda m: merge(m, "linear", names="Xab", base=None, weight=0.3),
    "tensor": lambda m: merge(m, "ties", names="Xb", weight=0.6, density=0.4),
    "base": lambda m: merge(m, "dare_ties", names="ab", base="X", weight=0.6, density=0.4),
    "row": lambda m: merge(m, "slerp", names="Xb", base="X", extra="parameters: {{t: 0.3, scope: row}}"),
    "model": lambda m: merge(m, "ties", names="Xc", extra="parameters: {{trim_scope: model}}", weight=1, density=0.4),
    "copies": lambda m: merge(m, "passthrough", names="X", base=None),
    "wider": lambda m: merge(m, "passthrough", names="X", base=None, dtype="float32"),
}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("first", FIRST)
def test_the_bytes_are_those_of_the_way_through_directories(tmp_path, models, first, last):
    want, got = ways(tmp_path, {"first": FIRST[first](models), "last": LAST[last](models)}, memory="64MB")
    assert sorted(got) == sorted(want)
    assert [name for name in want if got[name] != want[name]] == []
