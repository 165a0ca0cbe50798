"""What models are called where others read it: Hub ids, and the last parts of paths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint
    from fastmerge.recipe import ModelRef, Recipe

_CACHED = r"models--([\w.-]+?)--([\w.-]+)/snapshots/([\w.-]+)/"


class Names:
    """Names of the models of a recipe without the places where they lie on this machine.

    A model of the Hub keeps its id. Any other is called by the last part of its path, with a number behind it where
    two models would have the same name.

    Args:
        recipe: with all references, those of its stages too.
        documents: each recipe in it with its models, in the order of its ``refs``, and then the adapters of those that
            have one.

    Attributes:
        shown: for each model and adapter its name, and whether that is a Hub id.
    """

    def __init__(self, recipe: Recipe, documents: Sequence[tuple[Recipe, Sequence[Checkpoint]]]) -> None:
        self.recipe = recipe
        self.shown: list[tuple[str, bool]] = []
        self._local = {name: name for name, _ in recipe.stages}
        self._refs: dict[ModelRef, ModelRef] = {}
        for one, checkpoints in documents:
            refs = one.refs
            self._refs |= {ref: self._named(ref, c) for ref, c in zip(refs, checkpoints, strict=False)}
            adapted = [ref for ref in refs if ref.lora is not None]
            for ref, checkpoint in zip(adapted, checkpoints[len(refs) :], strict=False):
                if ref.lora is not None:
                    self._refs[ref] = replace(self._refs[ref], lora=self._named(ref.lora, checkpoint))
            giver = one.tokenizer_source
            if giver is not None and giver not in self._refs and Path(giver.path).exists():  # it is not merged
                self._refs[giver] = replace(giver, path=self._last(giver.path, Path(giver.path)))

    def _named(self, ref: ModelRef, checkpoint: Checkpoint) -> ModelRef:
        if checkpoint.alike is not None:
            return ref  # a stage, by the name of its document
        cached = re.search(_CACHED, f"{checkpoint.path}/")
        if cached is None:
            named = replace(ref, path=self._last(ref.path, checkpoint.path), revision=None)
        else:
            repository = f"{cached[1]}/{cached[2]}"
            # A path in the cache is one commit.
            named = replace(ref, path=repository, revision=ref.revision if ref.path == repository else cached[3])
        self.shown.append((named.path, cached is not None))
        return named

    def _last(self, path: str, opened: Path) -> str:
        """The last part of a path; of ``.`` and the like that of the directory which they mean."""
        if path not in self._local:
            last = PurePath(path).name
            name = last if last.strip(".") else opened.resolve().name or "model"
            taken = set(self._local.values())
            numbered = (f"{name}-{i}" for i in range(2, len(taken) + 3))
            self._local[path] = next(n for n in (name, *numbered) if n not in taken)
        return self._local[path]

    def to_yaml(self) -> str:
        """The recipe with these names."""

        def plain(ref: ModelRef) -> Any:
            return self._refs.get(ref, ref).plain()

        return self.recipe.to_yaml(plain)
