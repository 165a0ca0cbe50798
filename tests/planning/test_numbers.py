"""Recipes that differ in numbers alone, and a plan with other numbers."""

import pytest

import fastmerge as fm
from fastmerge.errors import RecipeError
from fastmerge.planning.numbers import renumbered, skeleton
from tests import tiny


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), hidden=32, vocab=70)


def document(paths, **changes):
    sources = [{"model": str(paths[n]), "layer_range": [0, 2], "parameters": {"weight": 0.5}} for n in "ab"]
    base = {"model": str(paths["base"]), "layer_range": [0, 2]}
    out = {
        "merge_method": "ties",
        "base_model": str(paths["base"]),
        "slices": [{"sources": [base, *sources]}],
        "parameters": {"density": 0.5, "normalize": True},
    }
    return {**out, **changes}


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({"parameters": {"density": 0.25, "normalize": True}}, True),
        ({"parameters": {"density": 1, "normalize": True}}, True),
        ({"parameters": {"density": "0.25", "normalize": True}}, True),
        ({"parameters": {"density": 0.5, "normalize": False}}, False),
        ({"parameters": {"density": 0.5}}, False),
        ({"parameters": {"density": [0.5, 0.6], "normalize": True}}, False),
        ({"parameters": {"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.5}], "normalize": True}}, False),
        ({"seed": 1}, False),
        ({"out_dtype": "float32"}, False),
        ({"preset": "paper"}, False),
    ],
)
def test_what_is_more_than_a_number(paths, changes, alike):
    first, second = (fm.Recipe.load(document(paths, **c)) for c in ({}, changes))
    assert (skeleton(first) == skeleton(second)) is alike


def test_layers_are_no_numbers(paths):
    first, second = document(paths), document(paths)
    for source in second["slices"][0]["sources"]:
        source["layer_range"] = [0, 1]
    assert skeleton(fm.Recipe.load(first)) != skeleton(fm.Recipe.load(second))


def test_the_numbers_of_two_filters_are_not_taken_for_each_other(paths):
    rules = [[{"filter": f, "value": 0.1}, {"value": 0.2}] for f in ("mlp", "attn")]
    texts = [skeleton(fm.Recipe.load(document(paths, parameters={"density": r}))) for r in rules]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("value", [[0.1, 0.9], [{"filter": "mlp", "value": 0.3}, {"value": [0.4, 0.8]}], 0.7])
def test_a_plan_has_the_specs_of_a_plan_anew(paths, value):
    def other(v):
        return (
            v / 2
            if isinstance(v, float)
            else [other(x) for x in v]
            if isinstance(v, list)
            else {**v, "value": other(v["value"])}
        )

    first, second = (document(paths, parameters={"density": v, "normalize": True}) for v in (value, other(value)))
    plan, anew = fm.plan(first), fm.plan(second)
    specs = renumbered(plan, fm.Recipe.load(second))
    assert [specs.get(op.spec, op.spec).method for op in plan.ops] == [op.spec.method for op in anew.ops]
    assert [specs.get(op.spec, op.spec).batch for op in plan.ops] == [op.spec.batch for op in anew.ops]
    assert set(renumbered(plan, fm.Recipe.load(first)).items()) == {(s, s) for s in plan.rows}


def test_numbers_that_do_not_fit_are_refused(paths):
    models = [{"model": str(paths[n]), "parameters": {"weight": 0.5}} for n in "ab"]
    plan = fm.plan({"merge_method": "linear", "models": models})
    wrong = [{**m, "parameters": {"weight": w}} for m, w in zip(models, (0.5, -0.5), strict=True)]
    with pytest.raises(RecipeError, match="sum to zero"):
        renumbered(plan, fm.Recipe.load({"merge_method": "linear", "models": wrong}))


def test_random_numbers_that_come_or_go_take_a_plan_anew(paths):
    first, second = (
        document(paths, merge_method="della", parameters={"density": d, "epsilon": 0.0}) for d in (1.0, 0.5)
    )
    plan = fm.plan(first)
    assert renumbered(plan, fm.Recipe.load(second)) is None
    assert renumbered(plan, fm.Recipe.load(first)) is not None
