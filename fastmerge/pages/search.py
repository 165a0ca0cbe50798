"""The page of a search: scores by generation, the best recipe and its coefficients, and what they are worth."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmerge.errors import OutputError
from fastmerge.pages import figures
from fastmerge.pages.document import Document, listed

SEARCH, EVALUATIONS, RESULT, BEST = "search.json", "evaluations.jsonl", "result.json", "best.yml"

MOST_BYTES = 1 << 30
"""Of a file that is read: a search of a million evaluations has a fifth of it."""

ROWS = 20
"""Of the table of evaluations."""

BIAS = (
    "The best of many candidates looks better than it is on the items that it was chosen by; held-out items were never "
    "seen by the search."
)


def page(directory: str | os.PathLike[str]) -> Document:
    """The page of a search, done or still under way.

    Args:
        directory: with ``search.json`` and ``evaluations.jsonl``, and, once it is done, ``result.json`` and
            ``best.yml``.

    Raises:
        OutputError: a file is missing or damaged.
        RecipeError: matplotlib is missing.
    """
    place = Path(directory)
    facts = _json(place / SEARCH)
    evaluations = _evaluations(place / EVALUATIONS)
    result = _json(place / RESULT) if (place / RESULT).exists() else {}
    try:
        return _page(place, facts, evaluations, result)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise OutputError(f"{place}: not the files of a search: {type(error).__name__}: {error}") from None


def _page(
    place: Path, facts: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> Document:
    objectives: list[str] = facts["objectives"]
    genes: list[Mapping[str, Any]] = facts["genes"]
    models = ", ".join(Path(str(m)).name for m in facts["models"])
    made = Document(
        f"Search: {facts['method']} of {models}",
        f"{len(evaluations):,} evaluations by {facts['sampler']}, seed {facts['seed']}, {len(genes)} genes"
        + ("" if result else "; still under way"),
    )
    searched = int(facts["items"]["search"])
    if not evaluations:
        made.text("No candidate has been evaluated yet.")
        return made
    best = _best(evaluations, result, objectives, searched)
    _scores(made, facts, best, result, objectives)
    for name in objectives:
        lines = {} if result.get("held_out") else _lines(result.get("baselines", {}), name)
        values = [_score(e, name) for e in evaluations]
        there = [i for i, v in enumerate(values) if math.isfinite(v)]
        if there:
            figure = figures.scores(
                [int(evaluations[i]["generation"]) for i in there],
                [values[i] for i in there],
                [int(evaluations[i]["items"]) / max(searched, 1) for i in there],
                lines,
                name,
            )
            made.figure(f"scores-{name}", figure, f"{name} of every candidate by generation, and the best so far")
    _front(made, [e for e in evaluations if int(e["items"]) >= searched], objectives, result)
    _coefficients(made, genes, best)
    recipe = place / BEST
    if recipe.exists():
        made.heading("The best recipe")
        made.text(f"{BEST}: what `fastmerge merge` takes.")
        made.code(_text(recipe))
    _table(made, evaluations, genes, objectives)
    return made


def _scores(
    made: Document,
    facts: Mapping[str, Any],
    best: Mapping[str, Any],
    result: Mapping[str, Any],
    objectives: Sequence[str],
) -> None:
    """What the best one and the models alone score."""
    made.heading("What was found")
    searched, held = facts["items"]["search"], facts["items"]["held_out"]
    rows = [[f"best (evaluation {best['number']}), on the {searched:,} items of the search"]]
    rows[0] += [_shown(best["scores"].get(name)) for name in objectives]
    if result.get("held_out"):
        rows.append([f"best, on {held:,} held-out items", *(_shown(result["held_out"].get(n)) for n in objectives)])
    where = "held-out items" if result.get("held_out") else "the items of the search"
    for name, scores in result.get("baselines", {}).items():
        rows.append([f"{name}, on {where}", *(_shown(scores.get(n)) for n in objectives)])
    made.table(["", *objectives], rows)
    made.text(BIAS if result.get("held_out") else f"Nothing was held out. {BIAS}")


def _front(
    made: Document, evaluations: Sequence[Mapping[str, Any]], objectives: Sequence[str], result: Mapping[str, Any]
) -> None:
    """The candidates by each pair of objectives."""
    if len(objectives) < 2:
        return
    made.heading("Pareto front")
    numbers = [int(e["number"]) for e in evaluations]
    front = set(result.get("front", ()))
    for i, first in enumerate(objectives):
        for second in objectives[i + 1 :]:
            pairs = [(_score(e, first), _score(e, second)) for e in evaluations]
            there = [k for k, pair in enumerate(pairs) if all(map(math.isfinite, pair))]
            on = [k for k, i in enumerate(there) if numbers[i] in front]
            xs, ys = [pairs[k][0] for k in there], [pairs[k][1] for k in there]
            caption = f"{first} against {second}; nothing is better than the front in every objective"
            made.figure(f"front-{first}-{second}", figures.front(xs, ys, on, (first, second)), caption)


def _coefficients(made: Document, genes: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> None:
    """A heat map of each parameter's values by group and model, and a table of what is no number."""
    made.heading("Coefficients of the best candidate")
    tables: dict[str, dict[tuple[str, str], float]] = {}
    words: list[list[Any]] = []
    for gene, value in zip(genes, best["genes"], strict=True):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and "choices" not in gene:
            key = str(gene.get("group") or "all"), str(gene.get("model") or "all")
            tables.setdefault(str(gene.get("parameter") or "value"), {})[key] = float(value)
        else:
            words.append([gene["name"], value])
    for parameter, cells in tables.items():
        groups = list(dict.fromkeys(group for group, _ in cells))
        models = list(dict.fromkeys(model for _, model in cells))
        values = [[cells.get((group, model), math.nan) for model in models] for group in groups]
        figure = figures.heat_map(groups, [Path(m).name for m in models], values, parameter)
        made.figure(f"heat-{parameter}", figure, f"{parameter} by group of tensors and model")
    if words:
        made.table(["gene", "value"], words)


def _table(
    made: Document,
    evaluations: Sequence[Mapping[str, Any]],
    genes: Sequence[Mapping[str, Any]],
    objectives: Sequence[str],
) -> None:
    """The best evaluations, by the first objective."""
    ranked = sorted(evaluations, key=lambda e: (-int(e["items"]), -_score(e, objectives[0]), int(e["number"])))
    made.heading(f"The {min(ROWS, len(ranked))} best of {len(ranked):,} evaluations")
    few = len(genes) <= 8
    head = ["evaluation", "generation", "items", *objectives, *([g["name"] for g in genes] if few else ["genes"])]
    rows = []
    for e in ranked[:ROWS]:
        values = list(e["genes"]) if few else [listed({g["name"]: v for g, v in zip(genes, e["genes"], strict=True)})]
        scores = [_shown(e["scores"].get(name)) for name in objectives]
        rows.append([e["number"], e["generation"], e["items"], *scores, *values])
    made.table(head, rows)


def _best(
    evaluations: Sequence[Mapping[str, Any]], result: Mapping[str, Any], objectives: Sequence[str], searched: int
) -> Mapping[str, Any]:
    """The one that the result names, else the best so far of those on all items."""
    if result:
        return next(e for e in evaluations if e["number"] == result["best"])
    whole = [e for e in evaluations if int(e["items"]) >= searched] or evaluations
    return max(whole, key=lambda e: _score(e, objectives[0]))


def _score(evaluation: Mapping[str, Any], name: str) -> float:
    value = evaluation["scores"].get(name)
    return -math.inf if value is None else float(value)


def _shown(value: Any) -> Any:
    return "none" if value is None else float(value)


def _lines(baselines: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, float]:
    """Scores of other models on the items of the search: what the candidates are to beat."""
    found = {model: scores.get(name) for model, scores in baselines.items()}
    return {model: float(score) for model, score in found.items() if score is not None}


def _evaluations(path: Path) -> list[dict[str, Any]]:
    *lines, _ = _text(path).split("\n")  # the last is empty, or what a search is still writing
    found = []
    for i, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise OutputError(f"{path}:{i + 1}: damaged: expected an evaluation, got {line[:80]!r}") from None
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise OutputError(f"{path}: damaged: {error}") from None
    if not isinstance(found, dict):
        raise OutputError(f"{path}: expected a mapping, got {type(found).__name__}")
    return found


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise OutputError(f"{path}: more than {MOST_BYTES >> 20} MB")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from None
