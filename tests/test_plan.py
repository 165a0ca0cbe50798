"""Plans from made-up headers: sources, order, types, parameters, policies, slices, configuration."""

import json
import subprocess
import sys
import time

import pytest

from fastmerge.errors import CheckpointError, RecipeError, ShapeError
from fastmerge.methods import METHODS
from fastmerge.philox import tensor_key
from fastmerge.planning import Output, Plan, Source, plan
from fastmerge.planning.structure import structure
from fastmerge.recipe import Recipe
from tests.recipe.fakes import checkpoint, llama

LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
TIES = "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, density: 0.5}\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n"
STOCK = "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"


def make(text, **models):
    recipe = Recipe.load(text)
    return plan(recipe, models={str(r): models[str(r)] for r in recipe.refs})


def names(made):
    return [o.name for o in made.outputs]


def by_name(made):
    return {o.name: o for o in made.outputs}


def test_a_plan_is_made_of_values():
    made = make(TIES, base=llama(), a=llama(), b=llama())
    assert isinstance(made, Plan)
    out = by_name(made)["model.layers.2.mlp.down_proj.weight"]
    assert isinstance(out, Output)
    assert isinstance(out.sources[0], Source)
    assert [s.model for s in out.sources] == [0, 1, 2]
    assert out.method is METHODS["ties"]
    group = out.group
    assert (group.name, group.shape, group.has_base, group.indices) == (out.name, (8, 24), True, (0, 1))
    assert [d.name for d in group.dtypes] == ["bfloat16"] * 3
    assert group.params["normalize"] is True
    assert [m["density"] for m in group.models] == [0.5, 0.5]
    assert group.key == tensor_key(0, out.name)
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
    group = made.outputs[0].group
    assert [s.model for s in made.outputs[0].sources] == [0, 1, 2]
    assert [str(r) for r in made.recipe.refs] == ["b", "a", "c"]
    assert [m["weight"] for m in group.models] == [2.0, 3.0]
    assert group.indices == (0, 1)


def test_a_base_is_an_input_where_the_method_has_none():
    made = make(LINEAR + "base_model: c\n", a=llama(), b=llama(), c=llama())
    out = made.outputs[0]
    assert [str(made.recipe.refs[s.model]) for s in out.sources] == ["a", "b", "c"]
    assert not out.group.has_base
    assert len(out.group.models) == 3
    assert out.group.indices == (0, 1, 2)


def test_slerp_between_two_models_beside_a_base():
    text = """
merge_method: slerp
base_model: base
models: [{model: a, parameters: {t: 0.25}}, {model: b, parameters: {t: 0.25}}]
"""
    made = make(text, base=llama(config={"num_hidden_layers": 4, "who": "base"}), a=llama(), b=llama())
    out = made.outputs[0]
    assert [str(made.recipe.refs[s.model]) for s in out.sources] == ["a", "b"]
    assert out.group.has_base
    assert out.group.params["t"] == 0.25
    assert made.config["who"] == "base"
    assert "configuration and tokenizer only; t = 0 is 'a'" in made.warnings[0]


# Types


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
    out = made.outputs[0]
    assert out.dtype.name == out.group.out_dtype.name == want
    assert [d.name for d in out.group.dtypes] == list(kinds)
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
    assert (out.method, out.group, out.dtype.name) == (None, None, "int64")
    assert [s.model for s in out.sources] == [0]
    assert [s.model for s in out.compare] == [1]
    assert made.summary()["tensors"]["compared"] == 2


def test_types_that_do_not_go_together():
    with pytest.raises(CheckpointError, match=r"ids: types that cannot be merged: 'a' int64, 'b' int32"):
        make(LINEAR, a=llama(extra={"ids": ("int64", (2,))}), b=llama(extra={"ids": ("int32", (2,))}))
    with pytest.raises(CheckpointError, match="'a' bool, 'b' bfloat16"):
        make(LINEAR, a=llama(extra={"ids": ("bool", (2,))}), b=llama(extra={"ids": (2,)}))


def test_fp8_is_refused_where_anything_would_be_computed():
    fp8 = {"w": ("float8_e4m3fn", (4, 4))}
    with pytest.raises(CheckpointError, match="w: float8_e4m3fn weights need their scales"):
        make(LINEAR, a=llama(extra=fp8), b=llama(extra=fp8))
    copy = "merge_method: passthrough\nmodels: [{model: a}]\n"
    assert by_name(make(copy, a=llama(extra=fp8)))["w"].method is None
    with pytest.raises(CheckpointError, match="float8"):
        make(copy + "dtype: bfloat16\n", a=llama(extra=fp8))


def test_passthrough_copies_converts_or_scales():
    text = "merge_method: passthrough\nmodels: [{model: a}]\n"
    assert all(o.method is None and o.group is None for o in make(text, a=llama()).outputs)
    assert all(o.method is None for o in make(text + "dtype: bfloat16\n", a=llama()).outputs)
    converted = make(text + "dtype: float32\n", a=llama())
    assert all(o.method is METHODS["passthrough"] and o.group.models[0]["scale"] is None for o in converted.outputs)
    assert converted.summary()["tensors"]["converted"] == len(converted.outputs)
    scaled = make(text + "parameters: {scale: [{filter: down_proj, value: 0.0}]}\n", a=llama())
    assert {o.name for o in scaled.outputs if o.method} == {n for n in names(scaled) if "down_proj" in n}


# Shapes


def test_shapes_that_differ_are_all_listed():
    with pytest.raises(ShapeError) as e:
        make(TIES, base=llama(), a=llama(vocab=33), b=llama())
    assert len(e.value.problems) == 2
    assert (
        "lm_head.weight: shapes differ: 'base' [32, 8], 'a' [33, 8], 'b' [32, 8]; vocabularies of different size"
        in str(e.value)
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
    with pytest.raises(ShapeError, match=r"\.\.\. and 300 more"):
        make(LINEAR, a=checkpoint(many), b=checkpoint({n: (s[0] + 1,) for n, s in many.items()}))


def test_scalars_and_empty_tensors():
    odd = {"s": (), "e": (0, 4), "x": (3,)}
    made = make(LINEAR, a=checkpoint(odd), b=checkpoint(odd))
    assert [(o.name, o.group.numel) for o in made.outputs] == [("s", 1), ("e", 0), ("x", 3)]


# Missing tensors


def without(model, *parts):
    kept = {n: (i.dtype.name, i.shape) for n, i in model.tensors.items() if not any(p in n for p in parts)}
    return checkpoint(kept, config=dict(model.config))


def test_methods_without_a_base_merge_what_is_there():
    extra = {"bias": (8,)}
    made = make(LINEAR, a=llama(extra=extra), b=llama())
    out = by_name(made)["bias"]
    assert (out.method, len(out.sources), len(out.group.models)) == (METHODS["linear"], 1, 1)
    assert made.warnings == ("missing from 'b': bias: the others are merged",)
    text = LINEAR.replace("{model: b}", "{model: b}, {model: c}")
    made = make(text, a=llama(extra=extra), b=llama(), c=llama(extra=extra))
    out = by_name(made)["bias"]
    assert [s.model for s in out.sources] == [0, 2]
    assert out.group.indices == (0, 2)
    assert len(out.group.models) == 2
    assert made.warnings == ("missing from 'b': bias: the others are merged",)


def test_tensors_that_the_first_model_lacks_come_last():
    made = make(LINEAR, a=llama(), b=llama(extra={"bias": (8,)}))
    assert names(made)[-1] == "bias"


def test_the_base_must_have_it():
    with pytest.raises(CheckpointError, match="bias: missing from 'b', 'base': the base must have it"):
        make(TIES, base=llama(), a=llama(extra={"bias": (8,)}), b=llama())


def test_the_base_alone_passes_through_and_others_are_skipped():
    extra = {"bias": (8,)}
    made = make(TIES + "dtype: float32\n", base=llama(extra=extra), a=llama(), b=llama())
    out = by_name(made)["bias"]
    assert (out.method, len(out.sources), out.dtype.name) == (METHODS["passthrough"], 1, "float32")
    made = make(TIES, base=llama(extra=extra), a=llama(), b=llama(extra=extra))
    out = by_name(made)["bias"]
    assert [s.model for s in out.sources] == [0, 2]
    assert out.group.indices == (1,)


def test_pairs_pass_a_survivor_through():
    for a, b in ((llama(extra={"bias": (8,)}), llama()), (llama(), llama(extra={"bias": (8,)}))):
        made = make(SLERP, a=a, b=b)
        assert by_name(made)["bias"].method is None


def test_model_stock_drops_what_too_few_have():
    extra = {"bias": (8,)}
    made = make(STOCK, base=llama(extra=extra), a=llama(extra=extra), b=llama())
    assert "bias" not in names(made)
    assert "too few models have it; it is not in the output" in made.warnings[0]
    made = make(STOCK, base=llama(extra=extra), a=llama(), b=llama())
    assert by_name(made)["bias"].method is None
    assert "bias" not in names(make(STOCK, base=llama(), a=llama(extra=extra), b=llama(extra=extra)))


def test_many_missing_tensors_are_one_warning():
    made = make(LINEAR, a=llama(9), b=without(llama(9), "q_proj"))
    (only,) = made.warnings
    assert "q_proj" in only
    assert "(9 tensors)" in only


def test_other_architectures_are_refused():
    with pytest.raises(
        CheckpointError, match=r"'b' lacks 14 of 16 tensors: it does not look like the same architecture"
    ):
        make(LINEAR, a=llama(), b=checkpoint({"lm_head.weight": (32, 8), "x": (1,)}))


def test_different_depths_are_refused():
    with pytest.raises(
        CheckpointError, match=r"model\.layers: the models have different numbers of layers: 'a' 4, 'b' 5"
    ):
        make(LINEAR, a=llama(4), b=llama(5))


def test_heads_that_one_model_ties():
    made = make(TIES, base=llama(head=False, config={"tie_word_embeddings": True}), a=llama(), b=llama())
    out = by_name(made)["lm_head.weight"]
    assert [s.info.name for s in out.sources] == ["model.embed_tokens.weight", "lm_head.weight", "lm_head.weight"]
    assert made.config["tie_word_embeddings"] is False
    assert "missing from 'base': lm_head.weight: the tied embedding takes its place" in made.warnings
    assert "lm_head.weight" not in names(make(TIES, **{n: llama(head=False) for n in ("base", "a", "b")}))


# Parameters


def test_filters_and_gradients_reach_the_groups():
    text = """
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters:
  t:
    - {filter: self_attn, value: [0, 1]}
    - {filter: layers, value: [0.5, 0.7]}
    - {value: [0.125, 1]}
    - {filter: typo, value: 1}
"""
    made = make(text, a=llama(3), b=llama(3))
    t = {n: o.group.params["t"] for n, o in by_name(made).items()}
    assert [t[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(3)] == [0, 0.5, 1]
    assert [t[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(3)] == [0.5, 0.6, 0.7]
    assert t["lm_head.weight"] == t["model.norm.weight"] == 0.125
    assert made.warnings == ("the filter 'typo' matches no tensor name",)


def test_a_gradient_needs_layers():
    text = LINEAR.replace("weight: 1", "weight: [0, 1]")
    flat = checkpoint({"x": (3,), "y": (3,)})
    with pytest.raises(RecipeError, match="a gradient needs layers, and the tensor names of 'a' show none"):
        make(text, a=flat, b=flat)
    assert make(LINEAR, a=flat, b=flat)


def test_one_layer_is_the_end_of_a_gradient():
    made = make(SLERP.replace("t: 0.5", "t: [0, 1]"), a=llama(1), b=llama(1))
    assert by_name(made)["model.layers.0.mlp.down_proj.weight"].group.params["t"] == 1.0


def test_every_missing_parameter_and_method_problem_is_said_with_its_tensor():
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: {filter: mlp, value: 1}}\n"
    with pytest.raises(RecipeError, match=r"lm_head\.weight: models: no filter gives the required parameter 'weight'"):
        make(text, a=llama(), b=llama())
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]\n"
    with pytest.raises(RecipeError, match=r"lm_head\.weight: linear: weights .* sum to zero"):
        make(text, a=llama(), b=llama())


def test_warnings_of_methods_come_once():
    made = make(SLERP.replace("t: 0.5", "t: 1.5"), a=llama(), b=llama())
    assert made.warnings == ("slerp: t = 1.5 is outside 0 .. 1 and extrapolates",)


def test_equal_outcomes_share_their_parameters():
    made = make(TIES, base=llama(), a=llama(), b=llama())
    assert len({id(o.group.params) for o in made.outputs}) == 1
    assert len({id(o.group.models[1]) for o in made.outputs}) == 1


# Structure


def t5(layers, decoder):
    out = {"shared.weight": (8, 8)}
    for side, n in (("encoder", layers), ("decoder", decoder)):
        for i in range(n):
            out |= {f"{side}.block.{i}.layer.{j}.w": (8,) for j in range(2)}
    return out


def test_experts_are_not_layers():
    moe = {f"model.layers.{i}.mlp.experts.{e}.w{k}": (2,) for i in range(4) for e in range(8) for k in range(2)}
    for config in ({"num_hidden_layers": 4}, {"num_hidden_layers": 4, "num_local_experts": 8}, {}):
        found = structure(moe, config)
        assert [(s.prefix, s.count) for s in found.stacks] == [("model.layers", 4)]
        assert found.gradient("model.layers.2.mlp.experts.7.w1") == pytest.approx(2 / 3)


def test_gpt2_bert_t5_and_unknown_prefixes():
    assert structure([f"h.{i}.attn.w" for i in range(6)], {"n_layer": 6}).main.prefix == "h"
    found = structure([f"bert.encoder.layer.{i}.output.w" for i in range(3)] + ["bert.pooler.dense.weight"], {})
    assert (found.main.prefix, found.main.count) == ("bert.encoder.layer", 3)
    found = structure(t5(3, 2), {"num_layers": 3, "num_decoder_layers": 2, "is_encoder_decoder": True})
    assert {(s.prefix, s.count) for s in found.stacks} == {("encoder.block", 3), ("decoder.block", 2)}
    assert found.main is None
    assert found.gradient("decoder.block.1.layer.0.w") == 1.0
    assert found.gradient("shared.weight") == 0.0


def test_vision_towers_have_layers_of_their_own():
    names_ = (
        [f"model.layers.{i}.w" for i in range(4)]
        + [f"visual.blocks.{i}.w" for i in range(6)]
        + ["visual.merger.mlp.0.w", "visual.merger.mlp.2.w"]
    )
    found = structure(names_, {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 6}})
    assert {(s.prefix, s.count) for s in found.stacks} == {("model.layers", 4), ("visual.blocks", 6)}
    assert found.main.prefix == "model.layers"
    assert found.keys == (("text_config", "num_hidden_layers"),)


def test_an_outer_index_that_is_not_the_layer():
    found = structure([f"model.{k}.layers.{i}.w" for k in range(2) for i in range(5)], {"num_hidden_layers": 5})
    assert {s.prefix for s in found.stacks} == {"model.0.layers", "model.1.layers"}
    assert found.main is None


def test_prediction_layers_beyond_the_count():
    found = structure([f"model.layers.{i}.w" for i in range(7)], {"num_hidden_layers": 6})
    assert (found.main.count, found.gradient("model.layers.5.w"), found.gradient("model.layers.6.w")) == (6, 1.0, 0.0)


def test_holes_and_nothing():
    assert structure([f"layers.{i}.w" for i in (0, 1, 3)], {"num_layers": 4}).main.count == 4
    assert structure([f"layers.{i}.w" for i in (0, 1, 3)], {}).main is None
    assert structure([], {}).stacks == ()
    assert structure(["0.weight", "1.weight", "x.007.y"], {}).stacks == ()


# Slices


def stack(*parts, extra=""):
    text = "merge_method: passthrough\nslices:\n"
    for model, a, b in parts:
        text += f"  - sources: [{{model: {model}, layer_range: [{a}, {b}]}}]\n"
    return text + extra


def test_slices_restack_layers():
    made = make(stack(("a", 0, 3), ("b", 2, 4), ("a", 2, 3)), a=llama(4), b=llama(4))
    out = by_name(made)
    where = {n: (o.sources[0].model, o.sources[0].info.name) for n, o in out.items()}
    origin = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (0, 2)]
    for i, (model, layer) in enumerate(origin):
        assert where[f"model.layers.{i}.mlp.down_proj.weight"] == (model, f"model.layers.{layer}.mlp.down_proj.weight")
    assert where["model.embed_tokens.weight"][0] == 0
    assert where["model.norm.weight"][0] == 0
    assert len(out) == 3 + 6 * 3
    assert made.config["num_hidden_layers"] == 6
    assert all(o.method is None for o in made.outputs)
    assert names(made)[0] == "model.embed_tokens.weight"
    assert names(made)[-2:] == ["lm_head.weight", "model.norm.weight"]


def test_ends_come_from_the_first_and_the_last_slice():
    made = make(stack(("a", 0, 2), ("b", 2, 4)), a=llama(), b=llama())
    where = {n: o.sources[0].model for n, o in by_name(made).items() if "layers" not in n}
    assert where == {"model.embed_tokens.weight": 0, "lm_head.weight": 1, "model.norm.weight": 1}


def test_a_single_slice_of_everything_is_in_file_order():
    text = """
merge_method: slerp
base_model: a
slices: [{sources: [{model: a, layer_range: [0, 12]}, {model: b, layer_range: [0, 12]}]}]
parameters: {t: 0.5}
"""
    a = llama(12)
    made = make(text, a=a, b=llama(12))
    assert names(made) == list(a.tensors)


def test_gradients_and_filters_of_slices():
    text = """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [1, 4]}]
  - sources: [{model: b, layer_range: [3, 4]}, {model: a, layer_range: [0, 1]}]
    base_model: b
    parameters: {t: {filter: layers.3., value: 0.875}}
parameters: {t: [0, 1]}
"""
    made = make(text, a=llama(4), b=llama(4))
    out = by_name(made)
    t = [out[f"model.layers.{i}.mlp.down_proj.weight"].group.params["t"] for i in range(4)]
    assert t == [0.0, 0.5, 1.0, 0.875], "the shared filter sees the output's name"
    first, last = (out[f"model.layers.{i}.mlp.down_proj.weight"] for i in (1, 3))
    assert [(s.model, s.info.name.split(".")[2]) for s in first.sources] == [(0, "1"), (1, "2")]
    assert [(s.model, s.info.name.split(".")[2]) for s in last.sources] == [(1, "3"), (0, "0")], "the slice's base"


def test_per_model_filters_see_the_names_of_the_inputs():
    text = """
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: layers.0., value: 1}, {value: 2}]}}
      - {model: b, layer_range: [2, 4], parameters: {weight: [{filter: layers.2., value: 3}, {value: 4}]}}
"""
    out = by_name(make(text, a=llama(4), b=llama(4)))
    weights = [[m["weight"] for m in out[f"model.layers.{i}.mlp.down_proj.weight"].group.models] for i in range(2)]
    assert weights == [[1.0, 3.0], [2.0, 4.0]]


def test_random_numbers_know_a_model_by_its_place_in_the_recipe():
    text = """
merge_method: ties
base_model: x
slices:
  - sources: [{model: x, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [2, 4]}, {model: x, layer_range: [2, 4]}, {model: a, layer_range: [2, 4]}]
parameters: {weight: 1}
"""
    out = by_name(make(text, x=llama(4), a=llama(4), b=llama(4)))
    assert out["model.layers.0.mlp.down_proj.weight"].group.indices == (0,)
    assert out["model.layers.3.mlp.down_proj.weight"].group.indices == (1, 0)


def test_slices_that_do_not_fit():
    with pytest.raises(RecipeError) as e:
        make(stack(("a", 0, 5), ("b", 8, 12)), a=llama(4), b=llama(4))
    assert e.value.problems == [
        "slices[0].sources[0]: layer_range [0, 5) of 'a', which has 4 layers",
        "slices[1].sources[0]: layer_range [8, 12) of 'b', which has 4 layers",
    ]
    flat = checkpoint({"x": (1,)})
    with pytest.raises(
        RecipeError, match=r"'a': 'slices' needs one stack of layers that fits config\.json; found none"
    ):
        make(stack(("a", 0, 1)), a=flat)
    gpt = checkpoint({f"h.{i}.w": (1,) for i in range(4)}, config={"n_layer": 4})
    with pytest.raises(RecipeError, match=r"'b': its layers are called 'h', elsewhere 'model\.layers'"):
        make(stack(("a", 0, 2), ("b", 0, 2)), a=llama(), b=gpt)


def test_lists_of_the_configuration_follow_the_layers():
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["f", "s", "t", "u"],
        "mlp_only_layers": [0, 3],
        "architectures": ["a", "b", "c", "d"],
        "max_window_layers": 4,
    }
    other = {**config, "layer_types": ["F", "S", "T", "U"], "mlp_only_layers": [2]}
    made = make(stack(("a", 0, 2), ("b", 1, 4)), a=llama(config=config), b=llama(config=other))
    assert made.config["num_hidden_layers"] == 5
    assert made.config["layer_types"] == ["f", "s", "S", "T", "U"]
    assert made.config["mlp_only_layers"] == [0, 3]
    assert made.config["architectures"] == config["architectures"]
    assert any("mlp_only_layers" in w for w in made.warnings)
    assert config["num_hidden_layers"] == 4


def test_nested_configurations():
    config = {"text_config": {"num_hidden_layers": 4, "layer_types": list("abcd")}}
    made = make(stack(("a", 1, 3)), a=llama(config=config))
    assert made.config["text_config"] == {"num_hidden_layers": 2, "layer_types": ["b", "c"]}


def test_prediction_layers_move_with_the_end():
    extra = {"model.layers.4.eh_proj.weight": (8, 8)}
    made = make(stack(("a", 0, 4), ("a", 2, 4)), a=llama(4, extra=extra))
    assert "model.layers.6.eh_proj.weight" in names(made)
    assert "model.layers.4.mlp.down_proj.weight" in names(made)


# Files of the output


def write(directory, **files):
    directory.mkdir(exist_ok=True)
    for name, data in files.items():
        (directory / name.replace("__", ".")).write_text(data if isinstance(data, str) else json.dumps(data))
    return directory


def carried(text, **models):
    return dict(make(text, **models).carry)


def test_tokenizer_files_come_from_the_base_else_the_first(tmp_path):
    a = write(tmp_path / "a", tokenizer__json="{}", generation_config__json="{}", code__py="x", optimizer__pt="x")
    b = write(tmp_path / "b", tokenizer__json="{}")
    models = {"a": llama(path=str(a)), "b": llama(path=str(b))}
    assert carried(LINEAR, **models) == {
        "tokenizer.json": a / "tokenizer.json",
        "generation_config.json": a / "generation_config.json",
    }
    assert carried(LINEAR + "base_model: b\n", **models) == {"tokenizer.json": b / "tokenizer.json"}
    got = carried(LINEAR + "tokenizer_source: b\n", **models)
    assert got == {"tokenizer.json": b / "tokenizer.json", "generation_config.json": a / "generation_config.json"}


def test_links_that_leave_the_model_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("s")
    a = write(tmp_path / "a", tokenizer__json="{}")
    (a / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    made = make(LINEAR, a=llama(path=str(a)), b=llama())
    assert dict(made.carry) == {"tokenizer.json": a / "tokenizer.json"}
    assert "a link that leaves the model's directory; not copied" in made.warnings[0]


def vocabulary(**tokens):
    return {"model": {"vocab": tokens}, "added_tokens": [{"content": "<s>", "id": 9}]}


def test_asking_for_a_tokenizer_needs_equal_vocabularies(tmp_path):
    text = LINEAR + "tokenizer: {source: a}\n"
    a = write(tmp_path / "a", tokenizer__json=vocabulary(x=0, y=1))
    same = write(tmp_path / "same", tokenizer__json={"version": 2, **vocabulary(y=1, x=0)})
    other = write(tmp_path / "other", tokenizer__json=vocabulary(x=1, y=0))
    none = write(tmp_path / "none", tokenizer__json="{not json")
    models = {n: llama(path=str(p), ref=n) for n, p in {"a": a, "same": same, "other": other, "none": none}.items()}
    assert make(text, a=models["a"], b=models["same"]).warnings == ()
    for bad in ("other", "none"):
        with pytest.raises(RecipeError, match=f"'{bad}' has another vocabulary than 'a'"):
            make(text, a=models["a"], b=models[bad])
    assert "cannot be compared" in make(text, a=models["a"], b=llama()).warnings[0]


def test_chat_templates_are_data(tmp_path):
    jinja = "{% for m in messages %}{{ m }}{% endfor %}"
    a = write(tmp_path / "a", tokenizer_config__json={"chat_template": "old {{ x }}", "k": 1}, tokenizer__json="{}")
    b = write(tmp_path / "b", chat_template__jinja=jinja)
    c = write(tmp_path / "c", tokenizer_config__json={"chat_template": [{"name": "default", "template": jinja}]})
    models = {"a": llama(path=str(a)), "b": llama(path=str(b)), "c": llama(path=str(c))}
    got = carried(LINEAR + f"chat_template: '{jinja}'\n", a=models["a"], b=models["b"])
    assert got["chat_template.jinja"] == jinja.encode()
    assert json.loads(got["tokenizer_config.json"]) == {"chat_template": jinja, "k": 1}
    three = LINEAR.replace("{model: b}", "{model: b}, {model: c}") + "chat_template: auto\n"
    assert carried(three, **models)["chat_template.jinja"] == jinja.encode()
    assert "no model has one" in make(LINEAR + "chat_template: auto\n", a=llama(), b=llama()).warnings[0]


def test_custom_code_is_named_and_left():
    made = make(LINEAR, a=llama(config={"auto_map": {"AutoModel": "x.Y"}}), b=llama())
    assert "custom code" in made.warnings[0]


def test_no_configuration_is_no_configuration():
    bare = checkpoint({"x": (2,)})
    assert make(LINEAR, a=bare, b=bare).config is None


# Identity


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
    made = plan(Recipe.load(LINEAR + "seed: 5\n"), models={"a": llama(), "b": llama()}, seed=7)
    assert made.seed == 7
    assert made.outputs[0].group.key == tensor_key(7, made.outputs[0].name)
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


# Speed


def test_eighteen_thousand_tensors_of_four_models():
    moe = {"model.embed_tokens.weight": (64, 8), "lm_head.weight": (64, 8), "model.norm.weight": (8,)}
    for i in range(47):
        moe |= {
            f"model.layers.{i}.mlp.experts.{e}.{w}_proj.weight": (8, 8)
            for e in range(128)
            for w in ("up", "gate", "down")
        }
    config = {"num_hidden_layers": 47}
    models = {n: checkpoint(moe, config=config) for n in ("base", "a", "b", "c")}
    text = """
merge_method: ties
base_model: base
models: [{model: a}, {model: b}, {model: c}]
parameters:
  weight: [{filter: up_proj, value: [0, 0.5, 1]}, {value: 0.5}]
  density: [1, 0.5]
"""
    recipe = Recipe.load(text)
    began = time.process_time()
    made = plan(recipe, models=models)
    taken = time.process_time() - began
    assert len(made.outputs) == 47 * 384 + 3
    assert taken < 2.4, f"{taken:.2f} s; expected below 1.2 s on a quiet machine"


def test_planning_imports_nothing_heavy():
    heavy = {"torch", "huggingface_hub", "transformers", "safetensors", "rich"}
    code = f"import sys, fastmerge.planning; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
