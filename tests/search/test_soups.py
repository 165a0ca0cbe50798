"""Soups of directories, modules and state dictionaries: bytes of the recipe, rules of acceptance, what is read."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import fastmerge as fm
from fastmerge.errors import CheckpointError, RecipeError, ShapeError
from fastmerge.search import averages
from fastmerge.search.evaluators import Function
from fastmerge.search.soups import Step, category_soup, greedy_soup, uniform_soup
from tests import tiny
from tests.search import small


def states(count=4, dtype=torch.bfloat16, shape=(7, 5), spread=1.0):
    g = torch.Generator().manual_seed(3)
    return [{"w": (torch.randn(shape, generator=g) * spread).to(dtype), "n": torch.tensor(3)} for _ in range(count)]


def mean(tensors):
    """As the definition of linear has it: a sum in order, for fp32 in fp64, one division, one rounding."""
    work = torch.float64 if tensors[0].dtype == torch.float32 else torch.float32
    total = tensors[0].to(work)
    for t in tensors[1:]:
        total = total + t.to(work)
    return (total / torch.tensor(float(len(tensors)), dtype=work)).to(tensors[0].dtype)


def scripted(*scores):
    """An evaluator that says what it is told, one score after the other, and keeps what it saw."""
    left, seen = list(scores), []

    def evaluate(model):
        seen.append(model["w"].clone())
        return left.pop(0)

    return evaluate, seen, left


def test_the_greedy_soup_tries_the_best_first_and_keeps_what_helps():
    models = states()
    before = copy.deepcopy(models)
    evaluate, seen, left = scripted(0.2, 0.5, 0.1, 0.5, 0.6, 0.6, 0.7)
    steps = []
    soup = greedy_soup(models, evaluate, progress=steps.append)
    w = [m["w"] for m in models]
    assert left == []
    expected = [*w, mean([w[1], w[3]]), mean([w[1], w[3], w[0]]), mean([w[1], w[3], w[2]])]
    for got, wanted in zip(seen, expected, strict=True):
        assert torch.equal(got, wanted)
    assert (
        soup.steps
        == tuple(steps)
        == (
            Step("1", 0.5, True),
            Step("3", 0.6, True),
            Step("0", 0.6, False),
            Step("2", 0.7, True),
        )
    )
    assert soup.score == 0.7
    assert soup.scores == {"0": 0.2, "1": 0.5, "2": 0.1, "3": 0.5}
    assert torch.equal(soup.model["w"], mean([w[1], w[3], w[2]]))
    assert [row["model"] for row in soup.recipe["models"]] == list(soup.weights) == ["1", "3", "2"]
    for model, old in zip(models, before, strict=True):
        assert torch.equal(model["w"], old["w"])


@pytest.mark.parametrize(("accept", "kept"), [("gt", ["a"]), ("ge", ["a", "b"])])
def test_equal_scores_tell_the_rules_apart(accept, kept):
    models = dict(zip("ab", states(2), strict=True))
    evaluate, _, _ = scripted(0.5, 0.5, 0.5)
    soup = greedy_soup(models, evaluate, accept)
    assert list(soup.weights) == kept
    assert torch.equal(soup.model["w"], mean([models[k]["w"] for k in kept]))


def test_nan_is_the_worst():
    evaluate, _, _ = scripted(float("nan"), 0.1, float("nan"))
    assert list(greedy_soup(dict(zip("ab", states(2), strict=True)), evaluate).weights) == ["b"]
    evaluate, _, _ = scripted(float("nan"), float("nan"), float("nan"))
    assert list(greedy_soup(dict(zip("ab", states(2), strict=True)), evaluate).weights) == ["a"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_running_sum_is_that_of_the_whole_merge(dtype):
    models = dict(enumerate(states(9, dtype, (40_000,), spread=3.0)))
    soup = greedy_soup(models, lambda model: 0.0, "ge")
    merged = fm.merge_state_dicts({str(k): m for k, m in models.items()}, "linear", parameters={"weight": 1.0})
    assert len(soup.weights) == 9
    assert torch.equal(soup.model["w"], merged["w"])
    assert soup.model["w"].dtype == dtype


@pytest.mark.parametrize("count", [3, 9])
def test_a_trial_reads_two_tensors_and_writes_one_however_many_are_in_the_soup(count, monkeypatch):
    ran = []
    real = averages.Averages._run

    def watch(self, inputs, share, outs):
        ran.append(len(inputs["w"]))
        real(self, inputs, share, outs)

    monkeypatch.setattr(averages.Averages, "_run", watch)
    greedy_soup(states(count), lambda model: 0.0, "ge")
    alone, trials = [1] * count, [2, 2] * (count - 1)  # each trial, and its acceptance
    assert ran == [*alone, 1, *trials, 1]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("soups")
    return [str(small.save(root / f"m{seed}", seed)) for seed in range(3)]


def equal(directory, state):
    files = {n: t for path in directory.glob("*.safetensors") for n, t in load_file(path).items()}
    return files.keys() <= state.keys() and all(torch.equal(t, state[n]) for n, t in files.items())


def test_the_soup_of_directories_has_the_bytes_of_its_recipe(family, tmp_path):
    def evaluate(model):
        scores.append(float(model.lm_head.weight.detach().float().sum()))
        return scores[-1]

    scores = []
    soup = greedy_soup(family, evaluate)
    assert len(scores) == 5
    assert 1 <= len(soup.weights) < 3, "a sum is greatest for the best model alone, or with one that is no worse"
    for accept in ("gt", "ge"):
        soup = greedy_soup(family, lambda model: 0.0, accept)
        fm.merge(soup.recipe, tmp_path / accept)
        assert equal(tmp_path / accept, soup.model.state_dict())
        assert len(soup.weights) == (1 if accept == "gt" else 3)
    module = small.model(dtype=torch.float32)
    again = greedy_soup(family, lambda model: 0.0, "ge", into=module)
    assert again.model is module
    assert all(torch.equal(t, soup.model.state_dict()[n].float()) for n, t in module.state_dict().items())


def test_the_uniform_soup(family, tmp_path, monkeypatch):
    soup = uniform_soup(family, lambda model: 1.5)
    fm.merge(soup.recipe, tmp_path / "out")
    assert equal(tmp_path / "out", soup.model.state_dict())
    assert soup.score == 1.5
    monkeypatch.setattr("fastmerge.search.soups._loaded", None)
    bare = uniform_soup(family)
    assert (bare.recipe, bare.model, bare.score) == (soup.recipe, None, None)
    modules = [small.model(seed) for seed in range(3)]
    made = uniform_soup(modules).model
    assert torch.equal(made.lm_head.weight, mean([m.lm_head.weight.detach() for m in modules]))
    assert made is not modules[0]


def test_an_adapter_is_part_of_its_model(family, tmp_path):
    adapter = tiny.adapter(tmp_path / "adapter", "model.layers.0.self_attn.q_proj", 32, 32)
    soup = greedy_soup([f"{family[0]}+{adapter}", family[1]], lambda model: 0.0, "ge")
    fm.merge(soup.recipe, tmp_path / "out")
    assert equal(tmp_path / "out", soup.model.state_dict())
    assert not torch.equal(soup.model.model.layers[0].self_attn.q_proj.weight, uniform_soup(family[:2], sum_of).model
                           .model.layers[0].self_attn.q_proj.weight)  # fmt: skip


def test_a_session_sees_that_its_target_was_written(family):
    module = small.model(dtype=torch.bfloat16)
    recipe = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1.0}} for m in family[:2]]}
    with fm.Session(family) as session:
        session.render(recipe, into=module)
        wanted = module.lm_head.weight.detach().clone()
        uniform_soup(family, into=module)
        assert not torch.equal(module.lm_head.weight, wanted)
        session.render(recipe, into=module)
    assert torch.equal(module.lm_head.weight, wanted)


def sum_of(model):
    return 0.0


def test_models_of_other_types_on_disk_are_refused(family, tmp_path):
    wide = str(small.save(tmp_path / "wide", 7, torch.float32))
    with pytest.raises(ShapeError, match=r"lm_head.weight: expected float32 in all models, got bfloat16 in '.*m0'"):
        greedy_soup([family[0], wide], sum_of)


def test_the_soup_of_the_strongest_of_each_category():
    models = dict(zip("abc", states(3), strict=True))
    w = {k: m["w"] for k, m in models.items()}

    def who(model):
        return next(k for k in w if torch.equal(model["w"], w[k]))

    table = {"math": {"a": 1, "b": 3, "c": 3}, "code": {"a": 5, "b": 1, "c": 9}, "chat": {"a": 0, "b": 2, "c": 1}}
    by_name = {c: lambda model, c=c: table[c][who(model)] for c in table}
    objectives = Function(lambda model, item: {c: table[c][who(model)] + item for c in table}, [0, 0], each=True)
    for evaluate in (by_name, objectives):
        soup = category_soup(models, evaluate)
        assert soup.weights == {"b": 2.0, "c": 1.0}
        assert soup.scores == table
        merged = fm.merge_state_dicts(
            {k: models[k] for k in "bc"}, "linear", parameters={"weight": {"b": 2.0, "c": 1.0}}
        )
        assert torch.equal(soup.model["w"], merged["w"])
        assert [(r["model"], r["parameters"]["weight"]) for r in soup.recipe["models"]] == [("b", 2.0), ("c", 1.0)]
    with pytest.raises(RecipeError, match="one category or more"):
        category_soup(models, {})


def test_what_does_not_go_together_is_refused_before_anything_is_evaluated(family):
    def never(model):
        raise AssertionError("evaluated")

    a, b = states(2)
    wide = {**b, "w": torch.zeros(7, 6, dtype=torch.bfloat16)}
    for models, error, what in [
        ([], RecipeError, "one or more"),
        ("path", RecipeError, "expected several models"),
        ([family[0], a], RecipeError, "all on disk or all in memory"),
        ([family[0], family[0]], RecipeError, "is there twice"),
        ([family[0], "/nowhere/x"], CheckpointError, "nowhere"),
        ([a, wide], ShapeError, r"w: expected \(7, 5\)"),
        ([a, {**b, "v": b["w"]}], ShapeError, "v: not in model '0'"),
        ([a, {"w": b["w"]}], ShapeError, "n: not in model '1'"),
        ([a, {**b, "n": torch.tensor(4)}], ShapeError, "n: .* model '1' differs"),
        ([a, {**b, "w": b["w"].float()}], ShapeError, "w: expected torch.bfloat16, got torch.float32 in model '1'"),
        ([a, 3], RecipeError, "model '1': expected a module or a state dictionary"),
        ([{"n": torch.tensor(1)}], ShapeError, "got none"),
    ]:
        with pytest.raises(error, match=what):
            greedy_soup(models, never)
    with pytest.raises(RecipeError, match="accept: expected gt or ge"):
        greedy_soup([a], never, "gte")
    with pytest.raises(ShapeError, match=r"(?s)w: expected \(7, 5\).*other: is in the live model"):
        greedy_soup([a, b], never, into={"w": torch.zeros(1), "other": torch.zeros(2)})
    with pytest.raises(ShapeError, match="the live model has no such tensor"):
        greedy_soup([a, b], never, into={})
    one = torch.zeros(7, 5, dtype=torch.bfloat16)
    pair = [{"v": m["w"], "w": m["w"] + 1} for m in (a, b)]
    with pytest.raises(ShapeError, match="one tensor with v in the live model"):
        greedy_soup(pair, never, into={"v": one, "w": one})


def test_tied_and_strided_tensors():
    shared = [m["w"] for m in states(2)]
    models = [{"v": t, "w": t, "t": t.T} for t in shared]
    soup = uniform_soup(models)
    assert torch.equal(soup.model["v"], mean(shared))
    into = {"v": torch.zeros(5, 7, dtype=torch.float64).T, "w": torch.zeros(7, 5), "t": torch.zeros(5, 7)}
    assert torch.equal(uniform_soup([{"v": t, "w": t + 1, "t": t.T} for t in shared], into=into).model["v"],
                       mean(shared).double())  # fmt: skip
    assert torch.equal(into["t"], mean(shared).T.float())
