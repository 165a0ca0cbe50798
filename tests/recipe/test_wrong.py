"""Recipes that are wrong: each is refused with file, line, name and hint before any model is opened."""

import pytest

import fastmerge
from fastmerge.errors import RecipeError

LINEAR = (
    "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: 2}}\n"
)
TIES = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters: {weight: 1, density: 0.5}\n"
TIES += "  - model: b\n    parameters: {weight: 1}\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n"
STACK = "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 4]}]\n"
PARTS = (
    "merge_method: linear\nmodules:\n  vision_tower:\n    models: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
)

WRONG = [
    ("models: [{model: a}]\n", 1, "merge_method: this key is required"),
    ("merge_method: linar\nmodels: [{model: a}]\n", 1, "unknown method 'linar' (did you mean 'linear'?); known: arc"),
    (TIES.replace("ties", "TIES"), 1, "unknown method 'TIES' (did you mean 'ties'?)"),
    (TIES.replace("ties", "dare-ties"), 1, "unknown method 'dare-ties' (did you mean 'dare_ties'?)"),
    ("merge_method: 3\nmodels: [{model: a}]\n", 1, "merge_method: expected a valid string; got 3"),
    ("merge_method: linear\nmodels: []\n", 1, "expected exactly one of 'models', 'slices' and 'modules'"),
    (LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n", 5, "slices: expected exactly one of"),
    (LINEAR + "modules: {x: {models: [{model: c}]}}\n", 5, "modules: expected exactly one of"),
    ("merge_method: linear\nmodels: {a: {parameters: {weight: 1}}}\n", 2, "models: expected a list; got a mapping"),
    ("merge_method: linear\nmodels: [a, b]\n", 2, "models[0]: expected a mapping; got 'a'"),
    ("merge_method: linear\nmodels:\n  - parameters: {weight: 1}\n", 3, "models[0].model: this key is required"),
    ("merge_method: linear\nmodels: [{model: 3, parameters: {weight: 1}}]\n", 2, "expected a model: a directory or"),
    (LINEAR.replace("model: b", "model: ''"), 4, "models[1].model: expected a model"),
    (LINEAR.replace("model: b", "model: b@1@2"), 4, "'b@1@2': expected one path[@revision]"),
    (LINEAR.replace("model: b", "model: b+c+d"), 4, "'b+c+d': expected one model[+adapter]"),
    (LINEAR.replace("model: b", "model: {path: b}"), 4, "expected a model, or {model: {path, revision}, lora: {path"),
    (
        LINEAR.replace("model: b", "model: {model: {path: b, revision: 3}}"),
        4,
        "models[1].model: expected a model, or {mod",
    ),
    (LINEAR.replace("model: b", "model: b, revision: main"), 4, "this key belongs to 'model: {model: {path: ..., rev"),
    (LINEAR.replace("model: b", "model: a"), 4, "models[1].model: model 'a' is listed twice"),
    (LINEAR.replace("model: b", "model: ./a"), 1, "one model is written in two ways: 'a' and './a'"),
    (TIES.replace("base_model: base", "base_model: [a]"), 2, "base_model: expected a model: a directory or org/name"),
    (TIES.replace("base_model: base\n", ""), 1, "'ties' needs a 'base_model'"),
    (TIES.replace("weight: 1, density", "density"), 4, "models[0]: 'ties' needs the parameter 'weight' for 'a'"),
    (
        TIES.replace("parameters: {weight: 1}", "weight: 1"),
        7,
        "'weight' is a parameter of 'ties': put it under 'parameters:'",
    ),
    (SLERP.replace("{model: b}", "{model: b}, {model: c}"), 3, "exactly 1 model beside the base 'a'; got 2"),
    (
        SLERP.replace("parameters: {", "")
        .replace("}\n", "\n")
        .replace("[{model: a}, {model: b\n", "[{model: a}, {model: b}]\n"),
        4,
        "put it under 'parameters:'",
    ),
    ("merge_method: passthrough\nbase_model: x\nmodels: [{model: a}]\n", 3, "1 input; got 2 (the base_model joins"),
    (LINEAR + "dype: float32\n", 5, "dype: unknown key (did you mean 'dtype'?)"),
    (LINEAR + "parameter: {normalize: true}\n", 5, "parameter: unknown key (did you mean 'parameters'?)"),
    (LINEAR + "base_models: x\n", 5, "base_models: unknown key (did you mean 'base_model'?)"),
    (LINEAR + "tokenizer-source: a\n", 5, "tokenizer-source: unknown key (did you mean 'tokenizer_source'?)"),
    (LINEAR + "parameters: 3\n", 5, "parameters: expected a mapping of parameters; got 3"),
    (LINEAR + "parameters:\n  - normalize: true\n", 5, "parameters: expected a mapping of parameters; got a list"),
    (LINEAR + "parameters: {normalise: true}\n", 5, "unknown parameter of 'linear' (did you mean 'normalize'?)"),
    (LINEAR + "parameters: {normalize: 2}\n", 5, "normalize: expected true or false; got 2"),
    (LINEAR.replace("weight: 2", "wieght: 2"), 4, "unknown parameter of 'linear' (did you mean 'weight'?)"),
    (LINEAR.replace("weight: 2", "weight: null"), 4, "weight: expected a value, a list of values, or {filter, value}"),
    (LINEAR.replace("weight: 2", "weight: 0,5"), 4, "keys are strings, not '5' (write 0.5 for a number)"),
    (LINEAR.replace("weight: 2", "weight: 2, ? [5] : "), 4, "keys are strings, not a sequence"),
    (LINEAR.replace("weight: 2", "weight: 2, 5: x"), 4, "keys are strings, not '5' (quote it if it is a name)"),
    (LINEAR.replace("weight: 2", "weight: '0,5'"), 4, "weight: expected a number; got '0,5'"),
    (LINEAR.replace("weight: 2", "weight: 50%"), 4, "weight: expected a number; got '50%'"),
    (LINEAR.replace("weight: 2", "weight: 1/3"), 4, "weight: expected a number; got '1/3'"),
    (LINEAR.replace("weight: 2", "weight: yes"), 4, "weight: expected a number; got true (or yes, on)"),
    (LINEAR.replace("weight: 2", "weight: .inf"), 4, "weight: expected a finite number; got inf"),
    (LINEAR.replace("weight: 2", "weight: [1, [2]]"), 4, "weight[1]: expected a value"),
    (LINEAR.replace("weight: 2", "weight: [1, {value: 2}]"), 4, "either values or {filter, value} entries, not both"),
    (LINEAR.replace("weight: 2", "weight: {filter: x}"), 4, "weight: an entry needs a 'value'"),
    (
        LINEAR.replace("weight: 2", "weight: {filter: [mlp, attn], value: 1}"),
        4,
        "a filter is part of a tensor name; got ['mlp'",
    ),
    (LINEAR.replace("weight: 2", "weight: {fliter: x, value: 1}"), 4, "fliter: unknown key (did you mean 'filter'?)"),
    (LINEAR.replace("weight: 2", "weight: {value: {value: 1}}"), 4, "weight.value: expected a value"),
    (TIES.replace("0.5", "[1.5, 0.5]"), 5, "expected a number in 0 .. 1; got 1.5"),
    (TIES + "parameters: {ties: al}\n", 8, "expected one of index, all, spread; got 'al' (did you mean 'all'?)"),
    (TIES + "preset: papre\n", 8, "'ties' has no preset 'papre' (did you mean 'paper'?)"),
    (
        LINEAR + "dtype: bf16\n",
        5,
        "'bf16' is no known type: expected one of float64, float32, float16, bfloat16 (did you mean 'bfloat16'?)",
    ),
    (LINEAR + "dtype: 16\n", 5, "dtype: expected one of float64, float32, float16, bfloat16; got 16"),
    (LINEAR + "out_dtype: int64\n", 5, "out_dtype: 'int64' is no floating-point type"),
    (LINEAR + "seed: 9223372036854775808\n", 5, "seed: expected a 64-bit signed integer"),
    (LINEAR + "missing: ignore\n", 5, "missing: expected 'error' or 'merge'; got 'ignore'"),
    (LINEAR + "dtype: float32\ndtype: float16\n", 6, "duplicate key 'dtype' (first on line 5) with another value"),
    (STACK.replace("[0, 4]", "[4, 0]"), 3, "layer_range: expected [first, end) with 0 <= first < end; got [4, 0]"),
    (STACK.replace("[0, 4]", "[0, 4, 5]"), 3, "layer_range: tuple should have at most 2 items"),
    (STACK.replace("[0, 4]", "[0, 4.5]"), 3, "layer_range[1]: expected a valid integer; got 4.5"),
    (STACK.replace("[0, 4]", "0-4"), 3, "layer_range: expected a list; got '0-4'"),
    (STACK.replace("[0, 4]", "{start: 0, end: 4}"), 3, "layer_range: expected a list; got a mapping"),
    (STACK.replace(", layer_range: [0, 4]", ""), 3, "slices[0].sources[0].layer_range: this key is required"),
    (
        STACK.replace("[{model: a, layer_range: [0, 4]}]", "[]"),
        3,
        "slices[0].sources: a slice needs at least one source",
    ),
    (
        STACK.replace("sources: [{model: a, layer_range: [0, 4]}]", "source: []"),
        3,
        "source: unknown key (did you mean 'sources'?)",
    ),
    (
        STACK.replace("passthrough", "linear").replace("4]}", "4]}, {model: b, layer_range: [0, 3]}"),
        3,
        "all sources of a slice need equally many layers; got 4, 3",
    ),
    (
        PARTS.replace("models: [", "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n    models: ["),
        3,
        "modules.vision_tower: expected exactly one of 'models' and 'slices'",
    ),
    (PARTS.replace("models:", "modles:"), 4, "modules.vision_tower.modles: unknown key (did you mean 'models'?)"),
    (PARTS.replace("{model: b}", "{model: a}"), 4, "modules.vision_tower.models[1].model: model 'a' is listed twice"),
    (
        PARTS.replace("weight: 1", "normalize: no"),
        4,
        "modules.vision_tower.models[0]: 'linear' needs the parameter 'weight' for 'a'",
    ),
    (
        "merge_method: linear\nmodules: [{model: a}]\n",
        2,
        "modules: expected a mapping of modules by their names; got a list",
    ),
    ("merge_method: linear\nmodels:\n\t- model: a\n", 3, "not valid YAML: found character"),
    ("base_model: a\nexperts:\n  - {source_model: a}\n", 2, "this is a file for mergekit-moe"),
]


@pytest.mark.parametrize(("text", "line", "said"), WRONG)
def test_refused_at_once_with_its_line(tmp_path, text, line, said):
    path = tmp_path / "r.yml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        fastmerge.merge(path, tmp_path / "out")
    (first, *_) = [p for p in error.value.problems if said in p]
    assert first.startswith(f"{path}:{line}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["r.yml"]


def test_there_are_at_least_sixty():
    assert len({text for text, _, _ in WRONG}) >= 60
