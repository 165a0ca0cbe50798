"""Experts of one model in several layouts: merged with each other, they give what one layout gives."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fastmerge
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.planning import plan
from fastmerge.recipe import Recipe
from tests.counted import calls
from tests.planning.plans import LINEAR, TIES, make, names
from tests.planning.test_experts import single, stacks
from tests.recipe.fakes import checkpoint

E, I, H = 3, 4, 10
BIASED = ("fused, alternating", "per expert, with biases")


def experts(seed):
    """Matrices of one layer, expert by expert: gate, up, down, and their biases."""
    rng = np.random.default_rng(seed)
    shapes = {"gate": (E, I, H), "up": (E, I, H), "down": (E, H, I), "router": (E, H)}
    shapes |= {"gate_bias": (E, I), "up_bias": (E, I), "down_bias": (E, H)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def per_expert(x, parent, gate, up, down, *, router="gate.weight", bias=False):
    out = {f"{parent}.{router}": x["router"]}
    for e in range(E):
        for leaf, role in ((gate, "gate"), (up, "up"), (down, "down")):
            out[f"{parent}.experts.{e}.{leaf}.weight"] = x[role][e]
            if bias:
                out[f"{parent}.experts.{e}.{leaf}.bias"] = x[f"{role}_bias"][e]
    return out


def fused(x, first, last, router, *, turned=False, woven=False):
    up = np.concatenate([x["gate"], x["up"]], axis=1)
    if woven:
        up = np.stack([x["gate"], x["up"]], axis=2).reshape(E, 2 * I, H)
    out = {first: up, last: x["down"], router: x["router"]}
    if turned:
        out = {n: t.transpose(0, 2, 1) if n != router else t for n, t in out.items()}
    if woven:
        out[f"{first}_bias"] = np.stack([x["gate_bias"], x["up_bias"]], axis=2).reshape(E, 2 * I)
        out[f"{last}_bias"] = x["down_bias"]
    return out


OURS = "gate_proj", "up_proj", "down_proj"
STACKS = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
LAYOUTS = {
    "per expert": lambda x: per_expert(x, "mlp", *OURS),
    "per expert of Mixtral": lambda x: per_expert(x, "block_sparse_moe", "w1", "w3", "w2"),
    "per expert, with biases": lambda x: per_expert(x, "mlp", *OURS, router="router.weight", bias=True),
    "fused": lambda x: fused(x, *STACKS, "mlp.gate.weight"),
    "fused, [in, out]": lambda x: fused(x, *STACKS, "mlp.router.weight", turned=True),
    "fused of Granite": lambda x: fused(
        x, "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight",
        "block_sparse_moe.router.layer.weight",
    ),
    "fused, alternating": lambda x: fused(x, *STACKS, "mlp.router.weight", turned=True, woven=True),
}  # fmt: skip


def spelled(layout, seeds, prefix="model."):
    """The tensors of a model: its layers' experts, and a norm that all layouts call the same."""
    out = {f"{prefix}norm.weight": np.full(H, seeds[0], np.float32)}
    for i, seed in enumerate(seeds):
        out |= {f"{prefix}layers.{i}.{n}": t for n, t in LAYOUTS[layout](experts(seed)).items()}
    return out


def written(path, layout, seeds, kind=None, prefix="model."):
    path.mkdir()
    tensors = {n: np.ascontiguousarray(t) for n, t in spelled(layout, seeds, prefix).items()}
    save_file(tensors, path / "model.safetensors")
    said = {"model_type": kind or ("gpt_oss" if layout in BIASED else "moe"), "num_hidden_layers": 2}
    (path / "config.json").write_text(json.dumps(said))
    return path


def merged(tmp_path, *models, **keys):
    """The tensors of the mean of models, and the plan."""
    weights = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]
    text = {"merge_method": "linear", "models": weights, "dtype": "float32", **keys}
    planned = fastmerge.plan(text)
    fastmerge.merge(planned, tmp_path / "out", device="cpu", memory="400MB")
    return load_file(tmp_path / "out" / "model.safetensors"), planned


def mean(layout, *seeds, prefix="model."):
    first, second = (spelled(layout, s, prefix) for s in seeds)
    return {n: (t.astype(np.float64) + second[n]) / 2 for n, t in first.items()}


def wrong(got, want):
    """Names that only one of both has, and those of other values."""
    far = [n for n in got.keys() & want.keys() if not np.allclose(got[n], want[n], rtol=1e-6, atol=1e-7)]
    return sorted(got.keys() ^ want.keys()) + far


PAIRS = [
    pair for pair in itertools.permutations(LAYOUTS, 2) if not any(p in BIASED for p in pair) or set(pair) == {*BIASED}
]


@pytest.mark.parametrize(("base", "tuned"), PAIRS, ids=map(" from ".join, PAIRS))
def test_every_layout_goes_into_every_other(base, tuned, tmp_path):
    a, b = written(tmp_path / "a", base, (1, 2)), written(tmp_path / "b", tuned, (3, 4))
    got, planned = merged(tmp_path, a, b)
    assert wrong(got, mean(base, (1, 2), (3, 4))) == []
    assert [w for w in planned.warnings if "experts are laid out as" in w and "(2 layers)" in w]
    account = planned.account.models[str(b)]
    assert account.keys() == load_file(b / "model.safetensors").keys()
    assert set(account.values()) == {"merged"}


def test_layouts_and_prefixes_together(tmp_path):
    a = written(tmp_path / "a", "per expert of Mixtral", (1, 2), prefix="model.")
    b = written(tmp_path / "b", "fused", (3, 4), prefix="_orig_mod.")
    got, _ = merged(tmp_path, a, b)
    assert wrong(got, mean("per expert of Mixtral", (1, 2), (3, 4))) == []


@pytest.mark.parametrize(
    ("kind", "given", "layout", "want"),
    [
        ("mixtral", "per expert of Mixtral", "fused", "fused"),
        ("mixtral", "fused", "per-expert", "per expert of Mixtral"),
        ("qwen3_moe", "fused", "per-expert", "per expert"),
        ("qwen3_moe", "fused", "fused", "fused"),
        ("gpt_oss", "per expert, with biases", "fused", "fused, alternating"),
        ("gpt_oss", "fused, alternating", "per-expert", "per expert, with biases"),
    ],
)
def test_the_layout_that_a_recipe_names(kind, given, layout, want, tmp_path):
    a, b = (written(tmp_path / n, given, s, kind) for n, s in (("a", (1, 2)), ("b", (3, 4))))
    got, planned = merged(tmp_path, a, b, layout=layout)
    assert wrong(got, mean(want, (1, 2), (3, 4))) == []
    assert ("transformers reads" in str(planned.warnings)) == (kind == "gpt_oss" and layout == "per-expert")


def test_slices_of_models_in_two_layouts(tmp_path):
    a, b = written(tmp_path / "a", "per expert", (1, 2)), written(tmp_path / "b", "fused", (3, 4))
    slices = [{"sources": [{"model": str(m), "layer_range": [i, i + 1]}]} for m, i in ((a, 0), (b, 1), (a, 1))]
    planned = fastmerge.plan({"merge_method": "passthrough", "slices": slices})
    fastmerge.merge(planned, tmp_path / "out", device="cpu")
    want = spelled("per expert", (1, 4, 2))
    assert wrong(load_file(tmp_path / "out" / "model.safetensors"), want) == []
    assert planned.config["num_hidden_layers"] == 3


def test_one_expert_in_another_type_widens_the_stack(tmp_path):
    a, b = written(tmp_path / "a", "fused", (1, 2)), written(tmp_path / "b", "per expert", (3, 4))
    tensors = load_file(b / "model.safetensors")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.float16)}, b / "model.safetensors")
    got, _ = merged(tmp_path, a, b)
    want = mean("fused", (1, 2), (3, 4))
    rounded = tensors[name].astype(np.float16).astype(np.float64) - tensors[name]
    want["model.layers.0.mlp.experts.gate_up_proj"][1, I:] += rounded / 2
    assert wrong(got, want) == []


def test_numbers_that_are_no_weights_are_not_mixed():
    """Codes of a quantised expert beside floats: no type holds both."""
    norm = {"model.norm.weight": (10,)}
    mixed = checkpoint({n: ("int8" if "experts.1." in n else "bfloat16", s) for n, s in (single() | norm).items()})
    for a, b in ((mixed, checkpoint(stacks() | norm)), (checkpoint(stacks() | norm), mixed)):
        with pytest.raises(CheckpointError, match="experts are fused in one model|types that cannot be merged"):
            make(LINEAR, a=a, b=b)


def test_an_expert_that_is_lost_is_named():
    broken = {n: s for n, s in single().items() if "layers.1.mlp.experts.2.up_proj" not in n}
    norm = {"model.norm.weight": (10,)}
    for a, b in ((single(), broken), (stacks(), broken), (broken, stacks())):
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts|layers\.\*\.mlp\.experts"):
            make(LINEAR, a=checkpoint(a | norm), b=checkpoint(b | norm))


def test_what_lies_beside_experts_is_told_by_shape():
    def model(shapes, beside):
        return checkpoint({"model.norm.weight": (10,), **shapes, **{f"model.layers.{i}.{n}": s for i in (0, 1)
                           for n, s in beside.items()}})  # fmt: skip

    old, new = {"mlp.moe_statics.bias": (4,)}, {"mlp.gate.moe_statics.bias": (4,)}
    made = make(LINEAR, a=model(single(), old), b=model(stacks(), new))
    assert "model.layers.1.mlp.moe_statics.bias" in names(made)
    assert "mlp.gate.moe_statics.bias" in made.warnings[0]
    with pytest.raises(CheckpointError, match="moe_statics"):
        make(LINEAR, a=model(single(), old), b=model(stacks(), {"mlp.gate.moe_statics.bias": (5,)}))
    two = {**new, "mlp.other.bias": (4,)}
    with pytest.raises(CheckpointError, match=r"moe_statics|other"):
        make(LINEAR, a=model(single(), old), b=model(stacks(), two))


def test_the_layout_decides_what_is_trimmed_together():
    models = {n: checkpoint(s | {"model.norm.weight": (10,)}) for n, s in (("base", stacks()), ("a", single()))}
    apart = make(TIES, **models, b=models["a"])
    shapes = {o.name: o.spec.shape for o in apart.ops}
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (4, 12, 10)
    assert len(apart.ops) == 5


def test_a_layout_of_models_without_experts():
    dense = {"model.norm.weight": (10,), "model.layers.0.mlp.down_proj.weight": (4, 4)}
    made = make(LINEAR + "layout: fused\n", a=checkpoint(dense), b=checkpoint(dense))
    assert "no experts" in made.warnings[0]
    assert made.recipe.layout == "fused"


def test_unknown_layouts_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="layout"):
        Recipe.load(LINEAR + "layout: split\n")
    with pytest.raises(RecipeError, match="expected one of base, per-expert, fused; got 'x'"):
        fastmerge.plan(LINEAR, layout="x")


def test_the_same_names_in_one_layout_are_left_alone():
    a, b = (checkpoint(stacks() | {"model.norm.weight": (10,)}) for _ in "ab")
    made = make(LINEAR, a=a, b=b)
    assert made.warnings == ()
    assert all(type(source).__name__ == "FileRange" for op in made.ops for source in op.inputs)


def test_an_expert_costs_a_few_calls():
    """Thousands of experts in two layouts are planned in a second."""
    norm = {"model.norm.weight": (10,)}
    few, many = ((checkpoint(single(layers=n) | norm), checkpoint(stacks(layers=n) | norm)) for n in (20, 40))

    def made(a, b):
        return calls(plan, Recipe.load(LINEAR), models={"a": a, "b": b})

    made(*few)
    extra = (made(*many) - made(*few)) / (20 * 12)
    assert extra < 58, f"{extra} calls for each tensor of an expert"  # 53 in November 2026


def test_the_example_of_the_page(tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "layouts.md").read_text()
    text = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]
    for name, layout, seeds in (
        ("mixtral-fused", "fused", (3, 4)),
        ("mixtral-code", "per expert of Mixtral", (5, 6)),
        ("mixtral", "per expert of Mixtral", (1, 2)),
    ):
        path = written(tmp_path / name, layout, seeds, "mixtral")
        text = re.sub(rf"\b{name}(?=\s+#|\n)", str(path), text)
    fastmerge.merge(text, tmp_path / "out", device="cpu")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(path / "model.safetensors").keys()


def test_layouts_need_no_torch(tmp_path):
    a, b = written(tmp_path / "a", "per expert", (1, 2)), written(tmp_path / "b", "fused, [in, out]", (3, 4))
    text = (
        f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{weight: 1}}\ndtype: float32\n"
    )
    code = "import sys, fastmerge as fm; fm.merge(*sys.argv[1:], device='cpu'); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, text, str(tmp_path / "out")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
