"""A search for the scales of task vectors, as one function."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from fastmerge.api.task_vectors import apply_task_vectors, compute_task_vector
from fastmerge.errors import RecipeError
from fastmerge.search import samplers
from fastmerge.search.evaluation import SCORE, evaluator, measure
from fastmerge.search.explore import Exploration
from fastmerge.search.genes import Candidate, Gene
from fastmerge.search.journal import Journal, written
from fastmerge.search.pareto import Scores

LOW, HIGH = 0.1, 1.0
"""Bounds of a scale."""


def benchmark_merge_configs(
    base_path: str | os.PathLike[str],
    model_paths: Sequence[str | os.PathLike[str]],
    eval_fn: Callable[[dict[str, Any]], Any],
    n_configs: int = 20,
    *,
    seed: int = 0,
    sampler: str = "random",
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    r"""Tries scales of task vectors, ``base + sum lambda_i tau_i``, and says which were best.

    With the default sampler the scales are those that ``random.uniform(0.1, 1.0)`` gives for one model after the other
    after ``random.seed(seed)``.

    Args:
        base_path: the base: a model's directory, a safetensors file or a hub id.
        model_paths: its fine-tunes.
        eval_fn: called with the merged tensors by name, in fp32; the larger its result, the better.
        n_configs: how many merges to try.
        seed: of the sampler.
        sampler: a name of :data:`~fastmerge.search.samplers.SAMPLERS`; scales are ranges from 0.1 to 1.
        directory: for the files of a search; None keeps it in memory.
        resume: go on with the search of that directory.

    Returns:
        ``best_lambdas``, ``best_score``, and ``all_results``: a list of ``{"lambdas", "score"}``, the best first.

    Raises:
        RecipeError: an argument is wrong, or a score is no number.
        CheckpointError: a model is damaged.
        ShapeError: the models differ.
        OutputError: as :func:`~fastmerge.search.running.search`.
    """
    problems = []
    if isinstance(n_configs, bool) or not isinstance(n_configs, int) or n_configs < 1:
        problems.append(f"n_configs: expected a whole number above 0, got {n_configs!r:.80}")
    if isinstance(model_paths, str) or not len(model_paths):
        problems.append(f"model_paths: expected a list of one or more, got {model_paths!r:.80}")
    if problems:
        raise RecipeError(problems)
    names = [os.fspath(path) for path in model_paths]
    genes = [Gene(LOW, HIGH, model=name, parameter="lambda") for name in names]
    fresh = samplers.sampler(sampler, genes, seed=seed)
    scored = evaluator(eval_fn)
    vectors = [compute_task_vector(base_path, name) for name in names]

    def scores(candidate: Candidate, first: int, last: int) -> list[Scores]:
        merged = apply_task_vectors(base_path, vectors, [float(scale) for scale in candidate])
        return measure(scored, merged, range(first, last), SCORE)

    facts = {
        "method": "task_arithmetic",
        "models": [*names, os.fspath(base_path)],
        "genes": [gene.plain() for gene in genes],
        "objectives": list(SCORE),
        "sampler": sampler,
        "seed": seed,
        "items": {"search": 1, "held_out": 0},
        "recipe": {},
    }
    journal = Journal(directory, facts, resume=resume)
    try:
        run = Exploration(fresh, genes, scores, journal, items=1)
        run.run(n_configs)
        ranked = sorted(run.evaluations, key=lambda e: -e.scores[0])
        best = ranked[0]
        scored_best = written(SCORE, best.scores)
        journal.finish(
            {"best": best.number, "scores": scored_best, "held_out": {}, "baselines": {}, "front": [best.number]},
            _recipe(os.fspath(base_path), names, best.genes),
        )
    finally:
        journal.close()
    tried = [{"lambdas": list(e.genes), "score": e.scores[0]} for e in ranked]
    return {"best_lambdas": list(best.genes), "best_score": best.scores[0], "all_results": tried}


def _recipe(base: str, names: Sequence[str], lambdas: Sequence[float]) -> str:
    """The best merge as YAML."""
    from fastmerge.recipe import Recipe

    models = [{"model": m, "parameters": {"weight": s}} for m, s in zip(names, lambdas, strict=True)]
    plain = {"merge_method": "task_arithmetic", "base_model": base, "models": models, "dtype": "float32"}
    return Recipe.load(plain).to_yaml()
