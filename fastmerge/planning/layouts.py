"""Experts of several models in one layout: that of the reference, or the one that a recipe's ``layout`` names.

A tensor of the wanted layout is made from those that the model has, run by run, while it is merged: nothing is
written in between, and no value changes. All else that a module of experts holds (the router, corrections of its
scores) is only renamed, where programs call it otherwise in the other layout.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastmerge.checkpoint import TensorInfo
from fastmerge.dtypes import BF16, DType, promote
from fastmerge.ops.gathered import Part
from fastmerge.ops.joined import Joined, Transposed
from fastmerge.ops.picked import Picked
from fastmerge.planning.experts import DOWN, GATE, UP, Experts, Spelling, find, model_types, other
from fastmerge.planning.names import shown
from fastmerge.planning.sources import FLOAT8, MADE

if TYPE_CHECKING:
    from fastmerge.ops.spec import Source
    from fastmerge.planning.rows import Models
    from fastmerge.recipe import ModelRef
    from fastmerge.recipe.schema import Layout

Take = Callable[[str], "Source"]
"""The source of a tensor of the model, by its name."""


class Relaid(NamedTuple):
    """Tensors of a model in another layout.

    Attributes:
        tensors: all of the model, by their new names.
        made: how those are made that no file holds: the tensors that go in, and what makes the source of these.
        what: what was done, for people.
    """

    tensors: dict[str, TensorInfo]
    made: dict[str, tuple[dict[str, TensorInfo], Callable[[Take], Source]]]
    what: str


def relay(models: Models, refs: Sequence[ModelRef], wanted: Layout) -> list[str]:
    """Brings the experts of all models to one layout, where they are not in it.

    Args:
        models: whose tensors are replaced.
        refs: those that are merged, the reference first.
        wanted: the layout of the output.

    Returns:
        A line for each model of which experts were laid out anew.
    """
    first = refs[0]
    experts = {r: find(models.tensors(r), models.config(r)) if _any(models.tensors(r)) else [] for r in refs}
    frame = list(dict.fromkeys(e.spelling for e in experts[first]))
    others = [s for ref in refs for s in dict.fromkeys(e.spelling for e in experts[ref])]
    if wanted != "base":
        fused, types = wanted == "fused", model_types(models.config(first))
        frame = list(dict.fromkeys(_chosen(s, others, types, fused=fused) for s in frame))
    out = []
    if wanted != "base" and not frame:
        out.append(f"layout: {wanted}: {str(first)!r} has no experts that a layout could be chosen for")
    if wanted == "per-expert" and any(s.turned or s.stacks[:1] == ("input_linear.weight",) for s in others):
        out.append("layout: per-expert: transformers reads the experts of this model type from stacks alone")
    beside: dict[str, tuple[int, ...]] | None = None
    for ref in refs:
        if ref != first and beside is None:
            beside = _beside(models.tensors(first), experts[first])
        done = _relaid(models.tensors(ref), experts[ref], frame, beside or {})
        if done is not None:
            models.relay(ref, done)
            if ref == first:
                experts[first] = find(done.tensors, models.config(first))
            whose = f"as {str(first)!r} has them" if wanted == "base" else wanted
            out.append(f"{str(ref)!r}: experts are laid out {whose}: {done.what}")
    return out


def _any(tensors: Mapping[str, TensorInfo]) -> bool:
    return any("experts" in name or name.endswith("put_linear.weight") for name in tensors)


def _chosen(own: Spelling, known: Sequence[Spelling], types: Sequence[str], *, fused: bool) -> Spelling:
    """The spelling of a layout: the reference's own, that of a model which has it, or what its type calls it."""
    if bool(own.stacks) == fused:
        return own
    fitting = [s for s in known if bool(s.stacks) == fused and s.gated == own.gated]
    near = [s for s in fitting if s.path == own.path] or [s for s in fitting if s.parent == own.parent] or fitting
    return near[0] if len(set(near)) == 1 else other(own, types, fused=fused)


def _goal(own: Spelling, frame: Sequence[Spelling]) -> Spelling | None:
    """The spelling of the reference that is meant by one of a model."""
    fitting = [s for s in frame if s.gated == own.gated]
    for alike in (lambda s: s.path == own.path, lambda s: s.parent == own.parent, lambda _: True):
        near = [s for s in fitting if alike(s)]
        if len(near) == 1:
            return near[0]
    return None


def _relaid(
    tensors: Mapping[str, TensorInfo],
    experts: Sequence[Experts],
    frame: Sequence[Spelling],
    beside: Mapping[str, tuple[int, ...]],
) -> Relaid | None:
    """A model's tensors with its experts spelled as the reference does; None where they are."""
    made: dict[str, tuple[dict[str, TensorInfo], Callable[[Take], Source]]] = {}
    groups: dict[str, dict[str, TensorInfo]] = {}  # new tensors, by the first one that goes in
    known: dict[tuple[str, ...], tuple[dict[str, TensorInfo], DType]] = {}
    gone: set[str] = set()
    moved: list[tuple[str, Spelling, Spelling]] = []
    said: Counter[str] = Counter()
    for own in experts:
        goal = _goal(own.spelling, frame)
        types = {_computed(tensors[n].dtype) for n in own.names}
        if goal is None or goal == own.spelling or (len(types) > 1 and not all(d.mergeable for d in types)):
            continue
        new = own._replace(spelling=goal)
        said[f"{goal.shown()} from {own.spelling.shown()}"] += 1
        moved.append((own.layer, own.spelling, goal))
        gone.update(own.names)
        for name, build in _formulas(own, new):
            if isinstance(build, str):
                info = tensors[build]
                groups.setdefault(build, {})[name] = info
                continue
            if build.names not in known:  # thousands of tensors may be made of one
                inputs = {n: tensors[n] for n in build.names}
                known[build.names] = inputs, functools.reduce(promote, {_computed(i.dtype) for i in inputs.values()})
            inputs, dtype = known[build.names]
            info = TensorInfo(name, dtype, build.shape, MADE, 0, dtype.nbytes(math.prod(build.shape)))
            groups.setdefault(build.names[0], {})[name] = info
            made[name] = inputs, build.source
    if not groups:
        return None
    names = _siblings([n for n in tensors if n not in gone], moved, tensors, beside)
    out: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        out |= groups.get(name, {})
        if name not in gone:
            out[names.get(name, name)] = info
    listed = [f"{what} ({n} layer{'s' * (n != 1)})" for what, n in said.items()]
    if names:
        listed.append(f"{shown(list(names))} as {shown(list(names.values()))}")
    return Relaid(out, made, "; ".join(listed))


def _computed(dtype: DType) -> DType:
    return BF16 if dtype.name in FLOAT8 else dtype


# Tensors of one layout from those of another one.


class _Formula(NamedTuple):
    """A tensor to be made: from which tensors, of what shape, and how."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    source: Callable[[Take], Source]


def _formulas(own: Experts, new: Experts) -> list[tuple[str, _Formula | str]]:
    """The tensors of the new layout with what makes them; a name stands for a tensor that stays as it is."""
    out: list[tuple[str, _Formula | str]] = []
    kinds = (False, True) if own.biased else (False,)
    same = own.spelling.like == new.spelling.like
    if same:
        return list(zip(new.names, own.names, strict=True))
    if not new.spelling.stacks:
        made = [_single(own, role, e, bias=b) for e in range(own.number) for role in new.roles for b in kinds]
        return list(zip(new.names, made, strict=True))
    for role in (UP, DOWN):
        for bias in kinds:
            straight = role == DOWN or own.spelling.woven == new.spelling.woven
            if own.spelling.stacks and straight and (bias or own.spelling.turned == new.spelling.turned):
                out.append((new.stack(role, bias=bias), own.stack(role, bias=bias)))
            else:
                out.append((new.stack(role, bias=bias), _stack(own, new, role, bias=bias)))
    return out


def _single(own: Experts, role: str, e: int, *, bias: bool) -> _Formula | str:
    """The tensor of one expert."""
    if not own.spelling.stacks:
        return own.of(role, e, bias=bias)
    rows, columns = (own.inner, own.hidden) if role != DOWN else (own.hidden, own.inner)
    shape = (rows,) if bias else (rows, columns)

    def source(take: Take) -> Source:
        return _matrix(own, role, e, take, bias=bias)

    return _Formula((own.stack(role, bias=bias),), shape, source)


def _stack(own: Experts, new: Experts, role: str, *, bias: bool) -> _Formula:
    """A stack of all experts."""
    rows, columns = own.hidden, own.inner
    if role != DOWN:
        rows, columns = own.inner * (2 if own.spelling.gated else 1), own.hidden
    one = (rows,) if bias else (columns, rows) if new.spelling.turned else (rows, columns)
    names = [own.stack(role, bias=bias)] if own.spelling.stacks else own.names
    if not own.spelling.stacks:
        wanted = (DOWN,) if role == DOWN else own.roles[:-1]
        names = [own.of(r, e, bias=bias) for e in range(own.number) for r in wanted]

    def source(take: Take) -> Source:
        parts = [_block(own, new, role, e, take, bias=bias) for e in range(own.number)]
        return Joined(tuple(parts), (own.number, *one))

    return _Formula(tuple(names), (own.number, *one), source)


def _block(own: Experts, new: Experts, role: str, e: int, take: Take, *, bias: bool) -> Source:
    """What one expert gives to a stack."""
    gated = role != DOWN and own.spelling.gated
    if not gated:
        block = _matrix(own, role, e, take, bias=bias)
    elif own.spelling.stacks and own.spelling.woven == new.spelling.woven:
        block = _straight(own, role, e, take, bias=bias)
    else:
        both = tuple([_matrix(own, r, e, take, bias=bias) for r in (GATE, UP)])
        rows = 2 * own.inner
        block = Joined(both, (rows,) if bias else (rows, own.hidden))
        if new.spelling.woven:
            block = _rows(block, np.arange(rows).reshape(2, -1).T.reshape(-1))
    return Transposed(block) if new.spelling.turned and not bias else block


def _matrix(own: Experts, role: str, e: int, take: Take, *, bias: bool) -> Source:
    """One matrix of an expert as ``[out, in]``, or its bias."""
    if not own.spelling.stacks:
        return take(own.of(role, e, bias=bias))
    if role == DOWN or not own.spelling.gated:
        return _straight(own, role, e, take, bias=bias)
    if own.spelling.woven:
        return _rows(_straight(own, role, e, take, bias=bias), np.arange(role == UP, 2 * own.inner, 2))
    shape = (own.inner,) if bias else (own.inner, own.hidden)
    half = math.prod(shape)
    if own.spelling.turned and not bias:
        return Part(_straight(own, role, e, take, bias=bias), half * (role == UP), shape)
    return Part(take(own.stack(role, bias=bias)), half * (2 * e + (role == UP)), shape)


def _straight(own: Experts, role: str, e: int, take: Take, *, bias: bool) -> Source:
    """The part of a stack that is one expert's, as ``[out, in]``."""
    whole = take(own.stack(role, bias=bias))
    shape = whole.shape[1:]
    block = Part(whole, e * math.prod(shape), shape)
    return Transposed(block) if own.spelling.turned and not bias else block


def _rows(source: Source, index: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Source:
    """Rows of a matrix, or elements of a vector."""
    if len(source.shape) == 1:
        return Picked(source, None, index, (len(index),))
    return Picked(source, index, None, (len(index), *source.shape[1:]))


# What else lies in the modules of experts.


def _siblings(
    names: Sequence[str],
    moved: Sequence[tuple[str, Spelling, Spelling]],
    tensors: Mapping[str, TensorInfo],
    beside: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """New names of what is beside the experts, where the reference calls it otherwise.

    The module has the reference's name. What the reference has not under that name is what is left over there, where
    last component and shape say so without doubt.
    """
    out: dict[str, str] = {}
    for layer, own, goal in moved:
        start = f"{layer}." if layer else ""
        old, new = f"{start}{own.parent}.", f"{start}{goal.parent}."
        mine = {n: new + n[len(old) :] for n in names if n.startswith(old)}
        suffixes = {to[len(start) :]: n for n, to in mine.items()}
        left: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        free: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for suffix, name in suffixes.items():
            if suffix not in beside:
                left.setdefault((suffix.rpartition(".")[2], tensors[name].shape), []).append(name)
        for suffix, shape in beside.items():
            if suffix not in suffixes:
                free.setdefault((suffix.rpartition(".")[2], shape), []).append(suffix)
        for what, found in left.items():
            if len(found) == 1 == len(free.get(what, ())):
                mine[found[0]] = start + free[what][0]
        out |= {n: to for n, to in mine.items() if to != n}
    return out


def _beside(reference: Mapping[str, TensorInfo], experts: Sequence[Experts]) -> dict[str, tuple[int, ...]]:
    """What the reference has in its modules of experts beside them, from the layer on, with shapes."""
    own = {name for e in experts for name in e.names}
    starts = {f"{e.layer}.": e.spelling.parent for e in experts}
    out: dict[str, tuple[int, ...]] = {}
    for name, info in reference.items():
        found = next((s for s in starts if name.startswith(s)), None) if name not in own else None
        if found is not None and name.startswith(f"{found}{starts[found]}."):
            out.setdefault(name[len(found) :], info.shape)
    return out
