"""The space of a search: a recipe with ranges and choices where a recipe has values."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fastmerge.errors import RecipeError, hint
from fastmerge.recipe import ModelRef, Recipe
from fastmerge.recipe.schema import model_ref
from fastmerge.search import groups
from fastmerge.search.genes import Candidate, Gene, check, told_apart

Loc = tuple[str | int, ...]
Found = list[tuple[list[Loc], Gene]]
"""Genes, and the places of the recipe that have their values."""

RANGE, CHOICES = frozenset({"low", "high"}), frozenset({"choices"})
KEYS = RANGE | CHOICES | groups.KEYS


class Space:
    """A recipe in mergekit's YAML grammar that has genes in the place of values.

    A gene is ``{low: 0, high: 1}``, a number from that range, or ``{choices: [...]}``, one of these values. It may
    stand wherever a value may: a parameter of a model, of a slice or of the recipe, an entry of a gradient, the
    ``value`` of a filter, a model or a ``layer_range`` of a slice, the method. A parameter may have one gene for each
    part of the model: ``layers: n`` cuts the layers into n groups of consecutive ones, ``modules: [...]`` tells tensors
    apart by a part of their names, both together by both; ``each: tensor`` gives one to each tensor. What is in no
    group has a gene of its own, called ``rest``.

    Args:
        template: the recipe.
        tensors: names of the output's tensors, which ``layers``, ``modules`` and ``each`` need; None looks into the
            headers of the first model of the recipe where they are needed.

    Attributes:
        genes: all of them, in the order of the template.
        models: what files call the models of the recipe, in the recipe's order; the base as well.
        refs: the models that candidates need.
        given: the recipe as it was given.
        template: the recipe with every group spelled out as filters.

    Raises:
        RecipeError: with everything that is wrong with the genes; or with the recipe, which is checked at both ends of
            every range and for every choice.
    """

    def __init__(self, template: Mapping[str, Any], tensors: Iterable[str] | None = None) -> None:
        self._problems: list[str] = []
        self._names = Names(template)
        self._tensors = None if tensors is None else list(tensors)
        self.given: dict[str, Any] = copy.deepcopy(dict(template))
        found: Found = []
        self.template: dict[str, Any] = self._spelled(copy.deepcopy(dict(template)), (), found)
        if self._problems:
            raise RecipeError(self._problems)
        self._places = [places for places, _ in found]
        self.genes = told_apart([gene for _, gene in found])
        check(self.genes)
        self._check_recipes()
        self.models = self._names.every

    def recipe(self, candidate: Sequence[Any]) -> dict[str, Any]:
        """The recipe of a candidate, as a mapping that :func:`fastmerge.merge` takes.

        Args:
            candidate: one value for each gene: a number of its range, or the position of its choice.

        Raises:
            RecipeError: there are more or fewer values than genes, or one is not the gene's.
        """
        if len(candidate) != len(self.genes):
            raise RecipeError(f"candidate: expected {len(self.genes)} values, one for each gene, got {len(candidate)}")
        out: dict[str, Any] = copy.deepcopy(self.template)
        for places, gene, value in zip(self._places, self.genes, candidate, strict=True):
            if not gene.held(value):
                raise RecipeError(f"{gene.name}: {value!r:.80} is none of its values")
            for place in places:
                at: Any = out
                for part in place[:-1]:
                    at = at[part]
                at[place[-1]] = copy.deepcopy(gene.choices[int(value)]) if gene.choices else value
        return out

    def short(self, ref: object) -> str:
        """What files call a model."""
        return self._names.short(ref)

    @property
    def base(self) -> ModelRef:
        """The base model, or the first of the models: its tokenizer is that of the candidates."""
        given = self.template.get("base_model")
        return model_ref(given) if isinstance(given, str) else self.refs[0]

    def middle(self) -> Candidate:
        """The candidate in the middle of every range, with the first of every choice."""
        return tuple([0 if g.choices else g.low + (g.high - g.low) / 2 for g in self.genes])

    def yaml(self, candidate: Sequence[Any]) -> str:
        """The recipe of a candidate as YAML that ``fastmerge merge`` takes."""
        return Recipe.load(self.recipe(candidate)).to_yaml()

    def _spelled(self, node: Any, loc: Loc, found: Found) -> Any:
        """The same tree with groups as filters; the genes in it go to ``found``, with their places."""
        if isinstance(node, Mapping) and (RANGE | CHOICES) & node.keys():
            return self._gene(node, loc, found)
        if isinstance(node, Mapping):
            return {key: self._spelled(item, (*loc, key), found) for key, item in node.items()}
        if isinstance(node, Sequence) and not isinstance(node, str):
            return [self._spelled(item, (*loc, i), found) for i, item in enumerate(node)]
        return node

    def _gene(self, node: Mapping[str, Any], loc: Loc, found: Found) -> Any:
        where = ".".join(map(str, loc))
        for key in node.keys() - KEYS:
            known = "a gene has low and high or choices, and layers, modules or each"
            self._problems.append(f"{where}: unknown key {key!r}{hint(str(key), KEYS)}: {known}")
        if bool(RANGE & node.keys()) == bool(CHOICES & node.keys()):
            self._problems.append(f"{where}: expected either low and high or choices, got {', '.join(map(str, node))}")
            return None
        gene = self._names.gene(loc)
        if CHOICES & node.keys():
            choices = node["choices"]
            if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
                self._problems.append(f"{where}: choices: expected a list of one or more, got {choices!r:.80}")
                return None
            values: dict[str, Any] = {"choices": tuple(choices)}
        elif node.keys() >= RANGE:
            values = {"low": node["low"], "high": node["high"]}
        else:
            self._problems.append(f"{where}: a range needs low and high, got {', '.join(map(str, node))}")
            return None
        if not groups.KEYS & node.keys():
            found.append(([loc], Gene(**values, **gene)))
            return None
        if "parameters" not in loc or isinstance(loc[-1], int) or loc[-1] == "value":
            self._problems.append(f"{where}: groups of tensors are for a parameter, not for a part of one")
            return None
        try:
            rules = groups.rules(node, self._needed())
        except RecipeError as error:
            self._problems += [f"{where}: {text}" for text in error.problems]
            return None
        own: dict[str, list[Loc]] = {}
        for i, rule in enumerate(rules):
            own.setdefault(rule.group, []).append((*loc, i, "value"))
        found += [(places, Gene(**values, **{**gene, "group": name})) for name, places in own.items()]
        return [{**({"filter": rule.filter} if rule.filter else {}), "value": None} for rule in rules]

    def _needed(self) -> list[str]:
        """Names of the output's tensors."""
        if self._tensors is None:
            from fastmerge.checkpoint import Checkpoint

            models = self._names.refs
            if not models:
                raise RecipeError("no model of the recipe is named, whose tensors could be told apart")
            self._tensors = list(Checkpoint.open(model_ref(models[0]).path).tensors)
        return self._tensors

    def _check_recipes(self) -> None:
        """Every value of the genes fits the recipe: both ends, and each choice."""
        most = max([len(g.choices) for g in self.genes] + [2])
        problems: dict[str, None] = {}
        refs: dict[ModelRef, None] = {}
        for k in range(most):
            ends = [min(k, len(g.choices) - 1) if g.choices else (g.low, g.high)[min(k, 1)] for g in self.genes]
            try:
                refs |= dict.fromkeys(Recipe.load(self.recipe(ends)).refs)
            except RecipeError as error:
                problems |= dict.fromkeys(error.problems)
        if problems:
            raise RecipeError(list(problems))
        self.refs = tuple(refs)


class Names:
    """What files call the parts of a recipe."""

    def __init__(self, template: Mapping[str, Any]) -> None:
        self._template = template
        found: dict[str, None] = {}
        base = template.get("base_model")
        for node in _nodes(template):
            given = node.get("model")
            options = given["choices"] if isinstance(given, Mapping) and "choices" in given else [given]
            for model in options if isinstance(options, Sequence) and not isinstance(options, str) else [options]:
                if isinstance(model, str):
                    found[model] = None
        if isinstance(base, str):
            found[base] = None
        self.refs = list(found)
        last = [PurePath(ref).name or ref for ref in self.refs]
        self._short = {ref: name if last.count(name) == 1 else ref for ref, name in zip(self.refs, last, strict=True)}
        self.every = tuple(self._short.values())

    def short(self, ref: object) -> str:
        """The last part of a model's path, where no other model has the same."""
        return self._short.get(str(ref), str(ref))

    def gene(self, loc: Loc) -> dict[str, Any]:
        """Model, group and parameter of a value of the recipe."""
        model, group, layers = "all", "all", "all"
        node: Any = self._template
        for part in loc:
            if isinstance(node, Mapping):
                if isinstance(node.get("model"), str):
                    model = self.short(node["model"])
                if part == "value":
                    group = str(node.get("filter") or "rest")
                layers = _layers(node) or layers
            node = node[part]
        names = [p for p in loc if isinstance(p, str) and p != "value"]
        parameter = names[-1] if names else "recipe"
        if isinstance(loc[-1], int) and "parameters" in loc:
            group = f"point.{loc[-1]}" if group == "all" else f"{group}.point.{loc[-1]}"
        if layers != "all" or loc[0] == "slices":
            layers = layers if layers != "all" else f"slice.{loc[1]}"
            group = layers if group == "all" else f"{layers}.{group}"
        return {"model": model, "group": group, "parameter": parameter}


def _layers(node: Mapping[str, Any]) -> str | None:
    """``layers.0-3``, of a source of a slice, or of a slice whose sources all take the same layers."""
    given = [node.get("layer_range")]
    sources = node.get("sources")
    if isinstance(sources, Sequence):
        given = [s.get("layer_range") if isinstance(s, Mapping) else None for s in sources]
    first = given[0] if given else None
    if not isinstance(first, Sequence) or len(first) != 2 or any(g != first for g in given):
        return None
    begin, end = first
    if not isinstance(begin, int) or not isinstance(end, int):
        return None
    return f"layers.{begin}" if end - begin == 1 else f"layers.{begin}-{end - 1}"


def _nodes(node: Any) -> Iterable[Mapping[str, Any]]:
    """Every mapping of a tree."""
    if isinstance(node, Mapping):
        yield node
        for item in node.values():
            yield from _nodes(item)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for item in node:
            yield from _nodes(item)
