"""``benchmark_merge_configs`` against the program whose signature it has."""

import json
import random

import pytest
import torch

import fastmerge as fm
from fastmerge.api.task_vectors import apply_task_vectors, compute_task_vector
from fastmerge.errors import OutputError, RecipeError
from fastmerge.search import benchmark_merge_configs
from tests import tiny


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), models=2, hidden=16, vocab=40, shards=(1, 1, 1, 1))


def plain(base_path, model_paths, eval_fn, n_configs):
    """The loop in words of its own: scales at random, a merge for each, the best."""
    vectors = [compute_task_vector(base_path, path) for path in model_paths]
    results = []
    for _ in range(n_configs):
        lambdas = [random.uniform(0.1, 1.0) for _ in model_paths]
        results.append({"lambdas": lambdas, "score": eval_fn(apply_task_vectors(base_path, vectors, lambdas))})
    results.sort(key=lambda one: -one["score"])
    return {"best_lambdas": results[0]["lambdas"], "best_score": results[0]["score"], "all_results": results}


def test_it_gives_what_the_plain_loop_gives(paths, tmp_path):
    base, models = str(paths["base"]), [str(paths["a"]), str(paths["b"])]
    goal = apply_task_vectors(base, [compute_task_vector(base, m) for m in models], [0.5, 0.8])
    scored = []

    def evaluate(merged):
        scored.append(-sum(float((merged[n] - t).square().sum()) for n, t in goal.items()))
        return scored[-1]

    random.seed(11)
    want = plain(base, models, evaluate, 8)
    got = benchmark_merge_configs(base, models, evaluate, n_configs=8, seed=11, directory=tmp_path / "out")
    assert got == want
    count = len(scored)
    again = benchmark_merge_configs(base, models, evaluate, 8, seed=11, directory=tmp_path / "out", resume=True)
    assert again == want
    assert len(scored) == count  # all of it was read
    with pytest.raises(OutputError, match="has a search already"):
        benchmark_merge_configs(base, models, evaluate, 8, seed=11, directory=tmp_path / "out")
    fm.merge(tmp_path / "out" / "best.yml", tmp_path / "best")
    vectors = [compute_task_vector(base, m) for m in models]
    for name, tensor in tiny_state(tmp_path / "best").items():
        assert torch.allclose(tensor, apply_task_vectors(base, vectors, want["best_lambdas"])[name], atol=1e-7)
    evolved = benchmark_merge_configs(base, models, evaluate, 48, sampler="cma")
    assert evolved["best_score"] > want["best_score"]
    assert evolved["best_lambdas"] == pytest.approx([0.5, 0.8], abs=0.1)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["scores"] == {"score": want["best_score"]}


def tiny_state(directory):
    from safetensors.torch import load_file

    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


def test_what_is_wrong_is_said(paths):
    base = str(paths["base"])
    with pytest.raises(RecipeError, match=r"n_configs(.|\n)*model_paths"):
        benchmark_merge_configs(base, [], lambda merged: 0.0, 0)
    with pytest.raises(RecipeError, match="expected a list of one or more, got 'x'"):
        benchmark_merge_configs(base, "x", lambda merged: 0.0)
    with pytest.raises(RecipeError, match="expected a function, got None"):
        benchmark_merge_configs(base, [base], None)
    with pytest.raises(RecipeError, match="expected a number, got 'good'"):
        benchmark_merge_configs(base, [base], lambda merged: "good", 1)
