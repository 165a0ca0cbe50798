"""Merge methods: one file each. Every class in this folder that names itself is a method; nothing lists them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping

from fastmerge.errors import RecipeError, hint
from fastmerge.methods.base import Method


class _Methods(Mapping[str, type[Method]]):
    """Methods by the name that recipes use; a file is imported when a method of its name is asked for."""

    def __init__(self) -> None:
        self._files = [info.name for info in pkgutil.iter_modules(__path__)]
        self._found: dict[str, type[Method]] = {}

    def _read(self, files: Iterable[str]) -> None:
        for file in files:
            for value in vars(importlib.import_module(f"{__name__}.{file}")).values():
                if isinstance(value, type) and issubclass(value, Method) and value.__dict__.get("name"):
                    self._found[value.name] = value

    def __getitem__(self, name: str) -> type[Method]:
        if name not in self._found:
            self._read([name] if name in self._files else ())
        if name not in self._found:
            self._read(self._files)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        self._read(self._files)
        return iter(sorted(self._found))

    def __len__(self) -> int:
        return sum(1 for _ in self)


METHODS: Mapping[str, type[Method]] = _Methods()
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
