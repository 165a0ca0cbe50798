"""Where two models differ: tensors, types, configuration, tokenizer, and with ``--weights`` every value."""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import Checkpoint
from fastmerge.checkpoint.header import listing
from fastmerge.planning import carry, compare, tokens
from fastmerge.planning.names import kind, shown
from fastmerge.sizes import show_bytes

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo
    from fastmerge.commands.pairs import Apart

MOST = 12
"""Rows of a table."""

_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\.")
_BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Difference:
    """What two models have in common, and what not.

    Attributes:
        a, b: as they were named.
        sizes: of each: tensors, elements, bytes, and bytes by type.
        only_a, only_b: tensors that the other one lacks.
        shapes: by tensor, where they differ.
        dtypes: by tensor, where they differ.
        common: how many tensors both have in one shape.
        config: (name, value of a, value of b) where the configurations mean different things.
        config_rest: other keys with different values.
        tokenizer: what their tokenizers give otherwise.
        files: further files of tokenizers that differ.
        values: by tensor, in the order of a's files; None where the weights were not read.
    """

    a: str
    b: str
    sizes: tuple[dict[str, Any], dict[str, Any]]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    common: int = 0
    config: list[tuple[str, Any, Any]] = field(default_factory=list)
    config_rest: list[str] = field(default_factory=list)
    tokenizer: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    values: dict[str, Apart] | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing was found that makes one model compute something else than the other."""
        found = (self.only_a, self.only_b, self.shapes, self.dtypes, self.config, self.tokenizer)
        return not any(found) and all(v.same for v in (self.values or {}).values())

    def facts(self) -> dict[str, Any]:
        """For ``--json``."""
        values = self.values
        return {
            "equal": self.equal,
            **self.__dict__,
            "values": None
            if values is None
            else {
                name: {
                    "equal": v.same, "differ": v.differ, "nonfinite": v.nonfinite, "max": v.most, "rms": v.rms,
                    "relative": v.relative if math.isfinite(v.relative) else None, "cosine": v.cosine,
                }
                for name, v in values.items()
            },
        }  # fmt: skip

    def __str__(self) -> str:
        return "\n".join([*_heads(self), *_headers(self), *_values(self), _summary(self)])


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str], *, weights: bool = False) -> Difference:
    """Compares two models, or two adapters.

    Args:
        a: a directory, file, index, hub id or adapter.
        b: the other one.
        weights: read the tensors; otherwise headers and small files alone.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    x, y = _open(a), _open(b)
    found = Difference(x.ref, y.ref, (_sizes(x), _sizes(y)))
    found.only_a = [n for n in x.tensors if n not in y.tensors]
    found.only_b = [n for n in y.tensors if n not in x.tensors]
    pairs: dict[str, tuple[TensorInfo, TensorInfo]] = {}
    for name, mine in x.tensors.items():
        other = y.tensors.get(name)
        if other is None:
            continue
        if mine.dtype is not other.dtype:
            found.dtypes[name] = mine.dtype.name, other.dtype.name
        if mine.shape != other.shape:
            found.shapes[name] = mine.shape, other.shape
        else:
            pairs[name] = mine, other
    found.common = len(pairs)
    found.config = list(compare.differences(x.config, y.config))
    found.config_rest = compare.others(x.config, y.config)
    found.tokenizer, found.files = _tokenizers(x, y)
    if weights:
        from fastmerge.commands.pairs import measure

        found.values = dict(zip(pairs, measure(x, y, list(pairs.values())), strict=True))
    return found


def _open(ref: str | os.PathLike[str]) -> Checkpoint:
    from fastmerge.checkpoint.adapter import CONFIG, Adapter

    path = Path(ref)
    if path.is_dir() and (path / CONFIG).exists() and not (path / "config.json").exists():
        return Adapter.open(os.fspath(ref)).checkpoint
    return Checkpoint.open(ref)


def _sizes(model: Checkpoint) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for info in model.tensors.values():
        dtypes[info.dtype.name] += info.nbytes
    return {
        "tensors": len(model.tensors),
        "elements": sum(math.prod(i.shape) for i in model.tensors.values()),
        "bytes": sum(dtypes.values()),
        "dtypes": dict(dtypes),
    }


def _tokenizers(x: Checkpoint, y: Checkpoint) -> tuple[list[str], list[str]]:
    """What two tokenizers say otherwise, and which of their files differ."""
    said: list[str] = []
    found = tokens.compare(x, y, {})
    if found is None:
        if tokens.has_vocabulary(x) != tokens.has_vocabulary(y):
            said.append(f"only {(x if tokens.has_vocabulary(x) else y).ref} has a vocabulary")
    elif found is tokens.UNKNOWN:
        said.append("the vocabularies differ, in a way that is not understood")
    elif found.other:
        said.append(f"vocabulary: {found}")
    templates = carry.template(x), carry.template(y)
    if templates[0] != templates[1]:
        said.append(
            "chat template: " + ("they differ" if all(templates) else f"only {(x if templates[0] else y).ref} has one")
        )
    directories = [model.path for model in (x, y) if model.path.is_dir()]
    names = dict.fromkeys(sorted(f.name for d in directories for f in d.iterdir() if carry.is_tokenizer(f.name)))
    files = [n for n in names if not tokens.same_bytes(x.path / n, y.path / n)]
    return said, files


def _heads(d: Difference) -> Iterable[str]:
    for letter, name, size in zip("AB", (d.a, d.b), d.sizes, strict=True):
        types = ", ".join(size["dtypes"])
        yield (
            f"{letter}          {name}: {size['tensors']:,} tensors, {size['elements']:,} elements, "
            f"{show_bytes(size['bytes'])} of {types or 'nothing'}"
        )


def _headers(d: Difference) -> Iterable[str]:
    yield f"tensors    {d.common:,} in both, of one shape"
    for what, names in (("only in A", d.only_a), ("only in B", d.only_b)):
        if names:
            yield f"           {what}: {shown(names)}"
    for what, table in (("shapes", d.shapes), ("types", d.dtypes)):
        kinds: dict[Any, list[str]] = defaultdict(list)
        for name, pair in table.items():
            kinds[pair].append(name)
        for i, (pair, names) in enumerate(list(kinds.items())[:MOST]):
            left, right = map(list, pair) if what == "shapes" else pair
            yield f"{'' if i else what:<10} {left} in A, {right} in B: {shown(names)}"
    for i, (name, left, right) in enumerate(d.config):
        yield f"{'' if i else 'config':<10} {name}: {_short(left)} in A, {_short(right)} in B"
    if d.config_rest:
        yield f"{'' if d.config else 'config':<10} other keys with different values: {listing(d.config_rest)}"
    if not d.config and not d.config_rest:
        yield "config     no difference"
    for i, text in enumerate(d.tokenizer or ["no difference in the vocabulary"]):
        yield f"{'' if i else 'tokenizer':<10} {text}"
    if d.files:
        yield f"           files that differ: {listing(d.files)}"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _values(d: Difference) -> Iterable[str]:
    if d.values is None:
        return
    changed = {n: v for n, v in d.values.items() if v.differ}
    same = sum(v.same for v in d.values.values())
    alike = len(d.values) - same - len(changed)
    odd = sum(v.nonfinite for v in d.values.values())
    yield f"values     {same:,} of {len(d.values):,} tensors equal, byte for byte"
    if alike:
        yield f"           {alike:,} equal in value, though not in type or in signs of zeros and NaNs"
    if odd:
        yield f"           {odd:,} pairs with NaN or Inf, which no figure below counts"
    if not changed:
        return
    kinds: dict[str, list[Apart]] = defaultdict(list)
    stacks: dict[str, dict[int, list[Apart]]] = defaultdict(lambda: defaultdict(list))
    for name, value in d.values.items():
        kinds[kind(name)].append(value)
        layer = _LAYER.match(name)
        if layer:
            stacks[layer["stack"]][int(layer["number"])].append(value)
    yield from _table("by kind", {k: v for k, v in kinds.items() if any(one.differ for one in v)}, counts=True)
    for stack, layers in stacks.items():
        yield from _layers(stack, {n: _sum(v).relative for n, v in sorted(layers.items())})
    if len(changed) > len(kinds):
        yield from _table("by tensor", {n: [v] for n, v in changed.items()})


def _sum(values: Sequence[Apart]) -> Apart:
    total = values[0]
    for value in values[1:]:
        total += value
    return total


def _table(title: str, rows: Mapping[str, Sequence[Apart]], *, counts: bool = False) -> Iterable[str]:
    """Rows by how much they changed, the most first."""
    totals = {name: _sum(values) for name, values in rows.items()}
    ranked = sorted(totals, key=lambda n: (-totals[n].relative, n))
    width = max(len(_cut(name)) for name in ranked[:MOST])
    head = "tensors equal" if counts else ""
    yield ""
    yield f"{title:<{width}}  {'relative':>9} {'rms':>9} {'max':>9} {'cosine':>9} {'differ':>8}  {head}".rstrip()
    for name in ranked[:MOST]:
        v = totals[name]
        share = v.differ / max(v.numel, 1)
        line = f"{_cut(name):<{width}}  {v.relative:9.2e} {v.rms:9.2e} {v.most:9.2e} {v.cosine:9.6f} {share:8.2%}"
        same = sum(not one.differ for one in rows[name])
        yield line + (f"  {same} of {len(rows[name])}" if counts else "")
    if len(ranked) > MOST:
        yield f"and {len(ranked) - MOST} more that changed less"


def _cut(name: str) -> str:
    return name if len(name) <= 60 else f"...{name[-57:]}"


def _layers(stack: str, relative: Mapping[int, float]) -> Iterable[str]:
    """A bar for each layer."""
    finite = [r for r in relative.values() if math.isfinite(r)]
    most = max(finite, default=0.0)
    if not most:
        return
    bars = "".join("·" if not r else _BARS[min(7, int(8 * min(r, most) / most))] for r in relative.values())
    numbers = list(relative)
    yield ""
    yield f"{stack} {numbers[0]} to {numbers[-1]}: {bars}  relative change {min(finite):.2e} to {most:.2e}"


def _summary(d: Difference) -> str:
    if d.equal:
        return "\nequal" + (
            "" if d.values is not None else " as far as headers, config and tokenizer say: --weights reads the tensors"
        )
    parts = [
        f"{len(names):,} tensors {what}"
        for what, names in (
            ("only in A", d.only_a), ("only in B", d.only_b), ("of other shape", d.shapes), ("of other type", d.dtypes),
        )
        if names
    ]  # fmt: skip
    parts += [f"{len(d.config)} settings"] if d.config else []
    parts += ["tokenizer"] if d.tokenizer else []
    changed = [v for v in (d.values or {}).values() if v.differ]
    if changed:
        total = _sum(list((d.values or {}).values()))
        parts.append(
            f"{len(changed):,} of {d.common:,} tensors changed, by {total.relative:.2e} of their norm together"
        )
    return "\ndifferent: " + ", ".join(parts)
