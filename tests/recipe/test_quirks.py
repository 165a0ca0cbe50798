"""What published recipes have beside the grammar: warned of where it is harmless, refused where it is a mistake."""

import json

import pytest

from fastmerge.errors import RecipeError
from fastmerge.planning import plan
from fastmerge.recipe import Recipe
from tests.recipe.fakes import llama, problems

LINEAR = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b}\n"
LINEAR += "parameters: {weight: 2}\n"
TIES = "merge_method: ties\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {weight: 1}\n"
STOCK = "merge_method: model_stock\nbase_model: a\nmodels: [{model: b}, {model: c}]\n"
STACK = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}]\n"


@pytest.mark.parametrize(
    ("text", "plain", "said"),
    [
        (LINEAR + "name: x\n", LINEAR, "recipe:6: name: unknown key, ignored; known here: merge_method"),
        (LINEAR + "name: 010\ndate: 2024-05-01\n", LINEAR, "recipe:6: name: unknown key, ignored"),
        (LINEAR + "license: mit\n", LINEAR, "license: unknown key, ignored (did you mean 'slices'?)"),
        (LINEAR + "description: >\n  some words\n", LINEAR, "recipe:6: description: unknown key, ignored"),
        (LINEAR + "select_topk: 0.1\n", LINEAR, "recipe:6: select_topk: unknown key, ignored"),
        (LINEAR.replace("model: b", "model: b, note: x"), LINEAR, "recipe:4: models[1].note: unknown key, ignored"),
        (LINEAR.replace("weight: 2", "weight: 2, t: 1"), LINEAR, "t: 'linear' takes no 't', ignored; known: weight"),
        (TIES.replace("weight: 1", "weight: 1, scale: 1"), TIES, "ignored (did you mean 'rescale'?)"),
        (STOCK + "parameters: {weight: 1}\n", STOCK, "'model_stock' takes no 'weight', ignored; known: f"),
        (STOCK + "parameters: {smooth: no}\n", STOCK, "unknown parameter of 'model_stock', ignored; known: filter"),
        (STACK.replace("}]}]", "}], residual_weight: 1}]"), STACK, "slices[0].residual_weight: unknown key, ignored"),
        (LINEAR + "modules: {}\nmodules: {}\n", LINEAR, "recipe:7: the key 'modules' (first"),
    ],
)  # fmt: skip
def test_harmless_keys_are_warned_of_and_change_nothing(text, plain, said):
    recipe = Recipe.load(text)
    assert recipe == Recipe.load(plain)
    assert said in recipe.warnings[0]
    assert Recipe.load(plain).warnings == ()
    with pytest.raises(RecipeError) as error:
        Recipe.load(text, strict=True)
    assert error.value.problems == list(recipe.warnings)
    with pytest.raises(RecipeError, match="ignored|again"):
        Recipe.load(recipe, strict=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LINEAR + "dype: float32\n", "recipe:6: dype: unknown key (did you mean 'dtype'?)"),
        (LINEAR + "dtype: float32\ndype: float16\n", "recipe:7: dype: unknown key (did you mean 'dtype'?)"),
        (LINEAR + "base_models: x\n", "did you mean 'base_model'?"),
        (LINEAR + "weight: 3\n", "'weight' is a parameter of 'linear': put it under 'parameters:'"),
        (LINEAR.replace("model: b", "model: b, revision: x"), "this key belongs to 'model: {model: {path: "),
        (LINEAR.replace("model: b", "model: b, filter: x"), "this key belongs to an entry {filter, value}"),
        (LINEAR.replace("model: b", "model: b, models: x"), "models[1].models: unknown key (did you mean 'model'?)"),
        (LINEAR.replace("weight: 2", "wieght: 2"), "unknown parameter of 'linear' (did you mean 'weight'?)"),
        (LINEAR.replace("weight: 2", "weight: 2, weigth: 3"), "did you mean 'weight'?"),
        (TIES + "preset: fusion_bench\n", "has no preset 'fusion_bench' (did you mean 'fusionbench'?)"),
        (LINEAR + "missing: ignore\n", "missing: expected 'error' or 'merge'; got 'ignore'"),
    ],
)
def test_likely_mistakes_are_errors(text, said):
    assert said in "\n".join(problems(text))


def test_a_shared_parameter_of_one_model_is_ignored():
    text = TIES.replace("{model: b}", "{model: b, parameters: {lambda: 1.0}}")
    recipe = Recipe.load(text)
    assert recipe == Recipe.load(TIES) == Recipe.load(text.replace("1.0", "0.5"))
    (said,) = recipe.warnings
    assert said.startswith("recipe:3: models[0].parameters.lambda: shared by all models, ignored for one")
    (said,) = Recipe.load(text.replace("1.0", "0.5")).warnings
    assert said == (
        "recipe:3: models[0].parameters.lambda: ignored for one model: all models share 'lambda' (1.0 is in effect); "
        "its place is under the 'parameters:' of the recipe or the slice"
    )
    with_top = text.replace("1.0", "0.5").replace("{weight: 1}", "{weight: 1, lambda: 0.25}")
    assert Recipe.load(with_top).parameters["lambda"].plain() == 0.25
    assert "(0.25 is in effect)" in Recipe.load(with_top).warnings[0]
    assert "expected a number" in problems(text.replace("1.0", "x"))[0]


def test_a_slice_that_merges_other_layers_with_each_other_is_warned_of():
    text = "merge_method: linear\nparameters: {weight: 1}\nslices:\n  - sources:\n"
    text += "      - {model: a, layer_range: [0, 2]}\n      - {model: b, layer_range: [2, 4]}\n"
    (said,) = Recipe.load(text).warnings
    assert said.startswith(
        "recipe:4: slices[0].sources: merges different layers with each other ([0, 2), [2, 4)) into 2 "
    )
    assert Recipe.load(text.replace("[2, 4]", "[0, 2]")).warnings == ()


def test_a_file_of_another_command_is_named():
    text = "base_model: a\nexperts:\n  - {source_model: a, positive_prompts: [x]}\ngate_mode: hidden\ndtype: float16\n"
    (said,) = problems(text)
    assert said == (
        "recipe:2: experts: this is a file for mergekit-moe, which merges by no 'merge_method': "
        "'fastmerge mergekit-moe' takes it"
    )
    (said,) = problems("recipe: {merge_method: ties}\nevaluator: {function: 'score.py:score'}\nbudget: 4\n")
    assert said.startswith("recipe:2: evaluator: this is a file for search, which merges by no 'merge_method'")
    assert said.endswith("'fastmerge search' takes it")
    (said,) = problems("store: results\nrecipes: [a.yml]\n")
    assert said.endswith("'fastmerge farm run' takes it")
    assert "mergekit-evolve" in problems("genome: {models: [a], merge_method: ties}\ntasks: []\n")[0]


MODULE = """\
merge_method: passthrough
modules:
  default:
    slices:
      - sources: [{model: a, layer_range: [0, 4], parameters: {scale: 2}}]
      - sources: [{model: b, layer_range: [2, 4]}]
"""


def test_the_one_module_is_the_recipe_itself():
    recipe = Recipe.load(MODULE)
    assert recipe == Recipe.load(
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 4], parameters: {scale: 2}}]\n"
        "  - sources: [{model: b, layer_range: [2, 4]}]\n"
    )
    assert recipe.at(("slices", 1, "sources", 0)) == "recipe:6: slices[1].sources[0]"
    assert recipe.warnings == ()
    moved = "merge_method: linear\nmodules: {default: {models: [{model: a, parameters: {weight: 1}}, {model: b}], "
    moved += "parameters: {weight: 2}}}\n"
    assert Recipe.load(moved) == Recipe.load(LINEAR)
    assert Recipe.load(LINEAR + "modules:\n") == Recipe.load(LINEAR)


def test_parameters_of_the_module_go_before_those_of_the_recipe():
    text = MODULE + "    parameters:\n      scale: {filter: mlp, value: 3}\nparameters: {scale: 4}\n"
    assert Recipe.load(text).parameters["scale"].plain() == [{"filter": "mlp", "value": 3.0}, {"value": 4.0}]
    text = MODULE + "    parameters:\n      scale: [0, 3]\nparameters: {scale: 4}\n"
    assert Recipe.load(text).parameters["scale"].plain() == [0.0, 3.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{'': {models: [{model: a}]}}", "expected a name"),
        ("{text_decoder: {models: [{model: a}]}}", "expected exactly one of 'models', 'slices' and 'modules'"),
        ("3", "modules: expected a mapping of modules by their names; got a number"),
        ("{default: [1]}", "modules.default: expected a mapping; got a list"),
        ("{default: {modles: []}}", "modules.default.modles: unknown key (did you mean 'models'?)"),
        ("{default: {models: [{model: c}]}}", "the recipe itself has 'models' as well: expected one of them"),
    ],
)
def test_modules_that_do_not_fit_the_recipe(text, said):
    assert said in "\n".join(problems(LINEAR + f"modules: {text}\n"))


def test_modules_are_written_and_read_back():
    text = "merge_method: linear\nmodules:\n  text_decoder:\n    slices:\n      - sources:\n"
    text += "          - {model: a, layer_range: [0, 2], parameters: {weight: 1}}\n"
    text += "          - {model: b, layer_range: [0, 2]}\n"
    text += "        parameters: {weight: 3}\n  vision_tower:\n    models: [{model: a}, {model: c+l}]\n"
    text += "    parameters: {weight: 4}\nparameters: {normalize: no}\n"
    recipe = Recipe.load(text)
    assert Recipe.load(recipe.to_yaml()) == recipe
    assert [part.module for part in recipe.parts] == ["text_decoder", "vision_tower", ""]
    assert [str(ref) for ref in recipe.refs] == ["a", "b", "c+l"]
    assert list(json.loads(recipe.canonical())["modules"]) == ["text_decoder", "vision_tower"]
    assert recipe.at(("modules", "vision_tower", "models", 1)) == "recipe:10: modules.vision_tower.models[1]"


def test_missing_tensors_are_asked_for_by_the_recipe():
    assert Recipe.load(LINEAR).missing is None
    recipe = Recipe.load(LINEAR + "missing: merge\n")
    assert recipe.missing == "merge"
    assert Recipe.load(recipe.to_yaml()) == recipe
    assert json.loads(recipe.canonical())["missing"] == "merge"
    assert "missing" not in json.loads(Recipe.load(LINEAR).canonical())


def test_the_plan_has_the_warnings_first_with_their_lines(tmp_path):
    path = tmp_path / "r.yml"
    path.write_text(LINEAR + "name: x\nname: x\n")
    made = plan(Recipe.load(path), models={"a": llama(), "b": llama()})
    assert made.warnings[0].startswith(f"{path}:6: name: unknown key, ignored")
    assert made.warnings[1].startswith(f"{path}:7: the key 'name' (first on line 6) stands here again")
    other = plan(Recipe.load(LINEAR), models={"a": llama(), "b": llama()})
    assert other.recipe == made.recipe


def test_warnings_are_capped(tmp_path):
    found = Recipe.load(LINEAR + "".join(f"kzx{i}: 1\n" for i in range(300))).warnings
    assert len(found) == 251
    assert found[-1] == "recipe: ... and 50 more warnings"


def test_parameters_that_do_not_apply_to_a_method():
    text = "merge_method: sce\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: 0.9}}]\n"
    text += "parameters: {normalize: true, int8_mask: true, rescale: true, filter_wise: no, smooth: no, lambda: 1.0, "
    recipe = Recipe.load(text + "allow_negative_weights: false}\n")
    assert recipe.models[0].parameters == {}
    assert len(recipe.warnings) == 8


def test_a_parameter_of_the_base_is_for_the_other_models_only():
    text = TIES.replace("[{model: b}", "[{model: a, parameters: {weight: 0.3, density: 0.5}}, {model: b}")
    said = Recipe.load(text).warnings
    assert said == (
        "recipe:3: models[0].parameters.weight: ignored: the base 'a' has no 'weight', the models beside it have",
        "recipe:3: models[0].parameters.density: ignored: the base 'a' has no 'density', the models beside it have",
    )
    assert Recipe.load(text.replace("weight: 0.3, density: 0.5", "")).warnings == ()
    assert Recipe.load(LINEAR + "base_model: a\n").warnings == ()


def test_int8_mask_is_harmless_everywhere():
    assert Recipe.load(TIES.replace("{model: b}", "{model: b, parameters: {int8_mask: true}}")).warnings == ()
    assert Recipe.load(STOCK.replace("{model: b}", "{model: b, parameters: {int8_mask: 1.0}}")).warnings == ()
    (said,) = Recipe.load(TIES + "int8_mask: true\n").warnings
    assert said.startswith("recipe:5: int8_mask: ignored: it never changes a result")


@pytest.mark.parametrize("end", ["4", "4.0", "'4'", "'04'"])
def test_integers_may_be_written_as_mergekit_takes_them(end):
    recipe = Recipe.load(STACK.replace("[0, 4]", f"[0, {end}]") + f"seed: {end}\n")
    assert recipe.slices[0].sources[0].layer_range == (0, 4)
    assert recipe.seed == 4
    assert recipe == Recipe.load(STACK + "seed: 4\n")
