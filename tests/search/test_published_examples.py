"""Evolution and random search by the example code that is published for them, on tiny modules."""

import pytest
import torch

from fastmerge.search import (
    EvolutionaryMergeConfig,
    MergeStrategy,
    benchmark_merge_configs,
    evolutionary_merge,
)
from tests import tiny


class Tiny(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(4)])
        self.out = torch.nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


@pytest.fixture(scope="module")
def specialists():
    return Tiny(1), Tiny(2), Tiny(3)


def test_evolution_without_an_eval_fn(specialists):
    math_model, code_model, _ = specialists
    config = EvolutionaryMergeConfig(
        strategy=MergeStrategy.EVOLUTIONARY,
        population_size=20,
        num_generations=50,
        mutation_rate=0.1,
        crossover_rate=0.7,
        elite_ratio=0.1,
    )
    merged_model = evolutionary_merge(
        [math_model, code_model],
        config,
    )
    assert merged_model(torch.ones(2, 6)).shape == (2, 3)
    math = [torch.equal(a.weight, b.weight) for a, b in zip(merged_model.layers, math_model.layers)]
    assert sum(math) == 2  # as evenly as the layers can be taken


@pytest.mark.parametrize(
    "config",
    [
        EvolutionaryMergeConfig(strategy=MergeStrategy.SLERP, interpolation_weight=0.5),
        EvolutionaryMergeConfig(strategy=MergeStrategy.TIES, ties_density=0.5),
        EvolutionaryMergeConfig(strategy=MergeStrategy.TASK_ARITHMETIC),
    ],
    ids=lambda c: c.strategy.value,
)
def test_the_other_strategies(specialists, config):
    math_model, code_model, _ = specialists
    merged_model = evolutionary_merge([math_model, code_model], config)
    assert merged_model(torch.ones(1, 6)).isfinite().all()
    assert not torch.equal(merged_model.out.weight, math_model.out.weight)


def test_evolution_of_three_specialists_by_their_tasks(specialists):
    math_model, code_model, writing_model = specialists
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    tasks = {n: m(inputs).argmax(1) for n, m in zip(("math", "code", "writing"), specialists)}

    def accuracy(model, labels):
        return float((model(inputs).argmax(1) == labels).float().mean())

    eval_math = eval_code = eval_writing = accuracy
    seen = []

    def evaluate_model(model, data):
        math_score = eval_math(model, data["math"])
        code_score = eval_code(model, data["code"])
        writing_score = eval_writing(model, data["writing"])
        seen.append((math_score + code_score + writing_score) / 3)
        return seen[-1]

    config = EvolutionaryMergeConfig(
        strategy=MergeStrategy.EVOLUTIONARY,
        population_size=12,
        num_generations=6,
        eval_fn=evaluate_model,
        eval_data=tasks,
    )
    merged_model = evolutionary_merge(
        [math_model, code_model, writing_model],
        config,
    )
    best = max(seen)
    assert evaluate_model(merged_model, tasks) == best
    assert best >= max(seen[:3])  # those are the specialists themselves
    assert best > sum(seen[:3]) / 3


def test_random_search_over_scales(tmp_path):
    paths = tiny.family(tmp_path, models=2, hidden=16, vocab=40)
    base_path, model_paths = str(paths["base"]), [str(paths["a"]), str(paths["b"])]

    def eval_fn(merged):
        return float(merged["model.norm.weight"].sum())

    result = benchmark_merge_configs(base_path, model_paths, eval_fn, n_configs=6)
    scores = [one["score"] for one in result["all_results"]]
    assert scores == sorted(scores, reverse=True)
    assert result["best_score"] == scores[0]
    assert result["best_lambdas"] == result["all_results"][0]["lambdas"]
    assert len(scores) == 6
    assert all(0.1 <= x <= 1.0 for one in result["all_results"] for x in one["lambdas"])
