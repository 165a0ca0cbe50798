"""Rows to input tensors: which tensor of which model goes in, and by which rule one is left out.

Every tensor of every model is accounted for here. The loop over rows must stay cheap: names that all models share
are looked up and no more; everything else is decided by sets and by kinds.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, cast

from fastmerge.planning import tied
from fastmerge.planning.layers import gaps
from fastmerge.planning.missing import buffer, decide, lost, optional, value_head
from fastmerge.planning.names import shown
from fastmerge.planning.rows import Models, Row, Sources
from fastmerge.planning.shapes import GATHER
from fastmerge.planning.tying import Tying
from fastmerge.recipe import ModelRef, Recipe

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo

_BUFFERS = ("num_batches_tracked", "inv_freq", "position_ids", "masked_bias", "attn.bias", "attention.bias")
_DEEP = 7
"""Names of so many dots are those of experts in layers; no tied tensor has one."""

_MERGE = "'missing: merge' in the recipe takes what there is"


class Found(NamedTuple):
    """Rows of one part with their input tensors.

    Attributes:
        rows: names and places.
        members: positions in the part's sources of those that go in, base first.
        columns: for each of these the tensors of all rows.
        single: whether a lone tensor passes through, whatever the method is.
        copies: further names of the output that are written with the same values, of one row.
    """

    rows: Sequence[Row]
    members: tuple[int, ...]
    columns: Sequence[Sequence[TensorInfo]]
    single: bool = False
    copies: tuple[str, ...] = ()


class Inputs:
    """Finds the input tensors of a recipe's rows.

    Args:
        recipe: checked.
        models: opened, and aligned.

    Attributes:
        problems: what stands in the way, a line for each kind; complete once all rows were found.
        warnings: what people should know; as :attr:`problems`.
        dropped: for each model and rule the tensors that are left out, by their names in the files.
    """

    def __init__(self, recipe: Recipe, models: Models) -> None:
        self.method = recipe.method
        self.merge_missing = getattr(recipe, "missing", None) == "merge"
        self.models = models
        self.sources = [Sources(recipe, part, models) for part in recipe.parts]
        self.problems: list[str] = []
        self.warnings: dict[str, None] = {}
        self.dropped: dict[str, dict[str, list[str]]] = {
            str(r): s.dropped for r, s in models.sources.items() if s.dropped
        }
        self._tying = Tying(recipe, models, self.sources)
        self._beyond: dict[tuple[ModelRef, ModelRef], frozenset[str]] = {}
        self._may_lack: dict[tuple[ModelRef, ModelRef], frozenset[str]] = {}
        self._notes: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        self._lost: dict[tuple[str, ...], list[str]] = {}
        self._baseless: list[str] = []
        self._hints: dict[str, None] = {}

    @property
    def ties(self) -> tied.Ties:
        """What became of tied tensors."""
        return self._tying.ties

    def find(self, rows: Sequence[Row]) -> Iterator[Found]:
        """The rows that become outputs, in order, with their inputs; as many at a time as nothing special is about."""
        views = list({id(t): t for s in self.sources for t in s.tensors}.values())
        if self.models.alike:
            del views[1:]
        names = [n for t in views for n in t if n.count(".") < _DEEP or not n.endswith("weight")]
        buffers = {n for n in names if n.endswith(_BUFFERS)}
        rows = self._tying.decide(rows, tied.candidates(dict.fromkeys(names)))
        self.problems += self._tying.problems
        copies: dict[str, tuple[str, ...]] = {}
        for name, original in self.ties.copies:
            copies[original] = (*copies.get(original, ()), name)
        left = dict((*self.ties.copies, *self.ties.dropped))
        special = buffers | left.keys() | copies.keys()
        for part, group in itertools.groupby(rows, itemgetter(1)):
            sources = self.sources[part]
            run = list(group)
            columns = sources.columns(run)
            apart = {id(column): column for column in columns}.values()
            odd = {at for column in apart for at, info in enumerate(column) if info is None}
            odd.update([at for at, row in enumerate(run) if row.name in special])
            start = 0
            for at in [*sorted(odd), len(run)]:
                if start < at:
                    regular = cast("list[list[TensorInfo]]", [c[start:at] for c in columns])
                    yield Found(run[start:at], sources.order, regular)
                if at < len(run):
                    yield from self._odd(run[at], sources, [c[at] for c in columns], left, copies, buffers)
                start = at + 1
        self._finish(rows)

    def _odd(
        self,
        row: Row,
        sources: Sources,
        infos: Sequence[TensorInfo | None],
        left: Mapping[str, str],
        copies: Mapping[str, tuple[str, ...]],
        buffers: Collection[str],
    ) -> Iterator[Found]:
        """A row that some source lacks, or that a rule may leave out; its tensors are given base first."""
        found: list[TensorInfo | None] = [None] * len(infos)
        for i, info in zip(sources.order, infos, strict=True):
            found[i] = info
        members, single = sources.order, False
        if row.name in left:
            self._leave(sources, found, f"a copy of {left[row.name]}")
            return
        if not all(found):
            found, single = self._incomplete(row, sources, found)
            members = tuple([i for i in members if found[i] is not None])
        elif row.name in buffers and len(found) > 1:
            members, single = self._buffer(row, sources, found)
        if members:
            yield Found(
                [row], members, [[info] for i in members if (info := found[i])], single, copies.get(row.name, ())
            )

    def _leave(self, sources: Sources, found: list[TensorInfo | None], rule: str) -> None:
        """Notes that a tensor is left out, for each model that has it."""
        for ref, info in zip(sources.refs, found, strict=True):
            if info is not None:
                names = self.dropped.setdefault(str(ref), {}).setdefault(rule, [])
                names += self.models.sources[ref].files(info)

    def _note(self, what: str, refs: Sequence[str], name: str) -> None:
        self._notes.setdefault((what, tuple(refs)), []).append(name)

    def _buffer(self, row: Row, sources: Sources, found: list[TensorInfo | None]) -> tuple[tuple[int, ...], bool]:
        """Buffers that differ (counters of batch normalisation, lengths) are those of the reference."""
        infos = [info for info in found if info is not None]
        if not buffer(row.name, infos[0]):
            return sources.order, False
        alike = len({(i.shape, i.dtype) for i in infos}) == 1
        if alike and row.name.endswith("num_batches_tracked"):
            known = [tied.value(self.models.checkpoints[r], i) for r, i in zip(sources.refs, infos, strict=True)]
            alike = None in known or len(set(known)) == 1
        if alike:
            return sources.order, False
        ref = str(sources.refs[sources.first])
        self._note(f"taken from {ref!r}, as the models differ in it", (), row.name)
        self._only(sources, found)
        return (sources.first,), True

    def _incomplete(
        self, row: Row, sources: Sources, found: list[TensorInfo | None]
    ) -> tuple[list[TensorInfo | None], bool]:
        """What there is of a tensor that some models lack (none: no output), and whether one alone passes through."""
        nothing: list[TensorInfo | None] = [None] * len(found)
        stored, found = found, self._stand_in(row, sources, found)
        absent = [i for i, f in enumerate(found) if f is None]
        if not absent:
            refs = [str(ref) for ref, f in zip(sources.refs, stored, strict=True) if f is None]
            head = row.name in self._tying.families[row.name].heads
            self._note("the tied embedding takes its place" if head else "its copy takes its place", refs, row.name)
            return found, False
        refs = [str(sources.refs[i]) for i in absent]
        has = next(i for i, f in enumerate(found) if f is not None) if any(found) else sources.first
        info = found[has]
        why = optional(sources.name(row, has), info, self.models.structure(sources.refs[has])) if info else None
        reference = str(sources.refs[sources.first])
        if why is not None:
            if found[sources.first] is None or value_head(row.name):
                self._note(f"not in the output: {why}", refs, row.name)
                self._leave(sources, found, why)
                return nothing, False
            return self._rest(row, sources, found, refs, f"{why}: ") or self._only(sources, found)
        if sources.base in absent and all(
            sources.name(row, i) in self._more(sources, i) for i, f in enumerate(found) if f is not None
        ):
            why = f"a part that {reference!r} does not have"
            self._note(f"not in the output: {why}", refs, row.name)
            self._leave(sources, found, why)
            return nothing, False
        if all(sources.name(row, i) in self._may(sources, i) for i in absent):
            partial = self._rest(row, sources, found, refs, f"a part of {reference!r}: ")
            if partial is not None:
                return partial
        if self.merge_missing:
            return self._opted_in(row, sources, found, refs)
        self._lost.setdefault(tuple(refs), []).append(row.name)
        if sources.base in absent:
            self._baseless.append(row.name)
        return nothing, False

    def _stand_in(self, row: Row, sources: Sources, found: list[TensorInfo | None]) -> list[TensorInfo | None]:
        """With the tied tensor of every model that stores no copy of its own."""
        family = self._tying.families.get(row.name)
        if family is None:
            return found
        out = list(found)
        for i, (ref, tensors) in enumerate(zip(sources.refs, sources.tensors, strict=True)):
            if out[i] is None:
                other = tied.original(family, row.name, tensors, self.models.config(ref))
                out[i] = tensors[other] if other is not None else None
                if other is None and row.name in family.heads and tied.tied(self.models.config(ref)) is False:
                    self._hints[f"config.json of {str(ref)!r} says that its head is not tied"] = None
        return out

    def _only(self, sources: Sources, found: list[TensorInfo | None]) -> tuple[list[TensorInfo | None], bool]:
        """The reference's tensor alone."""
        others = [f if i != sources.first else None for i, f in enumerate(found)]
        self._leave(sources, others, f"taken from {str(sources.refs[sources.first])!r} alone")
        return [f if i == sources.first else None for i, f in enumerate(found)], True

    def _rest(
        self, row: Row, sources: Sources, found: list[TensorInfo | None], refs: Sequence[str], why: str
    ) -> tuple[list[TensorInfo | None], bool] | None:
        """A tensor that some models may lack: of the others, where the method can tell; None where it cannot."""
        base, count = sources.base, sum(f is not None for f in found)
        if count == 1 and found[sources.first] is not None:
            self._note(f"{why}taken from {str(sources.refs[sources.first])!r} alone", refs, row.name)
            return found, True
        if base is not None and found[base] is not None and count > self.method.contract.least:
            self._note(f"{why}the others are merged", refs, row.name)
            return found, False
        return None

    def _may(self, sources: Sources, i: int) -> frozenset[str]:
        """Names of the reference that a source may lack, being a part of it."""
        key = sources.refs[sources.first], sources.refs[i]
        if key not in self._may_lack:
            whole, part = sources.tensors[sources.first], sources.tensors[i]
            frame, own = (self.models.structure(ref) for ref in key)
            configs = [self.models.config(ref) for ref in key]
            there = {n for n in whole.keys() - part.keys() if optional(n, whole[n], frame)} | set(part)
            there |= {n for n in whole.keys() - there if self._tied(n, part, configs[1])}
            more = [n for n in part.keys() - whole.keys() if not self._tied(n, part, {})]
            like = all(optional(n, part[n], own) for n in more)
            like = like and configs[1].get("model_type") in (None, configs[0].get("model_type"))
            gone = lost(whole, frame, there, like=like)
            gone |= {n for n in whole.keys() - there if self._headless(n, part)}
            self._may_lack[key] = frozenset(whole.keys() - there - gone)
        return self._may_lack[key]

    def _more(self, sources: Sources, i: int) -> frozenset[str]:
        """Names of a source of which the reference is a part: its vision tower, where the other has text only."""
        key = sources.refs[sources.first], sources.refs[i]
        if key not in self._beyond:
            part, whole = sources.tensors[sources.first], sources.tensors[i]
            frame, (mine, theirs) = self.models.structure(key[1]), (self.models.config(ref) for ref in key)
            more = whole.keys() - part.keys()
            there = set(part) | {n for n in more if optional(n, whole[n], frame) or self._tied(n, part, mine)}
            covered = all(self._tied(n, whole, theirs) for n in part.keys() - whole.keys())
            apart = len(frame.stacks) > 1 and covered and not lost(whole, frame, there, like=False)
            self._beyond[key] = frozenset(more if apart else ())
        return self._beyond[key]

    def _tied(self, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, object]) -> bool:
        """Whether a model has a tensor that is tied to one of this name."""
        family = self._tying.families.get(name)
        return family is not None and tied.original(family, name, tensors, config) is not None

    def _headless(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether a model has the embedding and not the head of this name, which is not tied."""
        family = self._tying.families.get(name)
        return family is not None and name in family.heads and any(n in tensors for n in family.names)

    def _opted_in(
        self, row: Row, sources: Sources, found: list[TensorInfo | None], refs: Sequence[str]
    ) -> tuple[list[TensorInfo | None], bool]:
        """Mergekit's rules for what some models lack; the base's tensor instead of none."""
        decision = decide(self.method, [f is not None for f in found], sources.base)
        if decision == "error":
            self._lost.setdefault(tuple(refs), []).append(row.name)
            if sources.base is not None and found[sources.base] is None:
                self._baseless.append(row.name)
            return [None] * len(found), False
        if decision == "drop" and found[sources.first] is not None:
            self._note(f"too few models have it; taken from {str(sources.refs[sources.first])!r} alone", refs, row.name)
            return self._only(sources, found)
        what = {
            "merge": "the others are merged",
            "single": "taken over from the one model that has it",
            "drop": "too few models have it; it is not in the output",
        }[decision]
        self._note(what, refs, row.name)
        if decision == "drop":
            self._leave(sources, found, "too few models have it")
            return [None] * len(found), False
        return found, decision == "single"

    def _finish(self, rows: Sequence[Row]) -> None:
        """Problems and warnings, a line for each kind."""
        if self._lost:
            where = "; ".join(f"{shown(n)} (missing from {_list(refs)})" for refs, n in self._lost.items())
            self.problems.insert(0, f"tensors that every model must have are missing: {where}: {self._advice()}")
        if self.merge_missing:
            self.problems[:0] = self._strangers()
        elif all(len(s.refs) == 1 for s in self.sources):
            self.problems += self._gaps(rows)
        for (what, refs), names in self._notes.items():
            missing = f"missing from {_list(refs)}: " if refs else ""
            self.warnings[f"{missing}{shown(names)}: {what}"] = None

    def _advice(self) -> str:
        """What to do about tensors that are missing."""
        names = list(self._lost.values())
        if len(names) > 1 and all(any("experts" in n for n in found) for found in names):
            return (
                "the experts are fused in one model and single in another, and those of one model are not whole, or "
                "of shapes that do not fit each other"
            )
        if self._hints:
            return "; ".join(self._hints)
        if self._baseless:
            return "the base must have them"
        if len(names) > 1:
            return f"the models do not hold the same tensors; {_MERGE}"
        return _MERGE

    def _strangers(self) -> list[str]:
        """Models that share at most half of their names with the reference."""
        out: dict[str, None] = {}
        for sources in self.sources:
            whole, first = sources.tensors[sources.first], str(sources.refs[sources.first])
            for ref, tensors in zip(sources.refs, sources.tensors, strict=True):
                common, least = len(whole.keys() & tensors.keys()), min(len(whole), len(tensors))
                if 2 * common <= least:
                    out[f"{str(ref)!r} shares {common} of {least} tensors with {first!r}: it does not look like the "
                        "same architecture"] = None  # fmt: skip
        return list(out)

    def _gaps(self, rows: Sequence[Row]) -> list[str]:
        """Tensors that one layer of a model lost, where no other model is there to tell."""
        out = []
        for ref in dict.fromkeys(ref for s in self.sources for ref in s.refs):
            tensors, config = self.models.tensors(ref), self.models.config(ref)
            empty = [n for n, i in tensors.items() if i.shape == (0,) and n.endswith(".weight")]
            if empty:
                out.append(f"{str(ref)!r}: {shown(empty)}: empty tensors, {GATHER}")
            for stack in self.models.structure(ref).stacks if config else ():
                names = gaps(self.models.layers(ref, stack), config)
                layer = names[0].removeprefix(stack.prefix + ".").partition(".")[0] if names else ""
                start = f"{stack.prefix}.{layer}."
                if names and any(_reads(row, start, ref, self.sources[row.part]) for row in rows):
                    out.append(f"{str(ref)!r} lost {shown(names)}, which its other layers have; {_MERGE}")
        return out


def _reads(row: Row, start: str, ref: ModelRef, sources: Sources) -> bool:
    return any(r == ref and sources.name(row, i).startswith(start) for i, r in enumerate(sources.refs))


def _list(refs: Sequence[str]) -> str:
    return ", ".join(map(repr, refs))
