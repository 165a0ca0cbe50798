"""Files of several recipes: which document is the result, which are its stages, and what is refused with a line."""

import pytest

from fastmerge.errors import RecipeError
from fastmerge.recipe import Recipe
from fastmerge.recipe.tree import MAX_DOCUMENTS


def document(name, *models, base=None):
    lines = [f"name: {name}"] * (name is not None) + ["merge_method: linear", "parameters: {weight: 1}"]
    lines += [f"base_model: {base}"] * (base is not None) + ["models:"]
    return "\n".join([*lines, *(f"  - {{model: {m}, parameters: {{weight: 1}}}}" for m in models), ""])


def load(*documents, **options):
    return Recipe.load("---\n".join(documents), **options)


def problems(*documents, **options):
    with pytest.raises(RecipeError) as caught:
        load(*documents, **options)
    return caught.value.problems


FIRST, SECOND, LAST = document("first", "a", "b"), document("second", "first", "c"), document(None, "second", "first")


def names(recipe):
    return [name for name, _ in recipe.stages]


@pytest.mark.parametrize("documents", [(FIRST, SECOND, LAST), (LAST, SECOND, FIRST), (SECOND, LAST, FIRST)])
def test_each_stage_comes_before_its_users_wherever_it_stands(documents):
    recipe = load(*documents)
    assert names(recipe) == ["first", "second"]
    assert [str(ref) for ref in recipe.refs] == ["second", "first"]
    assert names(dict(recipe.stages)["second"]) == ["first"]
    assert recipe == load(FIRST, SECOND, LAST)
    assert recipe != load(FIRST.replace("model: a", "model: x"), SECOND, LAST)


def test_a_document_is_a_model_wherever_one_may_stand():
    text = (
        "merge_method: slerp\nbase_model: first\nparameters: {t: 0.5}\ntokenizer_source: first\n"
        "slices:\n  - sources:\n      - {model: first, layer_range: [0, 1]}\n"
        "      - {model: first+lora, layer_range: [0, 1]}\n"
    )
    recipe = load(FIRST, text)
    assert names(recipe) == ["first"]
    assert recipe.tokenizer_source == recipe.base_model
    assert [str(ref) for ref in recipe.refs] == ["first", "first+lora"]


def test_yaml_and_back():
    recipe = load(FIRST, SECOND, LAST)
    text = recipe.to_yaml()
    assert text.count("---\n") == 2
    assert Recipe.load(text) == recipe
    assert Recipe.load(text).to_yaml() == text


def test_without_a_document_that_has_no_name_the_last_that_no_other_uses_is_the_result():
    recipe = load(FIRST, SECOND)
    assert names(recipe) == ["first"]
    assert [str(m.model) for m in recipe.models] == ["first", "c"]
    assert load(SECOND, FIRST) == recipe


def test_a_document_that_nothing_uses_is_a_warning():
    unused = document("aside", "first", "d")
    recipe = load(FIRST, unused, LAST.replace("second", "c"))
    assert names(recipe) == ["first"]
    assert recipe.warnings == ("recipe:8: name: nothing uses this document: it is not merged",)
    assert problems(FIRST, unused, LAST.replace("second", "c"), strict=True) == list(recipe.warnings)


def test_warnings_of_stages_have_their_lines():
    recipe = load(FIRST + "comment: x\n", document(None, "first", "c") + "comment: y\n")
    assert [w.partition(": unknown key, ignored")[0] for w in recipe.warnings] == [
        "recipe:14: comment",
        "recipe:7: comment",
    ]


def test_all_documents_by_themselves():
    every = Recipe.load_all(f"{LAST}---\n{SECOND}---\n{FIRST}")
    assert [name for name, _ in every] == ["first", "second", None]
    assert [names(recipe) for _, recipe in every] == [[], ["first"], ["first", "second"]]
    assert every[2][1] == load(FIRST, SECOND, LAST)
    assert [name for name, _ in Recipe.load_all(FIRST)] == ["first"]


def test_missing_tensors_are_merged_in_every_stage():
    recipe = load(FIRST, SECOND, LAST).having(missing="merge")
    assert [r.missing for r in (recipe, *(stage for _, stage in recipe.stages))] == ["merge"] * 3
    assert load(FIRST, SECOND, LAST).missing is None


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ((FIRST, FIRST, LAST), "recipe:8: name: 'first' names another document already (as on line 1)"),
        ((FIRST, LAST, LAST), "recipe:14: another document has no name either"),
        ((document("''", "a"), LAST), "recipe:1: name: expected a name; got ''"),
        ((document("7", "a"), LAST), "recipe:1: name: expected a name; got a number"),
        ((document("[x]", "a"), LAST), "recipe:1: name: expected a name; got a list"),
        ((document("a@b", "a"), LAST), "recipe:1: name: expected a name that other documents can write as a model"),
        ((document("union", "a"), LAST), "recipe:1: name: 'union' means something else as the source of a tokenizer"),
        ((FIRST, document(None, "frist")), "recipe:11: models[0].model: no document of this file is called 'frist'"),
        ((FIRST, document(None, "first@v1")), "recipe:11: models[0].model: 'first' is a document of this file"),
        ((FIRST, document(None, "a+first")), "recipe:11: models[0].model: 'first' is a document of this file: its"),
        ((document("first", "first"), LAST), "recipe:5: models[0].model: the documents use each other in a ring"),
        ((document("x", "y"), document("y", "a", "x"), LAST), "recipe:12: models[1].model: the documents use each"),
        ((FIRST, "- a list\n"), "recipe:8: expected a mapping with 'merge_method'"),
        ((FIRST, "text\n", LAST), "recipe:8: expected a mapping with 'merge_method'"),
    ],
)  # fmt: skip
def test_refused_with_a_line(documents, said):
    assert [p[: len(said)] for p in problems(*documents)] == [said]


def test_problems_of_all_documents_come_together():
    found = problems(FIRST.replace("linear", "lniear"), document("first", "a"), LAST.replace("linear", "liner"))
    assert [p.partition(": ")[0] for p in found] == ["recipe:2", "recipe:8", "recipe:14"]


def test_too_many_documents_are_refused():
    texts = [document(f"d{i}", "a") for i in range(MAX_DOCUMENTS - 1)]
    assert load(*texts, document(None, "b", "c")) == load(document(None, "b", "c"))
    said = f"recipe:{6 * MAX_DOCUMENTS}: more than {MAX_DOCUMENTS} documents; refused"
    assert problems(*texts, document(None, "b", "c"), FIRST) == [said]


def test_a_name_goes_before_a_path_and_a_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    recipe = load(FIRST, document("second", "./first"), document(None, "first", "second"))
    said = "recipe:1: name: 'first' is a path on this machine as well: here it is this document; './first' is the path"
    assert recipe.warnings == (said,)
    assert [str(ref) for ref in recipe.refs] == ["first", "second"]
    assert dict(recipe.stages)["second"].stages == ()
