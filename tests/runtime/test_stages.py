"""Recipes of several documents: the bytes of stage after stage through directories, and nothing of a stage on disk."""

import re
import shutil

import pytest

import fastmerge as fm
from fastmerge.api import merge as engine
from fastmerge.backends.choose import cpu_backend
from fastmerge.errors import BudgetError, FastMergeError, OutputError
from fastmerge.ops import sources
from fastmerge.ops.segments import TILE
from fastmerge.runtime import placement, results
from fastmerge.runtime.budget import need
from fastmerge.runtime.making import making, uncut
from tests import tiny
from tests.checkpoint.shim import evict
from tests.runtime.fake_device import FakeDevice

APART = {"README.md", "merge_report.json", "mergekit_config.yml"}
"""Files that tell how the output was made."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Matrices of two and three tiles of elements."""
    return tiny.family(tmp_path_factory.mktemp("models"), layers=1, hidden=256)


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch):
    monkeypatch.setattr(sources, "PANEL", TILE)
    monkeypatch.setattr(results, "PANEL", TILE)


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
    "row": lambda m: merge(m, "slerp", names="ab", base="a", extra="parameters: {{t: 0.3, scope: row}}"),
    "model": lambda m: merge(m, "ties", extra="parameters: {{trim_scope: model}}", weight=0.6, density=0.4),
    "angles": lambda m: merge(m, "karcher", base=None),
    "definition": lambda m: merge(m, "della", weight=0.6, density=0.4),
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


PAIRS = [(first, last) for first in FIRST for last in LAST if first not in ("definition", "copies")]
PAIRS += [(first, last) for first in ("definition", "copies") for last in ("tensor", "model", "copies")]


@pytest.fixture(scope="module")
def firsts(tmp_path_factory, models):
    """What the first documents give, each merged once."""
    root = tmp_path_factory.mktemp("firsts")
    return {name: fm.merge(text(models).format(), root / name).out for name, text in FIRST.items()}


@pytest.mark.parametrize(("first", "last"), PAIRS)
def test_the_bytes_are_those_of_the_way_through_directories(tmp_path, models, firsts, first, last):
    text = LAST[last](models)
    fm.merge(text.format(first=firsts[first]), tmp_path / "want")
    both = f"name: first\n{FIRST[first](models)}---\n{text}".format(first="first")
    fm.merge(both, tmp_path / "got", memory="64MB")
    want, got = files(tmp_path / "want"), files(tmp_path / "got")
    assert sorted(got) == sorted(want)
    assert [name for name in want if got[name] != want[name]] == []


def test_nothing_of_a_stage_is_written(tmp_path, models):
    both = f"name: first\n{FIRST['tensor'](models)}---\n{LAST['tensor'](models)}".format(first="first")
    fm.merge(both, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_three_deep_with_a_stage_twice_in_one_op(tmp_path, models):
    documents = {
        "first": FIRST["row"](models),
        "second": merge(models, "ties", names="Xb", weight=0.5, density=0.3),
        "last": merge(models, "ties", names="XY", extra="parameters: {{trim_scope: model}}", weight=0.5, density=0.5),
    }
    want, got = ways(tmp_path, documents, memory="64MB", seed=7)
    assert got == want


@pytest.mark.parametrize("shard_size", [300_000, "5GB"])
def test_small_budgets_and_shards(tmp_path, models, shard_size):
    documents = {"first": FIRST["tensor"](models), "last": LAST["base"](models)}
    recipe = f"name: first\n{documents['first']}---\n{documents['last']}".format(first="first")
    with pytest.raises(BudgetError) as refused:
        fm.merge(recipe, tmp_path / "refused", memory=1000)
    least = int(re.search(r"expected >= (\d+) bytes", str(refused.value))[1])
    want, got = ways(tmp_path, documents, memory=least, shard_size=shard_size)
    assert got == want
    assert not (tmp_path / "refused").exists()


def test_slices_of_a_stage_and_of_slices(tmp_path, models):
    def slices(*ranges, model):
        lines = [f"  - sources: [{{{{model: {model}, layer_range: [{a}, {b}]}}}}]" for a, b in ranges]
        return "\n".join(["merge_method: passthrough", "slices:", *lines, "dtype: bfloat16", ""])

    documents = {
        "first": slices((0, 1), (0, 1), (0, 1), model=models["a"]),
        "second": "merge_method: linear\nmodels:\n  - {{model: {first}, parameters: {{weight: [0.1, 0.5, 0.9]}}}}\n",
        "last": slices((1, 3), (0, 2), model="{second}"),
    }
    want, got = ways(tmp_path, documents)
    assert b'"num_hidden_layers": 4' in got["config.json"]
    assert got == want


def test_the_definitions_in_torch_give_the_same(tmp_path, models):
    documents = {"first": FIRST["model"](models), "last": LAST["model"](models)}
    reference = ways(tmp_path / "torch", documents, backend="reference")
    assert reference[0] == reference[1]
    assert reference[0] == ways(tmp_path / "native", documents)[1]


def both(models, first="tensor", last="tensor"):
    """A recipe of two documents."""
    return f"name: first\n{FIRST[first](models)}---\n{LAST[last](models)}".format(first="first")


@pytest.mark.parametrize("fail_at", [0, 4])
def test_an_interrupted_run_goes_on(tmp_path, models, monkeypatch, fail_at):
    recipe = both(models)
    with monkeypatch.context() as patch:
        patch.setattr(placement, "UNIT_ELEMENTS", TILE)
        patch.setattr(placement, "workers", lambda chosen: 1)
        patch.setattr(placement, "CpuDevice", lambda: FakeDevice(fail_at=fail_at))
        with pytest.raises(FastMergeError, match="injected fault"):
            fm.merge(recipe, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    fm.merge(recipe, tmp_path / "out", device="cpu", resume=True)
    fm.merge(recipe, tmp_path / "whole", device="cpu")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("old", "new"), [("weight: 0.4", "weight: 0.6"), ("dtype: bfloat16", "seed: 1\ndtype: bfloat16")]
)
def test_a_run_of_another_stage_is_not_resumed(tmp_path, models, monkeypatch, old, new):
    recipe = both(models, "random")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_extras", stop)
        with pytest.raises(KeyboardInterrupt):
            fm.merge(recipe, tmp_path / "out", device="cpu")
    with pytest.raises(OutputError, match="another recipe, seed, input"):
        fm.merge(recipe.replace(old, new, 1), tmp_path / "out", device="cpu", resume=True)


def test_a_change_of_a_model_of_a_stage_is_seen(tmp_path, models):
    model = shutil.copytree(models["a"], tmp_path / "model")
    recipe = both({**models, "a": model})
    planned = fm.plan(recipe)
    path = model / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert fm.plan(recipe).fingerprint != planned.fingerprint
    with pytest.raises(FastMergeError, match="changed or replaced after its header was read"):
        fm.merge(planned, tmp_path / "out", device="cpu")


def test_what_is_not_in_the_page_cache_is_read_and_made_once(tmp_path, models):
    recipe = both(models, "tensor", "base")
    fm.merge(recipe, tmp_path / "warm", device="cpu")
    evict([path for model in models.values() for path in model.glob("*.safetensors")])
    fm.merge(recipe, tmp_path / "cold", device="cpu")
    assert files(tmp_path / "cold") == files(tmp_path / "warm")


@pytest.mark.parametrize("first", ["tensor", "element", "copies"])
def test_nan_of_a_stage_is_treated_as_by_merging_it(tmp_path, models, first):
    spoilt = tiny.state(1, layers=1, hidden=256)
    spoilt["model.norm.weight"][3] = float("nan")
    broken = {**models, "a": tiny.write(tmp_path / "broken", spoilt, layers=1)}
    documents = {"first": FIRST[first](broken), "last": LAST["element"](models)}
    want, got = ways(tmp_path / "zero", documents, nan="zero")
    assert got == want
    with pytest.raises(OutputError, match="model.norm.weight: 1 NaN or Inf values from its inputs"):
        fm.merge(both(broken, first, "element"), tmp_path / "out", nan="error")


@pytest.mark.parametrize("last", ["element", "tensor", "row"])
@pytest.mark.parametrize("first", ["element", "tensor", "row", "model", "definition"])
def test_what_making_takes_is_counted(tmp_path, models, monkeypatch, first, last):
    taken, real = [], results.Results._memory

    def counting(self, nbytes):
        taken.append(nbytes)
        return real(self, nbytes)

    monkeypatch.setattr(results.Results, "_memory", counting)
    planned = fm.plan(both(models, first, last))
    report = fm.merge(planned, tmp_path / "out", device="cpu")
    chosen = cpu_backend(report.backend)
    counted = need(planned.ops, whole=uncut(planned.ops, chosen), made=making(chosen)).beside
    assert 0 < max(taken) <= counted
