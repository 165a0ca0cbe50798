"""Parameter values as YAML writes them: scalars, gradients, filters, and lists of those."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastmerge.methods.base import Param
from fastmerge.methods.parameters import Parameters, Rule, Scalar, Setting, Value, convert, more_than_all
from fastmerge.recipe.problems import Problems, misspelt
from fastmerge.recipe.tree import Loc, Map, Seq, kind

MANY = 100
"""Entries of a parameter to which later ones are compared."""


def read(raw: Any, param: Param | None, loc: Loc, problems: Problems) -> Setting | None:
    """One setting from the tree.

    Args:
        raw: a scalar, a list, ``{filter, value}``, or a list of those.
        param: the declared parameter; None where it is unknown (only the grammar is checked then).
        loc: where it stands.
        problems: takes whatever is wrong.

    Returns:
        The setting, or None where it could not be read.
    """
    if isinstance(raw, Map):
        rule = _rule(raw, param, loc, problems)
        return None if rule is None else Setting((rule,))
    if isinstance(raw, Seq) and any(isinstance(item, Map) for item in raw):
        rules = []
        for i, item in enumerate(raw):
            if isinstance(item, Map):
                rules.append(_rule(item, param, (*loc, i), problems))
            else:
                problems.add((*loc, i), "a list holds either values or {filter, value} entries, not both")
        good = tuple(r for r in rules if r is not None)
        if len(good) < len(raw):
            return None
        for i, rule in enumerate(good):
            _reached(rule, good[: min(i, MANY)], (*loc, i), problems)
        return Setting(good)
    if isinstance(raw, Seq) and not raw:
        return Setting(())
    value = _value(raw, param, loc, problems)
    return None if value is None else Setting((Rule(value),))


def _reached(rule: Rule, before: Sequence[Rule], loc: Loc, problems: Problems) -> None:
    """Warns of an entry that comes too late: the first entry that a name matches counts."""
    first = next((r for r in before if not r.filter or (rule.filter and r.filter in rule.filter)), None)
    if first is not None:
        what = f"names with {first.filter!r}" if first.filter else "all tensors"
        problems.warn(loc, f"never reached: an entry for {what} stands before it, and the first one counts")


def _rule(raw: Map, param: Param | None, loc: Loc, problems: Problems) -> Rule | None:
    for key in raw:
        if key not in ("filter", "value"):
            meant = misspelt(key, ("filter", "value"), raw)
            said = f" (did you mean {meant!r}?)" if meant else ", ignored"
            tell = problems.add if meant else problems.warn
            tell((*loc, key), f"unknown key{said}; an entry has 'filter' and 'value'")
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        problems.add((*loc, "filter"), f"a filter is part of a tensor name; got {pattern!r} (quote it if it is a name)")
        return None
    if "value" not in raw:
        problems.add(loc, "an entry needs a 'value'")
        return None
    value = _value(raw["value"], param, (*loc, "value"), problems)
    return None if value is None else Rule(value, None if pattern == "*" else pattern)


def _value(raw: Any, param: Param | None, loc: Loc, problems: Problems) -> Value | None:
    if isinstance(raw, Seq):
        items = [_scalar(item, param, (*loc, i), problems) for i, item in enumerate(raw)]
        good = tuple(item for item in items if item is not None)
        return good if len(good) == len(items) else None
    if param is not None and more_than_all(raw, param):
        problems.warn(loc, f"{raw!r} is taken for 1, as in mergekit: everything is kept")
        raw = 1.0
    return _scalar(raw, param, loc, problems)


def _scalar(raw: Any, param: Param | None, loc: Loc, problems: Problems) -> Scalar | None:
    if not isinstance(raw, bool | int | float | str):
        problems.add(loc, f"expected a value, a list of values, or {{filter, value}} entries; got {kind(raw)}")
        return None
    if param is None:
        if isinstance(raw, float) and not math.isfinite(raw):
            problems.add(loc, f"expected a finite number; got {raw!r}")
            return None
        return raw
    if isinstance(raw, bool) and param.type in (float, int):
        problems.add(loc, f"expected a number; got {'true (or yes, on)' if raw else 'false (or no, off)'}")
        return None
    try:
        return convert(raw, param)
    except ValueError as e:
        problems.add(loc, str(e))
        return None


__all__ = ["Parameters", "Rule", "Setting", "read"]
