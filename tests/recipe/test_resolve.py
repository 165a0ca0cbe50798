"""Filters, gradients and precedence, against mergekit 0.1.5's own resolution of random recipes."""

import random
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmerge.recipe as package
from fastmerge.errors import RecipeError
from fastmerge.methods.base import REQUIRED, Contract, Method, per_model, shared
from fastmerge.methods.parameters import Resolver
from fastmerge.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Fake(Method):
    """A parameter of every kind."""

    name = "fake"
    contract = Contract("optional")

    need: tuple[float, ...] = per_model("")
    own: tuple[float, ...] = per_model("", 0.75, low=-10.0, high=10.0)
    count: tuple[int, ...] = per_model("", 3)
    level: float = shared("", 0.5)
    flag: bool = shared("", default=False)
    word: Literal["x", "y", "z"] = shared("", "x")

    def reference(self, inputs, op):
        raise NotImplementedError


PARAMS = Fake.params
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.11.mlp.down_proj.weight",
    "lm_head.weight",
)


@pytest.fixture(autouse=True, scope="module")
def registry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "METHODS", MappingProxyType({"fake": Fake}))
        yield


@cache
def spec():
    from mergekit.merge_methods.base import BasePolicy, InputContract

    from tests.recipe.oracle import MergeMethodSpec, ParameterScope, ParameterSpec

    kinds = {"word": Literal["x", "y", "z"]}
    made = []
    for p in PARAMS:
        scope = ParameterScope.SHARED if p.scope == "shared" else ParameterScope.NON_BASE
        extra = {} if p.default is REQUIRED else {"default": p.default}
        made.append(ParameterSpec(p.name, kinds.get(p.name, p.type), scope, **extra))
    return MergeMethodSpec("fake", tuple(made), InputContract(base=BasePolicy.OPTIONAL))


def values(param):
    if param.type is float:
        scalar = st.floats(-8, 8) | st.integers(-8, 8) | st.sampled_from(["1e-3", "2.5", "-3E0"])
    elif param.type is int:
        scalar = st.integers(-5, 5) | st.sampled_from(["4", 2.0])
    elif param.type is bool:
        scalar = st.booleans() | st.sampled_from([0, 1, "true", "off", 1.0])
    else:
        scalar = st.sampled_from(param.type)
    size = {"min_size": 1, "max_size": 1} if param.type is int else {"min_size": 0, "max_size": 5}
    value = scalar | st.lists(scalar, **size)
    pattern = st.sampled_from(
        ["self_attn", "mlp", "layers.1", "layers.1.", "weight", "embed", "nothing", "*", "", None]
    )
    rule = st.fixed_dictionaries({"value": value}, optional={"filter": pattern})
    return value | rule | st.lists(rule, min_size=1, max_size=4)


def levels(scopes):
    return st.fixed_dictionaries({}, optional={p.name: values(p) for p in PARAMS if p.scope in scopes})


@st.composite
def recipes(draw):
    base = draw(st.sampled_from([None, "a", "c"]))
    names = ["a", "b", *(["c"] if base == "c" else [])]
    out = {"merge_method": "fake", **({"base_model": base} if base else {})}
    if draw(st.booleans()):
        names = names[:2] if base == "c" and draw(st.booleans()) else names
        out["models"] = [{"model": n, "parameters": draw(levels(["model"]))} for n in names]
    else:
        length = draw(st.integers(1, 4))
        sources = [{"model": n, "layer_range": [0, length], "parameters": draw(levels(["model"]))} for n in names]
        out["slices"] = [{"sources": sources, "parameters": draw(levels(["model", "shared"]))}]
    out["parameters"] = draw(levels(["model", "shared"]))
    return out


def theirs(raw, output, inputs, t):
    """(shared, per input) by mergekit, or None where it raises."""
    from tests.recipe.oracle import ModelReference, config, resolve_parameters

    cfg = config.MergeConfiguration.model_validate(raw)
    module = next(iter((cfg.modules or {}).values()), None)
    of = module or cfg
    models = of.models or of.slices[0].sources
    if of.slices:
        piece = of.slices[0]
    else:
        sources = [
            config.InputSliceDefinition(model=m.model, layer_range=(0, 4), parameters=m.parameters) for m in models
        ]
        piece = config.OutputSliceDefinition(sources=sources)
    base = ModelReference.parse(raw["base_model"]) if "base_model" in raw else None
    refs = [m.model for m in models] + ([base] if base and base not in [m.model for m in models] else [])
    reader = config.ConfigReader(config=cfg, t=t, slice_out=piece, module=module)
    try:
        shared, own = resolve_parameters(
            spec(),
            tensor_name=output,
            inputs=dict(zip(refs, inputs, strict=False)),
            sources=reader.parameter_sources,
            base_model=base,
            t=t,
        )
    except RuntimeError:
        return None
    return dict(shared), {str(m): dict(v) for m, v in own.items() if m != base}


def resolver_of(recipe):
    part = recipe.parts[0]
    names = [str(s.model) for s in part.sources]
    return Resolver(Fake, [s.parameters for s in part.sources], part.levels, place="models: ", models=names)


def ours(recipe, output, inputs, t):
    part = recipe.parts[0]
    who = [i for i, s in enumerate(part.sources) if s.model != part.base]
    try:
        made = resolver_of(recipe).method(output, [(i, inputs[i]) for i in who], t)
    except RecipeError:
        return None
    shared = {p.name: getattr(made, p.field) for p in PARAMS if p.scope == "shared"}
    own = {p.name: getattr(made, p.field) for p in PARAMS if p.scope == "model"}
    return shared, {str(part.sources[m].model): {n: v[i] for n, v in own.items()} for i, m in enumerate(who)}


SCALARS = {
    float: [0.0, 0.5, -2.25, 7.75, 1, -3, "1e-3", "2.5"],
    int: [0, 4, -5, "4", 2.0],
    bool: [True, False, 0, 1, "true", "off", 1.0],
}
FILTERS = ["self_attn", "mlp", "layers.1", "layers.1.", "weight", "embed", "nothing", "*", "", None]


def value(rng, param):
    scalars = SCALARS.get(param.type, param.type)
    most = 1 if param.type is int else 5
    if rng.random() < 0.5:
        return rng.choice(scalars)
    return [rng.choice(scalars) for _ in range(rng.randint(min(most, 1) if rng.random() < 0.9 else 0, most))]


def setting(rng, param):
    def rule():
        return {"value": value(rng, param), **({"filter": rng.choice(FILTERS)} if rng.random() < 0.8 else {})}

    kind = rng.random()
    return value(rng, param) if kind < 0.4 else rule() if kind < 0.5 else [rule() for _ in range(rng.randint(1, 4))]


def a_recipe(rng):
    def level(*scopes):
        return {p.name: setting(rng, p) for p in PARAMS if p.scope in scopes and rng.random() < 0.6}

    base = rng.choice([None, "a", "c"])
    names = ["a", "b", *(["c"] if base == "c" else [])]
    out = {"merge_method": "fake", **({"base_model": base} if base else {})}
    if rng.random() < 0.5:
        listed = names[:2] if rng.random() < 0.5 else names
        out["models"] = [{"model": n, "parameters": level("model")} for n in listed]
    else:
        length = rng.randint(1, 4)
        sources = [{"model": n, "layer_range": [0, length], "parameters": level("model")} for n in names]
        out["slices"] = [{"sources": sources, "parameters": level("model", "shared")}]
    if rng.random() < 0.4:
        module = {key: out.pop(key) for key in ("models", "slices") if key in out}
        out["modules"] = {rng.choice(["default", "part"]): {**module, "parameters": level("model", "shared")}}
    out["parameters"] = level("model", "shared")
    return out


def test_the_same_as_mergekit():
    rng, compared = random.Random(20261120), 0
    for _ in range(300):
        raw, output, inputs, t = a_recipe(rng), rng.choice(NAMES), rng.choices(NAMES, k=3), rng.randint(0, 8) / 8
        text = yaml.dump(raw, Dumper=yaml.CSafeDumper)
        want = theirs(yaml.load(text, yaml.CSafeLoader), output, inputs, t)
        try:
            recipe = Recipe.load(text)
        except RecipeError as e:
            refused = e.problems
        else:
            refused = []
        if refused:
            assert all("needs the parameter 'need'" in p for p in refused), refused
            assert want is None
            continue
        got = ours(recipe, output, inputs, t)
        assert got == want, (text, output, inputs, t)
        if got is not None:
            kinds = [type(v) for m in (got[0], *got[1].values()) for v in m.values()]
            assert kinds == [type(v) for m in (want[0], *want[1].values()) for v in m.values()]
            compared += 1
    assert compared > 120


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(recipes())
def test_yaml_there_and_back(raw):
    try:
        recipe = Recipe.load(yaml.dump(raw, Dumper=yaml.CSafeDumper))
    except RecipeError as e:
        assert [p for p in e.problems if "needs the parameter 'need'" not in p] == []
    else:
        again = Recipe.load(recipe.to_yaml())
        assert again == recipe
        assert hash(again) == hash(recipe)
        assert again.canonical() == recipe.canonical()


def resolver(parameters, *, models=None):
    models = models or [{"model": "a", "parameters": {"need": 1}}]
    return resolver_of(Recipe.load({"merge_method": "fake", "models": models, "parameters": parameters}))


def resolved(found, name="x", t=0.0):
    return found.method(name, [(0, name)], t)


@pytest.mark.parametrize(
    ("setting", "name", "t", "want"),
    [
        ([0, 1], "x", 0.5, 0.5),
        ([0, 0.5, 0.3, 0.7, 1], "x", 1.0, 1.0),
        ([0, 0.5, 0.3, 0.7, 1], "x", 0.25, 0.5),
        ([0.25], "x", 0.7, 0.25),
        ([], "x", 0.7, 0.5),
        ({"filter": "mlp", "value": 2}, "mlp", 0, 2.0),
        ({"filter": "mlp", "value": 2}, "attn", 0, 0.5),
        ([{"filter": "m", "value": 2}, {"filter": "mlp", "value": 3}], "mlp", 0, 2.0),
        ([{"filter": "mlp", "value": [0, 4]}, {"value": 3}], "mlp", 0.5, 2.0),
        ([{"filter": "mlp", "value": []}, {"value": 3}], "mlp", 0.5, 0.5),
        ([{"filter": "*", "value": 9}, {"value": 3}], "mlp", 0.5, 9.0),
    ],
)
def test_rules(setting, name, t, want):
    found = resolver({"level": setting})
    assert resolved(found, name, t).level == want


def test_integers_do_not_become_fractions():
    found = resolver({"count": [1, 4]})
    assert resolved(found, t=1.0).count == (4,)
    with pytest.raises(RecipeError, match=r"models: count: an integer parameter cannot be interpolated to 2\.5"):
        resolved(found, t=0.5)


def test_interpolation_stays_inside_the_bounds():
    found = resolver({"own": [10, 10, 10]})
    for i in range(1000):
        assert resolved(found, t=i / 999).own[0] <= 10


def test_outcomes_are_cached_and_unmatched_filters_known():
    found = resolver({"level": [{"filter": "mlp", "value": 1}, {"filter": "typo", "value": 2}], "own": 3})
    assert resolved(found, "a.mlp.b", 0.1) is resolved(found, "c.mlp.d", 0.9)
    assert resolved(found, "a.mlp.b") is not resolved(found, "a.attn.b")
    assert found.unmatched() == ["typo"]
    assert found.filters == ("mlp", "typo")
    assert not found.gradient


def test_filters_of_a_model_see_its_tensor_and_shared_ones_the_result():
    found = resolver({"level": {"filter": "out", "value": 1}, "own": [{"filter": "in", "value": 2}, {"value": 3}]})
    assert (resolved(found, "out").level, resolved(found, "out").own) == (1.0, (3.0,))
    made = found.method("out", [(0, "in")])
    assert (made.level, made.own) == (1.0, (2.0,))


def test_a_required_parameter_that_every_filter_misses():
    found = resolver({}, models=[{"model": "a", "parameters": {"need": {"filter": "mlp", "value": 1}}}])
    assert resolved(found, "mlp").need == (1.0,)
    with pytest.raises(RecipeError, match="models: fake needs the parameter 'need' of 'a': no filter gives it a value"):
        resolved(found, "attn")
