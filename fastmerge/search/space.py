"""The space of a search: a recipe with ranges and choices where a recipe has values."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fastmerge.errors import RecipeError, hint
from fastmerge.recipe import ModelRef, Recipe
from fastmerge.recipe.refs import model_ref
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
        self.given: dict[str, Any] = _plain(template)
        self._problems: list[str] = []
        self._names = Names(self.given)
        self._tensors = None if tensors is None else list(tensors)
        found: Found = []
        self.template: dict[str, Any] = self._spelled(self.given, (), found)
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
        if not loc:
            self._problems.append("recipe: expected one with genes in it, got a gene")
            return None
        where = ".".join(map(str, loc))
        for key in sorted(map(str, node.keys() - KEYS)):
            known = "a gene has low and high or choices, and layers, modules or each"
            self._problems.append(f"{where}: unknown key {key!r}{hint(key, KEYS)}: {known}")
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
        """Every value fits the recipe, both ends of a range and each choice, with some values of the other genes."""
        ends = [range(len(g.choices)) if g.choices else (g.low, g.high) for g in self.genes]
        most = max(map(len, ends))
        fits: set[tuple[int, int]] = set()
        problems: dict[str, None] = {}
        refs: dict[ModelRef, None] = {}
        # All at their k-th value, then each a step further than the one before it: of two models that may be
        # either of two, equal ones are no recipe.
        for step in (0, 1):
            for k in range(most):
                at = [(k + i) % len(e) if step else min(k, len(e) - 1) for i, e in enumerate(ends)]
                try:
                    refs |= dict.fromkeys(Recipe.load(self.recipe([e[n] for e, n in zip(ends, at, strict=True)])).refs)
                    fits |= set(enumerate(at))
                except RecipeError as error:
                    problems |= dict.fromkeys(error.problems)
        if problems and len(fits) < sum(map(len, ends)):
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
        """Model, group and parameter of a value of the recipe; in slices groups are layers of the output."""
        model, group = "all", "all"
        node: Any = self._template
        for part in loc:
            if isinstance(node, Mapping):
                if isinstance(node.get("model"), str):
                    model = self.short(node["model"])
                if part == "value":
                    group = str(node.get("filter") or "rest")
            node = node[part]
        names = [p for p in loc if isinstance(p, str) and p != "value"]
        parameter = names[-1] if names else "recipe"
        if isinstance(loc[-1], int) and "parameters" in loc:
            group = f"point.{loc[-1]}" if group == "all" else f"{group}.point.{loc[-1]}"
        if loc[0] == "slices" and len(loc) > 1 and isinstance(loc[1], int):
            layers = _layers(self._template["slices"], loc[1])
            group = layers if group == "all" else f"{layers}.{group}"
        return {"model": model, "group": group, "parameter": parameter}


def _layers(slices: Sequence[Any], number: int) -> str:
    """``layers.4-7``, the layers of the output that a slice makes; ``slice.1`` where their number is open."""
    counts = [_count(one) for one in slices[: number + 1]]
    if not all(counts):
        return f"slice.{number}"
    first, end = sum(counts[:-1]), sum(counts)
    return f"layers.{first}" if end - first == 1 else f"layers.{first}-{end - 1}"


def _count(node: Any) -> int:
    """The layers of a slice: of its ``layer_range``, or of all choices of one; 0 where it is not known."""
    found = set()
    for one in _nodes(node):
        given = one.get("layer_range")
        for choice in (
            _listed(given.get("choices")) if isinstance(given, Mapping) else _listed([given] if given else [])
        ):
            ends = [end for end in _listed(choice) if isinstance(end, int)]
            found.add(ends[1] - ends[0] if len(ends) == 2 else 0)
    return found.pop() if len(found) == 1 else 0


def _listed(value: Any) -> Sequence[Any]:
    """A list as it is; of anything else an empty one."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) else []


def _plain(node: Any) -> Any:
    """The same of dictionaries, lists, numbers and texts, as JSON has them."""
    if isinstance(node, Mapping):
        return {key: _plain(item) for key, item in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [_plain(item) for item in node]
    return os.fspath(node) if isinstance(node, os.PathLike) else node


def _nodes(node: Any) -> Iterable[Mapping[str, Any]]:
    """Every mapping of a tree."""
    if isinstance(node, Mapping):
        yield node
        for item in node.values():
            yield from _nodes(item)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for item in node:
            yield from _nodes(item)
