"""Parameters of a call in Python, as a resolver."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.errors import RecipeError, hint
from fastmerge.methods.base import REQUIRED, Method, Param
from fastmerge.methods.parameters import (
    SCALARS,
    Parameters,
    Resolver,
    Rule,
    Scalar,
    Setting,
    Value,
    convert,
    is_list,
    more_than_all,
)
from fastmerge.tensors import python_values

log = logging.getLogger("fastmerge")


def called(
    method: type[Method], given: Mapping[str, Any] | None, models: Sequence[Any], preset: str | None = None
) -> Resolver:
    """The resolver of a call in Python.

    A parameter with one value per model takes one for all, a sequence in the order of the models, or a mapping by
    model. Wherever a value stands, ``[{"filter": ..., "value": ...}, ...]`` and, for shared parameters and inside
    a sequence or mapping, a gradient ``[first, ..., last]`` may stand as well.

    Args:
        method: whose parameters.
        given: values by name.
        models: the ids of the models, without the base where the method has one.
        preset: a published variant of the method.

    Raises:
        RecipeError: with every problem: unknown names, wrong types, values out of bounds.
    """
    if given is not None and not isinstance(given, Mapping):
        raise RecipeError(f"parameters: expected a mapping of names to values, got {type(given).__name__}")
    problems: list[str] = []
    own: list[dict[str, Setting]] = [{} for _ in models]
    common: dict[str, Setting] = {}
    declared = {p.name: p for p in method.params}
    defaults = method.defaults(preset)
    problems += [
        f"{method.name} needs the parameter {p.name!r}: {p.doc}"
        for p in method.params
        if defaults[p.name] is REQUIRED and p.name not in (given or {})
    ]
    for name, value in (given or {}).items():
        param = declared.get(name)
        if param is None:
            problems.append(f"{method.name} has no parameter {name!r}{hint(str(name), declared)}")
            continue
        reader = _Reader(f"{method.name}: parameter {name!r}", param, problems, none=defaults[name] is None)
        values = python_values(value)
        alike = param.scope == "shared" or type(values) in SCALARS
        if alike or not (_listed_by_model(values) or _by_id(values)):
            reader.into(common, values)
        elif isinstance(values, Mapping):
            problems += [f"{reader.where}: missing for input {k!r}" for k in models if k not in values]
            if stray := [k for k in values if k not in models]:
                log.warning("%s: ignored: %r is none of the inputs %r", reader.where, stray[0], list(models))
            for level, key in zip(own, models, strict=True):
                reader.into(level, values.get(key, REQUIRED))
        else:
            if len(values) != len(models):
                problems.append(f"{reader.where}: expected {len(models)} values, got {len(values)}")
            for level, item in zip(own, values, strict=False):
                reader.into(level, item)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return Resolver(
        method, [Parameters(level) for level in own], (Parameters(common),), preset=preset, models=[*map(str, models)]
    )


def _is_rule(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value and set(value) <= {"filter", "value"}


def _by_id(value: Any) -> bool:
    return isinstance(value, Mapping) and not _is_rule(value)


def _listed_by_model(value: Any) -> bool:
    return is_list(value) and not any(_is_rule(v) for v in value)


class _Reader:
    """Reads the values of one parameter of a call."""

    def __init__(self, where: str, param: Param, problems: list[str], *, none: bool) -> None:
        self.where = where
        self._param = param
        self._problems = problems
        self._none = none or param.default is None

    def into(self, level: dict[str, Setting], value: Any) -> None:
        """Sets the parameter in a level; None stands for the default where that is a legal value."""
        if type(value) in SCALARS:
            level[self._param.name] = Setting((Rule(self._single(value)),))
        elif value is REQUIRED or (value is None and self._none):
            return
        elif value is None:
            self._problems.append(f"{self.where}: expected a value, got None")
        elif _is_rule(value):
            level[self._param.name] = Setting((self._rule(value),))
        elif is_list(value) and any(_is_rule(v) for v in value):
            if not all(_is_rule(v) for v in value):
                self._problems.append(
                    f"{self.where}: a list holds either values or {{filter, value}} entries, not both"
                )
                return
            level[self._param.name] = Setting(tuple(self._rule(v) for v in value))
        else:
            level[self._param.name] = Setting((Rule(self._value(value)),))

    def _rule(self, value: Mapping[str, Any]) -> Rule:
        pattern = value.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            self._problems.append(f"{self.where}: a filter is part of a tensor name; got {pattern!r}")
            pattern = None
        return Rule(self._value(value["value"]), None if pattern == "*" else pattern)

    def _value(self, value: Any) -> Value:
        value = python_values(value)
        if is_list(value):
            return tuple(self._scalar(v) for v in value)
        return self._single(value)

    def _single(self, value: Any) -> Scalar:
        if more_than_all(value, self._param):
            log.warning("%s: %r is taken for 1, as in mergekit: everything is kept", self.where, value)
            value = 1.0
        return self._scalar(value)

    def _scalar(self, value: Any) -> Scalar:
        try:
            return convert(value if type(value) in SCALARS else python_values(value), self._param)
        except ValueError as error:
            self._problems.append(f"{self.where}: {error}")
            return 0.0
