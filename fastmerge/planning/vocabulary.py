"""Rows by tokens: which row of which model each token of the output has, in every tensor that has a row per token."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from fastmerge.errors import RecipeError
from fastmerge.ops.made import Rows
from fastmerge.ops.means import Mean, Means
from fastmerge.planning import slow, tokenizers
from fastmerge.planning.embeddings import by_token, rows_of
from fastmerge.planning.tokens import (
    UNKNOWN,
    VOCABULARIES,
    compare,
    listed,
    same_bytes,
    same_parts,
    tokens,
    vocabulary_file,
)
from fastmerge.recipe.refs import UNION
from fastmerge.recipe.schema import Token

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from fastmerge.checkpoint import Checkpoint
    from fastmerge.ops.spec import Source
    from fastmerge.planning.rows import Models
    from fastmerge.planning.tokenizers import Tokenizer, United
    from fastmerge.recipe import ModelRef, Recipe

I64: TypeAlias = "npt.NDArray[np.int64]"


class _Table(NamedTuple):
    """Where the rows of a tensor come from.

    Attributes:
        own: for each model rows of the model alone; None where it takes others' too.
        every: for each model rows of all models one below the other, and of the means.
        means: for each mean a row of each model.
    """

    own: list[I64 | None]
    every: list[I64]
    means: I64


class Vocabulary:
    """The rows of the output, by number, and where they come from.

    Args:
        models: opened, and aligned; their vocabulary's tensors get the shapes of the output.
        rows: how many each model has.
        own: for each model its row of every number of the output; -1 where it has none.
        there: whether a number of the output is a token's.
        size: rows of the output, with padding.
        explicit: numbers whose row the recipe names: what it says, the model, and its row (-1: that of the token).
        names: the tokens by their numbers.

    Attributes:
        size: as above.
        warnings: what deserves a look; complete once all tensors were asked for.
        changes: whether any model's rows are not the output's as they are.
    """

    def __init__(
        self,
        models: Models,
        rows: Mapping[ModelRef, int],
        own: Mapping[ModelRef, I64],
        there: npt.NDArray[np.bool_],
        size: int,
        explicit: Mapping[int, tuple[Token, ModelRef | None, int]],
        names: Mapping[int, str],
    ) -> None:
        self.size = size
        self.warnings: dict[str, None] = {}
        self._own = own
        self._there = there
        self._explicit = explicit
        self._names = names
        self._tables: dict[object, _Table] = {}
        everything = np.arange(size)
        self.changes = bool(explicit) or any(
            rows[ref] != size or not np.array_equal(index, everything) for ref, index in own.items()
        )
        self._tensors: dict[ModelRef, frozenset[str]] = {}
        for ref in own if self.changes else ():
            tensors = models.tensors(ref)
            found = by_token(tensors, rows[ref])
            self._tensors[ref] = frozenset(tensors[n].name for n in found)
            models.reshape(ref, {n: (size, *tensors[n].shape[1:]) for n in found})

    @property
    def digest(self) -> str:
        """Of all rows."""
        h = hashlib.blake2b(digest_size=16)
        for index in (*self._own.values(), self._there):
            h.update(np.ascontiguousarray(index).tobytes())
        return h.hexdigest()

    def sources(
        self, name: str, refs: Sequence[ModelRef], files: Sequence[str], sources: Sequence[Source], base: int | None
    ) -> tuple[Source, ...]:
        """The inputs of one output tensor, by the tokens of the output where they have a row for each.

        Args:
            name: of the output tensor.
            refs: the models.
            files: names of their tensors in the files.
            sources: what these are.
            base: which model gives the rows of tokens that others lack.

        Raises:
            RecipeError: where a row that the recipe names is not there.
        """
        mine = [file in self._tensors.get(ref, ()) for ref, file in zip(refs, files, strict=True)]
        if not any(mine):
            return tuple(sources)
        if not all(mine) or any(not s.dtype.mergeable for s in sources):
            raise RecipeError(f"{name}: rows of tokens in some models only, or of a type on which nothing is computed")
        rows = tuple(s.shape[0] for s in sources)
        key = (tuple(refs), rows, base)
        if key not in self._tables:
            self._tables[key] = self._table(refs, rows, base)
        table = self._tables[key]
        every = tuple(sources) if not len(table.means) else (*sources, Means(tuple(sources), table.means))
        out: list[Source] = []
        for source, own, index in zip(sources, table.own, table.every, strict=True):
            found: Source = source
            if own is None:
                used = every if len(table.means) and index.max(initial=-1) >= sum(rows) else tuple(sources)
                found = Rows(used, index)
            elif len(own) != source.shape[0] or not np.array_equal(own, np.arange(len(own))):
                found = Rows((source,), own)
            out.append(self._padded(found))
        return tuple(out)

    def _padded(self, source: Source) -> Source:
        """Rows that no token has are the mean of those that tokens have."""
        count = int(self._there.sum())
        if count == self.size:
            return source
        index = np.full(self.size, source.shape[0])
        index[: len(self._there)][self._there] = np.flatnonzero(self._there)
        return Rows((source, Mean(source, count)), index)

    def _table(self, refs: Sequence[ModelRef], rows: Sequence[int], base: int | None) -> _Table:
        own = np.stack([np.where(self._own[ref] < n, self._own[ref], -1) for ref, n in zip(refs, rows, strict=True)])
        has = own >= 0
        count = has.sum(axis=0)
        first = np.cumsum([0, *rows])
        at = np.where(has, own + first[:-1, None], -1)
        start = np.where(count == 1, at.max(axis=0), -1)
        if base is not None:
            start = np.where(has[base], at[base], start)
        mean = (count > 1) & (count < len(refs)) & (start < 0)
        forced = np.zeros(own.shape[1], np.bool_)
        problems = []
        for number, (token, model, row) in self._explicit.items():
            mean[number], forced[number], start[number] = False, token.force, -1
            if model is None:
                continue
            i = refs.index(model) if model in refs else -1
            its = row if row >= 0 or i < 0 else int(own[i, number])
            if i >= 0 and 0 <= its < rows[i]:
                start[number] = first[i] + its
            elif token.force or not has[:, number].all():
                problems.append(f"tokenizer.tokens.{self._names[number]}: {str(model)!r} has no row for it here")
        if problems:
            raise RecipeError(problems)
        numbers = np.flatnonzero(mean)
        start[numbers] = first[-1] + np.arange(len(numbers))
        lost = [n for n in np.flatnonzero(self._there & (count == 0) & (start < 0)).tolist() if n not in self._explicit]
        if lost:
            self.warnings[f"tokenizer: no model has a row for {listed([self._names.get(n, str(n)) for n in lost])}: "
                          "zeros"] = None  # fmt: skip
        index = [np.where(has[i] & ~forced, at[i], start) for i in range(len(refs))]
        alone: list[I64 | None] = []
        for i, where in enumerate(index):
            inside = (where < 0) | ((where >= first[i]) & (where < first[i + 1]))
            alone.append(np.where(where < 0, -1, where - first[i]) if inside.all() else None)
        return _Table(alone, index, np.ascontiguousarray(own[:, numbers].T))


def by_tokens(recipe: Recipe, models: Models, donor: ModelRef, giver: Checkpoint) -> tuple[Vocabulary, United]:
    """The vocabulary that a recipe asks for.

    Args:
        recipe: with a ``tokenizer_source``.
        models: opened, and aligned.
        donor: the model of the configuration.
        giver: the model of the tokenizer, which need not be merged.

    Raises:
        RecipeError: where a tokenizer that it takes is missing or not understood, or tokens are asked for that are
            not there.
    """
    source = recipe.tokenizer_source
    union = source == UNION
    first = donor if source is None or union else source
    where = recipe.at(("tokenizer",) if recipe.tokenizer is not None else ("tokenizer_source",))
    rows, problems = _rows(models)
    if problems:
        raise RecipeError([f"{where}: {p}" for p in problems])
    known, base, notes = _read(models, first, giver, union=union, where=where)
    block = recipe.tokenizer
    asked = block.tokens if block is not None else {}
    try:
        united = tokenizers.unite(
            base,
            [known[ref] for ref in known if ref != first] if union else [],
            {base.ref: max(base.numbers.values(), default=-1) + 1}
            | {models.checkpoints[ref].ref: n for ref, n in rows.items()},
            {token: _flags(known, token, said) for token, said in asked.items()},
        )
    except RecipeError as e:
        raise RecipeError([f"{where}: {p.removeprefix('tokenizer: ')}" for p in e.problems]) from None
    own, there = align(united.numbers, {ref: t.numbers for ref, t in known.items()}, rows)
    explicit = _explicit(recipe, known, rows, own, united.numbers)
    multiple = block.pad_to_multiple_of if block is not None and block.pad_to_multiple_of else 1
    shown = {i: token for token, i in united.numbers.items()}
    made = Vocabulary(models, rows, own, there, -(-len(there) // multiple) * multiple, explicit, shown)
    made.warnings |= dict.fromkeys([*notes, *united.warnings])
    return made, united


def align(
    numbers: Mapping[str, int], theirs: Mapping[ModelRef, Mapping[str, int]], rows: Mapping[ModelRef, int]
) -> tuple[dict[ModelRef, I64], npt.NDArray[np.bool_]]:
    """Which row of each model the numbers of the output are.

    Args:
        numbers: of the output's tokens.
        theirs: numbers of each model's tokens.
        rows: how many each model has.

    Returns:
        For each model its row of every number, -1 for none; and which numbers are tokens.
    """
    size = max(numbers.values(), default=-1) + 1
    at = np.fromiter(numbers.values(), np.int64, len(numbers))
    there = np.zeros(size, np.bool_)
    there[at] = True
    own: dict[ModelRef, I64] = {}
    read: dict[int, I64] = {}
    for ref, table in theirs.items():
        if id(table) not in read:
            read[id(table)] = np.fromiter(map(table.get, numbers, itertools.repeat(-1)), np.int64, len(numbers))
        found = read[id(table)]
        own[ref] = np.full(size, -1)
        own[ref][at] = np.where(found < rows[ref], found, -1)
    return own, there


def _explicit(
    recipe: Recipe,
    known: Mapping[ModelRef, Tokenizer],
    rows: Mapping[ModelRef, int],
    own: Mapping[ModelRef, I64],
    numbers: Mapping[str, int],
) -> dict[int, tuple[Token, ModelRef | None, int]]:
    """The tokens whose rows the recipe names, by their numbers in the output.

    Raises:
        RecipeError: with every row that is not there.
    """
    out: dict[int, tuple[Token, ModelRef | None, int]] = {}
    problems = []
    for token, said in (recipe.tokenizer.tokens if recipe.tokenizer is not None else {}).items():
        source = said.source
        if source is None:
            continue
        ref, row, at = source.model, -1, recipe.at(("tokenizer", "tokens", token, "source"))
        if ref is not None and source.token_id is not None:
            row = source.token_id
            if row >= rows[ref]:
                problems.append(f"{at}: {str(ref)!r} has no token_id {row}: expected 0 .. {rows[ref] - 1}")
        elif ref is not None and source.token is not None:
            row = known[ref].numbers.get(source.token, -1)
            if not 0 <= row < rows[ref]:
                problems.append(f"{at}: {str(ref)!r} has no row for {source.token!r}")
        elif ref is not None and own[ref][numbers[token]] < 0:
            problems.append(f"{at}: {str(ref)!r} has no row for {token!r}")
        out[numbers[token]] = said, ref, row
    if problems:
        raise RecipeError(problems)
    return out


def by_number(models: Models, donor: ModelRef) -> Vocabulary | None:
    """The vocabulary where a recipe asks for none, and models have different numbers of rows for the same tokens.

    Rows that no token has are padding: the output has as many as the donor.

    Returns:
        None where that is not certain: the tokens differ, or cannot be compared, or some have no row.
    """
    rows, problems = _rows(models)
    if problems or len(set(rows.values())) < 2:
        return None
    mine = models.checkpoints[donor]
    path = next((p for p in (vocabulary_file(mine, n) for n in VOCABULARIES) if p is not None), None)
    read: dict[Path, dict[int, str] | None] = {path: tokens(path)} if path is not None else {}
    most = max((read[path] if path is not None else None) or {}, default=None)
    if most is None or most >= min(rows.values()):
        return None
    for ref, model in models.checkpoints.items():
        if ref == donor:
            continue
        found = compare(mine, model, read)
        theirs = [tokens(p) for p in [vocabulary_file(model, path.name)] if p is not None] if path is not None else []
        if found is None or found is UNKNOWN or found.other or not theirs or max(theirs[0] or {}, default=-1) > most:
            return None
    size = rows[donor]
    own = {ref: np.where(np.arange(size) < n, np.arange(size), -1) for ref, n in rows.items()}
    made = Vocabulary(models, rows, own, np.ones(size, np.bool_), size, {}, {})
    shown = ", ".join(f"{str(ref)!r} {n:,}" for ref, n in rows.items())
    made.warnings[
        f"the models have different numbers of rows for the same {most + 1:,} tokens ({shown}): the others are "
        f"padding, and the output has as many as {str(donor)!r}"
    ] = None
    return made


def _rows(models: Models) -> tuple[dict[ModelRef, int], list[str]]:
    """The rows of every model, and the models that have none."""
    found = {ref: rows_of(models.tensors(ref), models.config(ref)) for ref in models.checkpoints}
    problems = [f"{str(ref)!r} has no embedding with a row for every token" for ref, n in found.items() if n is None]
    return {ref: n for ref, n in found.items() if n is not None}, problems


def _read(
    models: Models, first: ModelRef, giver: Checkpoint, *, union: bool, where: str
) -> tuple[dict[ModelRef, Tokenizer], Tokenizer, dict[str, None]]:
    """The tokenizers of all models, and that of ``giver``, which is ``first``; equal files are read once.

    Raises:
        RecipeError: with every file that is not understood, and every tokenizer that is missed.
    """
    known: dict[ModelRef, Tokenizer] = {}
    problems: list[str] = []
    warnings: dict[str, None] = {}
    for ref in (first, *(r for r in models.checkpoints if r != first)):
        model = models.checkpoints.get(ref, giver)
        try:
            if ref != first and first in known and _equal(giver, model):
                known[ref] = replace(known[first], ref=model.ref)
                continue
            found = tokenizers.read(model)
        except RecipeError as e:
            problems += [f"{where}: {p}" for p in e.problems]
            continue
        if found is not None:
            known[ref] = found
        elif ref == first or union or first not in models.checkpoints:
            problems.append(f"{where}: {str(ref)!r} has no tokenizer.json or other file that numbers its tokens")
        elif first in known:  # of a model that is merged with it
            known[ref] = replace(known[first], ref=model.ref)
            warnings[f"tokenizer: {str(ref)!r} has no tokenizer: its tokens are taken for those of {str(first)!r}"] = (
                None
            )
    if problems:
        raise RecipeError(problems)
    return {ref: known[ref] for ref in models.checkpoints}, known[first], warnings


def _equal(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two models number their tokens by equal files."""
    if a.path == b.path:
        return True
    x, y = vocabulary_file(a, "tokenizer.json"), vocabulary_file(b, "tokenizer.json")
    if x is None or y is None or not (same_bytes(x, y) or same_parts(x, y)):
        return False
    return [token["content"] for token in slow.beside(a, ())] == [token["content"] for token in slow.beside(b, ())]


def _flags(known: Mapping[ModelRef, Tokenizer], token: str, said: Token) -> dict[str, Any] | None:
    """What an added token is in the model that gives its row, else in the first that has it."""
    source = said.source
    named = [known[source.model]] if source is not None and source.model is not None else []
    name = source.token if source is not None and source.token is not None else token
    found = [t.added[name] for t in named if name in t.added]
    found += [t.added[token] for t in known.values() if token in t.added]
    return found[0] if found else None
