"""How the weights of models are quantised, by meaning: weights that were rounded otherwise are merged all the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.formats import settings
from fastmerge.checkpoint.header import LISTED
from fastmerge.checkpoint.quantised import blocks, groups

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint

_METHOD = "quantisation"
_IGNORED = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
"""What programs call the list of modules that they did not quantise."""


def meaning(model: Checkpoint) -> dict[str, tuple[str, ...]]:
    """How the weights of a model are quantised, by aspect; empty where none is, whatever its configuration says.

    Args:
        model: opened with its codes read as weights.
    """
    if not model.quantised:
        return {}
    said = settings(model.config)
    weights = model.quantised.values()
    method = str(said.get("quant_method") or " and ".join(sorted({w.layout for w in weights})))
    sizes = [f"{rows} x {columns}" for rows, columns in blocks(said)] + [f"1 x {size}" for size in groups(said)]
    return {
        _METHOD: (method.lower().replace("_", "-"),),
        "codes of quantised weights": tuple(sorted({w.code for w in weights})),
        "blocks of quantised weights": tuple(dict.fromkeys(sizes)),
        "modules that are not quantised": _ignored(said),
    }


def _ignored(said: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that a section leaves out, without regard to their order."""
    found: Any = next((said[key] for key in _IGNORED if said.get(key)), [])
    return tuple(sorted({str(name) for name in (found if isinstance(found, list) else [found])}))


def disagreements(donor: str, model: Checkpoint, others: Iterable[tuple[str, Checkpoint]]) -> list[str]:
    """One line for each way in which the weights of other models are quantised otherwise.

    Args:
        donor: the model whose configuration the output takes.
        model: that model.
        others: names and models of the rest.
    """
    mine = meaning(model)
    found: dict[str, list[str]] = {}
    for name, other in others:
        theirs = meaning(other)
        aspects = theirs if mine.get(_METHOD) == theirs.get(_METHOD) else (_METHOD,)  # all else differs then
        for what in aspects:
            if mine.get(what) != theirs.get(what):
                found.setdefault(what, []).append(f"{_show(theirs.get(what, ()))} in {name!r}")
    return [
        f"{what}: {_show(mine.get(what, ()))} in {donor!r}; {', '.join(there)}: weights that were rounded in "
        f"different ways are merged"
        for what, there in found.items()
    ]


def _show(values: tuple[str, ...]) -> str:
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return (", ".join(values[:LISTED]) or "none") + more
