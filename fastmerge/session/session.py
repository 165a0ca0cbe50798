"""Models that stay in memory, and merges of them that are written over tensors again and again."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge import planning
from fastmerge.backends.choose import choose
from fastmerge.errors import FastMergeError, RecipeError, ShapeError
from fastmerge.planning.numbers import skeleton
from fastmerge.recipe import Recipe
from fastmerge.session.binding import Bound, Contents
from fastmerge.session.models import Models
from fastmerge.session.running import check, run
from fastmerge.session.sources import Sources
from fastmerge.session.statistics import Statistics
from fastmerge.session.targets import allocate, placed, tensors_of

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from fastmerge.ops.spec import Op

log = logging.getLogger("fastmerge")

MOST = 16
"""Recipes with their targets that a session finds again by itself."""

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
        self._statistics = Statistics(self._backend.kernels)
        self._contents = Contents()
        self._bounds: dict[Hashable, Bound] = {}
        self._closed = False

    def render(
        self, recipe: Wanted, into: Any = None, *, seed: int | None = None, everything: bool = False
    ) -> dict[str, torch.Tensor]:
        """Merges into memory.

        A recipe that differs from an earlier one in numbers only, with the same target, is not planned again. Tensors
        that hold what they would be given are left alone.

        Args:
            recipe: a file, YAML text, a mapping, or a :class:`~fastmerge.Recipe`, of the session's models.
            into: a module, or a mapping of names to tensors, that is written in place; None for new tensors.
            seed: of the random methods; None takes the recipe's own, else 0.
            everything: write all tensors: for a target that was changed past torch (through ``.data`` or numpy).

        Returns:
            The tensors of the target, by name.

        Raises:
            RecipeError, CheckpointError: as :func:`fastmerge.plan`.
            ShapeError: where ``into`` does not fit what the recipe makes; nothing was written.
            OutputError: where a method cannot work on its data; some tensors were written.
        """
        return self.render_batch([recipe], [into], seed=seed, everything=everything)[0]

    def render_batch(
        self,
        recipes: Sequence[Wanted],
        into: Sequence[Any] | None = None,
        *,
        seed: int | None = None,
        everything: bool = False,
    ) -> list[dict[str, torch.Tensor]]:
        """Merges several candidates at once: what they read of the models comes from memory once for all of them.

        Args:
            recipes: as of :meth:`render`.
            into: a target for each; None for new tensors.
            seed: as of :meth:`render`.
            everything: as of :meth:`render`.

        Returns:
            The tensors of each target, by name.

        Raises:
            FastMergeError: as :meth:`render`.
        """
        targets = [None] * len(recipes) if into is None else list(into)
        if len(targets) != len(recipes):
            raise RecipeError(f"into: expected {len(recipes)} targets, one for each recipe, got {len(targets)}")
        self._open()
        found = [self._target(Recipe.load(r), t, seed) for r, t in zip(recipes, targets, strict=True)]
        self.write([bound for bound, _ in found], everything=everything)
        return [tensors for _, tensors in found]

    def bind(self, recipe: Wanted, into: Any, *, seed: int | None = None) -> Binding:
        """Plans a recipe for a target once, for renders with other numbers.

        Args:
            recipe: as of :meth:`render`.
            into: as of :meth:`render`; the binding keeps its tensors.
            seed: as of :meth:`render`.

        Raises:
            FastMergeError: as :meth:`render`; nothing is written yet.
        """
        tensors = tensors_of(into)
        return Binding(self, self._plan(Recipe.load(recipe), tensors, seed), tensors)

    def _target(self, recipe: Recipe, into: Any, seed: int | None) -> tuple[Bound, dict[str, torch.Tensor]]:
        """A recipe with its target: the same as before where only numbers differ."""
        if into is None:
            tensors: dict[str, torch.Tensor] = {}
            return self._plan(recipe, tensors, seed), tensors
        tensors = tensors_of(into)
        key = (skeleton(recipe), seed, *[(name, id(t), t.data_ptr()) for name, t in tensors.items()])
        known = self._bounds.pop(key, None)
        if known is None or not known.set(recipe):
            known = self._plan(recipe, tensors, seed)
        self._bounds[key] = known
        while len(self._bounds) > MOST:
            self._bounds.pop(next(iter(self._bounds)))
        return known, tensors

    def _plan(self, recipe: Recipe, tensors: dict[str, torch.Tensor], seed: int | None) -> Bound:
        """Plans a recipe for the tensors of a target, which are made where there are none."""
        self._open()
        plan = planning.plan(recipe, seed=seed, models=self._models.of(recipe))
        for text in plan.warnings:
            log.info("%s", text)
        ops = self._sources.ops(plan.ops, plan.checkpoints)
        self._backend.check(ops)
        check(ops)
        if not tensors:
            tensors |= allocate(ops)
        return Bound(plan, recipe, *placed(ops, tensors, self._models.lent))

    def write(self, bounds: Sequence[Bound], *, everything: bool) -> None:
        """Computes what targets do not hold; for this package."""
        self._open()
        due: dict[object, list[tuple[Op, torch.Tensor]]] = {}
        filled: set[int] = set()
        for bound in bounds:
            pairs = [*zip(bound.ops, bound.tensors, strict=True)]
            addresses = {t.data_ptr() for _, t in pairs if t.numel()}
            if not filled.isdisjoint(addresses):
                raise ShapeError("into: two recipes of a batch have the same tensors as targets")
            filled |= addresses
            some = [pair for pair in pairs if everything or not self._contents.holds(*pair)]
            if any(op.spec.grain == "model" for op, _ in some):  # which all tensors decide together
                self._run([pair for pair in pairs if pair[0].spec.grain == "model"])
                some = [pair for pair in some if pair[0].spec.grain != "model"]
            for pair in some:
                due.setdefault(pair[0].inputs, []).append(pair)
        self._run([pair for pairs in due.values() for pair in pairs])

    def _run(self, pairs: Sequence[tuple[Op, torch.Tensor]]) -> None:
        if pairs:
            ops, tensors = zip(*pairs, strict=True)
            self._contents.forget(tensors)  # until all of it is there
            run(ops, self._backend, self._statistics)
            self._contents.keep(ops, tensors)

    def _open(self) -> None:
        if self._closed:
            raise FastMergeError("the session is closed")

    def close(self) -> None:
        """Gives the models' memory back; what was rendered stays."""
        self._closed = True
        self._bounds.clear()
        self._statistics.close()
        self._sources.close()
        self._models.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Binding:
    """A recipe planned for a target: :meth:`Session.bind` makes it.

    Args:
        session: that it belongs to.
        bound: the recipe with its target.
        tensors: of the target, which live as long as the binding.
    """

    def __init__(self, session: Session, bound: Bound, tensors: Mapping[str, torch.Tensor]) -> None:
        self._session = session
        self._bound = bound
        self._tensors = tensors

    def render(self, recipe: Wanted | None = None, *, everything: bool = False) -> None:
        """Writes the target; nothing is planned.

        Args:
            recipe: one that differs from the bound one in numbers only; None for the one that was rendered last.
            everything: as of :meth:`Session.render`.

        Raises:
            RecipeError: for a recipe that differs in more.
            FastMergeError: as :meth:`Session.render`.
        """
        if recipe is not None:
            loaded = Recipe.load(recipe)
            if skeleton(loaded) != skeleton(self._bound.recipe) or not self._bound.set(loaded):
                raise RecipeError("expected the bound recipe with other numbers; this one needs a plan of its own")
        self._session.write([self._bound], everything=everything)
