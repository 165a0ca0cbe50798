"""What became of every tensor of every model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint

NOT_ASKED = "not asked for by the recipe"
"""Rule of what no row of the plan asks for: layers outside the slices, and ends that other slices give."""

Dropped = Mapping[str, Mapping[str, Sequence[str]]]
"""For each model (its reference) and rule the names that are left out."""


class Account(NamedTuple):
    """Says of each tensor of each model, by the name in its files, whether and why it is in the output.

    Attributes:
        models: for each model (its reference), for each tensor what becomes of it: ``merged``, ``copied``, or
            ``dropped: `` and the rule.
    """

    models: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(
        cls,
        models: Iterable[tuple[str, Checkpoint]],
        used: Sequence[Mapping[str, str]],
        dropped: Dropped,
    ) -> Account:
        """Adds what is left out to what is used.

        Args:
            models: references and checkpoints.
            used: for each model what becomes of those of its tensors that ops read: ``merged`` or ``copied``.
            dropped: what is left out by a rule.
        """
        out: dict[str, Mapping[str, str]] = {}
        for (ref, model), mine in zip(models, used, strict=True):
            out[ref] = mine
            if not mine.keys() >= model.tensors.keys():
                rules = {name: rule for rule, names in dropped.get(ref, {}).items() for name in names}
                rest = {n: f"dropped: {rules.get(n, NOT_ASKED)}" for n in model.tensors if n not in mine}
                out[ref] = {**mine, **rest}
        return cls(out)

    def counts(self) -> dict[str, dict[str, int]]:
        """For each model how many of its tensors became what."""
        return {ref: dict(Counter(tensors.values())) for ref, tensors in self.models.items()}

    def names(self) -> dict[str, dict[str, list[str]]]:
        """For each model the names of what is dropped, by rule."""
        out: dict[str, dict[str, list[str]]] = {}
        for ref, tensors in self.models.items():
            rules = {what for what in set(tensors.values()) if what.startswith("dropped")}
            for name, what in tensors.items() if rules else ():
                if what in rules:
                    out.setdefault(ref, {}).setdefault(what, []).append(name)
        return out
