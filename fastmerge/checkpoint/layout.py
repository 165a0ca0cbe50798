"""Where every byte of the output goes: whole headers, offsets and index, before any weight is read. Pure."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from math import prod
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from fastmerge.checkpoint.header import MAX_HEADER, listing, name_problem, of_fields, printable
from fastmerge.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fastmerge.dtypes import DType

ALIGN = 4096
"""The data of every shard starts at a multiple of this."""

INDEX_NAME = "model.safetensors.index.json"


class _Kind(NamedTuple):
    """What tensors of one type and shape share.

    Attributes:
        nbytes: length in bytes.
        rank: orders the tensors of a shard.
        text: of the header's entry, up to the offsets.
    """

    nbytes: int
    rank: tuple[bool, int]
    text: str


class Place(NamedTuple):
    """Where one tensor's bytes go.

    Attributes:
        shard: position in the layout's ``shards``.
        offset: first byte, absolute in the shard's file.
        nbytes: length in bytes.
    """

    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file.

    Attributes:
        name: file name.
        header: its first bytes, length field and padding included.
        size: bytes of the whole file.
        tensors: names, in the order of their bytes.
    """

    name: str
    header: bytes = field(repr=False)
    size: int
    tensors: tuple[str, ...] = field(repr=False)

    @property
    def data_start(self) -> int:
        """Absolute offset of the first byte of data, a multiple of 4096."""
        return len(self.header)


@dataclass(frozen=True)
class Layout:
    """All output files.

    Attributes:
        shards: the files, in order.
        places: where each tensor goes, by name, in the order of shards and bytes.
        index: the index json; None where there is one shard.
        total: bytes of all files, the index excluded.
    """

    shards: tuple[Shard, ...]
    places: Mapping[str, Place] = field(repr=False)
    index: bytes | None = field(repr=False)
    total: int

    @property
    def digest(self) -> str:
        """sha256 over names and headers: equal exactly for equal files, their data aside."""
        h = hashlib.sha256()
        for shard in self.shards:
            h.update(f"{shard.name}\n{len(shard.header)}\n{shard.size}\n".encode())
            h.update(shard.header)
        return h.hexdigest()


def layout(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], *, shard_size: float, metadata: Mapping[str, str]
) -> Layout:
    """Lays tensors out in shards.

    Shards are filled in the order given. Inside one, tensors of whole blocks of 4096 bytes come first, so that all of
    them start at a block: what is written past the page cache, or cloned, must. (With norms between them, every
    second write of a mixture of experts would have ragged ends.) Both those and the others go
    by element size, largest first, which keeps each aligned to its element, then in the order given.

    Args:
        tensors: (name, dtype, shape), in the order wanted.
        shard_size: bytes of data per shard at most; a larger tensor has a shard of its own.
        metadata: strings for ``__metadata__`` of every shard; ``format: pt`` is added where absent.

    Raises:
        OutputError: names that no header may hold, duplicates, a shard size below one byte, or a header
            over 100 MB.
    """
    if not shard_size >= 1:
        raise OutputError(f"shard size: expected at least 1 byte, got {shard_size}")
    rows = [*tensors]
    names = [*map(itemgetter(0), rows)]
    pairs = [*map(itemgetter(1, 2), rows)]
    known = {pair: _kind(*pair) for pair in dict.fromkeys(pairs)}
    kinds = [*map(known.__getitem__, pairs)]
    simple = printable(names)
    _check_names(names, simple=simple)
    meta = {"format": "pt", **{str(k): str(v) for k, v in metadata.items()}}
    shards: list[Shard] = []
    places: dict[str, Place] = {}
    cuts = _split([kind.nbytes for kind in kinds], int(shard_size))
    for number, (a, b) in enumerate(cuts):
        name = "model.safetensors" if len(cuts) == 1 else f"model-{number + 1:05d}-of-{len(cuts):05d}.safetensors"
        mine, alike = tuple(names[a:b]), kinds[a:b]
        if len(set(map(id, alike))) > 1:
            order = sorted(range(len(mine)), key=[kind.rank for kind in alike].__getitem__)
            mine, alike = tuple([mine[i] for i in order]), [alike[i] for i in order]
        stops = [*itertools.accumulate([kind.nbytes for kind in alike], initial=0)]
        header = _header(mine if simple else [_json(n)[1:-1] for n in mine], alike, stops, meta, name)
        offsets = map(len(header).__add__, stops[:-1])
        fields = zip(itertools.repeat(number), offsets, [kind.nbytes for kind in alike])
        places.update(zip(mine, map(of_fields, itertools.repeat(Place), fields), strict=True))
        shards.append(Shard(name, header, len(header) + stops[-1], mine))
    index = None
    if len(shards) > 1:
        weight_map = {n: shards[p.shard].name for n, p in sorted(places.items())}
        total_size = sum(p.nbytes for p in places.values())
        content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        index = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return Layout(tuple(shards), places, index, sum(s.size for s in shards))


def _kind(dtype: DType, shape: tuple[int, ...]) -> _Kind:
    nbytes = dtype.nbytes(prod(shape))
    if nbytes < 0:
        raise OutputError(f"{dtype.name} of shape {list(shape)} ends inside a byte")
    sizes = ",".join(map(str, shape))
    return _Kind(
        nbytes, (nbytes % ALIGN > 0, -dtype.size), f'{{"dtype":"{dtype.tag}","shape":[{sizes}],"data_offsets":['
    )


def _check_names(names: Sequence[str], *, simple: bool) -> None:
    problems = [] if simple else [p for p in map(name_problem, names) if p]
    if "__metadata__" in names:
        problems.append("tensor name '__metadata__' is reserved")
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = [n for n in names if n in seen or seen.add(n)]  # type: ignore[func-returns-value]
        problems.append(f"output tensors named twice: {listing(twice)}")
    if problems:
        raise OutputError("; ".join(problems[:20]))


def _split(sizes: Sequence[int], shard_size: int) -> list[tuple[int, int]]:
    """First and last (exclusive) tensor of every shard: greedy, in order; always at least one shard."""
    ends = [*itertools.accumulate(sizes)]
    cuts: list[tuple[int, int]] = []
    start = before = 0
    while start < len(ends) or not cuts:
        stop = max(bisect.bisect_right(ends, before + shard_size, start), min(start + 1, len(ends)))
        cuts.append((start, stop))
        start, before = stop, ends[stop - 1] if stop else 0
    return cuts


def _header(
    names: Iterable[str], kinds: Iterable[_Kind], stops: Sequence[int], metadata: Mapping[str, str], shard: str
) -> bytes:
    """The shard's first bytes; the names as JSON has them between quotes."""
    places = [*map(str, stops)]
    rows = zip(names, [kind.text for kind in kinds], places[:-1], places[1:], strict=True)
    entries = [f'"{name}":{text}{start},{stop}]}}' for name, text, start, stop in rows]
    text = "{" + ",".join([f'"__metadata__":{_json(metadata)}', *entries]) + "}"
    raw = text.encode()
    length = -(-(8 + len(raw)) // ALIGN) * ALIGN - 8
    if length > MAX_HEADER:
        raise OutputError(f"{shard}: header of {length} bytes; expected at most {MAX_HEADER}: lower the shard size")
    return length.to_bytes(8, "little") + raw.ljust(length)


_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
