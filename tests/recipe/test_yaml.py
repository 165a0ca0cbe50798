"""Hostile and broken YAML: refused at once, with file and line."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastmerge.errors import RecipeError
from fastmerge.recipe import Recipe, tree
from tests.recipe.fakes import problems

GOOD = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x: !!python/object/apply:os.system ['true']\n", "recipe:1: tag:yaml.org,2002:python"),
        ("x: !!python/name:os.system ''\n", "no place in a recipe"),
        ("x: !foreign {a: 1}\n", "no place in a recipe"),
        ("x: !!set {a, b}\n", "!!set has no place"),
        ("x: !!binary aGk=\n", "!!binary values have no place"),
        ("merge_method: 2001-01-01\n", "expected a valid string; got '2001-01-01', which YAML reads as a date"),
        ("a: 1\nb: 2\na: 3\n", "recipe:3: duplicate key 'a' (first on line 1)"),
        ("1: x\n", "keys are strings, not '1'"),
        ("yes: x\n", "keys are strings, not 'yes'"),
        ("? [a, b]\n: x\n", "keys are strings, not a sequence"),
        ("- merge_method\n- linear\n", "this holds a list"),
        ("# nothing\n\n", "this is empty"),
        ("a: [1, 2\nb: 3\n", "not valid YAML"),
        ("a: b: c\n", "recipe:1: not valid YAML"),
        ("a: *nobody\n", "undefined alias"),
        ("a: \x00\n", "not valid YAML"),
        ("a: &a [*a]\n", "a value that contains itself"),
        ("a: &a {b: *a}\n", "a value that contains itself"),
        ("<<: 1\nb: 2\n", "'<<' takes mappings, not a number"),
        ("a: 0x" + "f" * 9000 + "\nb: " + "9" * 9000 + "\n", "cannot read"),
    ],
)
def test_refused_with_a_line(text, said):
    assert said in "\n".join(problems(text)).replace("!!python", "tag:yaml.org,2002:python")


@pytest.mark.parametrize("text", ["---\n" + GOOD, GOOD + "---\n", "--- ~\n---\n" + GOOD + "...\n---\n# end\n"])
def test_empty_documents_around_a_recipe_are_nothing(text):
    assert Recipe.load(text) == Recipe.load(GOOD)


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "{b: " * 5000, "a:\n" + "- " * 3000])
def test_deep_nesting_does_not_reach_the_recursive_composer(text):
    assert "levels deep" in problems(text + "\n")[0]


def test_alias_bombs():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "refused" in problems("\n".join(lines) + "\n")[0]
    assert "more than 200 aliases" in problems("a: &a 1\nb: [" + "*a, " * 300 + "]\n")[0]


def test_size_and_node_caps():
    assert "more than 1,000,000 bytes" in problems("a: " + "x" * 1_000_001 + "\n")[0]
    assert "more than 200,000 values" in problems("a: [" + "1," * 250_000 + "]\n")[0]


def test_files(tmp_path):
    path = tmp_path / "r.yml"
    path.write_text("\ufeff" + GOOD)
    assert Recipe.load(path) == Recipe.load(str(path)) == Recipe.load(GOOD)
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yml: not UTF-8 text \(byte 3\)"):
        Recipe.load(path)
    path.write_bytes(b"a: " + b"x" * 2_000_000)
    with pytest.raises(RecipeError, match=r"r\.yml: a recipe of more than"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match=r"no\.yml: cannot read the recipe: No such file"):
        Recipe.load(tmp_path / "no.yml")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.load(tmp_path)
    path.write_text(GOOD.replace("weight", "wieght"))
    with pytest.raises(RecipeError, match=r"r\.yml:3: models\[0\]\.parameters\.wieght: .*did you mean 'weight'"):
        Recipe.load(path)


def test_anchors_and_merge_keys_work_as_in_mergekit():
    text = """
merge_method: linear
models:
  - model: a
    parameters: &p {weight: 0.25}
  - model: b
    parameters: *p
  - model: c
    parameters:
      <<: *p
      weight: 0.5
"""
    recipe = Recipe.load(text)
    assert [m.parameters["weight"].plain() for m in recipe.models] == [0.25, 0.25, 0.5]


def test_mappings_have_no_lines_and_are_bounded():
    with pytest.raises(RecipeError, match=r"^recipe: models\[0\]\.parameters\.weight: expected a number"):
        Recipe.load({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": "x"}}]})
    with pytest.raises(RecipeError, match="keys are strings"):
        Recipe.load({1: 2})
    loop: dict = {}
    loop["a"] = loop
    with pytest.raises(RecipeError, match="levels deep"):
        Recipe.load(loop)


def test_numpy_values_are_numbers():
    import numpy as np

    data = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": np.float32(0.5)}}]}
    assert Recipe.load(data).models[0].parameters["weight"].plain() == 0.5
    data["models"][0]["parameters"]["weight"] = np.array([0.0, 1.0])
    assert Recipe.load(data).models[0].parameters["weight"].plain() == [0.0, 1.0]


def test_a_key_again_with_the_same_value_is_a_warning():
    recipe = Recipe.load(GOOD + "merge_method: linear\n")
    assert recipe == Recipe.load(GOOD)
    (said,) = recipe.warnings
    assert said == "recipe:4: the key 'merge_method' (first on line 1) stands here again, with the same value"
    (said,) = problems(GOOD + "dtype: float32\ndtype: float16\n")
    assert said == "recipe:5: duplicate key 'dtype' (first on line 4) with another value"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", "got true (or yes, on)"),
        ("on", "got true (or yes, on)"),
        ("true", "got true (or yes, on)"),
        ("off", "got false (or no, off)"),
        ("1:30", "got '1:30', which YAML reads as 90 (base 60)"),
        ("-1:30.5", "got '-1:30.5', which YAML reads as -90.5 (base 60)"),
        ("010", "got '010', which YAML reads as 8 (base 8)"),
        ("-0_12", "got '-0_12', which YAML reads as -10 (base 8)"),
        ("2024-01-01", "got '2024-01-01', which YAML reads as a date"),
        ("0o17", "expected a number; got '0o17'"),
    ],
)
def test_words_of_yaml_are_no_numbers(text, said):
    for written in (text, f"[{text}, 1]", f"{{filter: x, value: {text}}}"):
        (found,) = problems(GOOD.replace("weight: 1", f"weight: {written}"))
        assert found.startswith("recipe:3: models[0].parameters.weight")
        assert said in found


@pytest.mark.parametrize(
    ("text", "want"), [("07", 7), ("0x1f", 31), ("1_000", 1000), ("'010'", 10), (".5", 0.5), ("1e-3", 0.001)]
)
def test_numbers_that_say_what_they_are(text, want):
    recipe = Recipe.load(GOOD.replace("weight: 1", f"weight: {text}"))
    assert recipe.models[0].parameters["weight"].plain() == want


@pytest.mark.parametrize("text", ["010", "1:30", "yes"])
def test_words_of_yaml_are_no_seeds_and_no_layers(text):
    stack = (
        f"merge_method: passthrough\nseed: {text}\nslices: [{{sources: [{{model: a, layer_range: [0, {text}]}}]}}]\n"
    )
    seed, end = problems(stack)
    assert seed.startswith("recipe:2: seed: expected a valid integer; got")
    assert end.startswith("recipe:3: slices[0].sources[0].layer_range[1]: expected a valid integer; got")


@pytest.mark.parametrize("text", ["yes", "on", "true", "'true'", "'on'", "'Y'", "y", "t", "1", "1.0", "'1'"])
def test_every_yes_of_mergekit_is_true_where_a_boolean_is_wanted(text):
    recipe = Recipe.load(GOOD + f"parameters: {{normalize: {text}}}\n")
    assert recipe.parameters["normalize"].plain() is True


@pytest.mark.parametrize("text", ["no", "off", "false", "'False'", "n", "f", "0", "0.0", "'0'"])
def test_every_no_of_mergekit_is_false_where_a_boolean_is_wanted(text):
    recipe = Recipe.load(GOOD + f"parameters: {{normalize: {text}}}\n")
    assert recipe.parameters["normalize"].plain() is False


@pytest.mark.parametrize("text", ["2", "010", "1:30", "maybe", "0.5", "'1.0'"])
def test_what_is_no_boolean_in_mergekit_is_none_here(text):
    (said,) = problems(GOOD + f"parameters: {{normalize: {text}}}\n")
    assert said.startswith("recipe:4: parameters.normalize: expected ")


def test_half_of_a_surrogate_pair_is_no_text():
    for found in ({"chat_template": "\ud800 {{ x }}"}, {"models": [{"model": "\udc80"}]}):
        with pytest.raises(RecipeError, match=r"is no text: it holds half of a surrogate pair"):
            Recipe.load({"merge_method": "linear", **found})
    with pytest.raises(RecipeError, match="neither a path nor a recipe"):
        Recipe.load("\ud800")


def test_no_name_steers_a_terminal():
    text = 'merge_method: "\\e]0;x\\a"\n"\\e[2J": 1\nmodels:\n  - {model: "\\e[31m"}\n'
    text += '  - {model: b, parameters: {"\\x9b": 1}}\n'
    found = problems(text + "x: !%1b[2J y\n") + problems(text)
    with pytest.raises(RecipeError) as error:
        Recipe.load(text)
    warned = Recipe.load(GOOD + '"\\e[2J": 1\nparameters: {"\\e[2J": 1}\n').warnings
    assert len(warned) == 2
    assert [t for t in (*found, *warned, str(error.value)) if not t.replace("\n", "").isprintable()] == []


def test_lines():
    (found,) = tree.parse("a: 1\nb:\n  - x\n  - y: 3\n", "f")
    assert tree.line_at(found, ("b", 1, "y")) == 4
    assert tree.line_at(found, ("b", 7)) == 2
    assert tree.line_at(found, ("zzz",)) == 1


KEYS = [
    "merge_method",
    "models",
    "slices",
    "sources",
    "model",
    "parameters",
    "weight",
    "layer_range",
    "base_model",
    "x",
]
KEYS += [
    "filter",
    "value",
    "tokenizer",
    "tokenizer_source",
    "seed",
    "preset",
    "chat_template",
    "modules",
    "dtype",
    "path",
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["linear", "ties", "a", "a@b", "a+b", "base"])
)
TREES = st.recursive(
    LEAVES | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=25,
)


WEIGHTS = (
    st.floats(0.25, 2)
    | st.lists(st.integers(1, 3), min_size=1, max_size=2)
    | st.just([{"filter": "x", "value": 2}, {"value": 1}])
)
NEARLY_SOUND = st.fixed_dictionaries(
    {
        "merge_method": st.just("linear"),
        "models": st.lists(
            st.fixed_dictionaries(
                {"model": st.sampled_from(["a", "b", "c@d"]), "parameters": st.fixed_dictionaries({"weight": WEIGHTS})}
            ),
            min_size=1,
            unique_by=lambda m: m["model"],
        ),
    },
    optional={"seed": st.integers(-1, 3), "base_model": LEAVES, "chat_template": st.text(max_size=4) | LEAVES},
)


def outcome(source):
    """The recipe, or what one RecipeError says against it, without the lines; nothing else comes out."""
    try:
        return Recipe.load(source)
    except RecipeError as e:
        return sorted(re.sub(r"^recipe:[1-9]\d*: ", "recipe: ", p) for p in e.problems)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), TREES, max_size=7) | NEARLY_SOUND)
@example(yaml.safe_load(GOOD))
@example({**yaml.safe_load(GOOD), "base_model": None, "parameters": {"normalize": [{"filter": "*", "value": "on"}]}})
def test_whatever_is_written_is_read_the_same_from_text_and_again(raw):
    found = outcome(raw)
    assert outcome(yaml.safe_dump(raw, sort_keys=False) + "\n") == found
    if isinstance(found, Recipe):
        assert outcome(found.to_yaml()) == found
    else:
        assert found != []
        assert [p for p in found if not p.startswith("recipe: ")] == []


@st.composite
def misprints(draw):
    """A sound recipe with a few characters replaced by others."""
    at, cut = draw(st.integers(0, len(GOOD))), draw(st.integers(0, 3))
    return GOOD[:at] + draw(st.text("{}[]:,&*!-?|>'\"% \n\tab1<", max_size=3)) + GOOD[at + cut :]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | st.text("{}[]:,&*!-?|>'\"% \n\tab1<", max_size=60) | misprints())
@example(GOOD)
def test_whatever_text_it_is_is_a_recipe_or_refused_by_name(text):
    for source in (text, text + "\n"):
        found, path = outcome(source), str(Path(source))
        if isinstance(found, Recipe):
            assert outcome(found.to_yaml()) == found
        else:
            assert found != []
            assert [p for p in found if not p.startswith(("recipe:", f"{path}:", f"{path!r}:"))] == []
