"""Sessions on GPUs without one: logical GPUs have the bytes of the CPU and of the merge on disk."""

import pytest
import torch

import fastmerge as fm
from fastmerge.errors import BackendUnavailable, OutputError, ShapeError
from fastmerge.kernels import _call
from tests import tiny
from tests.session import logical
from tests.session.family import different, merged, recipe

if not _call.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), hidden=16, vocab=130, layers=1)


@pytest.fixture
def opened(paths, monkeypatch):
    """A session on two logical GPUs, and one on the CPU."""
    logical.pretend(monkeypatch, 2)
    with fm.Session(list(paths.values()), device="cuda:0,cuda:1") as gpus, fm.Session(list(paths.values())) as cpu:
        yield gpus, cpu


def numbers(key, *values):
    return [{key: v} for v in values]


SERIES = {
    "linear": ("linear", None, "abc", {}, numbers("weight", 0.3, [0.2, -0.1, 0.7])),
    "task_arithmetic": ("task_arithmetic", "base", "abc", {}, numbers("weight", 0.3, [0.2, -0.1, 0.7])),
    "ties": (
        "ties",
        "base",
        "abc",
        {"weight": 0.5, "density": 0.4},
        [{}, {"weight": [0.2, 0.9, 0.4]}, {"density": [0.4, 0.2, 0.9]}, {"weight": 0.1}],
    ),
    "ties spread": ("ties", "base", "ab", {"density": 0.4, "ties": "spread"}, numbers("weight", 0.5, 0.9)),
    "breadcrumbs": ("breadcrumbs", "base", "ab", {"density": 0.6, "gamma": 0.02}, numbers("weight", 0.5, 0.9)),
    "dare_ties": ("dare_ties", "base", "ab", {"weight": 0.5, "density": 0.4}, [{}, {"density": 0.7}]),
    "della": ("della", "base", "ab", {"density": 0.5, "epsilon": 0.2}, numbers("weight", 0.5, 0.8)),
    "slerp": ("slerp", "base", "a", {"t": 0.3}, numbers("t", 0.3, 0.8)),
    "slerp rows": ("slerp", "base", "a", {"t": 0.3, "scope": "row"}, numbers("t", 0.3, 0.8)),
    "model_stock": ("model_stock", "base", "abc", {}, [{}, {}]),
    "nuslerp": ("nuslerp", None, "ab", {}, numbers("weight", [0.3, 0.7], [0.6, 0.2])),
    "sce": ("sce", "base", "ab", {}, numbers("select_topk", 0.5, 0.2)),
    "passthrough": ("passthrough", None, "a", {}, [{}, {}]),
}
SHARED = {"t", "scope", "ties", "select_topk", "epsilon"}


def documents(paths, name):
    """The recipes of a series: the same but for numbers."""
    method, base, names, given, changes = SERIES[name]
    out = []
    for change in changes:
        values = {**given, **change}
        extra = {"parameters": {k: v for k, v in values.items() if k in SHARED}}
        own = {k: v for k, v in values.items() if k not in SHARED}
        out.append(recipe(paths, method, base=base, names=names, extra=extra, **own))
    return out


@pytest.mark.parametrize("name", SERIES)
def test_a_series_of_renders_has_the_bytes_of_the_cpu(opened, paths, name, tmp_path):
    gpus, cpu = opened
    target, expected = None, None
    for turn, document in enumerate(documents(paths, name)):
        target = gpus.render(document, target)
        expected = cpu.render(document, expected)
        assert different(target, expected) == []
        if turn == 0:
            assert different(target, merged(document, tmp_path)) == []
