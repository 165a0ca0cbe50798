"""What is said of tensors whose shapes differ: a line for each kind of difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastmerge.planning.names import shown
from fastmerge.planning.tied import candidates

GATHER = (
    "as DeepSpeed's ZeRO-3 saves them without gathering: save the model again with "
    "stage3_gather_16bit_weights_on_model_save, or make it with zero_to_fp32.py"
)
"""Where empty tensors come from, and what to do."""

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class Shapes:
    """Tensors whose shapes differ, by the shapes that each model has."""

    found: dict[_Shapes, list[str]] = field(default_factory=dict)

    def add(self, name: str, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Notes a tensor, with (model, shape) of every input."""
        self.found.setdefault(tuple(shapes), []).append(name)

    def lines(self) -> list[str]:
        """What is wrong, and what to do where that is known."""
        empty: dict[str, list[str]] = {}
        out: list[str] = []
        for shapes, names in self.found.items():
            holes = [ref for ref, shape in shapes if 0 in shape]
            for ref in holes:
                empty.setdefault(ref, []).extend(names)
            if not holes:
                listed = ", ".join(f"{ref!r} {list(shape)}" for ref, shape in shapes)
                out.append(f"{shown(names)}: shapes differ: {listed}{_hint(names, [s for _, s in shapes])}")
        return [f"{ref!r}: {shown(names)}: empty tensors, {GATHER}" for ref, names in empty.items()] + out


def _hint(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> str:
    """What to do about vocabularies of different size."""
    rows = all(shapes) and len({s[1:] for s in shapes}) == 1
    if not rows or not all(candidates([n]) or "embed" in n for n in names):
        return ""
    return (
        "; vocabularies of different size: 'tokenizer_source: union' (or base, or a model) merges rows by their tokens"
    )
