"""Models that stay in memory, and merges of them that are written over tensors again and again."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastmerge import planning
from fastmerge.backends.choose import choose
from fastmerge.errors import FastMergeError, RecipeError, ShapeError
from fastmerge.planning.numbers import renumbered, skeleton
from fastmerge.recipe import Recipe
from fastmerge.session.binding import Bound, Contents, Due
from fastmerge.session.homes import homes_of
from fastmerge.session.launching import Launching
from fastmerge.session.models import Models
from fastmerge.session.running import check, run
from fastmerge.session.sources import Sources
from fastmerge.session.statistics import Statistics
from fastmerge.session.targets import allocate, placed, tensors_of

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from fastmerge.ops.spec import Op
    from fastmerge.planning import Plan

log = logging.getLogger("fastmerge")

T = TypeVar("T")

MOST = 16
"""Plans, and plans with their targets, that a session finds again by itself."""

Wanted = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""A recipe as :meth:`fastmerge.Recipe.load` takes it."""


class Session:
    """Models loaded once, and any number of merges of them.

    ::

        with fm.Session(["base", "math", "code"]) as session:
            session.render({"merge_method": "linear", ...}, into=model)

    Every render has the bytes of the same recipe merged on disk; NaN and Inf are passed on, and not counted. A session
    renders for one thread at a time: on all cores, or on its GPUs, where results may still be under way, in the order
    of the current streams.

    Args:
        models: references as recipes write them (paths, hub ids, ``base+adapter``), or a mapping of the names that
            recipes use to references, state dictionaries or modules. Files are read once, into memory of the session's
            own; tensors of a caller are used where they are and must not change. (GPUs get copies of those on the CPU.)
        device: where models are: ``cpu``, ``cuda``, ``cuda:1``, a list ``cuda:0,cuda:1`` that shares the tensors by
            bytes, or ``auto`` (all GPUs that can be used, else the CPU).
        backend: ``native``, ``reference``, ``triton`` or None for the best one there.

    Attributes:
        device: where models are, as torch names it: of several GPUs the first.

    Raises:
        RecipeError: for something that is no model.
        CheckpointError: where a model is damaged.
        BudgetError: where the models do not fit the memory that is free.
        BackendUnavailable: for a device or backend that cannot be used here.
    """

    def __init__(
        self,
        models: Mapping[str, Any] | Sequence[Any],
        *,
        device: str | torch.device = "cpu",
        backend: str | None = None,
    ) -> None:
        self._backend = choose(str(device), backend, said=f"device {str(device)!r}")
        homes = homes_of(self._backend) if self._backend.gpus else None
        self._models = Models(models, homes)
        self._sources = Sources(self._models)
        self._statistics = Statistics(self._backend.kernels if homes is None else None)
        self._gpus = None if homes is None else Launching(homes, self._statistics)
        self.device = "cpu" if homes is None else homes.all[0].backend.home
        self._contents = Contents()
        self._warned: set[str] = set()
        self._plans: dict[Hashable, tuple[Plan, list[Op]]] = {}
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
            BackendUnavailable: where GPUs have no way to do what the recipe asks for.
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
        loaded = Recipe.load(recipe)
        return Binding(self, loaded, self._bound(loaded, tensors, seed)[0], tensors)

    def _target(self, recipe: Recipe, into: Any, seed: int | None) -> tuple[Bound, dict[str, torch.Tensor]]:
        """A recipe with its target: the same as before where only numbers differ."""
        if into is None:
            return self._bound(recipe, None, seed)
        tensors = tensors_of(into)
        key = (skeleton(recipe), seed, *[(name, id(t), t.data_ptr()) for name, t in tensors.items()])
        known = self._bounds.pop(key, None)
        if known is None or not known.set(recipe):
            known, _ = self._bound(recipe, tensors, seed)
        _keep(self._bounds, key, known)
        return known, tensors

    def _bound(
        self, recipe: Recipe, tensors: dict[str, torch.Tensor] | None, seed: int | None
    ) -> tuple[Bound, dict[str, torch.Tensor]]:
        """A recipe with the tensors of a target, or with new ones; planned where more than numbers differ."""
        self._open()
        key = (skeleton(recipe), seed)
        found = self._plans.pop(key, None)
        specs = renumbered(found[0], recipe) if found is not None else None
        if found is None or specs is None:
            plan = planning.plan(recipe, seed=seed, models=self._models.of(recipe))
            for text in dict.fromkeys(plan.warnings):
                if text not in self._warned:
                    log.warning("%s", text)
            self._warned |= set(plan.warnings)
            found, specs = (plan, self._sources.ops(plan.ops, plan.checkpoints)), {}
            self._check(found[1])
        if not recipe.stages:
            _keep(self._plans, key, found)
        if tensors is None:
            tensors = allocate(found[1], self._models.homes)
        bound = Bound(found[0], *placed(found[1], tensors, self._models.lent, gpus=self._gpus is not None))
        bound.use(specs)
        return bound, tensors

    def _check(self, ops: Sequence[Op]) -> None:
        """Refuses what cannot be rendered here, before anything is."""
        if self._gpus is not None and self._models.homes is not None:
            self._gpus.check(ops)
            check(ops, self._models.homes.same)
        else:
            self._backend.check(ops)
            check(ops)

    def write(self, bounds: Sequence[Bound], *, everything: bool) -> None:
        """Computes what targets do not hold; for this package."""
        self._open()
        every = [bound.all() for bound in bounds]
        targets = [one.address for some in every for one in some if one.op.spec.numel]
        if len(set(targets)) < len(targets):
            raise ShapeError("into: two recipes of a batch have the same tensors as targets")
        groups: dict[object, list[Due]] = {}
        for some in every:
            due = [one for one in some if everything or not self._contents.holds(one)]
            if any(one.op.spec.grain == "model" for one in due):  # which all tensors decide together
                self._run([one for one in some if one.op.spec.grain == "model"])
                due = [one for one in due if one.op.spec.grain != "model"]
            for one in due:
                groups.setdefault(id(one.op) if one.inputs is None else one.inputs, []).append(one)
        self._run([one for group in groups.values() for one in group])

    def _run(self, due: Sequence[Due]) -> None:
        if due:
            self._contents.forget(due)  # until all of it is there
            ops = [one.op for one in due]
            if self._gpus is not None:
                self._gpus.run(ops, [one.tensor for one in due])
            else:
                run(ops, self._backend, self._statistics)
            self._contents.keep(due)

    def _open(self) -> None:
        if self._closed:
            raise FastMergeError("the session is closed")

    def close(self) -> None:
        """Gives the models' memory back; what was rendered stays."""
        self._closed = True
        self._plans.clear()
        self._bounds.clear()
        if self._gpus is not None:
            self._gpus.close()
        self._statistics.close()
        self._sources.close()
        self._models.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _keep(kept: dict[Hashable, T], key: Hashable, value: T) -> None:
    """Puts a value last, and forgets what was not used for longest."""
    kept[key] = value
    while len(kept) > MOST:
        kept.pop(next(iter(kept)))


class Binding:
    """A recipe planned for a target: :meth:`Session.bind` makes it.

    Args:
        session: that it belongs to.
        recipe: as it was bound.
        bound: the same with its target.
        tensors: of the target, which live as long as the binding.
    """

    def __init__(self, session: Session, recipe: Recipe, bound: Bound, tensors: Mapping[str, torch.Tensor]) -> None:
        self._session = session
        self._form = skeleton(recipe)
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
            if skeleton(loaded) != self._form or not self._bound.set(loaded):
                raise RecipeError("expected the bound recipe with other numbers; this one needs a plan of its own")
        self._session.write([self._bound], everything=everything)
