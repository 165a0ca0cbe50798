"""Plans of recipes of several documents: what a stage stands for, what is said of it, and that nothing of it stays."""

import json
import pickle
import tempfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge as fm
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.ops.low_rank import LowRank
from fastmerge.ops.sources import FileRange, Result
from tests import tiny

SHAPE = {"hidden": 16, "vocab": 40}


@pytest.fixture
def models(tmp_path):
    return tiny.family(tmp_path / "models", **SHAPE)


def linear(*models, base=None, extra=""):
    lines = ["merge_method: linear", *([f"base_model: {base}"] if base else []), "models:"]
    return "\n".join([*lines, *(f"  - {{model: {m}, parameters: {{weight: 0.5}}}}" for m in models), extra, ""])


def chained(first, last, *more):
    return "---\n".join([f"name: first\n{first}", *more, last])


def through_directories(tmp_path, first, last):
    """The same in two merges; the last document names the stage ``first``."""
    fm.merge(first, tmp_path / "first")
    fm.merge(last.replace(" first", f" {tmp_path / 'first'}"), tmp_path / "want")
    return files(tmp_path / "want")


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def same(tmp_path, first, last):
    """Files that differ between both ways, but for those that tell how the output was made."""
    want = through_directories(tmp_path, first, last)
    fm.merge(chained(first, last), tmp_path / "got")
    got = files(tmp_path / "got")
    apart = {"README.md", "merge_report.json", "mergekit_config.yml"}
    return sorted(n for n in (want.keys() | got.keys()) - apart if want.get(n) != got.get(n))


def test_every_tensor_of_every_document_is_accounted_for(models):
    a, b, c = (models[n] for n in "abc")
    planned = fm.plan(chained(linear(a, b), linear("first", c), "name: aside\n" + linear(a, c)))
    facts = planned.summary()
    tensors = len(planned.ops)
    assert facts["account"] == {ref: {"merged": tensors} for ref in (f"first: {a}", f"first: {b}", "first", str(c))}
    assert facts["models"] == [str(a), str(b), str(c)]
    assert facts["stages"] == ["first"]
    assert facts["bytes_in"] == 3 * facts["bytes_out"]
    assert [str(c.path) for c in planned.checkpoints] == facts["models"]
    assert [w.partition(": ")[2] for w in facts["warnings"]] == ["name: nothing uses this document: it is not merged"]


def test_what_only_copies_is_read_where_it_is(models):
    a, c = models["a"], models["c"]
    copied = f"merge_method: passthrough\nmodels:\n  - model: {a}\n"
    planned = fm.plan(chained(copied, linear("first", c)))
    assert {type(s) for op in planned.ops for s in op.inputs} == {FileRange}
    planned = fm.plan(chained(linear(a, c), copied.replace(str(a), "first")))
    assert {op.spec.method.name for op in planned.ops} == {"linear"}, "the ops of the stage itself"
    planned = fm.plan(chained(linear(a, c), linear("first", a)))
    assert {tuple(map(type, op.inputs)) for op in planned.ops} == {(Result, FileRange)}


def test_a_plan_goes_to_another_process(models):
    planned = fm.plan(chained(linear(models["a"], models["b"]), linear("first", models["c"])))
    again = pickle.loads(pickle.dumps(planned))
    assert again.fingerprint == planned.fingerprint
    assert again.summary() == planned.summary()


def test_the_directory_for_small_files_goes_with_the_plan(tmp_path, models, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    for name in "ab":
        (models[name] / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
        (models[name] / "generation_config.json").write_text('{"eos_token_id": 1}')
    planned = fm.plan(chained(linear(models["a"], models["b"]), linear("first", models["b"])))
    assert list(scratch.iterdir()) == []
    assert dict(planned.carry)["tokenizer.json"] == models["a"] / "tokenizer.json"
    assert not [text for text in planned.warnings if str(scratch) in text]
    broken = linear("first", models["b"]).replace("0.5", "0.5, t: {bad")
    with pytest.raises(RecipeError):
        fm.plan(chained(linear(models["a"], models["b"]), broken))
    assert list(scratch.iterdir()) == []


def test_configuration_tokenizer_and_template_of_a_stage_go_on(tmp_path, models):
    for name, eos in (("a", 1), ("b", 2), ("c", 3)):
        (models[name] / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}, "added_tokens": []}')
        (models[name] / "tokenizer_config.json").write_text(json.dumps({"chat_template": name}))
        (models[name] / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        (models[name] / "1_Pooling").mkdir()
        (models[name] / "1_Pooling" / "config.json").write_text(json.dumps({"pool": name}))
        (models[name] / "modules.json").write_text(json.dumps([{"path": "1_Pooling"}]))
    a, b, c = (models[n] for n in "abc")
    first = linear(a, c, extra=f"tokenizer_source: {c}\nchat_template: chatml\nout_dtype: float16")
    assert same(tmp_path, first, linear(b, "first", base="first", extra="tokenizer_source: first")) == []


@pytest.mark.parametrize("tie", [True, False])
def test_tied_tensors_of_a_stage(tmp_path, tie):
    paths = []
    for i in range(3):
        tensors = tiny.state(i, **SHAPE)
        if tie:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        config = {"tie_word_embeddings": tie}
        paths.append(tiny.write(tmp_path / f"m{i}", tensors, config=config))
    dare = f"merge_method: dare_linear\nbase_model: {paths[0]}\nparameters: {{weight: 0.5, density: 0.5}}\n"
    last = dare + f"models:\n  - model: first\n  - model: {paths[2]}\n"
    assert same(tmp_path, linear(paths[0], paths[1]), last) == []


def test_an_adapter_on_a_stage(tmp_path, models):
    g = torch.Generator().manual_seed(0)
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    found = {f"{module}.lora_A.weight": (2, 16), f"{module}.lora_B.weight": (16, 2)}
    (tmp_path / "lora").mkdir()
    tensors = {name: torch.randn(shape, generator=g) for name, shape in found.items()}
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    first, last = linear(models["a"], models["b"]), linear(f"first+{tmp_path / 'lora'}", "first", models["c"])
    planned = fm.plan(chained(first, last))
    (op,) = [op for op in planned.ops if isinstance(op.inputs[0], LowRank)]
    assert isinstance(op.inputs[0].base, Result)
    assert op.inputs[0].base.op is op.inputs[1].op
    assert same(tmp_path, first, last) == []


def test_integers_are_compared_over_all_documents(tmp_path):
    paths = []
    for i, steps in enumerate((3, 3, 4)):
        tensors = {"a.weight": torch.randn(4, 4), "steps": torch.tensor([steps])}
        paths.append(tiny.write(tmp_path / f"m{i}", tensors, config={"architectures": None}))
    planned = fm.plan(chained(linear(paths[0], paths[1]), linear("first", paths[0])))
    assert planned.summary()["tensors"]["compared"] == 1
    with pytest.raises(CheckpointError, match="steps: int64 tensors are copied, not merged"):
        fm.merge(chained(linear(paths[0], paths[1]), linear("first", paths[2])), tmp_path / "out")
    fm.merge(planned, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["steps"].tolist() == [3]


def test_problems_and_warnings_name_the_document(tmp_path, models):
    small = tiny.write(tmp_path / "small", tiny.state(0, hidden=8, vocab=40))
    with pytest.raises(CheckpointError) as caught:
        fm.plan(chained(linear(models["a"], small), linear("first", models["c"])))
    assert all(text.startswith("first: ") for text in caught.value.problems)
    planned = fm.plan(chained(linear(models["a"], models["b"], extra="comment: x"), linear("first", models["c"])))
    assert [text.partition(": unknown")[0] for text in planned.warnings] == ["recipe:6: comment"]


def test_all_documents_stand_in_the_output_and_in_the_report(tmp_path, models):
    recipe = chained(linear(models["a"], models["b"]), linear("first", models["c"]))
    fm.merge(recipe, tmp_path / "out")
    text = (tmp_path / "out" / "mergekit_config.yml").read_text()
    shown = fm.Recipe.load(text)
    assert [str(ref) for _, stage in shown.stages for ref in stage.refs] == ["a", "b"]
    assert [str(ref) for ref in shown.refs] == ["first", "c"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert text in card
    assert "* `first`" not in card
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert fm.Recipe.load(report["details"]["recipe"]) == fm.Recipe.load(recipe)
    assert [i["path"] for i in report["details"]["inputs"]] == [str(models[n]) for n in "abc"]


def test_a_seed_holds_for_every_document(tmp_path, models):
    dare = f"merge_method: dare_linear\nbase_model: {models['base']}\nparameters: {{weight: 0.5, density: 0.5}}\n"
    first, last = dare + f"models: [{{model: {models['a']}}}]\n", dare + "models: [{model: first}]\n"
    plans = [fm.plan(chained(first, last), seed=seed) for seed in (0, 1, None)]
    assert plans[0].fingerprint == plans[2].fingerprint != plans[1].fingerprint
    fm.merge(first, tmp_path / "first", seed=1)
    fm.merge(last.replace(" first", f" {tmp_path / 'first'}"), tmp_path / "want", seed=1)
    fm.merge(plans[1], tmp_path / "got")
    want, got = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("want", "got"))
    assert want == got
