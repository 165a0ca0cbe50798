"""The strict safetensors header parser: hostile input in, checked tensor places out.

A file is 8 bytes of header length (little-endian), the header (JSON), and the data. Whatever this parser
accepts, the ``safetensors`` library accepts too, with the same tensors at the same bytes. Beyond it, it
refuses: duplicate keys, unknown fields, empty names, names over 512 bytes, control characters in names.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import re
from math import prod
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint.system import open_regular
from fastmerge.dtypes import BY_TAG, DType
from fastmerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

MAX_HEADER = 100_000_000
"""Bytes; the same cap as the safetensors library's."""

MAX_NAME = 512
"""Bytes of UTF-8 in a tensor name."""

MAX_RANK = 64
"""Dimensions; torch allows no more."""

MAX_TENSORS = 500_000
"""Tensors of one model: several times the largest model's. It bounds what a hostile file costs."""

_MAX_VALUES = 8 * MAX_TENSORS
"""Values of all kinds in one JSON text; a tensor has seven or eight."""

LISTED = 20
"""Names spelled out per kind of problem; the rest is counted."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
_FIELDS = {"dtype", "shape", "data_offsets"}
_LIMIT = 1 << 63

of_fields = tuple.__new__
"""Makes a named tuple of all its fields, in half the time of calling its class: for loops over every tensor."""


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        name: as in the header.
        dtype: element type.
        shape: sizes; ``()`` for a scalar.
        file: position in the checkpoint's ``files``.
        offset: first byte, absolute in the file.
        nbytes: length in bytes.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


class Header(NamedTuple):
    """A checked header.

    Attributes:
        tensors: in the order of their bytes.
        metadata: the file's ``__metadata__``.
        digest: sha256 of the header's bytes, in hex.
        size: bytes of the file.
        identity: (device, inode, size, mtime_ns) of the file that was read.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    digest: str
    size: int
    identity: tuple[int, int, int, int]


class Seen:
    """What was checked already: the headers of models of one family are often the same bytes.

    Attributes:
        headers: by digest, file size and file number.
        tables: the tensors of whole models by name, by the digests and sizes of their files.
    """

    def __init__(self) -> None:
        self.headers: dict[tuple[str, int, int], Header] = {}
        self.tables: dict[tuple[tuple[str, int], ...], dict[str, TensorInfo]] = {}


def printable(names: Collection[str]) -> bool:
    """Whether all names are legal, and in JSON nothing but themselves in quotes: nearly always, and quickly found."""
    text, sizes = "".join(names), set(map(len, names))
    fine = text.isascii() and text.isprintable() and '"' not in text and "\\" not in text
    return fine and 0 not in sizes and max(sizes, default=0) <= MAX_NAME


def name_problem(name: str) -> str | None:
    """What is wrong with a tensor name; None where nothing is."""
    if not name:
        return "empty tensor name"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return f"tensor name {name!r} is not valid Unicode"
    if size > MAX_NAME:
        return f"tensor name {name[:40]!r}... has {size} bytes; expected at most {MAX_NAME}"
    if _CONTROL.search(name):
        return f"tensor name {name!r} holds a control character"
    return None


def listing(names: Sequence[str]) -> str:
    """The first names of a list, quoted, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(repr(n) for n in names[:LISTED]) + more


def check_count(raw: bytes) -> None:
    """Refuses JSON that would fill the memory, before it is parsed.

    Raises:
        ValueError: with the number that is too large.
    """
    count = raw.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise ValueError(f"{count} tensors; expected at most {MAX_TENSORS}")
    values = raw.count(b",")
    if values > _MAX_VALUES:
        raise ValueError(f"{values} values; expected at most {_MAX_VALUES}")


def parse_json(text: str) -> Any:
    """JSON without duplicate keys and without NaN or infinities.

    Raises:
        ValueError: with what is wrong.
    """
    # Python reads "-0" as the integer 0, which other readers refuse; only a text with one pays for the check.
    hooks: dict[str, Any] = {"parse_int": _integer} if "-0" in text else {}
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _integer(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = [k for k, _ in pairs if k in seen or seen.add(k)]  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate keys: {listing(twice)}")
    return found


def parse(raw: bytes, data_start: int, data_bytes: int, *, where: str, file: int = 0) -> Header:
    """Checks the JSON of a header.

    Args:
        raw: the header without its 8 bytes of length.
        data_start: absolute offset of the data in the file.
        data_bytes: bytes of the file after the header.
        where: the file's name, for messages.
        file: what ``TensorInfo.file`` shall say.

    Raises:
        CheckpointError: with every problem found.
    """
    with without_gc():
        return _parse(raw, data_start, data_bytes, where, file)


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Hundreds of thousands of new objects, none of them garbage: looking for some only takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(raw: bytes, data_start: int, data_bytes: int, where: str, file: int) -> Header:
    try:
        check_count(raw)
        usual = _usual(raw, data_start, data_bytes, file)
        tensors, metadata, said = usual or _entries(raw.decode(), data_start, data_bytes, file)
    except ValueError as error:
        raise CheckpointError(f"{where}: header is not valid: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{where}: header is not valid: nested too deeply") from None
    problems = [f"{where}: {problem}" for problem in said]
    if not _is_text_map(metadata):
        problems.insert(0, f"{where}: __metadata__: expected a map from strings to strings")
    if not problems and usual is None:
        tensors.sort(key=itemgetter(4, 5))
        problems = _coverage(tensors, data_start, data_bytes, where)
    if problems:
        if len(problems) > LISTED:
            problems[LISTED:] = [f"{where}: and {len(problems) - LISTED} more problems"]
        raise CheckpointError(problems)
    size = data_start + data_bytes
    return Header(tuple(tensors), metadata, hashlib.sha256(raw).hexdigest(), size, (0, 0, size, 0))


_Found = tuple[list[TensorInfo], Any, list[str]]
"""Tensors, metadata, and what is wrong with others."""


def _usual(raw: bytes, data_start: int, data_bytes: int, file: int) -> _Found | None:
    """Reads a header that is written as programs write it, in which nothing is wrong; else gives None.

    Against any JSON, in any order: 0.5 microseconds per tensor in place of 8.
    """
    try:
        from fastmerge._native import header_rows
    except ImportError:
        return None
    try:
        found = header_rows(raw, data_start, file, TensorInfo, _kind)
        if found is None:
            return None
        head, tensors, stop = found
        metadata = parse_json(raw[:head].decode().removesuffix(",") + "}").get("__metadata__", {})
    except (ValueError, KeyError):
        return None
    twice = len(set(map(itemgetter(0), tensors))) != len(tensors)
    return None if twice or stop != data_bytes else (tensors, metadata, [])


def _kind(tag: str, sizes: str, nbytes: int) -> tuple[DType, tuple[int, ...], int]:
    """Type, shape and bytes of a tensor.

    Raises:
        KeyError, ValueError: there is no such type, or no tensor of such a shape and so many bytes.
    """
    shape = tuple(parse_json(f"[{sizes}]"))
    if len(shape) > MAX_RANK or _prod_nonzero(shape) >= _LIMIT:
        raise ValueError(f"{tag} {sizes[:80]}")
    if nbytes != BY_TAG[tag].nbytes(prod(shape)):
        raise ValueError(f"{tag} {sizes} in {nbytes} bytes")
    return BY_TAG[tag], shape, nbytes


def _entries(text: str, data_start: int, data_bytes: int, file: int) -> _Found:
    """Reads any header.

    Raises:
        ValueError: it is no JSON object, or has duplicate keys.
    """
    entries = parse_json(text)
    if not text.startswith("{"):
        raise ValueError("expected '{' first")
    metadata = entries.pop("__metadata__", {})
    tensors: list[TensorInfo] = []
    problems: list[str] = []
    for name, info in entries.items():
        # The common case in few steps; anything odd is explained by _problem.
        try:
            begin, end = info["data_offsets"]
            shape = info["shape"]
            dtype = BY_TAG[info["dtype"]]
            fine = (
                type(shape) is list
                and len(shape) <= MAX_RANK
                and all([type(d) is int and d >= 0 for d in shape])  # noqa: C419 - a list is faster here
                and type(begin) is type(end) is int
                and 0 <= begin <= end <= data_bytes
                and end - begin == dtype.nbytes(prod(shape))
                and (begin < end or _prod_nonzero(shape) < _LIMIT)
                and len(info) == 3
                and name_problem(name) is None
            )
        except (KeyError, TypeError, ValueError, IndexError):
            fine = False
        if fine:
            tensors.append(TensorInfo(name, dtype, tuple(shape), file, data_start + begin, end - begin))
        else:
            problems.append(_problem(name, info, data_bytes))
    return tensors, metadata, problems


def _is_text_map(value: Any) -> bool:
    if type(value) is not dict:
        return False
    try:
        for key, text in value.items():
            key.encode(), text.encode()
    except (AttributeError, UnicodeEncodeError):
        return False
    return True


def _prod_nonzero(shape: Sequence[int]) -> int:
    return prod([d for d in shape if d])


def _problem(name: str, info: Any, data_bytes: int) -> str:
    """What is wrong with one entry of a header, in words."""
    said = name_problem(name)
    if said:
        return said
    tensor = f"tensor {name!r}"
    if type(info) is not dict or set(info) != _FIELDS:
        got = sorted(info) if type(info) is dict else type(info).__name__
        return f"{tensor}: expected the fields dtype, shape and data_offsets, got {got!r:.200}"
    tag, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if type(tag) is not str or tag not in BY_TAG:
        return f"{tensor}: unknown dtype {tag!r:.80}; expected one of {', '.join(BY_TAG)}"
    if type(shape) is not list or len(shape) > MAX_RANK or not all(type(d) is int and 0 <= d < _LIMIT for d in shape):
        return f"{tensor}: expected a shape of at most {MAX_RANK} sizes >= 0, got {shape!r:.200}"
    if type(offsets) is not list or len(offsets) != 2 or not all(type(d) is int and 0 <= d < _LIMIT for d in offsets):
        return f"{tensor}: expected two data_offsets >= 0, got {offsets!r:.200}"
    begin, end = offsets
    nbytes = BY_TAG[tag].nbytes(prod(shape))
    if nbytes >= _LIMIT or _prod_nonzero(shape) >= _LIMIT:
        return f"{tensor}: shape {shape} overflows 63 bits"
    if nbytes < 0:
        return f"{tensor}: {tag} of shape {shape} ends inside a byte"
    if end - begin != nbytes:
        return f"{tensor}: {tag} of shape {shape} takes {nbytes} bytes, but data_offsets {offsets} hold {end - begin}"
    return f"{tensor}: data ends at byte {end}, but the file holds only {data_bytes} bytes of data: truncated"


def _coverage(tensors: Sequence[TensorInfo], data_start: int, data_bytes: int, where: str) -> list[str]:
    """Sorted ranges must cover the data exactly: no hole, no overlap, no tail."""
    at = data_start
    for name, _, _, _, offset, nbytes in tensors:
        if offset != at:
            kind = "overlaps the tensor before it" if offset < at else "leaves a hole before it"
            said = f"starts at data byte {offset - data_start}, expected {at - data_start}: it {kind}"
            return [f"{where}: tensor {name!r} {said}"]
        at += nbytes
    if at != data_start + data_bytes:
        return [f"{where}: expected {at - data_start} bytes of data, got {data_bytes}"]
    return []


def read_header(path: Path, *, file: int = 0, seen: Seen | None = None) -> Header:
    """Reads and checks the header of one file; never its data.

    Args:
        path: the file.
        file: what ``TensorInfo.file`` shall say.
        seen: headers that were checked before; this one is added.

    Raises:
        CheckpointError: the file is missing, not regular, truncated or malformed; all problems of its header.
    """
    try:
        fd = open_regular(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot open: {error.strerror}") from None
    try:
        info = os.fstat(fd)
        if info.st_size < 8:
            raise CheckpointError(f"{path}: expected a safetensors file, got {info.st_size} bytes: truncated")
        length = int.from_bytes(_read(fd, path, 8, 0), "little")
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: header of {length} bytes; expected at most {MAX_HEADER}")
        if length > info.st_size - 8:
            raise CheckpointError(f"{path}: header of {length} bytes in a file of {info.st_size} bytes: truncated")
        raw = _read(fd, path, length, 8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from None
    finally:
        os.close(fd)
    headers = {} if seen is None else seen.headers
    key = (hashlib.sha256(raw).hexdigest(), info.st_size, file)
    if key not in headers:
        headers[key] = parse(raw, 8 + length, info.st_size - 8 - length, where=str(path), file=file)
    return headers[key]._replace(identity=(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns))


def _read(fd: int, path: Path, nbytes: int, offset: int) -> bytes:
    parts = []
    while nbytes:
        try:
            part = os.pread(fd, nbytes, offset)
        except OSError as error:
            raise CheckpointError(f"{path}:{offset}: cannot read the header: {error.strerror}") from None
        if not part:
            raise CheckpointError(f"{path}:{offset}: the file shrank while its header was read")
        parts.append(part)
        offset += len(part)
        nbytes -= len(part)
    return b"".join(parts)
