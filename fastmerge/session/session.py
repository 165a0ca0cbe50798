"""Models that stay in memory, and merges of them that are written over tensors again and again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge import planning
from fastmerge.backends.choose import choose
from fastmerge.errors import FastMergeError
from fastmerge.recipe import Recipe
from fastmerge.session.models import Models
from fastmerge.session.sources import Sources
from fastmerge.session.targets import allocate, placed, tensors_of

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

Wanted = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""A recipe as :meth:`fastmerge.Recipe.load` takes it."""


class Session:
    """Models loaded once, and any number of merges of them.

    ::

        with fm.Session(["base", "math", "code"]) as session:
            session.render({"merge_method": "linear", ...}, into=model)

    Every render has the bytes of the same recipe merged on disk.

    Args:
        models: references as recipes write them (paths, hub ids, ``base+adapter``), or a mapping of the names that
            recipes use to references, state dictionaries or modules. Files are read once, into memory of the session's
            own; tensors of a caller are used where they are and must not change.
        device: ``cpu``; ``auto`` is the same.
        backend: ``native``, ``reference`` or None for the best one.

    Raises:
        RecipeError: for something that is no model.
        CheckpointError: where a model is damaged.
        BudgetError: where the models do not fit the memory that is free.
        BackendUnavailable: for a device or backend that cannot be used here.
    """

    def __init__(
        self, models: Mapping[str, Any] | Sequence[Any], *, device: str = "cpu", backend: str | None = None
    ) -> None:
        self._backend = choose(device, backend)
        self._models = Models(models)
        self._sources = Sources(self._models)
        self._closed = False

    def render(self, recipe: Wanted, into: Any = None, *, seed: int | None = None) -> dict[str, torch.Tensor]:
        """Merges into memory.

        Args:
            recipe: a file, YAML text, a mapping, or a :class:`~fastmerge.Recipe`, of the session's models.
            into: a module, or a mapping of names to tensors, that is written in place; None for new tensors.
            seed: of the random methods; None takes the recipe's own, else 0.

        Returns:
            The tensors that were written, by name.

        Raises:
            RecipeError, CheckpointError: as :func:`fastmerge.plan`.
            ShapeError: where ``into`` does not fit what the recipe makes; nothing was written.
        """
        if self._closed:
            raise FastMergeError("the session is closed")
        loaded = Recipe.load(recipe)
        plan = planning.plan(loaded, seed=seed, models=self._models.of(loaded))
        ops = self._sources.ops(plan.ops, plan.checkpoints)
        tensors = allocate(ops) if into is None else tensors_of(into)
        ops, _ = placed(ops, tensors, self._models.lent)
        self._backend.check(ops)
        from fastmerge.session.running import run

        run(ops, self._backend)
        return tensors

    def close(self) -> None:
        """Gives the models' memory back; what was rendered stays."""
        self._closed = True
        self._sources.close()
        self._models.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
