"""Options of a command from the fields of a configuration class: one definition of names, types and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from typing import Any

import click

from fastmerge.errors import printable

if typing.TYPE_CHECKING:
    _Type = click.ParamType[Any]
else:
    _Type = click.ParamType  # older ones take no type


class _Numbers(_Type):
    """Whole numbers with commas between them; ``4-9`` is a range with both ends."""

    name = "N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)
        found: list[int] = []
        for part in value.replace(" ", "").split(","):
            ends = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
            if ends is None or (ends[2] and int(ends[2]) - int(ends[1]) > 1_000_000):
                self.fail(f"expected whole numbers such as 0,4-9, got {printable(part)!r}", param, ctx)
            found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
        return tuple(found)


NUMBERS = _Numbers()


def fields(kind: type, *, leave: Collection[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds an option for each field of a configuration class.

    Args:
        kind: a dataclass whose docstring has a line for each field under ``Attributes:``.
        leave: fields that no option sets.
    """
    hints = typing.get_type_hints(kind)
    texts = attributes(kind)

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(dataclasses.fields(kind)):
            if field.name in leave:
                continue
            default = field.default
            flag, choices, parser = _type(hints[field.name])
            text = texts.get(field.name, "")
            shown = default if not isinstance(default, Enum) else default.value
            if not flag and shown not in (dataclasses.MISSING, None, (), ""):
                text = f"{text}  [default: {shown}]"
            dashed = "--" + field.name.replace("_", "-")
            if flag:
                text = f"{text}  [default: {'on' if default else 'off'}]"
                option = click.option(f"{dashed}/--no-{dashed[2:]}", field.name, default=None, help=text)
            else:
                option = click.option(dashed, field.name, type=choices or parser, default=None, help=text)
            command = option(command)
        return command

    return add


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that somebody set; the class has the defaults of the others."""
    return {name: value for name, value in values.items() if value is not None}


def attributes(kind: type) -> dict[str, str]:
    """What the docstring of a class says of each of its attributes, on one line, without markup."""
    doc = inspect.getdoc(kind) or ""
    _, _, section = doc.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        begins = re.match(r"    (\w+): (.*)", line)
        if begins:
            name = begins[1]
            found[name] = begins[2]
        elif line.startswith("        ") and name:
            found[name] += " " + line.strip()
        elif line.strip():
            break
    for name, text in found.items():
        plain = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text).replace("``", "")
        plain = re.sub(r",? ?\b[aA]n? [\w ()]+,? or its value[;,]? ?", " ", plain).strip(" .") + "."
        found[name] = (plain[:1].upper() + plain[1:]) if len(plain) > 1 else ""
    return found


def _type(hint: Any) -> tuple[bool, click.Choice[str] | None, Any]:
    """Whether it is a flag, its choices, and else what reads it."""
    parts = [p for p in (typing.get_args(hint) if _is_union(hint) else (hint,)) if p is not type(None)]
    for part in parts:
        if isinstance(part, type) and issubclass(part, Enum):
            return False, click.Choice([str(m.value) for m in part]), None
        if typing.get_origin(part) is typing.Literal:
            return False, click.Choice([str(v) for v in typing.get_args(part)]), None
    if bool in parts:
        return True, None, None
    if any(typing.get_origin(p) in (Sequence, list, tuple) for p in parts):
        words = str in parts
        return False, None, _Words() if words else NUMBERS
    if float in parts:
        return False, None, float
    if int in parts:
        return False, None, int if str not in parts else _Words()
    return False, None, str


class _Words(_Type):
    """Whole numbers as :class:`_Numbers` reads them, one number, or a word."""

    name = "WORD|N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(r"[\d, -]+", value):
            return value
        return int(value) if value.isdecimal() else NUMBERS.convert(value, param, ctx)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
