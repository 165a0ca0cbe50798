"""Merge methods: one file each. Every class in this folder that names itself is a method; nothing lists them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from fastmerge.errors import RecipeError, hint
from fastmerge.methods.base import Method


def _found() -> Iterator[type[Method]]:
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__dict__.get("name"):
                yield value


METHODS: Mapping[str, type[Method]] = MappingProxyType({m.name: m for m in sorted(_found(), key=lambda m: m.name)})
"""Every method by the name that recipes use."""

__all__ = ["METHODS", "Method", "get"]


def get(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        RecipeError: for an unknown name, with the closest known one.
    """
    found = METHODS.get(name)
    if found is None:
        raise RecipeError(f"unknown merge method {name!r}{hint(str(name), METHODS)}; known: {', '.join(METHODS)}")
    return found
