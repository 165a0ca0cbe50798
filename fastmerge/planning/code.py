"""Code of a model's own (``auto_map``): copied as data or referred to, and never run here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.discover import contained

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint

MOST = 4 << 20
"""Bytes of one file of code."""

FILES = 200
"""Files of code of one model."""

_REFERENCE = r"(?P<module>[A-Za-z_]\w{0,199})\.(?P<name>[A-Za-z_]\w{0,199})"
_IMPORTS = r"(?m)^\s*(?:from\s+\.([A-Za-z_]\w*)[\w.]*\s+import\b|import\s+\.([A-Za-z_]\w*))"
_FROM_HERE = r"(?m)^\s*from\s+\.\s+import\s+\(?([\w\s,]+)"
_CACHED = r"models--([\w.-]+?)--([\w.-]+)/snapshots/"


def hub_id(path: Path) -> str | None:
    """The ``org/name`` of a model in the Hugging Face cache, by its path there; None for other directories."""
    found = re.search(_CACHED, f"{path}/")
    return f"{found[1]}/{found[2]}" if found else None


class Code:
    """The code that the configurations of an output name.

    Args:
        warnings: where is said what somebody who loads the output should know.

    Attributes:
        files: what is copied: names and files.
    """

    def __init__(self, warnings: list[str]) -> None:
        self.files: dict[str, Path | bytes] = {}
        self.warnings = warnings

    def take(self, model: Checkpoint, auto_map: Any, place: str) -> Any:
        """What an ``auto_map`` of a model says in the output.

        Args:
            model: whose configuration it is.
            auto_map: as the configuration has it.
            place: the name of that file.

        Returns:
            The same, with ``org/name--`` before the code of a model of the hub.
        """
        repository = hub_id(model.path)
        if repository is not None:
            mapped = _each(auto_map, lambda text: f"{repository}--{text}" if re.fullmatch(_REFERENCE, text) else text)
            if mapped != auto_map:
                self._say(
                    f"{place} refers to custom code (auto_map), which stays at {repository} on the hub; "
                    "programs that load the output ask for trust_remote_code"
                )
            return mapped
        texts: list[str] = []
        _each(auto_map, texts.append)
        wanted = [found["module"] for found in [re.fullmatch(_REFERENCE, t) for t in texts] if found]
        taken, missing = self._closure(model, wanted)
        if taken:
            self._say(
                f"{place} refers to custom code (auto_map): copied, never run: {', '.join(taken)}; "
                "programs that load the output ask for trust_remote_code"
            )
        if missing:
            self._say(
                f"{place} refers to custom code (auto_map) that is not beside it; without it the output loads nowhere: "
                f"{', '.join(missing)}"
            )
        return auto_map

    def _closure(self, model: Checkpoint, modules: list[str]) -> tuple[list[str], list[str]]:
        """Copies modules and what they import from their own directory; names of the copied and of the missing."""
        todo, taken, missing = list(dict.fromkeys(modules)), [], []
        for module in todo:  # which grows
            name = f"{module}.py"
            path = model.path / name
            if not (path.is_file() and contained(path, model.path) and path.stat().st_size <= MOST):
                missing.append(name)
                continue
            taken.append(name)
            other = self.files.setdefault(name, path)
            if other != path and isinstance(other, Path) and other.read_bytes() != path.read_bytes():
                self._say(f"{name}: {path} differs from {other}, which is copied")
            text = path.read_text("utf-8", errors="replace")
            imports = [a or b for a, b in re.findall(_IMPORTS, text)]
            imports += [w.split()[0] for group in re.findall(_FROM_HERE, text) for w in group.split(",") if w.strip()]
            todo += [m for m in dict.fromkeys(imports) if m not in todo][: FILES - len(todo)]
        return taken, missing

    def _say(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def _each(value: Any, change: Callable[[str], Any]) -> Any:
    """A configuration's value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_each(v, change) for v in value]
    if isinstance(value, dict):
        return {k: _each(v, change) for k, v in value.items()}
    return value
