"""Parameters of one part of a recipe, resolved per tensor and layer.

A tensor's name matters only through the filters that it matches, so results are cached by that outcome:
a model of 18,000 tensors has a few dozen distinct ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.methods.base import REQUIRED, Method, Param
from fastmerge.recipe.checks import Part
from fastmerge.recipe.problems import dotted
from fastmerge.recipe.settings import Parameters, Setting, interpolate


class Resolver:
    """Resolved parameters of a method for one part.

    Precedence, highest first: the source's level (for parameters per model only), the slice's, the
    recipe's, the default (under the preset). Filters of parameters per model match the name of the
    input tensor, filters of shared ones that of the output tensor.

    Args:
        method: whose parameters.
        part: the inputs and their levels.
        top: the recipe's own level.
        defaults: of every parameter, under the preset in use.
    """

    def __init__(self, method: type[Method], part: Part, top: Parameters, defaults: Mapping[str, Any]) -> None:
        self.method = method
        self.part = part
        self._defaults = defaults
        self._common = (part.parameters, top)
        declared = {p.name for p in method.params}
        levels = [*(s.parameters for s in part.sources), *self._common]
        used = [setting for level in levels for name, setting in level.items() if name in declared]
        self.filters = tuple(dict.fromkeys(r.filter for s in used for r in s.rules if r.filter is not None))
        self.gradient = any(s.gradient for s in used)
        self._bit = {f: 1 << i for i, f in enumerate(self.filters)}
        self._cache: dict[tuple[int, int, float], dict[str, Any]] = {}
        self.matched = 0
        self._shared = [p for p in method.params if p.scope == "shared"]
        self._own = [p for p in method.params if p.scope != "shared"]

    def mask(self, name: str) -> int:
        """Which of :attr:`filters` are part of a tensor's name, as bits."""
        out = 0
        for pattern, bit in self._bit.items():
            if pattern in name:
                out |= bit
        self.matched |= out
        return out

    def unmatched(self) -> list[str]:
        """Filters that no name given to :meth:`mask` contained."""
        return [f for f, bit in self._bit.items() if not self.matched & bit]

    def shared(self, mask: int, t: float = 0.0) -> dict[str, Any]:
        """Shared parameters of one output tensor; the same dictionary for the same outcome.

        Args:
            mask: of the output tensor's name.
            t: place of the layer in its slice, 0 .. 1; 0 for tensors outside the layers.

        Raises:
            RecipeError: where a required parameter has no value, or a gradient makes none.
        """
        return self._resolve(-1, self._shared, self._common, mask, t)

    def own(self, source: int, mask: int, t: float = 0.0) -> dict[str, Any]:
        """Parameters of one input of one output tensor; ``mask`` is of the input tensor's name."""
        level = self.part.sources[source].parameters
        return self._resolve(source, self._own, (level, *self._common), mask, t)

    def _resolve(
        self, source: int, params: Sequence[Param], levels: Sequence[Parameters], mask: int, t: float
    ) -> dict[str, Any]:
        key = (source, mask, t if self.gradient else 0.0)
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = {p.name: self._value(source, p, levels, mask, t) for p in params}
        return found

    def _value(self, source: int, param: Param, levels: Sequence[Parameters], mask: int, t: float) -> Any:
        for level in levels:
            setting = level.get(param.name)
            if setting is None:
                continue
            try:
                value = self._evaluate(setting, param, mask, t)
            except ValueError as e:
                raise RecipeError(f"{dotted(self.part.loc)}: {param.name}: {e}") from None
            if value is not None:
                return value
        default = self._defaults[param.name]
        if default is REQUIRED:
            who = "" if source < 0 else f" of {str(self.part.sources[source].model)!r}"
            raise RecipeError(
                f"{dotted(self.part.loc)}: no filter gives the required parameter {param.name!r}{who} a value"
            )
        return default

    def _evaluate(self, setting: Setting, param: Param, mask: int, t: float) -> Any:
        for rule in setting.rules:
            if rule.filter is None or mask & self._bit[rule.filter]:
                if not isinstance(rule.value, tuple):
                    return rule.value
                return interpolate(rule.value, t, param) if rule.value else None
        return None
