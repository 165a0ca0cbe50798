"""Merging modules in memory by a strategy; the evolutionary one looks for the best model of each layer."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from fastmerge.api.tensors import merge_state_dicts
from fastmerge.choices import chosen
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.planning.structure import Stack, structure
from fastmerge.search.genetic import Genetic, Genome

if TYPE_CHECKING:
    import torch

log = logging.getLogger("fastmerge")

Evaluate = Callable[["torch.nn.Module", Any], float]
"""Scores a model on data; the larger the better."""


class MergeStrategy(Enum):
    """How models are merged."""

    SLERP = "slerp"
    TIES = "ties"
    DARE = "dare"
    TASK_ARITHMETIC = "task_arithmetic"
    EVOLUTIONARY = "evolutionary"


@dataclass(frozen=True, kw_only=True)
class EvolutionaryMergeConfig:
    """How to merge, and how to search.

    Attributes:
        strategy: a :class:`MergeStrategy`, or its value.
        population_size: candidates of a generation.
        num_generations: generations.
        mutation_rate: probability that a layer of a child is drawn anew.
        crossover_rate: probability that two parents exchange layers.
        elite_ratio: share of the best that goes on as it is.
        interpolation_weight: of ``slerp``: 0 is the first model, 1 the second.
        ties_density: share of each task vector that stays, of ``ties`` and ``dare``.
        eval_fn: called with a model and ``eval_data``, gives its score; the larger the better.
        eval_data: what it is called with.
        seed: of all random choices.
    """

    strategy: MergeStrategy | str = MergeStrategy.EVOLUTIONARY
    population_size: int = 20
    num_generations: int = 50
    mutation_rate: float = 0.1
    crossover_rate: float = 0.7
    elite_ratio: float = 0.1
    interpolation_weight: float = 0.5
    ties_density: float = 0.5
    eval_fn: Evaluate | None = None
    eval_data: Any = None
    seed: int = 0


def evolutionary_merge(
    models: Sequence[torch.nn.Module],
    config: EvolutionaryMergeConfig | None = None,
    layer_container_name: str = "layers",
) -> torch.nn.Module:
    r"""A new module out of modules of one architecture.

    ``evolutionary`` takes each layer from one of the models, and everything outside the layers from one of them;
    which, is found by a genetic algorithm (:class:`~fastmerge.search.genetic.Genetic`) on the scores of ``eval_fn``.
    The models themselves are the first candidates, so that the result never scores below the best of them. A
    candidate rewrites only the layers that differ from the one before, in one live copy. Without ``eval_fn`` the score
    is how evenly the layers are taken, :math:`-\sum_m (c_m / L - 1 / M)^2`, which says nothing about quality.

    ``slerp`` takes two models. In the others the first is the base: ``ties`` and ``dare`` (``dare_ties``) add the
    others' task vectors with weight 1, ``task_arithmetic`` with 1 / M, which makes the mean of all M models.

    Args:
        models: two or more, with equal names and shapes; none is changed.
        config: how; the default is the evolutionary strategy.
        layer_container_name: last part of the path of the list of layers.

    Returns:
        A copy of the first model with the merged weights.

    Raises:
        RecipeError: a parameter is out of range, there are too few or too many models, or a score is no number.
        ShapeError: the models differ, or have no such layers.
    """
    config = config or EvolutionaryMergeConfig()
    how = chosen("strategy", MergeStrategy, config.strategy)
    if len(models) < 2:
        raise RecipeError(f"models: expected two or more, got {len(models)}")
    if how is MergeStrategy.EVOLUTIONARY:
        return _evolved(models, config, layer_container_name)
    density = config.ties_density
    if how is MergeStrategy.SLERP:
        if len(models) != 2:
            raise RecipeError(f"models: slerp takes two, got {len(models)}")
        merged = merge_state_dicts(models, "slerp", parameters={"t": config.interpolation_weight}, base=0)
    elif how is MergeStrategy.TASK_ARITHMETIC:
        merged = merge_state_dicts(models, "task_arithmetic", parameters={"weight": 1 / len(models)}, base=0)
    else:
        method = "ties" if how is MergeStrategy.TIES else "dare_ties"
        parameters = {"weight": 1.0, "density": density, "normalize": how is MergeStrategy.TIES}
        merged = merge_state_dicts(models, method, parameters=parameters, base=0, seed=config.seed)
    made = copy.deepcopy(models[0])
    made.load_state_dict(merged)
    return made


class _Live:
    """One module that takes each layer from one of several, and what is outside the layers by the last gene."""

    def __init__(self, models: Sequence[torch.nn.Module], container: str) -> None:
        self.module = copy.deepcopy(models[0])
        self._states = [_state(m) for m in models]
        mine = _state(self.module)
        for i, state in enumerate(self._states[1:], 1):
            wrong = [n for n in {**mine, **state} if n not in state or n not in mine or state[n].shape != mine[n].shape]
            if wrong:
                raise ShapeError(f"model {i}: {wrong[0]} is not as in the first model, nor are {len(wrong) - 1} others")
        stack = _layers(mine, container)
        self.layers = stack.count
        self._targets: list[dict[str, torch.Tensor]] = [{} for _ in range(stack.count + 1)]
        for name, tensor in mine.items():
            found = stack.split(name)
            self._targets[found[0] if found is not None else -1][name] = tensor
        self._now = [0] * len(self._targets)

    def render(self, genome: Genome) -> torch.nn.Module:
        """The module that a genome says."""
        import torch

        with torch.no_grad():
            for i, model in enumerate(genome):
                if self._now[i] != model:
                    for name, target in self._targets[i].items():
                        target.copy_(self._states[model][name])
                    self._now[i] = model
        return self.module


def _evolved(models: Sequence[torch.nn.Module], config: EvolutionaryMergeConfig, container: str) -> torch.nn.Module:
    generations = config.num_generations
    if isinstance(generations, bool) or not isinstance(generations, int) or generations < 1:
        raise RecipeError(f"num_generations: expected a whole number above 0, got {generations!r:.80}")
    live = _Live(models, container)
    search = Genetic(
        [len(models)] * (live.layers + 1),
        population_size=config.population_size,
        mutation_rate=config.mutation_rate,
        crossover_rate=config.crossover_rate,
        elite_ratio=config.elite_ratio,
        seed=config.seed,
        first=[(i,) * (live.layers + 1) for i in range(len(models))],
    )
    if config.eval_fn is None:
        log.warning("evolutionary_merge: without eval_fn candidates are scored by how evenly they use the models")
    known: dict[Genome, float] = {}
    for _ in range(generations):
        asked = search.ask()
        for genome in asked:
            if genome not in known:
                known[genome] = _score(live, genome, len(models), config)
        search.tell([known[genome] for genome in asked])
    assert search.best is not None
    return live.render(search.best[0])


def _score(live: _Live, genome: Genome, models: int, config: EvolutionaryMergeConfig) -> float:
    if config.eval_fn is None:
        *layers, _ = genome
        return -sum((layers.count(m) / len(layers) - 1 / models) ** 2 for m in range(models))
    given: Any = config.eval_fn(live.render(genome), config.eval_data)
    try:
        score = float(given)
    except (TypeError, ValueError):
        raise RecipeError(f"eval_fn: expected a number, got {given!r:.80}") from None
    return score if not math.isnan(score) else -math.inf


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


def _layers(state: Mapping[str, Any], container: str) -> Stack:
    """The stack of layers whose path ends with a name."""
    found = [s for s in structure(state, {}).stacks if s.prefix.rpartition(".")[2] == container]
    if len(found) != 1:
        there = ", ".join(s.prefix for s in structure(state, {}).stacks) or "none"
        raise ShapeError(f"layer_container_name: expected one list of layers called {container!r}; there are: {there}")
    return found[0]
