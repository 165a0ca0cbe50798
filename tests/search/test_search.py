"""Whole searches: what they find, what they write, and that a killed one goes on as if it had not been."""

import itertools
import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastmerge as fm
from fastmerge.errors import NoSpace, OutputError, RecipeError
from fastmerge.search import Space, layer_paths, sampler, search
from tests import tiny
from tests.search.helpers import Near, Notes, template

ROOT = Path(__file__).resolve().parents[2]


def run(evaluate=None, **how):
    how = {"budget": 60, "sampler": {"genetic": {"population_size": 10}}, **how}
    return search(template(), evaluate or Near(), model={}, session=Notes(), **how)


def lines(directory):
    """The evaluations without their seconds."""
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (directory / "evaluations.jsonl").read_text().splitlines()
    ]


def test_a_search_writes_what_others_read(tmp_path):
    found = run(directory=tmp_path, seed=4)
    facts = json.loads((tmp_path / "search.json").read_text())
    assert facts["version"] == 1
    assert facts["models"] == ["a", "b", "c"]
    gene = {"name": "a/all/weight", "model": "a", "group": "all", "parameter": "weight", "low": 0.0, "high": 1.0}
    assert facts["genes"][0] == gene
    assert facts["objectives"] == ["score"]
    assert (facts["sampler"], facts["seed"], facts["method"]) == ("genetic", 4, "linear")
    assert facts["items"] == {"search": 13, "held_out": 3}
    assert facts["recipe"] == template()
    every = lines(tmp_path)
    assert [e["number"] for e in every] == list(range(60))
    assert {e["items"] for e in every} == {13}
    assert [e["generation"] for e in every] == sorted(e["generation"] for e in every)
    result = json.loads((tmp_path / "result.json").read_text())
    best = max(every, key=lambda e: e["scores"]["score"])
    assert (result["best"], result["scores"]) == (best["number"], best["scores"]) == (found.number, found.scores)
    assert result["front"] == [found.number]
    assert set(result["baselines"]) == {"a", "b", "c", "uniform"}
    recipe = fm.Recipe.load(tmp_path / "best.yml")
    assert recipe == fm.Recipe.load(found.recipe)
    assert [m.parameters["weight"].plain() for m in recipe.models] == best["genes"]
    assert found.held_out["score"] > result["baselines"]["uniform"]["score"]
    assert "selection bias" in str(found)


def test_held_out_items_are_never_searched():
    evaluate = Near(items=20)
    found = run(evaluate, held_out=0.25, budget=30)
    during, after = evaluate.asked[:30], evaluate.asked[30:]
    searched, held = set(during[0]), set(after[0])
    assert all(set(asked) == searched for asked in during)
    assert all(set(asked) == held for asked in after)
    assert len(after) == 5  # three models, the mean of them, and the best
    assert (len(held), len(searched)) == (5, 15) == found.items[::-1]
    assert not held & searched
    assert run(Near(items=20), held_out=0, budget=30).held_out == {}
    other = Near(items=20)
    run(other, held_out=0.25, budget=30, seed=1)
    assert set(other.asked[-1]) != held


def test_no_candidate_is_evaluated_twice():
    space = Space(
        {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": {"choices": [0.1, 0.2, 0.3]}}}]}
    )
    session, evaluate = Notes(), Near()
    found = search(space, evaluate, model={}, session=session, budget=1000, baselines=False)
    assert len(found.evaluations) == 3  # and then it ends, though the budget is not spent
    assert session.rendered == 4
    assert found.recipe["models"][0]["parameters"]["weight"] == 0.3


@pytest.mark.parametrize("name", ["genetic", "cma", "random", "sobol", "grid", "simplex"])
def test_the_budget_is_kept_and_a_seed_is_a_search(name):
    one, again = run(sampler=name, budget=45), run(sampler=name, budget=45)
    assert [e.genes for e in one.evaluations] == [e.genes for e in again.evaluations]
    assert one.plain() == again.plain()
    assert len(one.evaluations) == {"simplex": 15}.get(name, 45)
    assert one.scores["score"] == max(e.scores[0] for e in one.evaluations)


CHILD = """
import json, os, signal, sys
sys.path[:0] = [{root!r}]
from fastmerge.search import search
from tests.search.helpers import Near, Notes, template
class Killed(Near):
    def __call__(self, model, items):
        if len(self.asked) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model, items)
search(template(), Killed(noise=0.01), model={{}}, session=Notes(), directory=sys.argv[1], resume=True, **{how!r})
"""


@pytest.mark.parametrize(
    ("kills", "how"),
    [
        ((0, 1, 7, 11), {"sampler": {"genetic": {"population_size": 6}}, "budget": 30, "seed": 2}),
        ((3, 11), {"sampler": {"cma": {"population_size": 6}}, "budget": 30, "seed": 2}),
        ((4, 17), {"sampler": {"genetic": {"population_size": 6}}, "budget": 20, "racing": 3}),
    ],
    ids=["genetic", "cma", "race"],
)
def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path, kills, how):
    """Killed within the first generation and at later ones; each run begins where the last one died."""
    whole = search(template(), Near(noise=0.01), model={}, session=Notes(), directory=tmp_path / "whole", **how)
    killed = tmp_path / "killed"
    counts = []
    for at in kills:
        code = CHILD.format(root=str(ROOT), at=at, how=how)
        done = subprocess.run([sys.executable, "-c", code, str(killed)], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        counts.append(len(lines(killed)))
        with (killed / "evaluations.jsonl").open("ab") as file:
            file.write(b'{"number": 99, "genera')  # the line that it was writing
        assert not (killed / "result.json").exists()
    assert counts == list(itertools.accumulate(kills))
    evaluate = Near(noise=0.01)
    found = search(template(), evaluate, model={}, session=Notes(), directory=killed, resume=True, **how)
    assert lines(killed) == lines(tmp_path / "whole")
    assert found.plain() == whole.plain()
    assert len(evaluate.asked) == len(whole.evaluations) - sum(kills) + 5
    for name in ("search.json", "best.yml", "result.json"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_larger_budget_goes_further(tmp_path):
    for racing in (1, 3):
        whole, parts = tmp_path / f"whole-{racing}", tmp_path / f"parts-{racing}"
        run(directory=whole, budget=47, racing=racing)
        for budget in (13, 31, 47):
            run(directory=parts, budget=budget, racing=racing, resume=True)
        assert lines(parts) == lines(whole)


def test_a_finished_search_is_read(tmp_path):
    whole = run(directory=tmp_path, budget=20)
    evaluate, session, model = Near(), Notes(), {}
    how = {"budget": 20, "sampler": {"genetic": {"population_size": 10}}, "directory": tmp_path, "resume": True}
    again = search(template(), evaluate, model=model, session=session, **how)
    assert (evaluate.asked, session.rendered) == ([], 1)
    assert again == whole
    assert list(model.values()) == list(whole.candidate)  # the best one is in the module all the same
    (tmp_path / "result.json").unlink()
    assert search(template(), evaluate, model=model, session=session, **how) == whole
    assert len(evaluate.asked) == 5


def test_another_search_is_refused(tmp_path):
    run(directory=tmp_path, budget=10)
    with pytest.raises(OutputError, match="has a search already; continue it with --resume"):
        run(directory=tmp_path, budget=10)
    for how, said in (
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"sampler": "random"}, 'sampler: "genetic" there, "random" here'),
        ({"sampler": {"genetic": {"population_size": 12}}}, "sampler_options"),
        ({"held_out": 0.5}, "items"),
        ({"racing": 2}, "racing: 1 there, 2 here"),
    ):
        with pytest.raises(OutputError, match=said):
            run(directory=tmp_path, resume=True, **how)
    with pytest.raises(OutputError, match="genes"):
        search(template("ab"), Near(), model={}, session=Notes(), directory=tmp_path, resume=True)
    log = tmp_path / "evaluations.jsonl"
    good = log.read_text()
    entry = json.loads(good.splitlines()[3])
    entry["genes"][0] += 0.25
    log.write_text("".join([*good.splitlines(keepends=True)[:3], json.dumps(entry), "\n"]))
    with pytest.raises(OutputError, match="evaluation 3 is of .* take another directory"):
        run(directory=tmp_path, resume=True)
    log.write_text("x\n" + good)
    with pytest.raises(OutputError, match=r"evaluations.jsonl:1: damaged"):
        run(directory=tmp_path, resume=True)
    (tmp_path / "search.json").unlink()
    with pytest.raises(OutputError, match="no search.json"):
        run(directory=tmp_path, resume=True)


def test_a_full_disk_is_no_score_of_a_candidate(tmp_path, monkeypatch):
    def render(*_, **__):
        raise NoSpace("model: not enough space: 5 bytes needed, 3 free")

    whole = run(directory=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Notes, "render", render)
        with pytest.raises(NoSpace, match="5 bytes needed"):
            run(directory=tmp_path / "full")
    assert lines(tmp_path / "full") == []
    found = run(directory=tmp_path / "full", resume=True)
    assert (found.scores, lines(tmp_path / "full")) == (whole.scores, lines(tmp_path / "whole"))


def test_a_journal_on_a_full_disk_keeps_what_it_has(tmp_path):
    whole = run(directory=tmp_path / "whole")
    file = tmp_path / "whole" / "evaluations.jsonl"
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    file.write_bytes(before[:2000])
    (tmp_path / "whole" / "result.json").unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (3001, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            run(directory=tmp_path / "whole", resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(file.read_bytes()) == 3001, "a part of a line"
    found = run(directory=tmp_path / "whole", resume=True)
    assert found.scores == whole.scores


def test_two_searches_do_not_share_a_directory(tmp_path):
    def evaluate(model, data):
        with pytest.raises(OutputError, match="another search works in this directory"):
            run(directory=tmp_path, resume=True)
        return 1.0

    found = search(template(), evaluate, model={}, session=Notes(), directory=tmp_path, budget=1, baselines=False)
    assert found.scores == {"score": 1.0}


def test_a_race_saves_items_and_finds_as_good(tmp_path):
    evaluate = Near(items=64)
    found = run(evaluate, racing=4, held_out=0, budget=40, directory=tmp_path, sampler={"random": {"batch": 16}})
    every = lines(tmp_path)
    first = [e for e in every if e["generation"] == 0]
    assert [sum(e["items"] == k for e in first) for k in (8, 16, 32, 64)] == [16, 8, 4, 2]
    assert sum(map(len, evaluate.asked[: len(every)])) <= 40 * 64
    assert len({tuple(e["genes"]) for e in every}) > 80  # where 40 would have been evaluated on all items
    assert every[found.number]["items"] == 64
    # What a candidate has on more items counts what it had on fewer: its mean is that of one evaluation on all.
    model = dict(zip("abc", every[found.number]["genes"]))
    whole = Near(items=64)(model, range(64))
    assert found.scores["score"] == pytest.approx(sum(whole) / 64, abs=1e-12)
    alone = run(Near(items=64), held_out=0, budget=40, sampler="random")
    assert found.scores["score"] >= alone.scores["score"]
    by_items = {k: [e for e in first if e["items"] == k] for k in (8, 16)}
    better = sorted((e["scores"]["score"] for e in by_items[8]), reverse=True)[:8]
    kept = {tuple(e["genes"]) for e in by_items[16]}
    assert {tuple(e["genes"]) for e in by_items[8] if e["scores"]["score"] in better} == kept


def test_what_a_race_drops_is_told_to_be_worse():
    told = []

    class Spy:
        best = None

        def __init__(self, made):
            self.made = made

        def ask(self, n=None):
            return self.made.ask(n)

        def tell(self, scores):
            told.append(list(scores))
            self.made.tell(scores)

    # Later items say the opposite of the first ones: who is dropped looks better than who stays, and is not.
    class Turning(Near):
        def __call__(self, model, items):
            self.asked.append(list(items))
            return [10 - model["a"] if len(self.asked) <= 8 else -100.0 for _ in items]

    spy = Spy(sampler("random", Space(template()).genes, seed=0, batch=8))
    found = run(Turning(items=8), sampler=spy, racing=2, held_out=0, budget=8, baselines=False)
    stayed = sorted(told[0], reverse=True)[:4]
    assert sum(e.items == 8 for e in found.evaluations) == 4
    assert all(score == pytest.approx(-45, abs=1) for score in stayed)
    assert len([s for s in told[0] if s < min(stayed)]) == 4


def test_several_objectives_give_a_front(tmp_path):
    def evaluate(model, data):
        a, b = model.get("a", 0.0), model.get("b", 0.0)
        return {"math": a - b, "code": b, "chat": 0.0}

    found = search(
        template("ab"), evaluate, model={}, session=Notes(), objectives=("math", "code", "chat"), budget=120,
        directory=tmp_path, sampler={"genetic": {"population_size": 20}},
    )  # fmt: skip
    points = [tuple(e.scores) for e in found.evaluations]
    front = [points[i] for i in found.front]
    assert len(front) > 10
    for p in front:
        assert not [q for q in points if all(a >= b for a, b in zip(q, p)) and q != p]
    assert all(any(all(a >= b for a, b in zip(q, p)) for q in front) for p in points)
    assert min(p[0] + p[1] for p in front) > 0.9  # the front is a = 1
    assert found.number in found.front
    assert set(found.scores) == {"math", "code", "chat"}
    assert json.loads((tmp_path / "result.json").read_text())["front"] == list(found.front)
    with pytest.raises(RecipeError, match="cma takes one objective"):
        run(evaluate, objectives=("math", "code"), sampler="cma")


def test_scores_that_are_no_numbers_lose(tmp_path):
    def evaluate(model, data):
        return float("nan") if model["a"] > 0.2 else model["a"]

    found = run(evaluate, directory=tmp_path, sampler="random", budget=40, baselines=False)
    assert 0 < found.scores["score"] <= 0.2
    assert any(e["scores"]["score"] is None for e in lines(tmp_path))
    again = run(evaluate, directory=tmp_path, sampler="random", budget=40, baselines=False, resume=True)
    assert again.plain() == found.plain()


class Refused:
    def render(self, recipe, into):
        raise RecipeError("weights sum to zero")


def test_what_cannot_be_merged_loses():
    either = {"choices": ["a", "b"]}
    models = [{"model": either, "parameters": {"weight": w}} for w in (0.25, 0.75)]
    space = Space({"merge_method": "linear", "models": models})
    how = {"model": {}, "sampler": "grid", "baselines": False, "budget": 9}
    found = search(space, lambda model: model["a"], session=Notes(), **how)
    assert [e.scores[0] for e in found.evaluations] == [-math.inf, 0.25, 0.75, -math.inf]
    assert [m["model"] for m in found.recipe["models"]] == ["b", "a"]
    with pytest.raises(RecipeError, match="weights sum to zero"):  # where nothing can be, that is an error
        search(space, lambda model: 1.0, session=Refused(), **how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"budget": 0, "racing": 0, "held_out": 1.0}, r"3 problems(.|\n)*budget(.|\n)*racing(.|\n)*held_out"),
        ({"evaluate": 3}, "evaluator: expected a function, got 3"),
        ({"evaluate": lambda model, data: "good"}, "expected a number, got 'good'"),
        ({"evaluate": lambda model, data: {"a": 1}}, "expected scores for score, got a"),
        ({"sampler": {"cma": {}, "random": {}}}, "expected one name with its options"),
        ({"objectives": ("a", "a")}, "objectives: expected different names"),
        ({"eval_data": [1]}, "eval_data: an evaluator has its own items"),
        ({"racing": 2, "budget": 1, "sampler": "random"}, "budget: 1 is too small for one race of 2 rounds"),
    ],
)
def test_what_is_wrong_with_a_search_is_said(how, said):
    with pytest.raises(RecipeError, match=said):
        run(**how)


def test_the_best_recipe_has_the_bytes_that_were_scored(tmp_path):
    """On real checkpoints, by a session: the module at the end is what ``best.yml`` merges on disk."""
    paths = tiny.family(tmp_path / "models", models=2, hidden=16, vocab=40)
    wanted = {"low": 0.0, "high": 1.0, "layers": 2, "modules": ["mlp"]}
    density = {"low": 0.1, "high": 1.0}
    models = [{"model": str(paths[m]), "parameters": {"weight": wanted, "density": density}} for m in "ab"]
    recipe = {"merge_method": "ties", "base_model": str(paths["base"]), "models": models, "dtype": "bfloat16"}
    model = {n: torch.empty_like(t) for n, t in load_file(paths["base"] / "model.safetensors").items()}
    target = {n: t.clone() for n, t in model.items()}
    fm.merge(Space(recipe).recipe([0.75] * 8), tmp_path / "target")
    target = load_file(tmp_path / "target" / "model.safetensors")
    seen = []

    def evaluate(live, data):
        assert live is model
        seen.append(sum(float((live[n].float() - t.float()).square().sum()) for n, t in target.items()))
        return -seen[-1]

    found = search(
        recipe, evaluate, model=model, sampler={"cma": {"population_size": 6}}, budget=18, directory=tmp_path / "out"
    )
    assert found.scores["score"] == -min(seen[:18])
    assert set(found.baselines) == {"base", "a", "b", "uniform"}
    fm.merge(tmp_path / "out" / "best.yml", tmp_path / "best")
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert set(best) == set(model)
    assert all(torch.equal(best[n].view(torch.uint8), t.view(torch.uint8)) for n, t in model.items())


def test_the_best_layer_path_is_rendered_too(tmp_path):
    """A stack of four layers out of models of three: the buffers have the output's depth."""
    paths = tiny.family(tmp_path / "models", models=2, layers=3, hidden=16, vocab=40)
    space = Space(layer_paths([str(paths["a"]), str(paths["b"])], layers=4, near=0, dtype="bfloat16"))
    fm.merge(space.recipe(space.middle()), tmp_path / "middle")
    model = {n: torch.zeros_like(t) for n, t in load_file(tmp_path / "middle" / "model.safetensors").items()}
    states = {m: {n: t for p in paths[m].glob("*.safetensors") for n, t in load_file(p).items()} for m in "ab"}
    wanted = [("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    norm = "input_layernorm.weight"

    def evaluate(live):
        there = [live[f"model.layers.{i}.{norm}"] for i in range(4)]
        return sum(torch.equal(t, states[m][f"model.layers.{j}.{norm}"]) for t, (m, j) in zip(there, wanted))

    how = {"sampler": {"genetic": {"population_size": 12}}, "budget": 60, "directory": tmp_path / "out"}
    found = search(space, evaluate, model=model, **how)
    assert found.scores == {"score": 4.0}
    assert found.baselines == {}
    labels = [g.shown(v) for g, v in zip(space.genes, found.candidate)]
    assert labels == [f"{paths[m]}:{j}" for m, j in wanted]
    fm.merge(tmp_path / "out" / "best.yml", tmp_path / "best")
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(best[n].view(torch.uint8), t.view(torch.uint8)) for n, t in model.items())
