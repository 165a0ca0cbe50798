"""Which tensors a recipe's ``modules`` name: the language model, a vision tower, what lies between, an encoder.

There is no table of architectures. A module is a path in the tensors' names (``vision_tower``, ``model.visual``), or
one of the parts that mergekit's tables know under a name of their own, told from the names and the stacks of layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastmerge.errors import RecipeError, hint
from fastmerge.planning.names import shown
from fastmerge.planning.structure import Stack, is_head, is_post, roots
from fastmerge.recipe import REST, ModelRef, Part, Recipe

if TYPE_CHECKING:
    from fastmerge.planning.rows import Models, Row

TEXT, VISION, AUDIO, BETWEEN = "text_decoder", "vision_tower", "audio_tower", "multi_modal_projector"
_BETWEEN = r"projector|connector|merger|mm_proj|aligner|resampler|perceiver|(vision|visual|text)_projection"
_VISION = r"vision|visual|image|video|vit$|siglip|^clip"
_AUDIO = r"audio|speech|sound"
_LANGUAGE = r"text|language|llm"


class Modules:
    """The modules of a recipe in its models.

    Args:
        recipe: checked.
        models: opened, and aligned.

    Raises:
        RecipeError: for names that no tensor is under, and two names of one part.
    """

    def __init__(self, recipe: Recipe, models: Models) -> None:
        self.models = models
        self._of: Mapping[str, str] = {}
        named = [m for m in recipe.modules if m.name != "default"]
        if not named:
            return
        refs = dict.fromkeys(s.model for part in recipe.parts for s in part.sources)
        names = list(dict.fromkeys(n for ref in refs for n in models.order(ref)))
        frame = models.structure(next(iter(refs)))
        main = frame.main.prefix if frame.main is not None else ""
        root = roots(frame).get(main, "")
        parts = known_parts(names, root)
        claims = {m.name: meant(m.name, names, parts) for m in named}
        listed = ", ".join(parts) or "default"
        problems = [
            f"{recipe.at(m.loc)}: no part of the models has this name{hint(m.name, parts)}; parts: {listed}, or a "
            "path in the names of tensors"
            for m in named
            if not claims[m.name]
        ]
        owner: dict[str, str] = {}
        for module in sorted(named, key=lambda m: -len(claims[m.name])):  # the smaller of two is the nearer one
            owner |= dict.fromkeys(claims[module.name], module.name)
        problems += [
            f"{recipe.at(m.loc)}: other modules of the recipe have all of its tensors"
            for m in named
            if claims[m.name] and m.name not in owner.values()
        ]
        if problems:
            raise RecipeError(problems)
        self._of = owner

    def of(self, name: str) -> str:
        """The module of a tensor: its name in the recipe, or :data:`REST`."""
        return self._of.get(name, REST)

    def note(self, rows: Sequence[Row], donor: ModelRef) -> list[str]:
        """A warning of what is merged by no module: it is one model's, where mergekit leaves it out."""
        names = [row.name for row in rows]
        if not names or not self._of:
            return []
        return [f"no module of the recipe names {shown(names)}: taken from {str(donor)!r} alone"]

    def stacks(self, ref: ModelRef, module: str, *, every: bool = False) -> list[Stack]:
        """The stacks of layers of a model that are in a module, the main one first, else the largest.

        Where the recipe names no modules: the main one, or ``every`` one.
        """
        found = self.models.structure(ref)
        if not self._of:
            return list(found.stacks) if every else [found.main] if found.main is not None else []
        order = self.models.order(ref)
        first = {s: next(n for n in order if n.startswith(f"{s.prefix}.")) for s in found.stacks}
        own = [s for s in found.stacks if self.of(first[s]) == module]
        return sorted(own, key=lambda s: s != found.main)

    def embedding(self, parts: Sequence[Part]) -> list[Part]:
        """Of the parts of a recipe those of the module that has the embedding and the head; all, where none has."""
        heads = {module for name, module in self._of.items() if is_head(name) or "embed_tokens" in name}
        return [p for p in parts if p.module in heads] or list(parts)


def known_parts(names: Sequence[str], root: str) -> dict[str, list[str]]:
    """The parts of a model that mergekit knows under names of its own; empty where the model is one.

    Args:
        names: of all tensors.
        root: the module that holds the layers of the language model and of nothing else; empty where that is all.
    """
    ends = [{*name.split(".")[:2]} for name in names if not re.search(_VISION, name) and not re.search(_AUDIO, name)]
    two = any("encoder" in e for e in ends) and any("decoder" in e for e in ends)
    out: dict[str, list[str]] = {}
    for name in names:
        out.setdefault(_part(name.lower(), root.lower(), two=two), []).append(name)
    return out if len(out) > 1 else {}


def _part(name: str, root: str, *, two: bool) -> str:
    path = name.split(".")
    if any(re.search(_BETWEEN, p) for p in path):
        return BETWEEN
    if any(re.search(_VISION, p) for p in path):
        return VISION
    if any(re.search(_AUDIO, p) for p in path):
        return AUDIO
    if two:
        return next((p for p in path[:2] if p in ("encoder", "decoder")), "shared")
    inside = not root or name.startswith(root + ".")
    return TEXT if inside or is_head(name) or is_post(path[0]) else BETWEEN


def meant(module: str, names: Sequence[str], parts: Mapping[str, list[str]]) -> list[str]:
    """The tensors that a name means: those under such a path, those of such a part, or those of a part like it."""
    if module in parts:
        return parts[module]
    under = [n for n in names if f".{module}." in f".{n}."]
    word = module.lower().rpartition(".")[2]
    for part, like in ((BETWEEN, _BETWEEN), (VISION, _VISION), (AUDIO, _AUDIO), (TEXT, _LANGUAGE)):
        if not under and re.search(like, word):
            return parts.get(part, [])
    return under
