"""The genetic algorithm, and merges of modules by it."""

import copy
import json

import pytest
import torch

from fastmerge.errors import RecipeError, ShapeError
from fastmerge.search.evolutionary import EvolutionaryMergeConfig, MergeStrategy, evolutionary_merge
from fastmerge.search.genetic import Genetic


class Toy(torch.nn.Module):
    def __init__(self, seed, layers=6, hidden=8):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Linear(3, hidden)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(hidden, hidden) for _ in range(layers)])


def chosen(model, models):
    """Which model each layer is of."""
    return [
        next(m for m, other in enumerate(models) if torch.equal(layer.weight, other.layers[i].weight))
        for i, layer in enumerate(model.layers)
    ]


def test_the_best_layers_are_found():
    models = [Toy(0), Toy(1), Toy(2)]
    wanted = [2, 0, 1, 1, 0, 2, 1]
    seen = []

    def score(model, data):
        outside = next(m for m, other in enumerate(models) if torch.equal(model.embed.weight, other.embed.weight))
        seen.append((*chosen(model, models), outside))
        return sum(a == b for a, b in zip(seen[-1], data, strict=True))

    before = [copy.deepcopy(m.state_dict()) for m in models]
    config = EvolutionaryMergeConfig(population_size=24, num_generations=40, eval_fn=score, eval_data=wanted, seed=1)
    made = evolutionary_merge(models, config)
    assert chosen(made, models) == wanted[:6]
    assert torch.equal(made.embed.weight, models[1].embed.weight)
    assert seen[:3] == [(0,) * 7, (1,) * 7, (2,) * 7]
    assert len(seen) == len(set(seen))  # nothing is scored twice
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    again = evolutionary_merge(models, config)
    assert torch.equal(again.layers[0].weight, made.layers[0].weight)


def test_a_search_goes_on_where_it_was():
    def score(genomes):
        return [-sum((g - 2) ** 2 for g in genome) for genome in genomes]

    whole = Genetic([5] * 8, seed=3)
    trail = []
    for _ in range(12):
        trail.append(whole.ask())
        whole.tell(score(trail[-1]))
    for at in (0, 1, 7, 11):
        one = Genetic([5] * 8, seed=3)
        for _ in range(at):
            one.tell(score(one.ask()))
        other = Genetic([5] * 8, seed=99)
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        rest = []
        for _ in range(12 - at):
            rest.append(other.ask())
            other.tell(score(rest[-1]))
        assert rest == trail[at:]
        assert other.best == whole.best


def test_elites_stay_and_nan_is_the_worst():
    search = Genetic([4] * 5, population_size=10, elite_ratio=0.2, seed=0)
    asked = search.ask()
    search.tell([float("nan"), *range(1, 9), float("-inf")])
    assert search.ask()[:2] == [asked[8], asked[7]]
    assert search.best == (asked[8], 8.0)


def test_strategies_are_those_of_the_merge_methods():
    import fastmerge as fm

    models = [Toy(0), Toy(1), Toy(2)]
    mean = evolutionary_merge(models, EvolutionaryMergeConfig(strategy=MergeStrategy.TASK_ARITHMETIC))
    want = sum(m.layers[0].weight for m in models) / 3
    assert torch.allclose(mean.layers[0].weight, want, atol=1e-6)
    slerp = evolutionary_merge(models[:2], EvolutionaryMergeConfig(strategy="slerp", interpolation_weight=0.25))
    want = fm.merge_state_dicts(models[:2], "slerp", parameters={"t": 0.25}, base=0)
    assert torch.equal(slerp.embed.weight, want["embed.weight"])
    for strategy in ("ties", "dare"):
        made = evolutionary_merge(models, EvolutionaryMergeConfig(strategy=strategy, ties_density=0.5))
        assert not torch.equal(made.embed.weight, models[0].embed.weight)
    even = evolutionary_merge(models[:2], EvolutionaryMergeConfig(num_generations=5))
    assert sorted(chosen(even, models)) == [0, 0, 0, 1, 1, 1]


def test_what_is_wrong_is_said():
    models = [Toy(0), Toy(1)]
    with pytest.raises(RecipeError, match="two or more, got 1"):
        evolutionary_merge(models[:1])
    with pytest.raises(ShapeError, match=r"layers.5.* is not as in the first model"):
        evolutionary_merge([models[0], Toy(1, layers=5)])
    with pytest.raises(ShapeError, match="called 'blocks'; there are: layers"):
        evolutionary_merge(models, layer_container_name="blocks")
    with pytest.raises(RecipeError, match="eval_fn: expected a number, got 'good'"):
        evolutionary_merge(models, EvolutionaryMergeConfig(eval_fn=lambda *_: "good"))
    with pytest.raises(RecipeError) as caught:
        evolutionary_merge(models, EvolutionaryMergeConfig(mutation_rate=1.5, population_size=0))
    assert "mutation_rate" in str(caught.value)
    assert "population_size" in str(caught.value)
