"""From plain parameters to a :class:`~fastmerge.methods.base.Group`: defaults, presets, types, bounds.

Recipes have more ways to write a value (gradients, filters); what they resolve to is checked here as well.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.dtypes import DType, promote
from fastmerge.errors import RecipeError
from fastmerge.methods.base import REQUIRED, Group, Method, Param
from fastmerge.philox import checked_seed


def problem(method: type[Method], param: Param, value: Any, default: Any) -> str | None:
    """What is wrong with one resolved value, or None.

    Args:
        method: for the message.
        param: its declaration.
        value: what the recipe gives, or the default.
        default: the default under the preset in use; None makes None legal.
    """
    where = f"{method.name}: parameter {param.name!r}"
    if value is REQUIRED:
        return f"{where} is required"
    if value is None:
        return None if default is None or param.default is None else f"{where}: expected a value, got null"
    if isinstance(param.type, tuple):
        return None if value in param.type else f"{where}: expected one of {', '.join(param.type)}, got {value!r}"
    if param.type is bool:
        return None if isinstance(value, bool) else f"{where}: expected true or false, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{where}: expected a number, got {value!r}"
    if param.type is int and value != int(value):
        return f"{where}: expected a whole number, got {value!r}"
    if not math.isfinite(value):
        return f"{where}: expected a finite number, got {value!r}"
    low, high = param.low, param.high
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"{'-inf' if low is None else low} .. {'inf' if high is None else high}"
        return f"{where}: expected {bounds}, got {value!r}"
    return None


def unknown(method: type[Method], name: str) -> str:
    """The message for a parameter that the method does not have."""
    names = [p.name for p in method.params]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(names) or 'none'}"
    return f"{method.name}: unknown parameter {name!r}{hint}"


def resolve(
    method: type[Method], parameters: Mapping[str, Any], models: int, preset: str | None = None
) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    """Resolves plain parameters for one tensor.

    Args:
        method: whose declarations count.
        parameters: by name; for ``model`` and ``input`` parameters one value for all, or a sequence.
        models: how many values such a parameter has (non-base models; inputs where the base is ignored).
        preset: a name from ``method.presets``.

    Returns:
        Shared parameters, and one mapping per model.

    Raises:
        RecipeError: with every problem found.
    """
    defaults = method.defaults(preset)
    problems = [unknown(method, name) for name in parameters if name not in defaults]
    shared: dict[str, Any] = {}
    each: tuple[dict[str, Any], ...] = tuple({} for _ in range(models))
    for param in method.params:
        default = defaults[param.name]
        value = parameters.get(param.name, default)
        if param.scope == "shared":
            values = [value]
            shared[param.name] = value
        else:
            values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * models
            if len(values) != models:
                problems.append(f"{method.name}: parameter {param.name!r}: expected {models} values, got {len(values)}")
            for mapping, v in zip(each, values, strict=False):
                mapping[param.name] = v
        found = (problem(method, param, v, default) for v in values)
        problems.extend(dict.fromkeys(p for p in found if p))
    if problems:
        raise RecipeError(problems)
    return shared, each


def make_group(
    method: type[Method],
    name: str,
    shape: Sequence[int],
    dtypes: Sequence[DType],
    *,
    has_base: bool,
    out_dtype: DType | None = None,
    parameters: Mapping[str, Any] | None = None,
    preset: str | None = None,
    indices: Sequence[int] | None = None,
    seed: int = 0,
) -> Group:
    """One tensor's :class:`Group` from plain parameters.

    Args:
        method: the merge method.
        name: output tensor name.
        shape: common shape of the inputs.
        dtypes: input types, base first where there is one.
        has_base: whether the first input is the base.
        out_dtype: type of the result; None is the inputs' common type.
        parameters: see :func:`resolve`.
        preset: see :func:`resolve`.
        indices: positions of the models for the random numbers; None counts from 0.
        seed: of the random numbers.

    Raises:
        RecipeError: for bad parameters or the wrong number of inputs.
    """
    contract = method.contract
    with_base = has_base and contract.base != "ignored"
    models = len(dtypes) - with_base
    if contract.base == "required" and not has_base:
        raise RecipeError(f"{method.name} needs a base model; none was given")
    if models < contract.least or (contract.most is not None and models > contract.most):
        most = "or more" if contract.most is None else f".. {contract.most}"
        raise RecipeError(f"{method.name}: expected {contract.least} {most} models besides the base, got {models}")
    shared, each = resolve(method, parameters or {}, models, preset)
    out = out_dtype or dtypes[0]
    if out_dtype is None:
        for d in dtypes[1:]:
            out = promote(out, d)
    group = Group(
        name=name,
        shape=tuple(shape),
        dtypes=tuple(dtypes),
        out_dtype=out,
        params=shared,
        models=each,
        has_base=with_base,
        indices=tuple(indices) if indices is not None else tuple(range(models)),
        seed=checked_seed(seed),
    )
    if problems := method.check(group):
        raise RecipeError(problems)
    return group
