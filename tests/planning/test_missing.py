"""Tensors that some models lack, parameters, and what is refused."""

import pytest

from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.methods import METHODS
from tests.planning.plans import LINEAR, SLERP, STOCK, TIES, by_name, make, names
from tests.recipe.fakes import checkpoint, llama


def without(model, *parts):
    kept = {n: (i.dtype.name, i.shape) for n, i in model.tensors.items() if not any(p in n for p in parts)}
    return checkpoint(kept, config=dict(model.config))


def test_methods_without_a_base_merge_what_is_there():
    extra = {"bias": (8,)}
    made = make(LINEAR, a=llama(extra=extra), b=llama())
    out = by_name(made)["bias"]
    assert (out.method, len(out.inputs), len(out.group.models)) == (METHODS["linear"], 1, 1)
    assert made.warnings == ("missing from 'b': bias: the others are merged",)
    text = LINEAR.replace("{model: b}", "{model: b}, {model: c}")
    made = make(text, a=llama(extra=extra), b=llama(), c=llama(extra=extra))
    out = by_name(made)["bias"]
    assert out.models == (0, 2)
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
    assert (out.method, len(out.inputs), out.dtype.name) == (METHODS["passthrough"], 1, "float32")
    made = make(TIES, base=llama(extra=extra), a=llama(), b=llama(extra=extra))
    out = by_name(made)["bias"]
    assert out.models == (0, 2)
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
    assert [info.name for info in out.inputs] == ["model.embed_tokens.weight", "lm_head.weight", "lm_head.weight"]
    assert made.config["tie_word_embeddings"] is False
    assert "missing from 'base': lm_head.weight: the tied embedding takes its place" in made.warnings
    assert "lm_head.weight" not in names(make(TIES, **{n: llama(head=False) for n in ("base", "a", "b")}))


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
