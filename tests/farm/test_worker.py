"""A worker in this process: what it merges, fails at, scores and keeps."""

import dataclasses
import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import fastmerge as fm
from fastmerge.errors import CheckpointError, Interrupted, NoSpace, OutputError, RecipeError
from fastmerge.farm import run as farms
from fastmerge.farm import worker as workers
from fastmerge.farm.file import load
from fastmerge.farm.jobs import Planner
from fastmerge.farm.store import Store
from fastmerge.farm.worker import How, Worker, scored
from tests import tiny
from tests.farm.farms import calls, contents, farm, idle, scorer, tree


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), models=2)


class Here:
    """Merges in this process, by workers one after the other."""

    def __init__(self, **here):
        self.here = here

    def run(self, store, tick):
        tick()
        how = How.of(store.settings, memory=64 << 20, **self.here)
        with Worker(store, how) as worker:
            worker.run(wait=False)


def run(source, **here):
    return farms.run(source, executor=Here(**here))


def test_results_are_those_of_merge(paths, tmp_path):
    source = farm(tmp_path, paths, 3)
    store = run(source)
    _, wanted = load(source)
    assert [r.state for r in store.results()] == ["done"] * 3
    for name, recipe in ((w.name, w.recipe) for w in wanted):
        out = tmp_path / name / "model"
        fm.merge(recipe, out, memory="64MB")
        assert tree(store.entry(farms.find(store, name).id) / "model") == tree(out)
    assert idle(store) == []


def test_a_farm_that_ran_is_done(paths, tmp_path):
    store = run(farm(tmp_path, paths, 3, score=scorer(tmp_path)))
    before = contents(store)
    run(farm(tmp_path, paths, 3, score=scorer(tmp_path)))
    assert len(calls(tmp_path)) == 3
    more = farm(tmp_path, paths, 6)  # its weights are those three, and three more
    run({**more, "score": scorer(tmp_path)})
    assert len(calls(tmp_path)) == 6
    after = contents(store)
    assert {i: after[i] for i in before} == before


def test_equal_recipes_are_one_job(paths, tmp_path):
    text = tiny.recipe(paths, "linear", names=("a", "b"), base=None, weight=0.5)
    (tmp_path / "one.yml").write_text(text)
    (tmp_path / "two.yml").write_text("# the same\n" + text.replace("0.5", "0.50"))
    (tmp_path / "three.yml").write_text(text + "seed: 1\n")
    names = [str(tmp_path / f"{n}.yml") for n in ("one", "two", "three")]
    store = run({"store": str(tmp_path / "store"), "recipes": names})
    assert len(store.jobs()) == 2


def test_ids_tell_recipes_and_models_apart_and_paths_not(paths, tmp_path):
    planner = Planner()

    def identity(text, **how):
        how = {"seed": None, "shard_size": 1 << 30, **how}
        return planner.job("", fm.Recipe.load(text), **how)[0]

    text = tiny.recipe(paths, "dare_ties", names=("a", "b"), weight=0.5, density=0.5)
    first = identity(text)
    assert identity(text) == first
    assert identity(text, seed=3).id != first.id
    assert identity(text, shard_size=200_000).id != first.id
    assert identity(text.replace("density: 0.5", "density: 0.25")).id != first.id
    (tmp_path / "link").symlink_to(paths["a"])
    assert identity(text.replace(str(paths["a"]), str(tmp_path / "link"))).id == first.id
    other = shutil.copytree(paths["a"], tmp_path / "other")
    with (other / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\1")
    changed = identity(text.replace(str(paths["a"]), str(other)))
    assert changed.id != first.id
    assert changed.inputs != first.inputs


def test_jobs_hold_absolute_paths(paths, tmp_path, monkeypatch):
    monkeypatch.chdir(paths["a"].parent)
    text = "name: s\nmerge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n---\n"
    text += "merge_method: linear\nmodels: [{model: s, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    job, _ = Planner().job("", fm.Recipe.load(text), seed=None, shard_size=1 << 30)
    assert [line for line in job.recipe.splitlines() if "model:" in line] == [
        f"- model: {paths['a']}",
        "- model: s",
        f"- model: {paths['b']}",
    ]
    monkeypatch.chdir(tmp_path)
    assert Planner().again(job).layout.total > 0


def test_errors_that_would_come_again_are_not_tried_again(paths, tmp_path, monkeypatch):
    models = {n: shutil.copytree(p, tmp_path / "models" / n) for n, p in paths.items()}
    source = farm(tmp_path, models, 2)
    file, wanted = load(source)
    store = Store.create(file.store, file.settings)
    for w in wanted:
        store.add(Planner().job(w.name, w.recipe, seed=None, shard_size=1 << 30)[0])
    with (models["b"] / "model.safetensors").open("r+b") as data:
        data.seek(-1, os.SEEK_END)
        data.write(b"\0")
    Here().run(store, lambda: None)
    assert {r.state for r in store.results()} == {"failed"}
    assert all("the models changed since the job was made" in r.error for r in store.results())
    assert {a.last for a in store.attempts().values()} == {1}
    with pytest.raises(CheckpointError, match="changed"):
        Planner().again(store.job(store.jobs()[0]))


def test_errors_of_the_machine_are_tried_again_and_then_no_more(paths, tmp_path, monkeypatch):
    real, tried = workers.merge, []

    def merge(planned, out, **how):
        tried.append(out)
        if len(tried) == 1:
            raise OutputError("input/output error")
        return real(planned, out, **how)

    monkeypatch.setattr(workers, "merge", merge)
    store = run(farm(tmp_path, paths, 1))
    assert len(tried) == 1
    assert idle(store) == []
    store = run(farm(tmp_path, paths, 1))
    assert [r.state for r in store.results()] == ["done"]
    monkeypatch.setattr(workers, "merge", lambda *_, **__: 1 / 0)
    for _ in range(3):
        store = run(farm(tmp_path / "again", paths, 1))
    (result,) = store.results()
    assert result.state == "quarantined"
    assert "ZeroDivisionError: division by zero" in result.error


def no_space(*_, **__):
    raise NoSpace("model: not enough space: 5 bytes needed, 3 free")


def no_space_for_a_result(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "full"), [(workers, "merge", no_space), (Store, "publish", no_space_for_a_result)]
)
def test_a_full_store_costs_no_job_an_attempt(paths, tmp_path, monkeypatch, owner, name, full):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        for _ in range(5):
            with pytest.raises(NoSpace, match=r"store: the store is full; nothing that was finished is lost: .*space"):
                run(farm(tmp_path, paths, 2))
    store = run(farm(tmp_path, paths, 2))
    assert [r.state for r in store.results()] == ["done"] * 2
    assert idle(store) == []


def test_a_store_whose_making_was_cut_short_is_made(paths, tmp_path):
    (tmp_path / "store" / "jobs").mkdir(parents=True)
    (tmp_path / "store" / ".farm.json.77").write_text("{")
    assert [r.state for r in run(farm(tmp_path, paths, 1)).results()] == ["done"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="holds other files"):
        Store.create(tmp_path / "other", {})


def test_a_store_that_cannot_take_its_own_files_is_named(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "add", no_space_for_a_result)
    with pytest.raises(NoSpace, match="store: the store is full; nothing that was finished is lost: No space"):
        run(farm(tmp_path, paths, 2))


def test_a_worker_that_is_stopped_gives_its_job_back(paths, tmp_path, monkeypatch):
    def merge(*_, **__):
        raise Interrupted("stopped by SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(workers, "merge", merge)
        for _ in range(5):
            with pytest.raises(Interrupted):
                run(farm(tmp_path, paths, 1))
    store = run(farm(tmp_path, paths, 1))
    assert [r.state for r in store.results()] == ["done"]


def test_an_owner_whose_lease_expires_while_it_runs(paths, tmp_path):
    """The slow one finds its job done by another, and leaves nothing of its own."""
    store = Store.create(tmp_path / "store", {})
    _, wanted = load(farm(tmp_path, paths, 1))
    job, _ = Planner().job(wanted[0].name, wanted[0].recipe, seed=None, shard_size=1 << 30)
    store.add(job)
    how = How(memory=64 << 20, device="cpu")
    quick, won = Worker(store, how, "quick"), []

    class Slow(Worker):
        def _result(self, claim):
            found = super()._result(claim)
            os.utime(claim.path, (1, 1))
            won.append(quick.try_one(job.id))
            return found

    assert Slow(store, how, "slow").try_one(job.id) is None
    assert won[0].worker == store.result(job.id).worker == "quick"
    assert (store.entry(job.id) / "model" / "model.safetensors").exists()
    assert idle(store) == []


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_the_best_models_stay(paths, tmp_path, keep):
    store = run(farm(tmp_path, paths, 6, score=scorer(tmp_path), keep=keep))
    held = {r.score: (store.entry(r.id) / "model").is_dir() for r in store.results()}
    assert held == {w: i > 6 - keep for i, w in ((i, i / 6) for i in range(1, 7))}
    worst = min(store.results(), key=lambda r: r.score)
    report = farms.make(store, worst.name, tmp_path / "made" / "model", memory="64MB")
    assert report.tensors == 21
    again = run(farm(tmp_path / "all", paths, 6, score=scorer(tmp_path)))
    assert tree(tmp_path / "made" / "model") == tree(again.entry(worst.id) / "model")


def test_equal_scores_keep_the_same_models_in_any_order(paths, tmp_path):
    kept = []
    for name in "ab":
        source = farm(tmp_path / name, paths, 4, score="echo 1", keep=2)
        source["recipes"][0]["grid"]["w"] = source["recipes"][0]["grid"]["w"][:: 1 if name == "a" else -1]
        store = run(source)
        kept.append({r.id for r in store.results() if (store.entry(r.id) / "model").is_dir()})
    assert kept[0] == kept[1] == set(sorted(store.jobs())[:2])


def test_scores(tmp_path, monkeypatch):
    assert scored("echo some words 0.25", tmp_path) == 0.25
    assert scored("sh -c 'echo 3; echo 4' {model}", tmp_path) == 4
    assert scored("sh -c 'echo ${#1}' x {model}", tmp_path) == len(str(tmp_path))
    assert scored("builtins:len", "four") == 4
    (tmp_path / "judge_of_models.py").write_text("def score(model):\n    return len(model.name)\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert scored("judge_of_models:score", tmp_path / "seven77", str(tmp_path)) == 7
    (tmp_path / "four.sh").write_text("echo 4\n")
    assert scored("sh four.sh", tmp_path, str(tmp_path)) == 4
    for how, said in (
        ("echo nan", "expected a finite number, last; got 'nan'"),
        ("echo", "got ''"),
        ("echo high", "got 'high'"),
        ("sh -c 'echo why >&2; exit 3'", "exit status 3: why"),
        ("/nowhere/at/all", "No such file or directory"),
    ):
        with pytest.raises(workers.ScoreFailed, match=said):
            scored(how, tmp_path)
    for how in ("nowhere:score", "builtins:score"):
        with pytest.raises(RecipeError, match=f"score '{how}'"):
            scored(how, tmp_path)


def test_results_by_name(paths, tmp_path):
    store = run(farm(tmp_path, paths, 2))
    first = store.jobs()[0]
    assert farms.find(store, first[:8]).id == first
    assert farms.find(store, "w=0.5").id in store.jobs()
    for text in ("w", "", "0" * 70):
        with pytest.raises(RecipeError, match="no results are called"):
            farms.find(store, text)


def test_problems_of_all_recipes_come_before_any_merge(paths, tmp_path):
    bad = {"merge_method": "linear", "models": [{"model": str(tmp_path / "no"), "parameters": {"weight": 1}}]}
    source = farm(tmp_path, paths, 2)
    source["recipes"] += [bad, {**bad, "seed": 2}]
    with pytest.raises(CheckpointError) as error:
        run(source)
    assert len(error.value.problems) == 2
    assert not (tmp_path / "store").exists()


def test_settings_reach_every_worker(paths, tmp_path):
    source = farm(tmp_path, paths, 1, lease=7, backend="native", score="echo 1", keep=3)
    store = run(source)
    assert How.of(store.settings) == How("cpu", "native", None, "echo 1", 3, 7.0, str(Path.cwd()))
    assert dataclasses.replace(How.of(store.settings, device="cuda", memory=3)).memory == 3
    assert json.loads((store.root / "farm.json").read_text())["farm"] == 1
