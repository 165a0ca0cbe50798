"""Recipes: what is wanted, as a frozen value, from mergekit's YAML and back.

The grammar is mergekit 0.1.5's (``models``, ``slices``, ``modules``, parameters with gradients and filters) plus four
keys of fastmerge's own, ``preset``, ``seed``, ``missing`` and ``layout``. What mergekit ignores without a word is a
warning where it is harmless, an error where it is likely a mistake; values that are not finite or out of bounds are
errors too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from fastmerge.errors import RecipeError
from fastmerge.methods import METHODS
from fastmerge.methods.base import Method
from fastmerge.recipe import documents
from fastmerge.recipe.checks import REST, UNNAMED, Part, check, donor_only_base, parts, refs
from fastmerge.recipe.documents import Document
from fastmerge.recipe.load import build, text_of
from fastmerge.recipe.problems import Origin, Problems, dotted
from fastmerge.recipe.refs import UNION, ModelRef
from fastmerge.recipe.schema import Input, Module, Shape, Slice, Source
from fastmerge.recipe.settings import Parameters, Rule, Setting
from fastmerge.recipe.tree import Loc, Map


@dataclass(frozen=True, kw_only=True)
class Recipe(Shape):
    """What is wanted. Immutable; equal where the meaning is written the same.

    Attributes:
        origin: where it was loaded from, and what was said about it.
        stages: the recipes whose results are models of this one, by the names that stand for them: each before its
            users.
    """

    origin: Origin | None = field(default=None, compare=False, repr=False)
    stages: tuple[tuple[str, Recipe], ...] = ()

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Mapping[str, Any] | Recipe, *, strict: bool = False) -> Recipe:
        """Reads and checks a recipe; no model is opened.

        Args:
            source: a YAML file, YAML text, or the same as a mapping; a recipe is returned as it is.
            strict: whether :attr:`warnings` are errors.

        Raises:
            RecipeError: with every problem, each as ``file:line: place: what is wrong``.
        """
        if isinstance(source, Recipe):
            if strict and source.warnings:
                raise RecipeError(source.warnings)
            return source
        trees, name = text_of(source)
        if len(trees) > 1:
            return documents.result(cls._read_all(trees, name, strict=strict))
        recipe, problems = cls._read(trees[0], name, strict=strict)
        problems.check()
        if recipe is None:
            raise RecipeError(f"{name}: not a recipe")
        return replace(recipe, origin=problems.origin)

    @classmethod
    def load_all(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = False
    ) -> tuple[tuple[str | None, Recipe], ...]:
        """Reads every document of a file as a recipe of its own, with its name; those that others use come first.

        Raises:
            RecipeError: as :meth:`load`.
        """
        return tuple((d.name, d.recipe) for d in cls._read_all(*text_of(source), strict=strict))

    @classmethod
    def _read_all(cls, trees: Sequence[Map], name: str, *, strict: bool) -> list[Document]:
        def read(tree: Map) -> tuple[Recipe | None, Problems]:
            return cls._read(tree, name, strict=strict)

        every: list[Document] = []
        for document in documents.read_all(trees, read):
            stages = tuple((str(d.name), d.recipe) for d in documents.needed(document, every))
            recipe = replace(document.recipe, origin=document.problems.origin, stages=stages)
            every.append(document._replace(recipe=recipe))
        return every

    @classmethod
    def _read(cls, tree: Map, name: str, *, strict: bool) -> tuple[Recipe | None, Problems]:
        """The recipe in a tree, and what is wrong with it."""
        recipe, problems = build(cls, tree, name, METHODS, strict=strict)
        if recipe is not None:
            recipe = check(recipe, METHODS.get(recipe.merge_method), problems)
        return recipe, problems

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was ignored or deserves a look, in the stages too, each as ``file:line: place: what``.

        No part of what the recipe means.
        """
        own = self.origin.warnings if self.origin is not None else ()
        return tuple(dict.fromkeys((*own, *(text for _, stage in self.stages for text in stage.warnings))))

    def at(self, loc: Loc) -> str:
        """A place as errors name it, ``recipe.yml:4: slices[1]``; without file and line where it was not loaded."""
        return self.origin.at(loc) if self.origin is not None else dotted(loc)

    @property
    def method(self) -> type[Method]:
        """The method that ``merge_method`` names."""
        return METHODS[self.merge_method]

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """All models, the base first, then in the order of their first appearance."""
        return refs(self)

    @property
    def adapters(self) -> tuple[ModelRef, ...]:
        """All adapters of :attr:`refs`, without their weights, in the order of their first appearance."""
        return tuple(dict.fromkeys(adapter.bare for ref in self.refs for adapter in ref.adapters))

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is merged together: one part for ``models``, one per slice; so for each module, and one for the rest."""
        return parts(self, self.method)

    @property
    def donor_only_base(self) -> bool:
        """Whether the base gives configuration and tokenizer only (``slerp`` between two other models)."""
        return donor_only_base(self, self.method)

    def plain(self, model: Any = ModelRef.plain) -> dict[str, Any]:
        """The recipe as dictionaries and lists; ``model`` says how a reference is written."""

        def level(item: Input | Slice | Module | Recipe) -> dict[str, Any]:
            return {"parameters": item.parameters.plain()} if item.parameters else {}

        def members(item: Module | Recipe) -> dict[str, Any]:
            out: dict[str, Any] = {}
            if item.models:
                out["models"] = [{"model": model(m.model), **level(m)} for m in item.models]
            if item.slices:
                out["slices"] = [
                    {
                        "sources": [
                            {"model": model(s.model), "layer_range": list(s.layer_range), **level(s)}
                            for s in part.sources
                        ],
                        **({"base_model": model(part.base_model)} if part.base_model else {}),
                        **level(part),
                    }
                    for part in item.slices
                ]
            return out

        out: dict[str, Any] = {"merge_method": self.merge_method}
        if self.preset is not None:
            out["preset"] = self.preset
        if self.base_model is not None:
            out["base_model"] = model(self.base_model)
        out |= members(self)
        if self.modules:
            out["modules"] = {m.name: members(m) | level(m) for m in self.modules}
        out |= level(self)
        for key in ("dtype", "out_dtype", "chat_template", "seed", "missing", "layout"):
            if getattr(self, key) is not None:
                out[key] = getattr(self, key)
        source = self.tokenizer_source
        if source is not None:
            out["tokenizer_source"] = {UNION: "union", self.base_model: "base"}.get(source) or model(source)
        block = self.tokenizer
        if block is not None:
            out["tokenizer"] = {"source": out.pop("tokenizer_source")}
            if block.tokens:
                out["tokenizer"]["tokens"] = {name: token.plain(model) for name, token in block.tokens.items()}
            if block.pad_to_multiple_of is not None:
                out["tokenizer"]["pad_to_multiple_of"] = block.pad_to_multiple_of
        return out

    def to_yaml(self, model: Any = ModelRef.plain) -> str:
        """YAML that loads as an equal recipe, and that mergekit reads where no key of fastmerge's own is used.

        A document for each of :attr:`stages` comes first; ``model`` says how a reference is written.
        """
        from fastmerge.recipe.dump import dump

        every = [{"name": name, **stage.plain(model)} for name, stage in self.stages]
        return "---\n".join(map(dump, [*every, self.plain(model)]))

    def having(self, **keys: str) -> Recipe:
        """The same with other values of ``missing`` or ``layout``, in every stage too."""
        stages = tuple((name, stage.having(**keys)) for name, stage in self.stages)
        return replace(self, stages=stages, **cast("Any", keys))

    def canonical(self, identities: Sequence[str] = (), *, seed: int | None = None) -> str:
        """The recipe as one line of JSON without any path: the same wherever the models lie.

        A model that gives nothing but its tokenizer is ``another``.

        Args:
            identities: what each model of :attr:`refs` is (its header hash), then what each of :attr:`adapters` is;
                their number where absent.
            seed: the seed in effect; the recipe's own (or 0) where absent.
        """
        names = {ref: i for i, ref in enumerate(self.refs)}
        loras = {ref: i for i, ref in enumerate(self.adapters)}

        def model(ref: ModelRef) -> Any:
            weighed = [loras[a.bare] if a.weight == 1 else [loras[a.bare], a.weight] for a in ref.adapters]
            return [names[ref], *weighed] if weighed else names.get(ref, "another")

        out = self.plain(model)
        out["seed"] = seed if seed is not None else self.seed or 0
        out["inputs"] = list(identities) or len(names) + len(loras)
        return json.dumps(out, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


__all__ = [
    "REST",
    "UNNAMED",
    "Input",
    "ModelRef",
    "Module",
    "Parameters",
    "Part",
    "Recipe",
    "Rule",
    "Setting",
    "Slice",
    "Source",
]
