"""Renders have the bytes of the merge on disk, the first time and every other."""

import re
from pathlib import Path

import pytest
import torch

import fastmerge as fm
from fastmerge import planning
from fastmerge.errors import FastMergeError, OutputError, RecipeError, ShapeError
from fastmerge.methods import METHODS
from fastmerge.session import running, statistics
from tests import tiny
from tests.api.test_merge import RECIPES, recipe_of
from tests.counted import calls
from tests.session.family import different, merged, recipe


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), hidden=96, vocab=3000)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    paths = tiny.family(tmp_path_factory.mktemp("small"), hidden=32, vocab=70)
    with fm.Session(list(paths.values())) as opened:
        yield opened, paths


@pytest.fixture
def session(paths):
    with fm.Session(list(paths.values())) as opened:
        yield opened


def poisoned(session, document):
    """A target of NaN."""
    target = session.render(document)
    for tensor in target.values():
        tensor.fill_(float("nan"))
    return target


@pytest.mark.parametrize("name", RECIPES)
def test_a_render_is_the_merge_on_disk(session, paths, name, tmp_path):
    text = recipe_of(paths, name)
    target = poisoned(session, text)
    session.render(text, target)
    assert different(target, merged(text, tmp_path)) == []


def cases():
    """A recipe for each method that takes a base and up to three models."""
    for name, method in METHODS.items():
        case = dict(method.cases[0])
        count, preset = (
            case.pop("models", 2 if method.contract.most == 2 else method.contract.most or 3),
            case.pop("preset", None),
        )
        based = case.pop("base", method.contract.base == "required")
        if count > 3 or method.contract.pairs or not method.contract.least:
            continue
        scopes = {p.name: p.scope for p in method.params}
        own = {k: v for k, v in case.items() if scopes.get(k) != "shared"}
        yield pytest.param(name, count, preset, based, own, {k: v for k, v in case.items() if k not in own}, id=name)


@pytest.mark.parametrize(("method", "count", "preset", "based", "own", "shared"), [*cases()])
def test_every_method(small, method, count, preset, based, own, shared, tmp_path):
    session, paths = small
    extra = {"parameters": shared, **({"preset": preset} if preset else {})}
    names = ("a", "b", "c")[:count]
    document = recipe(paths, method, base="base" if based else None, names=names, extra=extra, **own)
    target = poisoned(session, document)
    session.render(document, target)
    assert different(target, merged(document, tmp_path)) == []


NUMBERS = {
    "linear": ("linear", None, [dict(weight=[0.2, 0.3, 0.5]), dict(weight=[0.9, -0.3, 0.5])]),
    "task_arithmetic": ("task_arithmetic", "base", [dict(weight=0.3), dict(weight=[0.5, 0.1, 0.0])]),
    "ties": ("ties", "base", [dict(weight=0.5, density=0.3), dict(weight=0.7, density=[0.2, 0.5, 1.0])]),
    "dare_ties": ("dare_ties", "base", [dict(weight=0.5, density=0.3), dict(weight=0.7, density=[0.2, 0.5, 1.0])]),
    "filters": (
        "linear",
        None,
        [dict(weight=[[{"filter": "mlp", "value": v}, {"value": w}], 0.5, 0.25]) for v, w in ((0.1, 0.2), (0.3, -0.4))],
    ),
    "gradient": ("task_arithmetic", "base", [dict(weight=[[0.0, 1.0], 0.5, 0.3]), dict(weight=[[1.0, 0.5], 0.5, 0.3])]),
    "minus zero": ("linear", None, [dict(weight=[0.0, 1.0, 1.0]), dict(weight=[-0.0, 1.0, 1.0])]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_other_numbers_are_not_planned_again(session, paths, name, tmp_path, monkeypatch):
    method, base, numbers = NUMBERS[name]
    documents = [recipe(paths, method, base=base, **n) for n in numbers]
    target = session.render(documents[0])
    planned = []
    monkeypatch.setattr(planning, "plan", lambda *args, **named: planned.append(1) or PLAN(*args, **named))
    expected = [merged(d, tmp_path) for d in documents]
    planned.clear()
    for i in (0, 1, 0, 1, 0):
        session.render(documents[i], target)
        assert different(target, expected[i]) == []
    assert planned == []


PLAN = planning.plan


def test_the_threshold_of_a_density_comes_from_a_table_in_the_end(session, paths, tmp_path, monkeypatch):
    documents = [recipe(paths, "ties", base="base", weight=0.5, density=[d, 0.5, 0.9]) for d in (0.1, 0.2, 0.3)]
    documents += [recipe(paths, "ties", base="base", weight=0.5, density=d, extra=e) for d, e in (
        (0.4, {}), (0.35, {}), (0.0, {}), (1e-6, {}), (0.999, {}), (0.6, {"parameters": {"ties": "spread"}}),
        (0.7, {"parameters": {"ties": "all"}}), (0.2, {"parameters": {"rescale": True}}), (1.0, {}),
    )]  # fmt: skip
    target = session.render(documents[0])
    passes = []
    monkeypatch.setattr(running, "_passes", lambda *args: passes.append(1) or PASSES(*args))
    made = []
    for document in documents:
        passes.clear()
        session.render(document, target)
        made.append(len(passes))
        assert different(target, merged(document, tmp_path)) == []
    assert made[1 : statistics.AFTER] == [1] * (statistics.AFTER - 1)
    assert made[statistics.AFTER :] == [0, 0, 0, 0, 0, 0, 1, 0]  # a rescale sums magnitudes, which is another pass


PASSES = running._passes


@pytest.mark.parametrize("name", ["slerp", "slerp rows", "model_stock", "nuslerp"])
def test_inner_products_are_found_once(session, paths, name, tmp_path, monkeypatch):
    changes = {"slerp": {"t": 0.8}, "slerp rows": {"t": 0.8, "scope": "row"}}
    if name == "nuslerp":
        documents = [recipe(paths, name, names=("a", "b"), weight=w) for w in ([0.3, 0.7], [0.6, 0.2])]
    else:
        documents = [recipe_of(paths, name), recipe_of(paths, name)]
        if name in changes:
            documents[1] = recipe(paths, "slerp", base="base", names=("a",), extra={"parameters": changes[name]})
    target = session.render(documents[0])
    monkeypatch.setattr(running, "_passes", None)
    session.render(documents[1], target, everything=True)
    assert different(target, merged(documents[1], tmp_path)) == []


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "ties whole model", "slerp rows", "dare_ties"])
def test_a_batch_is_its_recipes_one_by_one(session, paths, name):
    first = fm.Recipe.load(recipe_of(paths, name)).plain()
    documents = [{**first, "models": [{**m, "parameters": dict(m.get("parameters", {}))} for m in first["models"]]}]
    documents += [recipe_of(paths, "linear"), recipe_of(paths, name)]
    for i, value in enumerate((0.2, 0.45, 0.9)):
        changed = {**first, "models": [{**m, "parameters": dict(m.get("parameters", {}))} for m in first["models"]]}
        if "slerp" in name:
            changed["parameters"] = {**first["parameters"], "t": value}
        else:
            changed["models"][0]["parameters"]["weight"] = value
            if "density" in changed["models"][0]["parameters"] and "whole" not in name:
                changed["models"][i % 3]["parameters"]["density"] = value
        documents.append(changed)
    got = session.render_batch(documents)
    with fm.Session(list(paths.values())) as other:
        assert [different(g, other.render(d)) for g, d in zip(got, documents, strict=True)] == [[]] * len(documents)


def test_only_what_changes_is_written(session, paths):
    def document(value):
        weight = [{"filter": "layers.1.", "value": value}, {"value": 0.5}]
        return recipe(paths, "linear", weight=[weight, 0.3, 0.2])

    target = session.render(document(0.1))
    session.render(document(0.1), target)
    for tensor in target.values():
        tensor.data.fill_(7)  # which torch does not count
    session.render(document(0.9), target)
    left = [n for n, t in target.items() if bool((t == 7).all())]
    assert left == [n for n in target if ".layers.1." not in n]
    session.render(document(0.9), target, everything=True)
    assert not any(bool((t == 7).all()) for t in target.values())


def test_what_the_caller_changed_is_written_again(session, paths):
    document = recipe(paths, "linear", weight=0.5)
    target = session.render(document)
    expected = {n: t.clone() for n, t in target.items()}
    session.render(document, target)
    name = next(iter(target))
    target[name].zero_()
    session.render(document, target)
    assert different(target, expected) == []


def test_another_recipe_in_between_is_seen(session, paths, tmp_path):
    first, second = recipe(paths, "linear", weight=0.5), recipe(paths, "linear", names=("a", "b"), weight=0.5)
    target = session.render(first)
    for document in (first, second, first):
        session.render(document, target)
    assert different(target, merged(first, tmp_path)) == []


def test_a_module_is_written_in_place(session, paths, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=96, intermediate_size=288, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=48, vocab_size=3000, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    document = recipe(paths, "linear", weight=[0.2, 0.3, 0.5])
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    session.render(document, into=model)
    assert different(dict(model.state_dict()), merged(document, tmp_path)) == []
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
    version = model.lm_head.weight._version
    session.render(recipe(paths, "linear", weight=[0.1, 0.4, 0.5]), into=model)
    assert model.lm_head.weight._version > version  # autograd is told


def test_a_binding_is_rendered_with_other_numbers(session, paths, tmp_path, monkeypatch):
    documents = [recipe(paths, "linear", weight=w) for w in (0.2, [0.1, 0.6, 0.3])]
    target = {n: torch.empty_like(t) for n, t in session.render(documents[0]).items()}
    bound = session.bind(documents[0], target)
    expected = [merged(d, tmp_path) for d in documents]
    monkeypatch.setattr(planning, "plan", None)
    bound.render()
    assert different(target, expected[0]) == []
    bound.render(documents[1])
    assert different(target, expected[1]) == []
    with pytest.raises(RecipeError, match="a plan of its own"):
        bound.render(recipe(paths, "linear", names=("a", "b"), weight=0.5))


def test_a_second_render_is_little_work(session, paths):
    target = session.render(recipe(paths, "linear", weight=0.5))
    session.render(recipe(paths, "linear", weight=0.6), target)
    again = fm.Recipe.load(recipe(paths, "linear", weight=0.7))
    made = calls(session.render, again, target)
    assert made < 100 * len(target) + 2000


def test_targets_are_not_kept_alive(session, paths):
    import weakref

    document = recipe(paths, "linear", weight=0.5)
    target = session.render(document)
    session.render(document, target)
    watched = weakref.ref(next(iter(target.values())))
    del target
    assert watched() is None


def test_seeds_tell_renders_apart(session, paths, tmp_path):
    document = recipe(paths, "dare_linear", base="base", weight=0.5, density=0.5)
    target = session.render(document, seed=1)
    for seed in (2, None, 1):
        session.render(document, target, seed=seed)
        assert different(target, merged(document, tmp_path, seed=seed)) == []


def test_a_failed_render_is_not_remembered(paths, tmp_path):
    states = {n: {"x": torch.ones(300) * (i + 1), "y": torch.ones(70000)} for i, n in enumerate("abc")}
    document = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 0.5}}
    with fm.Session(states) as session:
        target = session.render(document)
        expected = {n: t.clone() for n, t in target.items()}
        states["b"]["y"][3] = float("nan")  # against the rules, and not seen: inner products are kept
        with fm.Session(states) as fresh:
            with pytest.raises(OutputError, match="y: "):
                fresh.render(document, target)
            states["b"]["y"][3] = 1.0
            fresh.render(document, target)
    assert different(target, expected) == []


def test_a_closed_session_says_so(paths):
    session = fm.Session([paths["a"]])
    session.close()
    session.close()
    with pytest.raises(FastMergeError, match="closed"):
        session.render(recipe(paths, "passthrough", names=("a",)))


def test_batches_of_the_wrong_size_or_with_a_target_twice(session, paths):
    document = recipe(paths, "linear", weight=0.5)
    target = session.render(document)
    with pytest.raises(RecipeError, match="expected 2 targets"):
        session.render_batch([document, document], [target])
    with pytest.raises(ShapeError, match="two recipes"):
        session.render_batch([document, document], [target, target])


def test_the_page_of_sessions_runs(paths, tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[2] / "docs" / "session.md").read_text()
    (tmp_path / "models").mkdir()
    for name, source in (("base", "base"), ("math", "a"), ("code", "b")):
        (tmp_path / "models" / name).symlink_to(paths[source])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], "session.md", "exec"), names)
    assert different(names["target"], merged(names["recipe"], tmp_path)) == []
