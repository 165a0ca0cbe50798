"""Recipes as YAML, lists of numbers on one line."""

from __future__ import annotations

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Block style, except lists of scalars; never aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


def _sequence(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.SequenceNode:
    flow = all(isinstance(item, bool | int | float | str) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    # Text of several lines stays on one line of YAML, so that none of it looks like anything else.
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\n" in data else None)


_Dumper.add_representer(list, _sequence)
_Dumper.add_representer(str, _text)


def dump(plain: dict[str, Any]) -> str:
    """YAML text of dictionaries, lists and scalars, keys in their order."""
    return str(yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000))
