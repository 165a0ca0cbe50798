"""The grammar: what is accepted, what is refused and how it is said."""

import os
import pickle
from dataclasses import replace

import pytest

from fastmerge.errors import RecipeError
from fastmerge.methods import METHODS
from fastmerge.recipe import ModelRef, Parameters, Recipe, Rule, Setting
from fastmerge.recipe.refs import model_ref
from fastmerge.recipe.schema import Token, TokenSource
from tests.recipe.fakes import problems

LINEAR = (
    "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: 2}}\n"
)
TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1, density: 0.5}
  - model: b
    parameters: {weight: 1}
"""
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n"
STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources: [{model: b, layer_range: [2, 4]}]
"""
ROW_OF_A = "tokenizer:\n  tokens:\n    x: {source: {kind: model_token, model: a, %s}}\n"


def test_every_problem_at_once_in_the_order_of_the_lines():
    found = problems("""\
merge_method: ties
modles: []
base_model: a+lora+b
dtype: bf16
models:
  - model: x
    parameters: {density: -1.5, wieght: 1}
  - model: x@1@2
    parameter: {weight: .nan}
parameters:
  normalize: maybe
  lambda: .inf
seed: x
""")
    assert [p.split(": ", 2)[:2] for p in found] == [
        ["recipe:2", "modles"],
        ["recipe:3", "base_model"],
        ["recipe:4", "dtype"],
        ["recipe:7", "models[0].parameters.density"],
        ["recipe:7", "models[0].parameters.wieght"],
        ["recipe:8", "models[1].model"],
        ["recipe:9", "models[1].parameter"],
        ["recipe:11", "parameters.normalize"],
        ["recipe:12", "parameters.lambda"],
        ["recipe:13", "seed"],
    ]
    text = "\n".join(found)
    for said in (
        "did you mean 'models'?",
        "expected one model[+adapter]",
        "did you mean 'bfloat16'?",
        "expected a number in 0 .. 1; got -1.5",
        "did you mean 'weight'?",
        "expected one path[@revision]",
        "did you mean 'parameters'?",
        "expected true or false; got 'maybe'",
        "expected a finite number; got inf",
        "expected a valid integer; got 'x'",
    ):
        assert said in text, said


def test_unknown_keys_do_not_hide_what_needs_the_whole_recipe():
    found = "\n".join(problems("merge_method: slerp\nmodles: 1\nmodels: [{model: a}]\n"))
    assert "modles" in found
    assert "needs a 'base_model'" in found
    assert "needs the parameter 't'" in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: passthrough\nslices: [{sources: []}]\n", "a slice needs at least one source"),
        ("merge_method: passthrough\nslices: [{}]\n", "slices[0].sources: this key is required"),
        (LINEAR + "tokenizer: {tokens: [x]}\n", "tokenizer.tokens: expected a mapping; got a list"),
        (LINEAR + "tokenizer: {tokens: {x: a}}\n", "tokens.x: expected a mapping with 'source' and 'force'; got"),
        (LINEAR + "tokenizer: {tokens: {x: {sauce: a}}}\n", "unknown key 'sauce' (did you mean 'source'?)"),
        (LINEAR + "tokenizer: {tokens: {x: {source: c}}}\n", "tokens.x.source: 'c' is not a model of this recipe"),
        (LINEAR + "tokenizer: {tokens: {x: {force: true}}}\n", "'force' needs a 'source'"),
        (LINEAR + "tokenizer: {tokens: {x: {source: a, force: maybe}}}\n", "'force': expected true or false"),
        (LINEAR + "tokenizer: {tokens: {x: {source: {kind: none}}}}\n", "'kind': expected model_token or zero"),
        (LINEAR + "tokenizer: {tokens: {x: {source: {kind: zero, model: a}}}}\n", "'zero' has no key 'model'"),
        (LINEAR + ROW_OF_A % "token: y, token_id: 1", "'model_token' takes either 'token' or 'token_id'"),
        (LINEAR + ROW_OF_A % "token: 3", "'token': expected a text"),
        (LINEAR + ROW_OF_A % "token_id: -1", "'token_id': expected a number of 0 or more; got -1"),
        (LINEAR + ROW_OF_A.replace("model: a, ", "") % "token: y", "'model_token' needs a 'model'"),
        (LINEAR + "tokenizer: {pad_to_multiple_of: 0}\n", "pad_to_multiple_of: expected a number of 1 or more; got 0"),
        (LINEAR + "tokenizer: {source: a}\ntokenizer_source: a\n", "either 'tokenizer' or 'tokenizer_source'"),
        (LINEAR + "tokenizer: {sauce: a}\n", "tokenizer.sauce: unknown key (did you mean 'source'?)"),
        (LINEAR + "chat_template: short\n", "mistral or a Jinja template; got 'short'"),
        (LINEAR.replace("model: a", "model: {path: a}"), "got a mapping of ['path']"),
    ],
)  # fmt: skip
def test_refused(text, said):
    assert said in "\n".join(problems(text))


def test_sources_of_a_slice_need_equal_lengths_and_the_base():
    text = """\
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [0, 4]}, {model: c, layer_range: [0, 4]}]
parameters: {t: 0.5}
"""
    found = "\n".join(problems(text))
    assert "recipe:4: slices[0].sources: all sources of a slice need equally many layers; got 4, 3" in found
    assert "recipe:5: slices[1].sources: the base 'a' must be one of the sources of each slice" in found


def test_a_required_parameter_may_stand_at_any_level():
    assert Recipe.load(
        TIES.replace("weight: 1, ", "").replace("    parameters: {weight: 1}\n", "") + "parameters: {weight: 1}\n"
    )
    assert Recipe.load("merge_method: linear\nbase_model: c\nmodels: [{model: a}]\nparameters: {weight: 1}\n")
    found = problems(LINEAR + "base_model: c\n")
    assert found == ["recipe:2: models[2]: 'linear' needs the parameter 'weight' for 'c'"]


def test_presets_decide_what_is_required():
    bare = "merge_method: ties\nbase_model: x\nmodels: [{model: a}]\n"
    assert "needs the parameter 'weight'" in problems(bare)[0]
    assert Recipe.load(bare + "preset: paper\n").preset == "paper"
    assert Recipe.load(bare + "parameters: {weight: 1}\npreset: mergekit\n")
    assert "needs the parameter 'density'" in "\n".join(problems(bare + "parameters: {weight: 1}\npreset: peft\n"))


def test_values_are_typed():
    recipe = Recipe.load(
        TIES.replace("density: 0.5", "density: 5e-1").replace("weight: 1}", "weight: '2'}")
        + "parameters: {normalize: 'no', rescale: 1}\n"
    )
    assert recipe.models[0].parameters["density"] == Setting((Rule(0.5),))
    assert recipe.models[1].parameters["weight"].plain() == 2.0
    assert recipe.parameters["normalize"].plain() is False
    assert recipe.parameters["rescale"].plain() is True


def test_a_stray_key_with_null_is_a_warning_like_any_other():
    (warning,) = Recipe.load(LINEAR + "name: null\n").warnings
    assert "name: unknown key, ignored" in warning


def test_int8_mask_is_accepted_everywhere():
    assert "int8_mask" in Recipe.load(LINEAR + "parameters: {int8_mask: true}\n").parameters


def test_recipes_are_frozen_hashable_and_pickle():
    recipe = Recipe.load(TIES)
    with pytest.raises(Exception, match="cannot assign"):
        recipe.dtype = "float32"
    with pytest.raises(TypeError):
        recipe.parameters["x"] = 1
    assert hash(recipe) == hash(Recipe.load(TIES))
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert Recipe.load(recipe) is recipe
    assert recipe.method is METHODS["ties"]


def test_model_references():
    text = """
merge_method: linear
parameters: {weight: 1}
models:
  - model: org/name@abc
  - model: {model: {path: 'a+b@c', revision: main}}
  - model: {model: ../x}
"""
    recipe = Recipe.load(text)
    assert recipe.refs == (ModelRef("org/name", "abc"), ModelRef("a+b@c", "main"), ModelRef("../x"))
    assert str(recipe.refs[0]) == "org/name@abc"
    assert Recipe.load(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", ["ft@v2", "a@b@c", "a+b", "org/name@abc"])
def test_a_reference_that_exists_as_a_path_is_that_path(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    ref = model_ref(name)
    assert ref == ModelRef(name)
    assert ref.plain() == {"model": {"path": name}}


@pytest.mark.parametrize("raw", ["", " ", "a\0b", "\udcff"])
def test_what_no_path_and_no_id_can_be(raw):
    with pytest.raises(ValueError, match="expected a model"):
        model_ref(raw)


def test_a_recipe_that_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "r.yml")
    with pytest.raises(RecipeError, match=r"r.yml: cannot read the recipe: expected a regular file, got a pipe"):
        Recipe.load(tmp_path / "r.yml")


def test_order_of_models_is_base_first_then_as_written():
    assert [str(r) for r in Recipe.load(TIES).refs] == ["base", "a", "b"]
    assert [str(r) for r in Recipe.load(LINEAR + "base_model: b\n").refs] == ["b", "a"]
    assert [str(r) for r in Recipe.load(STACK).refs] == ["a", "b"]


def test_a_base_joins_last_where_the_method_has_none_and_as_base_where_it_has():
    (part,) = Recipe.load(LINEAR + "base_model: c\nparameters: {weight: 1}\n").parts
    assert [str(s.model) for s in part.sources] == ["a", "b", "c"]
    assert part.base is None
    (part,) = Recipe.load(TIES).parts
    assert [str(s.model) for s in part.sources] == ["a", "b", "base"]
    assert part.base == ModelRef("base")
    (part,) = Recipe.load(LINEAR + "base_model: b\n").parts
    assert [str(s.model) for s in part.sources] == ["a", "b"]


def test_slice_bases_win():
    text = """\
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    base_model: b
    parameters: {t: 0.1}
parameters: {t: 0.5}
"""
    first, second = Recipe.load(text).parts
    assert (str(first.base), str(second.base)) == ("a", "b")
    assert second.levels[0]["t"].plain() == 0.1
    assert first.ranges == ((0, 2), (0, 2))


def test_tokenizers():
    for text in (
        "tokenizer_source: base\n",
        "tokenizer: {source: base}\n",
        "tokenizer_source: a\n",
        "tokenizer_source: model:a\n",
        "tokenizer_source: a+adapter\n",
    ):
        recipe = Recipe.load(SLERP + text)
        assert recipe.tokenizer_source == ModelRef("a")
        assert Recipe.load(recipe.to_yaml()) == recipe
    assert Recipe.load(LINEAR + "tokenizer_source: base\n").tokenizer_source == ModelRef("a"), (
        "as the donor of the rest"
    )
    other = Recipe.load(LINEAR + "tokenizer_source: other+adapter\n")
    assert other.tokenizer_source == ModelRef("other")
    assert '"tokenizer_source":"another"' in other.canonical()
    assert Recipe.load(LINEAR + "tokenizer: {}\n") == Recipe.load(LINEAR + "tokenizer_source: union\n")
    text = ROW_OF_A % "token_id: 3" + "  pad_to_multiple_of: 8\n"
    more = "    y: {source: {kind: zero}, force: true}\n    z: {source: b}\n    q:\n"
    recipe = Recipe.load(LINEAR + text.replace("  pad", more + "  pad"))
    assert hash(recipe) == hash(Recipe.load(recipe.to_yaml()))
    block = recipe.tokenizer
    assert (block.source, block.pad_to_multiple_of) == (recipe.tokenizer_source, 8) == (ModelRef("union"), 8)
    assert block.tokens == {
        "x": Token(TokenSource(ModelRef("a"), token_id=3)),
        "y": Token(TokenSource(None), force=True),
        "z": Token(TokenSource(ModelRef("b"))),
        "q": Token(),
    }
    assert Recipe.load(recipe.to_yaml()) == recipe
    assert '"model":0,"token_id":3' in recipe.canonical()
    assert Recipe.load(SLERP + "chat_template: auto\n").chat_template == "auto"
    assert Recipe.load(SLERP + "chat_template: chatml\n").chat_template == "chatml"
    assert Recipe.load(SLERP + "tokenizer_source: model:b\n").tokenizer_source == ModelRef("b")


def test_canonical_has_no_paths_and_knows_identities_and_seed():
    here, there = (
        Recipe.load(TIES.replace("base\n", f"{root}/base\n").replace("model: a", f"model: {root}/a"))
        for root in ("/x", "/y/z")
    )
    assert here.canonical(["1", "2", "3"]) == there.canonical(["1", "2", "3"])
    assert "/x" not in here.canonical()
    assert here.canonical(["1", "2", "3"]) != here.canonical(["1", "2", "4"])
    assert here.canonical(seed=1) != here.canonical()
    assert here.canonical(seed=0) == here.canonical()
    assert here.canonical() != Recipe.load(TIES.replace("0.5", "0.4")).canonical()
    assert "\n" not in here.canonical()


def test_parameters_are_a_mapping():
    one = Parameters({"a": Setting((Rule(1.0),))})
    assert one == Parameters({"a": Setting((Rule(1.0),))})
    assert one != Parameters()
    assert "Rule" in repr(one)


def test_a_recipe_knows_where_its_parts_stand(tmp_path):
    text = "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 2]\n"
    path = tmp_path / "some.yml"
    path.write_text(text)
    recipe, same = Recipe.load(path), Recipe.load(text)
    loc = ("slices", 0, "sources", 0, "layer_range")
    assert recipe.at(loc) == f"{path}:5: slices[0].sources[0].layer_range"
    assert same.at(loc) == "recipe:5: slices[0].sources[0].layer_range"
    assert recipe == same
    assert hash(recipe) == hash(same)
    assert replace(recipe).at(loc) == recipe.at(loc)
    mapped = Recipe.load(recipe.plain())
    assert mapped.at(loc) == "recipe: slices[0].sources[0].layer_range"
    assert mapped == recipe
