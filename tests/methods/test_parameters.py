"""One value, one answer: recipes, calls with tensors and the functions on task vectors share their rules."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

import fastmerge as fm
from fastmerge.methods import METHODS, get
from fastmerge.methods.called import called
from fastmerge.planning import plan
from fastmerge.recipe import Recipe
from tests import tiny
from tests.compare import differences
from tests.recipe.fakes import checkpoint

A, B = (torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]]) * f for f in (1, 0.5))
BASE = torch.zeros(2, 3)
REFUSED = "refused"


def answer(call):
    """What a call makes of a value: the resolved value, or the words from "expected" on of the error."""
    try:
        return call()
    except fm.RecipeError as e:
        assert all(any(w in text for w in ("expected", "entry", "input")) for text in e.problems), e.problems
        return REFUSED


def of_recipe(method, name, value, **more):
    """The parameter of the method that a recipe makes."""
    models = {n: checkpoint({"w": (2, 3)}, dtype="float32") for n in ("base", "a", "b")}
    raw = {
        "merge_method": method,
        "models": [{"model": "a"}, {"model": "b"}],
        "base_model": "base",
        "parameters": {"weight": 0.5, **more, name: value},
    }
    recipe = Recipe.load(raw)
    return getattr(plan(recipe, models=models).ops[0].spec.method, field(method, name))


def of_yaml(method, name, value, **more):
    """The same, written and read again."""
    text = yaml.safe_dump({name: value}).replace("'nan'", "nan")
    return of_recipe(method, name, yaml.safe_load(text)[name], **more)


def of_call(method, name, value, **more):
    found = called(get(method), {"weight": 0.5, **more, name: value}, [0, 1])
    return getattr(found.method("w", [(0, "w"), (1, "w")]), field(method, name))


def field(method, name):
    return next(p.field for p in get(method).params if p.name == name)


def seen(method, name, value, **more):
    """The same call with tensors: what its result is, so that the value was understood."""
    given = {"weight": 0.5, **more, name: value}
    one = fm.merge_tensors([BASE, A, B], method, parameters=given, base_index=0, name="w")
    states = [{"w": x} for x in (BASE, A, B)]
    many = fm.merge_state_dicts(states, method, parameters=given, base=0)["w"]
    assert torch.equal(one, many)
    return one


NUMBERS = [
    (0.5, 0.5), (1, 1.0), (0, 0.0), ("0.5", 0.5), ("1e-1", 0.1), (" .25 ", 0.25), (np.float32(0.25), 0.25),
    (np.array(0.5), 0.5), (True, REFUSED), (False, REFUSED), ("true", REFUSED), ("much", REFUSED), ("", REFUSED),
    (float("nan"), REFUSED), (float("inf"), REFUSED), ("nan", REFUSED), ("1_0", REFUSED), ("0x1", REFUSED),
    (1.5, REFUSED), (-0.1, REFUSED), ("1.5", REFUSED), (10**400, REFUSED), (None, REFUSED), ({"x": 1}, REFUSED),
    (b"1", REFUSED),
]  # fmt: skip
FLAGS = [
    (True, True), (False, False), (1, True), (0, False), (1.0, True), ("yes", True), ("Off", False), ("true", True),
    ("0", False), (np.bool_(True), True), (2, REFUSED), ("maybe", REFUSED), (0.5, REFUSED), (None, REFUSED),
    ({"x": True}, REFUSED), (float("nan"), REFUSED),
]  # fmt: skip
WORDS = [("sum", "sum"), ("mean", "mean"), ("mode", REFUSED), ("SUM", REFUSED), (None, REFUSED), (1, REFUSED),
         (True, REFUSED), ({"x": "sum"}, REFUSED)]  # fmt: skip
SHARES = [(v, 1.0 if v == 1.5 else w) for v, w in NUMBERS]  # mergekit keeps everything; here with a warning
TABLE = [("ties", "density", (v, w if w is REFUSED else (w, w))) for v, w in SHARES]
TABLE += [("ties", "normalize", pair) for pair in FLAGS] + [("ties", "merge", pair) for pair in WORDS]


@pytest.mark.parametrize(("method", "name", "pair"), TABLE, ids=lambda x: repr(x)[:40])
def test_the_same_value_has_the_same_answer(method, name, pair):
    value, want = pair
    assert answer(lambda: of_call(method, name, value)) == want
    assert answer(lambda: of_recipe(method, name, value)) == want
    if isinstance(value, bool | int | float | str | dict | None):
        assert answer(lambda: of_yaml(method, name, value)) == want
    result = answer(lambda: seen(method, name, value))
    if want is REFUSED:
        assert result is REFUSED
    else:
        scalar = want[0] if isinstance(want, tuple) else want
        assert torch.equal(result, seen(method, name, scalar))


@pytest.mark.parametrize(("value", "want"), NUMBERS, ids=lambda x: repr(x)[:40])
def test_functions_on_task_vectors_take_the_same_numbers(value, want):
    """Bounds are those of the parameter: 0 .. 1 for shares."""
    base, tau = {"w": BASE}, {"w": A}

    functions = (
        lambda density: fm.ties_merge(base, [tau, {"w": B}], density),
        lambda p: fm.dare_sparsify(tau, p),
        lambda rate: fm.dare_ties_merge(base, [tau], drop_rate=rate),
        lambda density: fm.dare_ties_merge(base, [tau], density=density),
    )
    got = [answer(lambda f=f: f(value)["w"]) for f in functions]
    if want is REFUSED:
        assert got == [REFUSED] * 4
    else:
        assert differences(got, [f(want)["w"] for f in functions]) == []


@pytest.mark.parametrize(("value", "want"), NUMBERS, ids=lambda x: repr(x)[:40])
def test_factors_of_task_vectors_are_numbers(value, want, tmp_path):
    """Without bounds."""
    from safetensors.torch import save_file

    save_file({"w": A}, tmp_path / "a.safetensors")
    free = value in (1.5, -0.1, "1.5") if isinstance(value, int | float | str) else False
    for call in (
        lambda: fm.slerp_models({"w": A}, {"w": B}, value)["w"],
        lambda: fm.ties_merge({"w": BASE}, [{"w": A}], 0.5, [value])["w"],
        lambda: fm.apply_task_vectors(tmp_path / "a.safetensors", [{"w": A}], [value])["w"],
    ):
        assert (answer(call) is REFUSED) == (want is REFUSED and not free)


@pytest.mark.parametrize("values", [None, 0.5, "0.5", [0.5, 0.5], [], {"w": 1}])
def test_factors_come_one_per_task_vector(values, tmp_path):
    from safetensors.torch import save_file

    save_file({"w": A}, tmp_path / "a.safetensors")
    with pytest.raises(fm.RecipeError, match=r"^lambdas: expected 1 values, one per task vector, got"):
        fm.apply_task_vectors(tmp_path / "a.safetensors", [{"w": A}], values)
    if values is not None:
        with pytest.raises(fm.RecipeError, match=r"^weights: expected 1 values, one per task vector, got"):
            fm.ties_merge({"w": BASE}, [{"w": A}], 0.5, values)


def test_none_is_the_default_where_that_is_a_legal_value():
    third = {"merge_method": "ties", "preset": "task_vectors", "base_model": "base"}
    models = {n: checkpoint({"w": (2, 3)}, dtype="float32") for n in ("base", "a", "b")}
    raw = third | {"models": [{"model": "a", "parameters": {"weight": None}}, {"model": "b"}]}
    made = plan(Recipe.load(raw), models=models).ops[0].spec.method
    assert made.weight == (None, None)
    assert made.weights == (0.5, 0.5)
    (again,) = {called(get("ties"), {"weight": w}, "ab", "task_vectors").method("w", [(0, "w"), (1, "w")])
                for w in (None, [None, None], {"a": None, "b": None})}  # fmt: skip
    assert again == made
    copy = {"merge_method": "passthrough", "models": [{"model": "a", "parameters": {"scale": None}}]}
    assert plan(Recipe.load(copy), models=models).ops[0].spec.grain == "copy"
    for wrong in ({"weight": None}, {"weight": [None, 1.0]}):
        with pytest.raises(fm.RecipeError, match="weight"):
            called(get("ties"), wrong, "ab")
    with pytest.raises(fm.RecipeError, match="weight"):
        Recipe.load(raw | {"preset": "mergekit"})


def test_nested_values_are_refused_and_no_other_error_escapes():
    odd = [[[0.5]], [[True]], [{}], {"a": [[1]]}, object(), {1, 2}, [object()], [["sum"]], (None,), [{"value": [[1]]}]]
    for name in ("density", "normalize", "merge", "lambda", "weight"):
        for value in odd:
            with pytest.raises(fm.RecipeError, match=f"parameter '{name}'"):
                called(get("ties"), {"weight": 0.5, name: value}, "ab")


def test_values_by_model_and_by_order(caplog):
    def weights(value):
        return called(get("ties"), {"weight": value}, ["a", "b"]).method("w", [(0, "w"), (1, "w")]).weight

    assert weights([1, 2]) == weights({"a": 1, "b": 2}) == weights({"b": "2", "a": 1.0}) == (1.0, 2.0)
    assert weights(np.array([1, 2])) == weights((1, 2)) == weights(torch.tensor([1, 2])) == (1.0, 2.0)
    assert weights(3) == weights({"filter": None, "value": 3}) == weights([{"value": 3}]) == (3.0, 3.0)
    assert weights([{"filter": "x", "value": 3}, {"filter": "*", "value": 4}]) == (4.0, 4.0)
    assert weights([[{"filter": "w", "value": 3}, {"value": 5}], 4]) == (3.0, 4.0)
    for wrong, words in (
        ([1], "expected 2 values, got 1"),
        ({"a": 1}, "missing for input 'b'"),
        ([{"value": 3}, 4], "either values or {filter, value} entries, not both"),
        ([{"filter": 3, "value": 4}], "a filter is part of a tensor name; got 3"),
    ):
        with pytest.raises(fm.RecipeError) as e:
            weights(wrong)
        assert words in str(e.value)
    assert weights({"a": 1, "b": 2, "c": 3}) == (1.0, 2.0)
    assert "weight': ignored: 'c' is none of the inputs ['a', 'b']" in caplog.text


# ---- the same parameters in memory and on disk -------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    base = tiny.state(0, layers=4, hidden=32, vocab=50)
    states = {"base": base} | {
        n: tiny.state(i + 1, layers=4, hidden=32, vocab=50, base=base) for i, n in enumerate("ab")
    }
    return {n: tiny.write(root / n, s, layers=4) for n, s in states.items()}, states


FILTERED = [{"filter": "self_attn", "value": 0.3}, {"filter": "mlp", "value": [0.9, 0.1]}, {"value": 0.5}]
SAME = {
    "slerp filters and gradients": ("slerp", {"t": FILTERED}, {}),
    "slerp gradient": ("slerp", {"t": [0, 0.2, 1]}, {}),
    "ties filters": ("ties", {"weight": 1.0, "density": FILTERED}, {}),
    "ties by model": ("ties", {"weight": {"a": 0.3, "b": FILTERED}, "density": [0.25, 0.5]}, {}),
    "ties words by layer": ("ties", {"weight": 1.0, "density": 0.4, "merge": ["mean", "sum"]}, {}),
    "ties flags by filter": ("ties", {"weight": 1.0, "normalize": [{"filter": "norm", "value": False}]}, {}),
    "linear by order": ("linear", {"weight": [[0.2, 0.9], 0.7, FILTERED]}, {}),
    "dare seeds": ("dare_ties", {"weight": 0.7, "density": {"a": [0.9, 0.2], "b": 0.5}}, {"seed": 7}),
    "preset": ("task_arithmetic", {"lambda": FILTERED}, {"preset": "fusionbench"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_in_memory_and_on_disk_the_same_bits(family, name, tmp_path):
    paths, states = family
    method, parameters, more = SAME[name]
    based = METHODS[method].contract.base == "required"
    who = ["base", "a"] if method == "slerp" else ["base", "a", "b"]
    others = who[1:] if based else who
    raw = {"merge_method": method, "models": [{"model": str(paths[n]), "parameters": {}} for n in others], **more}
    if based:
        raw["base_model"] = str(paths["base"])
    for key, value in parameters.items():
        param = next(p for p in METHODS[method].params if p.name == key)
        if param.scope == "shared" or not isinstance(value, list | dict) or value is FILTERED:
            raw.setdefault("parameters", {})[key] = value
            continue
        for i, (model, n) in enumerate(zip(raw["models"], others, strict=True)):
            model["parameters"][key] = value[n] if isinstance(value, dict) else value[i]
    fm.merge(yaml.safe_dump(raw), tmp_path / "out", device="cpu")
    from safetensors.torch import load_file

    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    given = dict(parameters=parameters, base="base" if based else None, **more)
    assert differences(fm.merge_state_dicts({n: states[n] for n in who}, method, **given), on_disk) == []
    if based and method != "slerp":
        moved = {n: states[n] for n in ("a", "base", "b")}  # what is asked for by name does not depend on the order
        assert differences(fm.merge_state_dicts(moved, method, **given), on_disk) == []


def test_a_gradient_needs_layers():
    flat = {"w": torch.ones(3)}
    with pytest.raises(fm.RecipeError, match="a gradient needs layers"):
        fm.merge_state_dicts([flat, flat], "linear", parameters={"weight": [[0, 1], 1]})
    with pytest.raises(fm.RecipeError, match="'t': a gradient needs the layers of a model"):
        fm.merge_tensors([A, B], "slerp", parameters={"t": [0, 1]}, base_index=0)
    (one,) = fm.merge_state_dicts([flat, flat], "linear", parameters={"weight": [[1], 1]}).values()
    assert torch.equal(one, flat["w"])


def test_filters_that_match_nothing_are_said(caplog):
    given = {"weight": 1.0, "density": [{"filter": "typo", "value": 0.5}]}
    fm.merge_state_dicts([{"w": BASE}, {"w": A}], "ties", parameters=given, base=0)
    assert [r.getMessage() for r in caplog.records] == ["the filter 'typo' matches no tensor name"]


def test_a_method_is_its_class_and_its_values():
    made = called(get("ties"), {"weight": 0.5}, "ab").method("w", [(0, "w"), (1, "w")])
    assert made == dataclasses.replace(made)
    assert hash(made) == hash(dataclasses.replace(made))
    assert made != dataclasses.replace(made, lam=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.lam = 2.0
