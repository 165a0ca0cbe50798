"""Parameter values: scalars, gradients, filters, levels; and the one place where they become a method.

A recipe's YAML, a call with tensors and the task-vector functions all end here. The grammar and its meaning are
mergekit's (0.1.5): the first rule whose filter is a substring of the tensor's name counts; a list of numbers is a
gradient over the layers of a slice; a list of words or booleans picks one of them; a level whose rules all miss
falls through to the next level.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastmerge.errors import RecipeError, hint
from fastmerge.methods.base import REQUIRED, Method, Param
from fastmerge.tensors import python_values

log = logging.getLogger("fastmerge")

Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...]

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_BOOLEANS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}
"""Words that mergekit takes for booleans."""
SCALARS = frozenset({float, int, bool, str})
_KINDS = {float: "a number", int: "an integer", bool: "true or false"}


class Rule(NamedTuple):
    """One value and the tensors that it is for.

    Attributes:
        value: a scalar, or a tuple: a gradient.
        filter: part of the names of the tensors that it is for; None is all of them.
    """

    value: Value
    filter: str | None = None


class Setting(NamedTuple):
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


def _listed(value: Value) -> Scalar | list[Scalar]:
    return list(value) if isinstance(value, tuple) else value


def convert(value: Any, param: Param) -> Scalar:
    """A scalar as the declared type: ``"1e-5"`` is a number for a number, 3.0 an integer for an integer.

    Raises:
        ValueError: where it is none, is not finite, is out of bounds, or is not an allowed word.
    """
    if isinstance(param.type, tuple):
        if isinstance(value, str) and value in param.type:
            return value
        raise ValueError(f"expected one of {', '.join(param.type)}; got {value!r}{hint(str(value), param.type)}")
    if param.type is bool:
        found = None
        if isinstance(value, bool | str):
            found = _BOOLEANS.get(str(value).lower())
        elif isinstance(value, int | float) and value in (0, 1):
            found = value == 1
        if found is None:
            raise ValueError(f"expected true or false; got {value!r}")
        return found
    real = _number(value)
    if real is None:
        raise ValueError(f"expected {_KINDS[param.type]}; got {value!r}")
    if not math.isfinite(real):
        raise ValueError(f"expected a finite number; got {value!r}")
    if param.type is int and not real.is_integer():
        raise ValueError(f"expected an integer; got {value!r}")
    low, high = param.low, param.high
    if (low is not None and real < low) or (high is not None and real > high):
        bounds = f"{'-inf' if low is None else f'{low:g}'} .. {'inf' if high is None else f'{high:g}'}"
        raise ValueError(f"expected a number in {bounds}; got {value!r}")
    return int(real) if param.type is int else real


def number(name: str, value: Any, low: float | None = None, high: float | None = None) -> float:
    """An argument of a function, by the rules of parameters.

    Raises:
        RecipeError: where it is no number, not finite or out of bounds.
    """
    try:
        return float(convert(python_values(value), Param(name, name, "shared", float, None, "", low, high)))
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from None


def more_than_all(value: Any, param: Param) -> bool:
    """Whether a share is above 1, by which mergekit keeps everything.

    A gradient with such a value would have other ones between, and is refused.
    """
    return type(value) in (int, float) and 1 < value < 1e300 and param.name in ("density", "select_topk")


def is_list(value: Any) -> bool:
    """Whether something is several values."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _number(value: Any) -> float | None:
    """A number, or the text of one; None for anything else."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


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


class Resolver:
    """Makes the method of each tensor from the levels of its parameters.

    Precedence, highest first: the model's level (for parameters per model only), the common levels in order, the
    default (under the preset). Filters of parameters per model match the name of the input tensor, filters of shared
    ones that of the output tensor. A tensor's name matters only through the filters that it matches.

    Args:
        method: whose parameters.
        own: one level per model.
        common: the levels for all models, highest first.
        preset: a published variant of the method.
        place: what errors put in front, with its ": ".
        models: how errors call the models.

    Raises:
        RecipeError: for a preset that the method does not have.
    """

    def __init__(
        self,
        method: type[Method],
        own: Sequence[Parameters],
        common: Sequence[Parameters],
        *,
        preset: str | None = None,
        place: str = "",
        models: Sequence[str] = (),
    ) -> None:
        self._method = method
        self._own = own
        self._common = common
        self._defaults = method.defaults(preset)
        self._place = place
        self._models = models
        declared = {p.name for p in method.params}
        used = [(name, setting) for level in (*own, *common) for name, setting in level.items() if name in declared]
        self.filters = tuple(dict.fromkeys(r.filter for _, s in used for r in s.rules if r.filter is not None))
        self.gradients = tuple(dict.fromkeys(name for name, s in used if s.gradient))
        self.gradient = bool(self.gradients)
        self._bit = {f: 1 << i for i, f in enumerate(self.filters)}
        self._matched = 0
        self._known: dict[tuple[int, tuple[tuple[int, int], ...], float], Method] = {}

    @property
    def constant(self) -> bool:
        """Whether no tensor's name or layer matters."""
        return not (self.filters or self.gradient)

    def mask(self, name: str) -> int:
        """Which of :attr:`filters` are part of a tensor's name, as bits."""
        out = 0
        for pattern, bit in self._bit.items():
            if pattern in name:
                out |= bit
        self._matched |= out
        return out

    def unmatched(self) -> list[str]:
        """Filters that no name given to :meth:`mask` contained."""
        return [f for f, bit in self._bit.items() if not self._matched & bit]

    def method(self, name: str, inputs: Sequence[tuple[int, str]], t: float = 0.0) -> Method:
        """The method with the parameters of one output tensor; the same object for the same outcome.

        Args:
            name: of the output tensor.
            inputs: (number of the model, name of its tensor) of each input but the base.
            t: place of the layer in its slice, 0 .. 1; 0 for tensors outside the layers.

        Raises:
            RecipeError: where a required parameter has no value, or a gradient makes none.
        """
        masks = tuple([(i, self.mask(n)) for i, n in inputs] if self._bit else [(i, 0) for i, _ in inputs])
        key = (self.mask(name), masks, t if self.gradient else 0.0)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._make(*key)
        return found

    def _make(self, mask: int, inputs: Sequence[tuple[int, int]], t: float) -> Method:
        fields: dict[str, Any] = {}
        for p in self._method.params:
            if p.scope == "shared":
                fields[p.field] = self._value(p, None, self._common, mask, t)
            else:
                fields[p.field] = tuple([self._value(p, i, (self._own[i], *self._common), m, t) for i, m in inputs])
        return self._method(**fields)

    def _value(self, param: Param, model: int | None, levels: Sequence[Parameters], mask: int, t: float) -> Any:
        for level in levels:
            setting = level.get(param.name)
            if setting is None:
                continue
            try:
                value = self._evaluate(setting, param, mask, t)
            except ValueError as e:
                raise RecipeError(f"{self._place}{param.name}: {e}") from None
            if value is not None:
                return value
        default = self._defaults[param.name]
        if default is REQUIRED:
            who = "" if model is None or model >= len(self._models) else f" of {self._models[model]!r}"
            lost = any(param.name in level for level in levels)
            why = "no filter gives it a value" if lost else param.doc
            raise RecipeError(f"{self._place}{self._method.name} needs the parameter {param.name!r}{who}: {why}")
        return default

    def _evaluate(self, setting: Setting, param: Param, mask: int, t: float) -> Any:
        for rule in setting.rules:
            if rule.filter is None or mask & self._bit[rule.filter]:
                if not isinstance(rule.value, tuple):
                    return rule.value
                return interpolate(rule.value, t, param) if rule.value else None
        return None
