"""References to models: paths, hub ids, revisions, adapters; what exists as a path is a path."""

import json
from pathlib import Path

import pytest

from fastmerge.recipe import ModelRef, Recipe
from fastmerge.recipe.checks import refs
from fastmerge.recipe.refs import model_ref
from fastmerge.recipe.schema import Input, Shape
from fastmerge.recipe.tree import locate


def read(raw):
    return model_ref(locate({"model": raw})["model"])


LORA = ModelRef("b")
SAME = [
    ("a", ModelRef("a")),
    ("org/name@v1", ModelRef("org/name", "v1")),
    ("a+b", ModelRef("a", None, LORA)),
    ("org/a@v1+org/b@v2", ModelRef("org/a", "v1", ModelRef("org/b", "v2"))),
    ({"model": "a"}, ModelRef("a")),
    ({"model": {"path": "a"}}, ModelRef("a")),
    ({"model": "a@v1", "lora": "b@v2"}, ModelRef("a", "v1", ModelRef("b", "v2"))),
    ({"model": {"path": "a", "revision": "v1"}, "lora": {"path": "b"}}, ModelRef("a", "v1", LORA)),
    ({"model": "a", "lora": None, "override_architecture": "X"}, ModelRef("a")),
]


@pytest.mark.parametrize(("raw", "want"), SAME)
def test_forms_and_the_way_back(raw, want):
    assert read(raw) == want
    assert read(want.plain()) == want
    assert read(str(want)) == want


@pytest.mark.parametrize(("raw", "want"), SAME)
def test_the_same_as_mergekit(raw, want):
    from tests.recipe.oracle import ModelReference

    theirs = ModelReference.model_validate(raw)
    assert str(theirs) == str(want)
    lora = theirs.lora and (theirs.lora.path, theirs.lora.revision)
    assert (theirs.model.path, theirs.model.revision) == (want.path, want.revision)
    assert lora == (want.lora and (want.lora.path, want.lora.revision))


@pytest.mark.parametrize(
    ("path", "revision", "lora"),
    [("a+b@c", "main", None), ("a+b", None, None), ("a", None, ModelRef("b@c", "d+e")), ("a@b", None, ModelRef("c+d"))],
)
def test_names_with_signs_are_written_as_a_mapping(path, revision, lora):
    ref = ModelRef(path, revision, lora)
    assert isinstance(ref.plain(), dict)
    raw = {"model": {"path": path, **({"revision": revision} if revision else {})}}
    if lora:
        raw["lora"] = {"path": lora.path, **({"revision": lora.revision} if lora.revision else {})}
    assert ref.plain() == raw


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ft", "ft@v2", "ft+x", "x"):
        Path(name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("ft@v2", ModelRef("ft@v2")),
        ("ft+x", ModelRef("ft+x")),
        ("ft+x+l", ModelRef("ft+x", None, ModelRef("l"))),
        ("l+ft+x", ModelRef("l", None, ModelRef("ft+x"))),
        ("ft@v2+l@v1", ModelRef("ft@v2", None, ModelRef("l", "v1"))),
        ("org/l@v1+ft@v2", ModelRef("org/l", "v1", ModelRef("ft@v2"))),
        ({"model": {"path": "ft@v2"}, "lora": "ft+x"}, ModelRef("ft@v2", None, ModelRef("ft+x"))),
        ({"model": {"path": "ft"}, "lora": "x"}, ModelRef("ft", None, ModelRef("x"))),
        ("ft/", ModelRef("ft")),
        ("/", ModelRef("/")),
    ],
)
def test_what_exists_as_a_path_is_a_path(here, raw, want):
    assert read(raw) == want
    assert read(want.plain()) == want


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("ft@v3", "'ft' is a path on this machine, which has no revisions; got revision 'v3'"),
        ({"model": {"path": "ft", "revision": "v3"}}, "'ft' is a path on this machine"),
        ("org/l+x@v1", "'x' is a path on this machine"),
        ("a+b+c", "'a+b+c': expected one model[+adapter]"),
        ("a+", "'a+': expected model+adapter"),
        ("+b", "'+b': expected model+adapter"),
        ("a@", "'a@': expected one path[@revision]"),
        ("@b", "'@b': expected one path[@revision]"),
        ("a@b@c", "'a@b@c': expected one path[@revision]"),
        ("a\x1b[2J", "got 'a\\x1b[2J': control characters"),
        ("a\nb", "control characters"),
        ("org/a@v\x9b", "control characters"),
        ("~nobody_of_this_name/x", "'~nobody_of_this_name/x': no such user"),
        (
            {"model": "a", "lora": 3},
            "expected a model, or {model: {path, revision}, lora: {path, revision, weight}}",
        ),
        ({"lora": "a"}, "got a mapping of ['lora']"),
        (
            {"model": {"path": "a", "subfolder": "x"}, "adapter": "b"},
            "unknown keys 'adapter', 'subfolder' in a mapping of",
        ),
        (3, "got a number"),
    ],
)
def test_refused(here, raw, said):
    with pytest.raises(ValueError) as error:
        read(raw)
    assert said in str(error.value)


def test_paths_of_pathlib_are_paths():
    assert read(Path("/x/y")) == ModelRef("/x/y")


def test_a_slash_at_the_end_is_no_other_model(tmp_path):
    text = f"merge_method: ties\nbase_model: {tmp_path}/\nmodels: [{{model: {tmp_path}}}, {{model: x}}]\n"
    recipe = Recipe.load(text + "parameters: {weight: 1}\n")
    assert recipe.refs == (ModelRef(str(tmp_path)), ModelRef("x"))


ADAPTED = """\
merge_method: ties
base_model: a+l
models:
  - {model: b+l, parameters: {weight: 1}}
  - {model: {model: {path: c}, lora: {path: k, revision: v}}, parameters: {weight: 1}}
tokenizer_source: a
"""


def test_recipes_with_adapters_come_back():
    recipe = Recipe.load(ADAPTED)
    assert [str(ref) for ref in recipe.refs] == ["a+l", "b+l", "c+k@v"]
    assert recipe.adapters == (ModelRef("l"), ModelRef("k", "v"))
    assert recipe.tokenizer_source == recipe.base_model
    assert Recipe.load(recipe.to_yaml()) == recipe
    canonical = json.loads(recipe.canonical())
    assert canonical["base_model"] == [0, 0]
    assert [m["model"] for m in canonical["models"]] == [[1, 0], [2, 1]]
    assert canonical["inputs"] == 5
    bare = Recipe.load(ADAPTED.replace("+l", ""))
    assert bare.canonical(["x"]) != recipe.canonical(["x"])


def test_one_model_with_and_without_an_adapter_is_two():
    shape = Shape(
        merge_method="linear",
        models=[Input(model=ModelRef("a")), Input(model=ModelRef("a", None, ModelRef("l")))],
    )
    assert len(refs(shape)) == 2
