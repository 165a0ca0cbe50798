"""Tied tensors of a recipe: which are written once, twice, or have become tensors of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastmerge.planning import tied
from fastmerge.planning.rows import Models, Row, Sources
from fastmerge.recipe import ModelRef, Recipe


class Tying:
    """Decides about the families of tied tensors.

    A copy is merged once, with its original, and written under every name that the reference has: masks and ranks
    are then those of the original. A copy that differs from its original in any model is a tensor of its own.

    Args:
        recipe: checked.
        models: opened, and aligned.
        sources: of each part of the recipe.

    Attributes:
        ties: what became of them.
        families: for each name its family.
        problems: ends that do not fit each other.
    """

    def __init__(self, recipe: Recipe, models: Models, sources: Sequence[Sources]) -> None:
        self.models = models
        self.sources = sources
        self.ties = tied.Ties()
        self.families: dict[str, tied.Family] = {}
        self.problems: list[str] = []
        self._keyed = _keyed(recipe)
        self._same: dict[tuple[ModelRef, str, str], bool] = {}

    def decide(self, rows: Sequence[Row], names: Sequence[str]) -> Sequence[Row]:
        """Looks at every family.

        Args:
            rows: of the output.
            names: the candidates of all models.

        Returns:
            The rows, with the head that the last slice's tied model needs where the first slice's has one.
        """
        families = tied.families(names)
        if not families:
            return rows
        wanted = set(names)
        by_name = {row.name: row for row in rows if row.name in wanted}
        untied = False
        copies: list[tuple[str, str]] = []
        dropped: list[tuple[str, str]] = []
        more: list[Row] = []
        for family in families:
            self.families |= dict.fromkeys(family.names, family)
            there = [n for n in family.names if n in by_name]
            if not there:
                continue
            first = self.sources[by_name[there[0]].part]
            kept = [n for n in there if n in first.tensors[first.first]] or there
            original = kept[0]
            for n in family.names:
                head, row = n in family.heads, by_name.get(n)
                last = self._last(first) if row is None else self.sources[row.part]
                if row is None and head and last is not first and self._own_head(first, family, n):
                    more.append(Row(n, self.sources.index(last), n))
                elif row is None or n == original:
                    continue
                if last.refs != first.refs:
                    self._fit((original, n), first, last)
                    ends = [(ref, t) for s in (first, last) for ref, t in zip(s.refs, s.tensors, strict=True)]
                    untied |= head and any(n not in t or tied.tied(self.models.config(ref)) for ref, t in ends)
                    continue
                says = tied.tied(self.models.config(last.refs[last.first]))
                lacking = any(n not in t or original not in t for t in last.tensors)
                merged_once = lacking or (self._keyed and not (head and says is False))
                if not merged_once and not (head and says):
                    continue
                if not self._copy(last, family, original, n):
                    untied |= head and bool(lacking or says)
                elif merged_once:
                    (copies if n in kept else dropped).append((n, original))
        self.ties = tied.Ties(untied, tuple(copies), tuple(dropped))
        return [*rows, *more]

    def _last(self, first: Sources) -> Sources:
        """The last part of the module of a part."""
        return next(s for s in reversed(self.sources) if s.module == first.module)

    def _fit(self, names: Sequence[str], *ends: Sources) -> None:
        """Embedding of the first slice, head of the last: the models need vocabularies of one size."""
        for name in names:
            found = {ref: t[name].shape for s in ends for ref, t in zip(s.refs, s.tensors, strict=True) if name in t}
            if len(set(found.values())) > 1:
                listed = ", ".join(f"{str(ref)!r} {list(shape)}" for ref, shape in found.items())
                self.problems.append(
                    f"{name}: embedding and head need one vocabulary; they have different ones: {listed}"
                )

    def _equal(self, ref: ModelRef, a: str, b: str) -> bool:
        if (ref, a, b) not in self._same:
            x, y = (self.models.tensors(ref)[n] for n in (a, b))
            changed = self.models.sources[ref].parts(x, y)  # what an adapter trained is no copy
            self._same[ref, a, b] = not changed and tied.same(self.models.checkpoints[ref], x, y)
        return self._same[ref, a, b]

    def _copy(self, sources: Sources, family: tied.Family, original: str, name: str) -> bool:
        """Whether a tensor is a copy of the original in every source that has it, and tied in every other."""
        for ref, tensors in zip(sources.refs, sources.tensors, strict=True):
            if name not in tensors:
                if tied.original(family, name, tensors, self.models.config(ref)) is None:
                    return False
                continue
            other = next((n for n in (original, *family.names) if n in tensors and n != name), None)
            if other is not None and not self._equal(ref, other, name):
                return False
        return True

    def _own_head(self, sources: Sources, family: tied.Family, head: str) -> bool:
        """Whether one of the models has a head that is not its embedding."""
        for ref, tensors in zip(sources.refs, sources.tensors, strict=True):
            other = next((n for n in family.names if n in tensors and n != head), None)
            untied = tied.tied(self.models.config(ref)) is False
            if head in tensors and (untied or other is None or not self._equal(ref, other, head)):
                return True
        return False


def _keyed(recipe: Recipe) -> bool:
    """Whether the tensors of a model are not merged each by itself: random masks go by name, or one rank by model."""
    method = recipe.method
    if method.name.startswith("dare_"):
        return True
    levels: list[Mapping[str, object]] = [level for part in recipe.parts for level in part.levels]
    default = method.defaults(recipe.preset).get("trim_scope")
    return default == "model" or any("trim_scope" in level for level in levels)
