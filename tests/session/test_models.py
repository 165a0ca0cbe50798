"""What a session can hold, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fastmerge as fm
from fastmerge.errors import BackendUnavailable, BudgetError, CheckpointError, RecipeError, ShapeError
from fastmerge.session import models
from tests import tiny
from tests.session.family import different, merged, recipe


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), hidden=32, vocab=70, layers=3)


def states(paths):
    """The state dictionary of each model."""
    return {
        n: {k: t for f in sorted(p.glob("*.safetensors")) for k, t in load_file(f).items()} for n, p in paths.items()
    }


def test_names_stand_for_paths_states_and_modules(paths, tmp_path):
    class Module(torch.nn.Module):
        def state_dict(self, **_):
            return states(paths)["b"]

    held = {"base": paths["base"], "a": states(paths)["a"], "b": Module(), "c": str(paths["c"])}
    named = {n: n for n in paths}
    with fm.Session(held) as session:
        for method, base in (("linear", None), ("ties", "base")):
            extra = {"parameters": {"density": 0.4}} if base else {}
            got = session.render(recipe(named, method, base=base, weight=[0.2, 0.3, 0.4], extra=extra))
            expected = merged(recipe(paths, method, base=base, weight=[0.2, 0.3, 0.4], extra=extra), tmp_path)
            assert different(got, expected) == []


def test_tensors_of_a_caller_are_not_copied(paths):
    held = states(paths)
    with fm.Session({n: held[n] for n in "ab"}) as session:
        name = next(iter(held["a"]))
        held["a"][name].fill_(2.0)
        held["b"][name].fill_(4.0)
        got = session.render(recipe({n: n for n in "ab"}, "linear", names=("a", "b"), weight=0.5))
        assert bool((got[name] == 3.0).all())


def test_an_adapter_is_applied(paths, tmp_path):
    adapter = tiny.adapter(tmp_path / "adapter", "model.layers.1.self_attn.q_proj", 32, 32)
    ref = f"{paths['a']}+{adapter}"
    document = recipe({**paths, "a": ref}, "linear", weight=[0.2, 0.3, 0.5])
    expected = merged(document, tmp_path)
    with fm.Session([ref, paths["b"], paths["c"]]) as session:
        assert different(session.render(document), expected) == []
    with fm.Session({"x": paths["a"], "b": paths["b"], "c": paths["c"]}) as session:
        named = recipe({"a": f"x+{adapter}", "b": "b", "c": "c"}, "linear", weight=[0.2, 0.3, 0.5])
        assert different(session.render(named), expected) == []
        made = list(session._models._buffers)
        assert different(session.render(named), expected) == []
        assert len(session._models._buffers) == len(made)  # applied once
    with fm.Session({"x": states(paths)["a"], "b": paths["b"], "c": paths["c"]}) as session:
        assert different(session.render(named), expected) == []


def test_other_depths_are_rendered_into_tensors_of_their_own(paths, tmp_path):
    source = [{"model": str(paths[n]), "layer_range": r} for n, r in (("a", [0, 2]), ("b", [1, 3]))]
    document = {"merge_method": "passthrough", "slices": [{"sources": [s]} for s in source], "dtype": "bfloat16"}
    with fm.Session([paths["a"], paths["b"]]) as session:
        got = session.render(document)
        assert different(got, merged(document, tmp_path)) == []
        assert {n.split(".")[2] for n in got if ".layers." in n} == set("0123")


def test_stages_are_made_on_the_way(paths, tmp_path):
    documents = [
        f"""
name: first
merge_method: ties
base_model: {paths["base"]}
models: [{{model: {paths["a"]}}}, {{model: {paths["b"]}}}]
parameters: {{weight: 0.5, density: {density}}}
---
merge_method: linear
models:
  - {{model: first, parameters: {{weight: 0.6}}}}
  - {{model: {paths["c"]}, parameters: {{weight: 0.4}}}}
"""
        for density in (0.3, 0.6)
    ]
    with fm.Session(list(paths.values())) as session:
        target = session.render(documents[0])
        for document in documents:
            session.render(document, target)
            assert different(target, merged(document, tmp_path)) == []
    with fm.Session({n: states(paths)[n] if n == "a" else p for n, p in paths.items()}) as session:
        text = documents[1]
        for name, path in paths.items():
            text = text.replace(str(path), name)
        assert different(session.render(text), merged(documents[1], tmp_path)) == []


def test_integers_are_copied_where_all_agree(tmp_path):
    held = {n: {"x": torch.full((5,), i, dtype=torch.bfloat16), "n": torch.tensor([1, 2])} for i, n in enumerate("ab")}
    document = recipe({n: n for n in "ab"}, "linear", names=("a", "b"), dtype=None, weight=0.5)
    with fm.Session(held) as session:
        assert session.render(document)["n"].tolist() == [1, 2]
    held["b"]["n"] = torch.tensor([1, 3])
    with fm.Session(held) as session, pytest.raises(CheckpointError, match="n: int64 tensors are copied"):
        session.render(document)


def test_tensors_that_are_empty_scalars_or_strided(tmp_path):
    wide = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    held = {
        "a": {"x": wide.T, "e": torch.zeros(0, 3), "s": torch.tensor(1.0), "t": wide[:, :2]},
        "b": {"x": torch.ones(6, 4), "e": torch.zeros(0, 3), "s": torch.tensor(3.0), "t": torch.zeros(4, 2)},
    }
    with fm.Session(held) as session:
        got = session.render(recipe({n: n for n in "ab"}, "linear", names=("a", "b"), dtype="float32", weight=0.5))
    assert torch.equal(got["x"], (wide.T + 1) / 2)
    assert torch.equal(got["t"], wide[:, :2] / 2)
    assert got["e"].shape == (0, 3)
    assert got["s"].item() == 2.0


def test_a_path_is_found_however_it_is_written(paths, tmp_path, monkeypatch):
    monkeypatch.chdir(paths["a"].parent)
    document = recipe({"a": "./a", "b": str(paths["b"])}, "linear", names=("a", "b"), weight=0.5)
    with fm.Session([paths["a"], "b/"]) as session:
        assert different(session.render(document), merged(document, tmp_path)) == []


def test_models_that_are_not_there(paths):
    words = f"{paths['c']}.*none of the session's models.*{paths['a']}"
    with fm.Session([paths["a"], paths["b"]]) as session, pytest.raises(RecipeError, match=words):
        session.render(recipe(paths, "linear", weight=0.5))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([], RecipeError, "at least one"),
        ("a", RecipeError, "a list of references"),
        (3, RecipeError, "a list of references"),
        ([{}], RecipeError, "a mapping"),
        ({"a": 3}, RecipeError, "'a': expected a path"),
        ({"a": {"x": 3}}, ShapeError, "model 'a': x: expected a torch tensor"),
        ({"a": {"x": torch.zeros(2, dtype=torch.complex128)}}, ShapeError, "complex128"),
        ({"a": {"x": torch.zeros(2, device="meta")}}, ShapeError, "on meta"),
        (["/nowhere"], CheckpointError, "nowhere"),
        ({"a": "x+y"}, RecipeError, "without an adapter"),
    ],
)
def test_what_is_no_model(given, error, words):
    with pytest.raises(error, match=words):
        fm.Session(given)


def test_devices_that_are_not_the_cpu(paths):
    with pytest.raises(BackendUnavailable, match="device 'cuda:1': "):
        fm.Session([paths["a"]], device="cuda:1")
    with pytest.raises(BackendUnavailable, match="device 'gpu': unknown device"):
        fm.Session([paths["a"]], device="gpu")
    with pytest.raises(BackendUnavailable, match="unknown backend 'fast'"):
        fm.Session([paths["a"]], backend="fast")


def test_the_reference_renders_the_same(paths):
    documents = [
        recipe(paths, "ties", base="base", weight=w, extra={"parameters": {"density": 0.3}}) for w in (0.2, 0.7)
    ]
    opened = [fm.Session(list(paths.values()), backend=backend) for backend in ("reference", "native")]
    targets = [session.render(documents[0]) for session in opened]
    for session, target in zip(opened, targets, strict=True):
        session.render(documents[1], target)
        session.close()
    assert different(*targets) == []


def test_all_problems_are_listed(paths):
    with pytest.raises(CheckpointError, match="2 problems"):
        fm.Session(["/nowhere", paths["a"], "/neither"])


def test_models_that_do_not_fit(paths, monkeypatch):
    monkeypatch.setattr(models, "available", lambda: models.PROCESS + 1000)
    with pytest.raises(BudgetError, match=r"models: \d+ kB of weights do not fit the 1 kB"):
        fm.Session([paths["a"], paths["b"]])


def test_files_are_read_once(paths, monkeypatch):
    read = []
    each = models.each
    monkeypatch.setattr(models, "each", lambda work, rows, **named: read.extend(rows) or each(work, rows, **named))
    with fm.Session({"x": paths["a"], "y": paths["a"], "z": paths["b"]}) as session:
        weights = [f.stat().st_size for n in "ab" for f in paths[n].glob("*.safetensors")]
        assert sum(row[3] for row in read) < sum(weights)  # headers are not
        document = recipe({n: n for n in "xyz"}, "linear", names=("x", "y", "z"), weight=0.5)
        count = len(read)
        session.render(document)
        session.render(document)
        assert len(read) == count


def test_eight_bit_floats_are_widened(paths, tmp_path):
    from safetensors.torch import save_file

    directory = tmp_path / "eight"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3}))
    tensors = {k: t.to(torch.float8_e4m3fn) if "proj" in k else t for k, t in states(paths)["a"].items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    document = recipe({"a": directory, "b": paths["b"]}, "linear", names=("a", "b"), weight=0.5)
    with fm.Session([directory, paths["b"]]) as session:
        assert different(session.render(document), merged(document, tmp_path)) == []
