"""Recipes as people publish them, with what mergekit takes without a word: planned, with the warnings they deserve."""

import pytest
import yaml

from fastmerge.errors import RecipeError
from fastmerge.planning import plan
from fastmerge.recipe import Recipe
from tests.recipe.fakes import llama

TWO = "models:\n  - {model: a, parameters: {weight: 0.4, density: 0.5}}\n  - {model: b, parameters: {weight: 0.3}}\n"
TIES = "merge_method: ties\nbase_model: base\n" + TWO
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n"
STOCK = "merge_method: model_stock\nbase_model: base\nmodels:\n  - {model: a}\n  - {model: b}\n"
STACK = "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 8]\n"
STACK += "- sources:\n  - model: b\n    layer_range: [4, 12]\n"

ODD = {
    "name, description and the like": (
        "name: x\ndescription: >\n  words\nlicense: mit\ntags: [merge]\nmodel_type: llama\narchitecture: X\n" + TIES,
        ["1: name: unknown key, ignored", "2: description", "4: license", "5: tags", "6: model_type", "7: archi"],
    ),
    "a key twice": (TIES + "merge_method: ties\n", ["the key 'merge_method' (first on line 1) stands here again"]),
    "a random seed of another tool": (TIES + "random_seed: 0\n", ["random_seed: unknown key, ignored"]),
    "layer_range of whole models": (
        SLERP.replace("model: b", "model: b, layer_range: [0, 12]"),
        ["models[1].layer_range: ignored here: this key belongs to a source of a slice"],
    ),
    "select_topk at the top": (
        "merge_method: sce\nbase_model: base\nmodels: [{model: a}, {model: b}]\nselect_topk: .15\n",
        ["select_topk: ignored here: 'select_topk' is a parameter of 'sce': put it under 'parameters:'"],
    ),
    "normalize at the top": (TIES + "normalize: false\n", ["normalize: ignored here: 'normalize' is a parameter"]),
    "density beside model": (TIES.replace("{model: b,", "{model: b, density: 1,"), ["models[1].density: ignored here"]),
    "density above 1": (
        TIES.replace("density: 0.5", "density: 1.5"),
        ["models[0].parameters.density: 1.5 is taken for 1, as in mergekit: everything is kept"],
    ),
    "dtype among the parameters": (
        TIES + "parameters: {dtype: float16, out_dtype: bfloat16}\n",
        ["parameters.dtype: ignored here: this key belongs to the recipe itself", "parameters.out_dtype: ignored here"],
    ),
    "base_model and seed among the parameters": (
        SLERP.replace("t: 0.5", "base_model: a, seed: 42, t: 0.5"),
        ["base_model: ignored here", "seed: ignored here"],
    ),
    "a method in a slice": (
        STACK + "  merge_method: linear\n  residual_weight: 0.5\n  dtype: float16\n",
        ["slices[1].merge_method: ignored here", "residual_weight: unknown key", "slices[1].dtype: ignored here"],
    ),
    "lambda and normalize of one model": (
        TIES.replace("weight: 0.3", "weight: 0.3, lambda: 1.1, normalize: true"),
        ["lambda: ignored for one model: all models share 'lambda' (1.0 is in effect)", "it is what the others have"],
    ),
    "parameters of other methods": (
        STOCK.replace("model: a", "model: a, parameters: {weight: 0.5}") + "parameters: {normalize: no, smooth: no}\n",
        ["'model_stock' takes no 'weight', ignored", "'model_stock' takes no 'normalize'", "smooth: unknown parameter"],
    ),
    "weights of slerp": (SLERP.replace("model: b", "model: b, parameters: {weight: 1}"), ["'slerp' takes no 'weight'"]),
    "parameters of the base": (
        TIES.replace("  - {model: b", "  - {model: base, parameters: {weight: 1}}\n  - {model: b"),
        ["models[1].parameters.weight: ignored: the base 'base' has no 'weight'"],
    ),
    "an entry for all tensors first": (
        SLERP.replace("0.5", "[{value: 0.5}, {filter: self_attn, value: 0.3}]"),
        ["parameters.t[1]: never reached: an entry for all tensors stands before it, and the first one counts"],
    ),
    "a filter within another": (
        SLERP.replace("0.5", "[{filter: mlp, value: 1}, {filter: mlp.down_proj, value: 0.3}, {value: 0}]"),
        ["parameters.t[1]: never reached: an entry for names with 'mlp' stands before it"],
    ),
    "a filter that matches nothing": (
        SLERP.replace("0.5", "[{filter: self_atn, value: 1}, {value: 0}]"),
        ["parameters.t[0]: the filter 'self_atn' matches no tensor name (did you mean 'self_attn'?)"],
    ),
    "a gradient longer than the layers": (
        SLERP.replace("0.5", "[0, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1, 1, 1]"),
        ["parameters.t[0]: a gradient of 13 values over 12 layers: some are passed over"],
    ),
    "two ranges in one slice": (
        STACK.replace("passthrough", "linear").replace("- sources:\n  - model: b", "  - model: b")
        + "  parameters: {weight: [0.9, 0.1]}\nparameters: {weight: 0.8}\n",
        ["3: slices[0].sources: merges different layers with each other ([0, 8), [4, 12)) into 8 layers"],
    ),
    "a note in an entry": (
        SLERP.replace("0.5", "[{filter: mlp, value: 1, comment: more}, {value: 0}]"),
        ["parameters.t[0].comment: unknown key, ignored; an entry has 'filter' and 'value'"],
    ),
    "anchors under keys of their own": (
        (
            "x-parameters: &p {weight: 0.5, density: 0.5}\n.models: &m {int8_mask: true}\nmerge_method: dare_linear\n"
            "base_model: base\nmodels:\n  - {model: a, parameters: *p}\n  - model: b\n    parameters:\n      <<: *p\n"
            "      weight: 0.25\nparameters: {<<: *m, normalize: false}\n"
        ),
        ["1: x-parameters: unknown key, ignored", "2: .models: unknown key, ignored"],
    ),
    "what a module has beside": (
        SLERP.replace("models:", "modules: {default: {dtype: x, models:").replace("b}]", "b}]}}"),
        ["modules.default.dtype: ignored here: this key belongs to the recipe itself"],
    ),
}  # fmt: skip

PLAIN = {
    "merges inside lists": STACK.replace("- model: a", "- &s\n    model: a", 1).replace("- model: b\n", "- <<: *s\n"),
    "levels without content": TIES + "parameters:\ntokenizer:\ntokenizer_source:\nchat_template:\nslices:\ndtype:\n",
    "a model's parameters without content": STOCK.replace("{model: a}", "model: a\n    parameters:"),
    "numbers as text": TIES.replace("0.4", "'4e-1'").replace("0.3", "1e-8"),
    "one {filter, value}": TIES + "parameters: {lambda: {value: 1.5}}\n",
    "gradients of one value": TIES.replace("0.4", "[0.4]").replace("0.5", "[.5]"),
    "empty lists": TIES.replace("0.5", "[]"),
    "flags": TIES + "parameters: {normalize: 1.0, int8_mask: 'yes'}\n",
    "flags by layers": TIES + "parameters: {normalize: [true, false]}\n",
    "integers": "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: 12.0, tol: 1e-10}\n",
    "ranges": STACK.replace("[0, 8]", "['0', 8.0]"),
    "models as mappings": TIES.replace("base_model: base", "base_model: {model: {path: base, revision: null}}")
    .replace("{model: a,", "{model: {model: a, lora: null, override_architecture: X},"),
    "the base listed": TIES.replace("models:\n", "models:\n  - model: base\n    # no parameters\n"),
    "one model beside the base": SLERP.replace("{model: a}, ", ""),
    "an unlisted base is one more input": "merge_method: linear\nbase_model: base\n" + TWO.replace(", density: 0.5", "")
    + "parameters: {weight: 0}\n",
    "scale": STACK + "    parameters: {scale: [{filter: q_proj, value: 0.0}, {value: 1.0}]}\n",
    "a type of torch": TIES + "dtype: torch.bfloat16\n",
}  # fmt: skip


MODELS = {name: llama(12) for name in ("base", "a", "b")}
"""Models that deserve no warnings themselves."""


def planned(text):
    return plan(Recipe.load(text), models=MODELS).warnings


@pytest.mark.parametrize("what", ODD)
def test_odd_ones_are_planned_with_a_warning(what):
    from tests.recipe.oracle import config

    text, said = ODD[what]
    assert config.MergeConfiguration.model_validate(yaml.safe_load(text))
    recipe = Recipe.load(text)
    assert Recipe.load(recipe.to_yaml()) == recipe
    found = planned(text)
    assert len(found) == len(said), found
    assert [(s, f) for s, f in zip(said, found, strict=True) if s not in f] == []
    assert [f for f in found if not f.startswith("recipe:")] == []
    with pytest.raises(RecipeError) as error:
        plan(Recipe.load(text, strict=True), models=MODELS, strict=True)
    assert error.value.problems == list(found)


@pytest.mark.parametrize("what", PLAIN)
def test_others_are_planned_without(what):
    from tests.recipe.oracle import config

    assert config.MergeConfiguration.model_validate(yaml.safe_load(PLAIN[what]))
    recipe = Recipe.load(PLAIN[what], strict=True)
    assert Recipe.load(recipe.to_yaml()) == recipe
    assert planned(PLAIN[what]) == ()


def test_there_are_at_least_twenty():
    assert len(ODD) >= 20
