"""Names of one model's tensors as another model writes them: prefixes, wrappers of trainers, old spellings.

Programs save one architecture under several names: with or without ``model.``, ``bert.`` or ``transformer.``, inside
``module.`` or ``_orig_mod.``, a language model before or after ``model.``. Nothing here is a table of
architectures: a prefix is found by the names that are equal behind it, and taken where it explains whole modules.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo

WHOLE = 0.9
"""Share of a module's tensors, in one of both models, that a prefix must explain."""

MANY = 8
"""An ending that more kinds of tensors share than this tells nothing about a prefix."""

_Pair = tuple[str, str]

_INDEX = re.compile(r"\.\d+(?=\.)")
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_HEAD = r"(lm_head|embed_out)\.weight"
"""The head of a language model, which transformers 5 calls ``lm_head`` everywhere."""

_MODULE = re.compile(r"^(?:module\.)+")
_OLD = (
    ("gamma", "weight"),
    ("beta", "bias"),
    ("weight_g", "parametrizations.weight.original0"),
    ("weight_v", "parametrizations.weight.original1"),
)


def kind(name: str) -> str:
    """The name with ``*`` for every number: equal for siblings in other layers, and for other experts."""
    return _INDEX.sub(".*", name)


def shown(names: Sequence[str], most: int = 3) -> str:
    """Names for a message: siblings as one pattern, and how many there are."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind(name), []).append(name)
    parts = [found[0] if len(found) == 1 else pattern for pattern, found in kinds.items()]
    more = ", ..." if len(parts) > most else ""
    count = f" ({len(names)} tensors)" if len(names) > 1 else ""
    return f"{', '.join(parts[:most])}{more}{count}"


def unwrapped(names: Iterable[str]) -> dict[str, str] | None:
    """New name by old one where training wrappers (DDP, FSDP, ``torch.compile``) left theirs; None where none did."""
    names = list(names)
    text = "\n" + "\n".join(names)
    if not any(left in text for left in ("\nmodule.", "_orig_mod.", "_wrapped_module.")):
        return None  # searched at once, as there may be tens of thousands
    out = {n: _MODULE.sub("", _WRAPPER.sub("", n)) for n in names}
    changed = any(new != old for old, new in out.items())
    return out if changed and len(set(out.values())) == len(names) else None


class Alignment(NamedTuple):
    """How a model's names become those of the reference.

    Attributes:
        names: for each tensor of the model, in its order, the name that the reference uses.
        rules: what was done, for people; empty where nothing had to be.
    """

    names: Mapping[str, str]
    rules: tuple[str, ...] = ()


def align(reference: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo]) -> Alignment:
    """Matches the names of a model to those of a reference.

    A prefix is replaced by another one for a whole module at a time, where that gives names of the reference that
    the model lacks, for at least :data:`WHOLE` of the module's tensors in one of both models. Of several such
    prefixes the one counts that fits shapes and most tensors; between equals none is taken.

    Args:
        reference: tensors of the model whose names are kept.
        other: tensors of the model to be matched.

    Returns:
        The names; those that match nothing stay as they are.
    """
    names = {n: n for n in other}
    rules: list[str] = []
    for old, new in _OLD:
        here, there = (any(n.endswith(f".{old}") for n in tensors) for tensors in (other, reference))
        if here == there:
            continue
        was, now = (old, new) if here else (new, old)
        leaves = {_leaf(n) for n in reference if n.endswith(f".{now}")}
        ends = [n for n, to in names.items() if to.endswith(f".{was}") and to not in reference]
        moved = {n: names[n].removesuffix(was) + now for n in ends}
        moved = {n: to for n, to in moved.items() if _leaf(to) in leaves and to not in other}
        if moved:
            names |= moved
            rules.append(f"{was!r} as {now!r} ({len(moved)} tensors)")
    mine, theirs = (
        [n for n in tensors if re.fullmatch(_HEAD, n) and n not in others]
        for tensors, others in ((other, reference), (reference, other))
    )
    if len(mine) == len(theirs) == 1 and other[mine[0]].shape == reference[theirs[0]].shape:
        names[mine[0]] = theirs[0]
        rules.append(f"{mine[0]!r} as {theirs[0]!r} (1 tensor)")
    prefixes = _prefixes(reference, {names[n]: info for n, info in other.items()})
    for (p, q), renamed in prefixes.items():
        found = {n: renamed[to] for n, to in names.items() if to in renamed}
        names |= found
        what = f"{p}.' as '{q}.'" if p and q else f"{p}.' left out" if p else f"{q}.' put before"
        rules.append(f"'{what} ({len(found)} tensor{'s' * (len(found) != 1)})")
    return Alignment(names, tuple(rules))


def _leaf(name: str) -> str:
    """The module that a tensor belongs to, and the tensor: its last two components."""
    return ".".join(name.rsplit(".", 2)[-2:])


def _prefixes(reference: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo]) -> dict[_Pair, dict[str, str]]:
    """For each pair of prefixes (of the model, of the reference) the names that it changes."""
    here = [n for n in other if n not in reference]
    free = {n for n in reference if n not in other}
    if not here or not free:
        return {}
    base: Counter[_Pair] = Counter()
    modules: dict[str, dict[str, _Pair]] = defaultdict(dict)
    for pair, (module, target) in _candidates({kind(n) for n in here}, {kind(n) for n in free}):
        base[pair] += 1
        modules[module][target] = pair
    count = _Count(reference), _Count(other)
    scored = []
    for module, targets in modules.items():
        inside = [n for n in here if _under(n, module)]
        found = [s for target in targets if (s := _score(module, target, inside, reference, other, free, count))]
        ranked = sorted(((*s[:2], base[targets[s[2]]], s[2]) for s in found), reverse=True)
        if ranked and (len(ranked) == 1 or ranked[0][:3] != ranked[1][:3]):
            scored.append((ranked[0][1], module, ranked[0][3]))
    out: dict[_Pair, dict[str, str]] = {}
    taken: set[str] = set()
    done: set[str] = set()
    for _, module, target in sorted(scored, key=lambda s: -s[0]):
        for n in here:
            if n in done or not _under(n, module):
                continue
            to = target + n[len(module) :]
            if to not in other and to not in taken:
                out.setdefault(modules[module][target], {})[n] = to
                taken.add(to)
                done.add(n)
    return out


def _candidates(ours: Iterable[str], theirs: Iterable[str]) -> Iterator[tuple[_Pair, _Pair]]:
    """Prefixes before the longest common endings, and the modules that follow them in both models."""
    endings: dict[str, list[list[str]]] = defaultdict(list)
    for pattern in theirs:
        parts = pattern.split(".")
        for i in range(len(parts)):
            endings[".".join(parts[i:])].append(parts)
    for pattern in sorted(ours):
        parts = pattern.split(".")
        i = next((i for i in range(len(parts)) if ".".join(parts[i:]) in endings), len(parts))
        tail = parts[i:]
        found = endings.get(".".join(tail), ())
        for there in found if len(found) <= MANY else ():
            p, q = parts[:i], there[: len(there) - len(tail)]
            if (len(tail) < 2 and p and q) or "*" in p or "*" in q:
                continue
            more = tail[:1] if tail[0] != "*" else []
            yield (".".join(p), ".".join(q)), (".".join(p + more), ".".join(q + more))


class _Count:
    """How many of a model's tensors lie in a module."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(names)

    def __call__(self, module: str) -> int:
        found = bisect_left(self.names, module + "/") - bisect_left(self.names, module + ".")
        at = bisect_left(self.names, module)
        return found + (at < len(self.names) and self.names[at] == module)


def _score(
    module: str,
    target: str,
    inside: Sequence[str],
    reference: Mapping[str, TensorInfo],
    other: Mapping[str, TensorInfo],
    free: set[str],
    count: tuple[_Count, _Count],
) -> tuple[int, int, str] | None:
    """How many tensors of a module find a free name, with the same shape and at all; None where too few do."""
    hits = {n: to for n in inside if (to := target + n[len(module) :]) in free}
    if not hits or max(len(hits) / count[0](target), len(hits) / count[1](module)) < WHOLE:
        return None
    same = sum(other[n].shape == reference[to].shape for n, to in hits.items())
    return same, len(hits), target


def _under(name: str, module: str) -> bool:
    return name.startswith(module) and (len(name) == len(module) or name[len(module)] == ".")
