"""Plans from made-up headers: sources, order, types, fingerprints."""

import json
import subprocess
import sys

import pytest

from fastmerge.dtypes import BF16
from fastmerge.errors import CheckpointError, ShapeError
from fastmerge.keys import tensor_key
from fastmerge.ops.made import Wide
from fastmerge.ops.sources import FileRange
from fastmerge.ops.spec import Op, Spec
from fastmerge.planning import Plan, plan
from fastmerge.recipe import Recipe
from tests.counted import calls
from tests.planning.plans import LINEAR, TIES, by_name, make, method_of, models_of, names, tensors_of
from tests.recipe.fakes import checkpoint, llama


def test_a_plan_is_made_of_values():
    made = make(TIES, base=llama(), a=llama(), b=llama())
    assert isinstance(made, Plan)
    out = by_name(made)["model.layers.2.mlp.down_proj.weight"]
    assert isinstance(out, Op)
    assert all(isinstance(source, FileRange) for source in out.inputs)
    assert tensors_of(out) == [out.name] * 3
    assert models_of(out) == (0, 1, 2)
    assert out.key == 0, "TIES draws no random numbers"
    assert out.targets == (made.layout.places[out.name],)
    spec = out.spec
    assert isinstance(spec, Spec)
    assert (method_of(out), spec.shape, spec.has_base, spec.models) == ("ties", (8, 24), True, (0, 1))
    assert [d.name for d in spec.dtypes] == ["bfloat16"] * 3
    assert spec.method.normalize is True
    assert spec.method.density == (0.5, 0.5)
    assert spec is by_name(made)["model.layers.0.mlp.down_proj.weight"].spec
    assert made.layout.places[out.name].nbytes == 8 * 24 * 2


def test_outputs_follow_the_reference_models_file():
    base = llama(12)
    made = make(TIES, base=base, a=llama(12), b=llama(12))
    assert names(made) == list(base.tensors)
    backwards = checkpoint(dict(reversed([(n, i.shape) for n, i in llama(12).tensors.items()])))
    assert names(make(LINEAR, a=backwards, b=llama(12))) == list(backwards.tensors)
    assert names(make(LINEAR + "base_model: b\n", a=backwards, b=llama(12))) == list(llama(12).tensors)


def test_outputs_are_in_the_order_of_their_bytes_whatever_their_types():
    mixed = {"a": ("bfloat16", (3,)), "b": ("float32", (3,)), "c": ("int64", (2,)), "d": ("bfloat16", ())}
    made = make(LINEAR, a=checkpoint(mixed), b=checkpoint(mixed))
    assert names(made) == ["c", "b", "a", "d"]


def test_base_comes_first_even_where_it_is_listed_later():
    text = """
merge_method: ties
base_model: b
models: [{model: a, parameters: {weight: 2}}, {model: b}, {model: c, parameters: {weight: 3}}]
"""
    made = make(text, a=llama(), b=llama(), c=llama())
    out = made.ops[0]
    assert models_of(out) == (0, 1, 2)
    assert [str(r) for r in made.recipe.refs] == ["b", "a", "c"]
    assert out.spec.method.weight == (2.0, 3.0)
    assert out.spec.models == (0, 1)


def test_a_base_is_an_input_where_the_method_has_none():
    made = make(LINEAR + "base_model: c\n", a=llama(), b=llama(), c=llama())
    out = made.ops[0]
    assert [str(made.recipe.refs[m]) for m in models_of(out)] == ["a", "b", "c"]
    assert not out.spec.has_base
    assert len(out.spec.method.weight) == 3
    assert out.spec.models == (0, 1, 2)


def test_slerp_between_two_models_beside_a_base():
    text = """
merge_method: slerp
base_model: base
models: [{model: a, parameters: {t: 0.25}}, {model: b, parameters: {t: 0.25}}]
"""
    made = make(text, base=llama(config={"num_hidden_layers": 4, "who": "base"}), a=llama(), b=llama())
    out = made.ops[0]
    assert [str(made.recipe.refs[m]) for m in models_of(out)] == ["a", "b"]
    assert out.spec.has_base
    assert out.spec.method.t == 0.25
    assert made.config["who"] == "base"
    assert "configuration and tokenizer only; t = 0 is 'a'" in made.warnings[0]


@pytest.mark.parametrize(
    ("kinds", "extra", "want"),
    [
        (("bfloat16", "bfloat16"), "", "bfloat16"),
        (("bfloat16", "float16"), "", "float32"),
        (("float32", "bfloat16"), "", "float32"),
        (("float64", "bfloat16"), "", "float64"),
        (("bfloat16", "float16"), "dtype: float16\n", "float16"),
        (("bfloat16", "bfloat16"), "dtype: float16\nout_dtype: float32\n", "float32"),
        (("float32", "float32"), "dtype: torch.bfloat16\n", "bfloat16"),
    ],
)
def test_output_types(kinds, extra, want):
    made = make(LINEAR + extra, a=llama(dtype=kinds[0]), b=llama(dtype=kinds[1]))
    out = made.ops[0]
    assert out.spec.out_dtype.name == want
    assert [d.name for d in out.spec.dtypes] == list(kinds)
    assert made.config["torch_dtype"] == want


def test_a_type_that_the_configuration_calls_dtype():
    config = {"num_hidden_layers": 4, "dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    made = make(LINEAR + "dtype: float16\n", a=llama(config=config), b=llama())
    assert made.config == {**config, "dtype": "float16", "text_config": {"dtype": "float16"}}
    assert config["dtype"] == "bfloat16"


def test_integers_are_copied_and_compared():
    extra = {"ids": ("int64", (10,)), "mask": ("bool", (4,))}
    made = make(LINEAR + "dtype: float32\n", a=llama(extra=extra), b=llama(extra=extra))
    out = by_name(made)["ids"]
    assert (method_of(out), out.spec.out_dtype.name) == (None, "int64")
    assert models_of(out) == (0, 1), "the first is copied, the other compared"
    assert made.summary()["tensors"]["compared"] == 2


def test_types_that_do_not_go_together():
    with pytest.raises(CheckpointError, match=r"ids: types that cannot be merged: 'a' int64, 'b' int32"):
        make(LINEAR, a=llama(extra={"ids": ("int64", (2,))}), b=llama(extra={"ids": ("int32", (2,))}))
    with pytest.raises(CheckpointError, match="'a' bool, 'b' bfloat16"):
        make(LINEAR, a=llama(extra={"ids": ("bool", (2,))}), b=llama(extra={"ids": (2,)}))


def test_fp8_is_widened_where_anything_is_computed():
    for kind in ("float8_e4m3fn", "float8_e5m2"):
        fp8 = {"w": (kind, (4, 4))}
        out = by_name(make(LINEAR, a=llama(extra=fp8), b=llama(extra=fp8)))["w"]
        assert [type(source) for source in out.inputs] == [Wide, Wide]
        assert (out.spec.dtypes, out.spec.out_dtype) == ((BF16, BF16), BF16)
        copy = "merge_method: passthrough\nmodels: [{model: a}]\n"
        assert method_of(by_name(make(copy, a=llama(extra=fp8)))["w"]) is None
        converted = by_name(make(copy + "dtype: bfloat16\n", a=llama(extra=fp8)))["w"]
        assert (method_of(converted), converted.spec.out_dtype) == ("passthrough", BF16)


def test_passthrough_copies_converts_or_scales():
    text = "merge_method: passthrough\nmodels: [{model: a}]\n"
    assert all(method_of(o) is None for o in make(text, a=llama()).ops)
    assert all(method_of(o) is None for o in make(text + "dtype: bfloat16\n", a=llama()).ops)
    converted = make(text + "dtype: float32\n", a=llama())
    assert all(method_of(o) == "passthrough" and o.spec.method.scale[0] is None for o in converted.ops)
    assert converted.summary()["tensors"]["converted"] == len(converted.ops)
    scaled = make(text + "parameters: {scale: [{filter: down_proj, value: 0.0}]}\n", a=llama())
    assert {o.name for o in scaled.ops if method_of(o)} == {n for n in names(scaled) if "down_proj" in n}


def test_shapes_that_differ_are_all_listed():
    with pytest.raises(ShapeError) as e:
        make(TIES, base=llama(), a=llama(vocab=33), b=llama())
    (only,) = e.value.problems
    assert only.startswith(
        "lm_head.weight, model.embed_tokens.weight (2 tensors): shapes differ: 'base' [32, 8], 'a' [33, 8], "
        "'b' [32, 8]; vocabularies of different size"
    )
    with pytest.raises(ShapeError, match=r"input_layernorm.weight: shapes differ: 'a' \[8\], 'b' \[9\]$") as e:
        make(
            LINEAR,
            a=llama(1),
            b=checkpoint(
                {**{n: i.shape for n, i in llama(1).tensors.items()}, "model.layers.0.input_layernorm.weight": (9,)}
            ),
        )
    many = {f"t{i}": (i + 1,) for i in range(500)}
    with pytest.raises(ShapeError, match="and 250 more"):
        make(LINEAR, a=checkpoint(many), b=checkpoint({n: (s[0] + 1,) for n, s in many.items()}))


def test_scalars_and_empty_tensors():
    odd = {"s": (), "e": (0, 4), "x": (3,)}
    made = make(LINEAR, a=checkpoint(odd), b=checkpoint(odd))
    assert [(o.name, o.spec.numel) for o in made.ops] == [("e", 0), ("s", 1), ("x", 3)]


def test_no_configuration_is_no_configuration():
    bare = checkpoint({"x": (2,)})
    assert make(LINEAR, a=bare, b=bare).config is None


def test_fingerprints():
    a, b, other = llama(), llama(), llama(hidden=16)
    first = make(LINEAR, a=a, b=b)
    assert make(LINEAR, a=a, b=b).fingerprint == first.fingerprint
    assert make(LINEAR + "seed: 0\n", a=a, b=b).fingerprint == first.fingerprint
    recipe = Recipe.load(LINEAR)
    models = {"a": a, "b": b}
    changed = [
        plan(recipe, models=models, seed=1),
        plan(recipe, models=models, shard_size=1000),
        make(LINEAR.replace("weight: 1", "weight: 2"), a=a, b=b),
        make(LINEAR + "dtype: float32\n", a=a, b=b),
        make(LINEAR, a=other, b=other),
        make(LINEAR, a=llama(config={"num_hidden_layers": 4, "x": 1}), b=b),
    ]
    assert len({first.fingerprint, *(c.fingerprint for c in changed)}) == len(changed) + 1
    assert make(LINEAR + "seed: 1\n", a=a, b=b).fingerprint == changed[0].fingerprint
    assert plan(recipe, models=models, seed=0).seed == 0


def test_the_seed_keys_the_tensors_and_the_command_wins():
    text = TIES.replace("merge_method: ties", "merge_method: dare_ties") + "seed: 5\n"
    three = {n: llama() for n in ("base", "a", "b")}
    made = plan(Recipe.load(text), models=three, seed=7)
    assert made.seed == 7
    assert [op.key for op in made.ops] == [tensor_key(7, op.name) for op in made.ops]
    assert make(text, **three).ops[0].key == tensor_key(5, made.ops[0].name)
    assert make(LINEAR + "seed: 5\n", a=llama(), b=llama()).seed == 5


def test_shards_carry_the_recipe_and_no_paths(tmp_path):
    text = LINEAR.replace("model: a", f"model: {tmp_path}/a")
    made = make(text, **{f"{tmp_path}/a": llama(path=str(tmp_path)), "b": llama()})
    header = made.layout.shards[0].header
    assert str(tmp_path).encode() not in header
    assert b"fastmerge_recipe" in header
    assert made.checkpoints[0].identity.encode() in header


def test_summary():
    found = make(TIES, base=llama(), a=llama(), b=llama()).summary()
    assert json.loads(json.dumps(found)) == found
    total = sum(i.nbytes for i in llama().tensors.values())
    assert (found["bytes_in"], found["bytes_out"], found["bytes_copied"], found["shards"]) == (3 * total, total, 0, 1)
    assert found["tensors"] == {"merged": 15, "converted": 0, "copied": 0, "compared": 0}


def test_models_that_cannot_be_opened_are_named_together(tmp_path):
    recipe = Recipe.load(LINEAR.replace("model: a", f"model: {tmp_path}/x").replace("model: b", f"model: {tmp_path}/y"))
    with pytest.raises(CheckpointError) as e:
        plan(recipe)
    assert len(e.value.problems) == 2


def mixture(layers):
    """A model of 128 experts a layer: the largest that people merge have 47."""
    moe = {"model.embed_tokens.weight": (64, 8), "lm_head.weight": (64, 8), "model.norm.weight": (8,)}
    for i in range(layers):
        moe |= {
            f"model.layers.{i}.mlp.experts.{e}.{w}_proj.weight": (8, 8)
            for e in range(128)
            for w in ("up", "gate", "down")
        }
    return checkpoint(moe, config={"num_hidden_layers": layers})


def test_a_tensor_of_four_models_costs_a_few_calls():
    text = """
merge_method: ties
base_model: base
models: [{model: a}, {model: b}, {model: c}]
parameters:
  weight: [{filter: up_proj, value: [0, 0.5, 1]}, {value: 0.5}]
  density: [1, 0.5]
"""
    recipe = Recipe.load(text)
    few, many = ({n: mixture(layers) for n in ("base", "a", "b", "c")} for layers in (2, 12))
    assert len(plan(recipe, models=many).ops) == 12 * 384 + 3
    assert calls(plan, recipe, models=many) - calls(plan, recipe, models=few) < 45 * 3840  # 39 in November 2026


def test_planning_imports_nothing_heavy():
    heavy = {"torch", "huggingface_hub", "transformers", "safetensors", "rich"}
    code = f"import sys, fastmerge.planning; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
