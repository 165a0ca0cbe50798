"""Parameter values as recipes write them: scalars, gradients, filters, and lists of those.

The grammar and its meaning are mergekit's (0.1.5): the first rule whose filter is a substring of the
tensor's name counts; a list of numbers is a gradient over the layers of a slice; a list of words or
booleans picks one of them; a level whose rules all miss falls through to the next level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fastmerge.methods.base import Param
from fastmerge.recipe.problems import Problems, hint
from fastmerge.recipe.tree import Loc, Map, Seq, kind

Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One value and the tensors that it is for.

    Attributes:
        value: a scalar, or a tuple: a gradient.
        filter: part of the names of the tensors that it is for; None is all of them.
    """

    value: Value
    filter: str | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """What one level says about one parameter: rules in order, the first that matches counts."""

    rules: tuple[Rule, ...]

    @property
    def gradient(self) -> bool:
        """Whether the result depends on the layer."""
        return any(isinstance(r.value, tuple) and len(r.value) > 1 for r in self.rules)

    def plain(self) -> Any:
        """The value as YAML and JSON write it."""
        rules = [{**({} if r.filter is None else {"filter": r.filter}), "value": _listed(r.value)} for r in self.rules]
        alone = len(rules) == 1 and self.rules[0] != Rule(()) and self.rules[0].filter is None
        return rules[0]["value"] if alone else rules


class Parameters(Mapping[str, Setting]):
    """The settings of one level: an immutable, hashable mapping."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Setting] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> Setting:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"Parameters({self._items!r})"

    def plain(self) -> dict[str, Any]:
        """The level as YAML and JSON write it."""
        return {name: setting.plain() for name, setting in self._items.items()}


def convert(value: Any, param: Param) -> Scalar:
    """A YAML scalar as the declared type: ``"1e-5"`` is a number for a number, 3.0 an integer for an integer.

    Raises:
        ValueError: where it is none, is not finite, is out of bounds, or is not an allowed word.
    """
    if isinstance(param.type, tuple):
        if value in param.type and isinstance(value, str):
            return value
        words = ", ".join(param.type)
        raise ValueError(f"expected one of {words}; got {value!r}{hint(str(value), param.type)}")
    try:
        out: Scalar = _adapter(param.type).validate_python(value)
    except (ValidationError, OverflowError):
        names = {float: "a number", int: "an integer", bool: "true or false"}
        raise ValueError(f"expected {names.get(param.type, param.type.__name__)}; got {value!r}") from None
    if isinstance(out, float) and not math.isfinite(out):
        raise ValueError(f"expected a finite number; got {value!r}")
    if isinstance(out, int | float) and not isinstance(out, bool):
        low, high = param.low, param.high
        if (low is not None and out < low) or (high is not None and out > high):
            bounds = f"{'-inf' if low is None else f'{low:g}'} .. {'inf' if high is None else f'{high:g}'}"
            raise ValueError(f"expected a number in {bounds}; got {value!r}")
    return out


def interpolate(values: tuple[Scalar, ...], t: float, param: Param) -> Scalar:
    """The value of a gradient at ``t`` in 0 .. 1: linear for numbers, one of the entries for words and booleans.

    Raises:
        ValueError: where an integer parameter would become fractional.
    """
    if param.type not in (float, int):
        return values[int(t * (len(values) - 1))]
    scaled = t * (len(values) - 1)
    i = int(scaled)
    j = min(len(values) - 1, i + 1)
    f = scaled - i
    out = (1 - f) * float(values[i]) + f * float(values[j])
    if param.type is int:
        if not out.is_integer():
            raise ValueError(f"an integer parameter cannot be interpolated to {out:g}")
        return int(out)
    out = out if param.low is None else max(param.low, out)  # rounding may leave the bounds by one unit
    return out if param.high is None else min(param.high, out)


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
        return Setting(good) if len(good) == len(raw) else None
    if isinstance(raw, Seq) and not raw:
        return Setting(())
    value = _value(raw, param, loc, problems)
    return None if value is None else Setting((Rule(value),))


def _rule(raw: Map, param: Param | None, loc: Loc, problems: Problems) -> Rule | None:
    for key in raw:
        if key not in ("filter", "value"):
            problems.add((*loc, key), f"unknown key; an entry has 'filter' and 'value'{hint(key, ('filter', 'value'))}")
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


@cache
def _adapter(kind_: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind_)


def _listed(value: Value) -> Scalar | list[Scalar]:
    return list(value) if isinstance(value, tuple) else value
