"""Whole merges from disk to disk: the right weights, the same bytes however they are computed."""

import hashlib
import json
import os
import shutil
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fastmerge as fm
from fastmerge.checkpoint import Writer
from fastmerge.errors import BudgetError
from fastmerge.runtime import placement
from tests import tiny
from tests.compare import differences
from tests.runtime.fake_device import FakeDevice

RECIPES = {
    "linear": dict(method="linear", base=None, weight=0.4),
    "task_arithmetic": dict(method="task_arithmetic", weight=0.7),
    "slerp": dict(method="slerp", names=("a",), extra="parameters: {t: 0.3}"),
    "slerp rows": dict(method="slerp", names=("a",), extra="parameters: {t: 0.3, scope: row}"),
    "model_stock": dict(method="model_stock"),
    "ties": dict(method="ties", weight=0.5, density=0.3),
    "ties whole model": dict(method="ties", weight=0.5, density=0.3, extra="parameters: {trim_scope: model}"),
    "ties paper": dict(method="ties", extra="preset: paper"),
    "dare_linear": dict(method="dare_linear", weight=0.5, density=0.4),
    "dare_ties": dict(method="dare_ties", weight=0.5, density=0.4),
    "dare_ties paper": dict(method="dare_ties", extra="preset: paper"),
    "passthrough": dict(method="passthrough", names=("a",), base=None),
    "passthrough scaled": dict(method="passthrough", names=("a",), base=None, extra="parameters: {scale: 0.5}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), hidden=96, vocab=1500)


def recipe_of(paths, name, **changes):
    spec = {**RECIPES[name], **changes}
    return tiny.recipe(paths, spec.pop("method"), **spec)


def weights(directory):
    h, files = hashlib.sha256(), sorted(directory.glob("*.safetensors*"))
    assert files, f"no weights in {directory}"
    for path in files:
        h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()


def load(directory):
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_bytes_from_the_reference_any_unit_size_and_any_devices(paths, name, tmp_path, monkeypatch):
    text = recipe_of(paths, name)
    fm.merge(text, tmp_path / "reference", backend="reference")
    fm.merge(text, tmp_path / "native", backend="native")
    assert weights(tmp_path / "native") == weights(tmp_path / "reference")
    monkeypatch.setattr(placement, "UNIT_ELEMENTS", 1 << 16)
    fm.merge(text, tmp_path / "chunks")
    assert weights(tmp_path / "chunks") == weights(tmp_path / "reference")
    fakes = [FakeDevice(name=f"fake:{i}", latency=0.002, seed=i) for i in range(3)]
    monkeypatch.setattr(placement, "workers", lambda chosen: len(fakes))
    monkeypatch.setattr(placement, "CpuDevice", iter(fakes).__next__)
    fm.merge(text, tmp_path / "fake")
    assert weights(tmp_path / "fake") == weights(tmp_path / "reference")
    assert sum(f.uploads for f in fakes) > 0 or "passthrough" in name


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"passthrough"}))  # which sends nothing through kernels
def test_in_memory_is_the_same_as_on_disk(paths, name, tmp_path):
    text = recipe_of(paths, name)
    planned = fm.plan(text)
    fm.merge(planned, tmp_path / "out")
    merged = load(tmp_path / "out")
    spec = RECIPES[name]
    names = [n for n in ("base", *spec.get("names", "abc")) if n != "base" or spec.get("base", "base")]
    states = {n: load(paths[n]) for n in names}
    method = next(op.spec.method for op in planned.ops if op.spec.grain != "copy")
    values = {p.name: getattr(method, p.field) for p in method.params}
    parameters = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    preset = "paper" if "paper" in name else None
    base = "base" if spec.get("base", "base") else None
    got = fm.merge_state_dicts(states, spec["method"], parameters=parameters, base=base, preset=preset)
    assert differences(got, merged) == []


def test_the_output_directory_is_what_a_user_expects(paths, tmp_path):
    out = tmp_path / "out"
    os.umask(0o022)
    report = fm.merge(recipe_of(paths, "linear"), out)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "merge_report.json",
        "mergekit_config.yml",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o644
    with safe_open(out / "model.safetensors", "pt") as f:
        assert f.metadata()["format"] == "pt"
        text = json.dumps(f.metadata())
    assert str(tmp_path) not in text, "no paths in the shards"
    assert str(paths["a"]) not in text
    assert "linear" in text
    facts = json.loads((out / "merge_report.json").read_text())
    assert facts["tensors"] == report.tensors == len(load(out))
    assert report.bytes_written == sum(t.numel() * 2 for t in load(out).values())
    assert not [p for p in tmp_path.iterdir() if p != out]


def test_files_in_directories_and_no_paths_of_this_machine(paths, tmp_path):
    model = tmp_path / "secret" / "a `# b`"
    shutil.copytree(paths["a"], model)
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (model / "modules.json").write_text('[{"path": "1_Pooling"}]')
    recipe = {"merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": 1}} for p in
              (model, paths["b"])]}  # fmt: skip
    out = tmp_path / "out\n# c"
    report = fm.merge(recipe, out)
    assert (out / "1_Pooling" / "config.json").read_bytes() == (model / "1_Pooling" / "config.json").read_bytes()
    for name in ("README.md", "mergekit_config.yml", "config.json"):
        text = (out / name).read_text()
        assert str(tmp_path.parent) not in text
        assert "\n# c" not in text
        assert "pypi" not in text
    assert str(model) in report.details["recipe"], "the report may hold paths"
    assert "* `` a `# b` ``" in (out / "README.md").read_text()
    assert set(report.account) == {"counts", "dropped"}


def test_shards_have_an_index_and_load(paths, tmp_path):
    fm.merge(recipe_of(paths, "linear"), tmp_path / "one")
    fm.merge(recipe_of(paths, "linear"), tmp_path / "many", shard_size="300KB")
    names = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert index["weight_map"].keys() == one.keys() == many.keys()
    assert differences(many, one) == []


def test_the_right_weights(paths, tmp_path):
    fm.merge(recipe_of(paths, "linear"), tmp_path / "out")
    states = [load(paths[n]) for n in "abc"]
    out = load(tmp_path / "out")
    assert set(out) == set(states[0])
    for key, tensor in out.items():
        want = sum(s[key].double() for s in states) / 3
        assert (tensor.double() - want).abs().max() <= want.abs().max() * 2**-8, key


def test_out_dtype_and_mixed_inputs(paths, tmp_path):
    tiny.write(tmp_path / "half", {k: v.half() for k, v in load(paths["a"]).items()})
    tiny.write(tmp_path / "full", {k: v.float() for k, v in load(paths["b"]).items()})
    text = tiny.recipe(
        {"a": tmp_path / "half", "b": tmp_path / "full", "c": paths["c"]},
        "linear",
        base=None,
        dtype="float32",
        weight=1.0,
    )
    fm.merge(text, tmp_path / "out")
    fm.merge(text, tmp_path / "reference", backend="reference")
    assert weights(tmp_path / "out") == weights(tmp_path / "reference")
    assert all(t.dtype == torch.float32 for t in load(tmp_path / "out").values())


def test_integer_buffers_are_copied_if_equal_else_refused(paths, tmp_path):
    for name, offset in (("x", 0), ("y", 0), ("z", 1)):
        tensors = {**load(paths["a"]), "model.position_ids": torch.arange(10) + offset}
        tiny.write(tmp_path / name, tensors)
    models = {"a": tmp_path / "x", "b": tmp_path / "y", "c": tmp_path / "z"}
    fm.merge(tiny.recipe(models, "linear", names=("a", "b"), base=None, weight=1.0), tmp_path / "good")
    assert torch.equal(load(tmp_path / "good")["model.position_ids"], torch.arange(10))
    with pytest.raises(fm.CheckpointError, match="position_ids"):
        fm.merge(tiny.recipe(models, "linear", base=None, weight=1.0), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def poisoned(paths, tmp_path, value):
    tensors = load(paths["a"])
    tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
    tensors["model.norm.weight"][3] = value
    return {**paths, "a": tiny.write(tmp_path / "poisoned", tensors)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_an_input_is_reported_refused_or_zeroed(paths, tmp_path, value):
    text = recipe_of(poisoned(paths, tmp_path, value), "linear")
    report = fm.merge(text, tmp_path / "warn")
    assert report.nonfinite == {"model.norm.weight": 1}
    assert any("model.norm.weight" in w for w in report.warnings)
    with pytest.raises(fm.OutputError, match="model.norm.weight"):
        fm.merge(text, tmp_path / "error", nan="error")
    fm.merge(text, tmp_path / "zero", nan="zero")
    got = load(tmp_path / "zero")["model.norm.weight"]
    assert got[3] == 0
    assert torch.isfinite(got).all()


def test_an_overflow_that_the_merge_made_is_an_error(paths, tmp_path):
    states = {n: {k: v * 1e5 for k, v in load(paths[n]).items()} for n in "ab"}
    models = {n: tiny.write(tmp_path / n, s) for n, s in states.items()}
    text = tiny.recipe(
        models,
        "linear",
        names=("a", "b"),
        base=None,
        dtype="float16",
        weight=1000.0,
        extra="parameters: {normalize: false}",
    )
    with pytest.raises(fm.OutputError, match="finite inputs"):
        fm.merge(text, tmp_path / "out")


@pytest.mark.parametrize("unit", [1 << 16, 1 << 20])
def test_an_overflow_is_an_error_beside_a_nan_too(paths, tmp_path, monkeypatch, unit):
    monkeypatch.setattr(placement, "UNIT_ELEMENTS", unit)
    big = {k: torch.full_like(v, 1e4) for k, v in load(paths["a"]).items()}
    big["lm_head.weight"][0, 0] = float("nan")
    models = {n: tiny.write(tmp_path / n, big) for n in "ab"}
    extra = "parameters: {normalize: false}"
    text = tiny.recipe(models, "linear", names=("a", "b"), base=None, dtype="float16", weight=100.0, extra=extra)
    with pytest.raises(fm.OutputError, match="finite inputs"):
        fm.merge(text, tmp_path / "out")


def test_copied_tensors_follow_the_nan_policy(paths, tmp_path):
    text = recipe_of(poisoned(paths, tmp_path, float("nan")), "passthrough")
    fm.merge(text, tmp_path / "warn")
    assert load(tmp_path / "warn")["model.norm.weight"].isnan().sum() == 1
    with pytest.raises(fm.OutputError, match="model.norm.weight"):
        fm.merge(text, tmp_path / "error", nan="error")
    report = fm.merge(text, tmp_path / "zero", nan="zero")
    assert load(tmp_path / "zero")["model.norm.weight"].isnan().sum() == 0
    assert report.nonfinite == {"model.norm.weight": 1}
    shutil.rmtree(tmp_path / "zero")
    text = recipe_of(poisoned(paths, tmp_path / "again", float("nan")), "linear")
    interrupted(text, tmp_path / "zero", nan="warn")
    with pytest.raises(fm.OutputError, match="another"):
        fm.merge(text, tmp_path / "zero", nan="zero", resume=True)


def interrupted(text, out, **how):
    """A merge that fails at its very end, with everything written."""
    from fastmerge.checkpoint.writer import Writer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "commit", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fm.merge(text, out, **how)


def test_rows_too_many_for_the_budget_are_refused(tmp_path):
    models = {n: tiny.write(tmp_path / n, {"w": torch.randn(400_000, 3).bfloat16()}) for n in ("a", "base")}
    text = tiny.recipe(models, "slerp", names=("a",), extra="parameters: {t: 0.5, scope: row}")
    fm.merge(text, tmp_path / "out", memory="1GB")
    with pytest.raises(fm.BudgetError, match="by row"):
        fm.merge(text, tmp_path / "small", memory="100MB")


def test_an_input_that_changes_under_the_merge_is_noticed(paths, tmp_path, monkeypatch):
    model = tiny.write(tmp_path / "moving", load(paths["a"]))
    planned = fm.plan(recipe_of({**paths, "a": model}, "linear"))
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(fm.CheckpointError, match="model.safetensors"):
        fm.merge(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_stack_from_two_models(paths, tmp_path):
    text = f"""
merge_method: passthrough
slices:
  - sources: [{{model: {paths["a"]}, layer_range: [0, 2]}}]
  - sources: [{{model: {paths["b"]}, layer_range: [1, 2]}}]
dtype: bfloat16
"""
    fm.merge(text, tmp_path / "out")
    a, b, out = load(paths["a"]), load(paths["b"]), load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    ends = {n: (a if "embed" in n else b)[n] for n in a if ".layers." not in n}
    below = {n: t for n, t in a.items() if ".layers." in n}
    above = {n.replace(".layers.1.", ".layers.2."): t for n, t in b.items() if ".layers.1." in n}
    assert differences(out, {**ends, **below, **above}) == []


def test_seeds_change_dare_and_nothing_else_does(paths, tmp_path):
    text = recipe_of(paths, "dare_linear")
    one, two, same = (tmp_path / n for n in ("one", "two", "same"))
    fm.merge(text, one, seed=1)
    fm.merge(text, two, seed=2)
    fm.merge(text, same, seed=1)
    assert weights(one) == weights(same)
    assert weights(one) != weights(two)
    kept = np.concatenate([(load(one)[k] != load(paths["base"])[k]).numpy().ravel() for k in load(one)])
    assert 0.3 < kept.mean() < 1.0


def test_a_budget_that_is_refused_leaves_an_interrupted_run_alone(tmp_path):
    text = tiny.recipe(tiny.family(tmp_path), "linear", base=None, weight=1)
    planned = fm.plan(text)
    Writer(tmp_path / "out", planned.layout, fingerprint=planned.fingerprint).abort()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BudgetError, match="expected >="):
        fm.merge(text, tmp_path / "out", memory="1KB", device="cpu")
    assert sorted(tmp_path.rglob("*")) == before
    assert len(before) > len(planned.checkpoints)


def test_budgets_may_be_numbers_and_devices_torch_devices(paths, tmp_path):
    text = recipe_of(paths, "linear")
    report = fm.merge(text, tmp_path / "out", memory=2e9, max_vram=1e9, shard_size=5e9, device=torch.device("cpu"))
    assert set(report.devices) == {"cpu"}
    with pytest.raises(fm.RecipeError, match="size nan: expected a number of bytes"):
        fm.merge(text, tmp_path / "none", memory=float("nan"))
    with pytest.raises(fm.BackendUnavailable, match="unknown device 'meta'"):
        fm.merge(text, tmp_path / "none", device=torch.device("meta"))
