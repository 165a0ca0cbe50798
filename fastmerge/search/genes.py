"""What a search may change, one number or one choice at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastmerge.errors import RecipeError

Value = float | int
"""Of a gene of a range: the number itself. Of a gene of choices: which one, counted from 0."""

Candidate = tuple[Value, ...]
"""One value for each gene."""


@dataclass(frozen=True, slots=True)
class Gene:
    """One number from a range, or one of several choices.

    Attributes:
        low, high: the range, both ends in it.
        choices: what there is to choose from, any values of a recipe; empty for a range.
        model: whose parameter it is; ``all`` where models share it.
        group: which tensors it is for; ``all`` for every one.
        parameter: of the method.
    """

    low: float = 0.0
    high: float = 1.0
    choices: tuple[Any, ...] = ()
    model: str = "all"
    group: str = "all"
    parameter: str = "weight"

    @property
    def name(self) -> str:
        """``model/group/parameter``."""
        return f"{self.model}/{self.group}/{self.parameter}"

    @property
    def labels(self) -> tuple[Any, ...]:
        """The choices as files write them: numbers and words as they are, anything else as one line of text."""
        return tuple([c if isinstance(c, bool | int | float | str) else _line(c) for c in self.choices])

    def shown(self, value: Value) -> Any:
        """A value as files write it."""
        return self.labels[int(value)] if self.choices else value

    def plain(self) -> dict[str, Any]:
        """As ``search.json`` has it."""
        facts = {"name": self.name, "model": self.model, "group": self.group, "parameter": self.parameter}
        return facts | ({"choices": list(self.labels)} if self.choices else {"low": self.low, "high": self.high})

    def held(self, value: Any) -> bool:
        """Whether the gene can have that value."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.choices:
            return isinstance(value, int) and 0 <= value < len(self.choices)
        return self.low <= value <= self.high

    def problems(self) -> list[str]:
        """What is wrong with it."""
        if self.choices:
            written = [json.dumps(label) for label in self.labels]
            twice = sorted({w for w in written if written.count(w) > 1})
            return [f"{self.name}: choices: {w:.80} is there twice" for w in twice]
        ends = {"low": self.low, "high": self.high}
        wrong = [f"{self.name}: {k}: expected a number, got {v!r:.80}" for k, v in ends.items() if not _finite(v)]
        if not wrong and not self.low < self.high:
            wrong.append(f"{self.name}: expected low < high, got {self.low:g} and {self.high:g}")
        return wrong


def told_apart(genes: Sequence[Gene]) -> tuple[Gene, ...]:
    """The same genes with names of their own: the second ``all`` is ``all.2``."""
    seen: dict[str, int] = {}
    out = []
    for gene in genes:
        times = seen[gene.name] = seen.get(gene.name, 0) + 1
        out.append(gene if times == 1 else replace(gene, group=f"{gene.group}.{times}"))
    return tuple(out)


def check(genes: Sequence[Gene]) -> None:
    """Refuses genes that nothing can be drawn for.

    Raises:
        RecipeError: with all that is wrong.
    """
    if not genes:
        raise RecipeError("genes: expected one or more, got none: nothing is left to search for")
    if problems := [text for gene in genes for text in gene.problems()]:
        raise RecipeError(problems)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _line(choice: Any) -> str:
    """A source of a slice as ``model:first-last``; anything else as JSON."""
    sources = choice if isinstance(choice, Sequence) and not isinstance(choice, str) else [choice]
    if sources and all(isinstance(s, Mapping) and set(s) == {"model", "layer_range"} for s in sources):
        return " + ".join([f"{s['model']}:{_range(s['layer_range'])}" for s in sources])
    return json.dumps(choice, ensure_ascii=False)


def _range(given: Any) -> str:
    try:
        first, end = given
        return str(first) if end - first == 1 else f"{first}-{end - 1}"
    except (TypeError, ValueError):
        return str(given)
