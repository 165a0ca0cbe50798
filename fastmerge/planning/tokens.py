"""Whether models give the same numbers to the same tokens: rows of their embeddings are merged by number."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint.discover import contained

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint

MOST = 64 << 20
"""Bytes of a vocabulary file that is read; a larger one is compared byte for byte only."""

VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tiktoken.model", "qwen.tiktoken", "tekken.json",
)  # fmt: skip
"""Files that number tokens, the most telling first."""

EXAMPLES = 3
_BLOCK = 1 << 20
_VOCABULARY = re.compile(r'"vocab"\s*:\s*')
_VOCABULARY_PART = re.compile(rb'"vocab"\s*:')
_MERGES = re.compile(rb'"merges"\s*:\s*\[')  # the token of this name has a number
_ADDED_PART = re.compile(rb'"added_tokens"\s*:.*?"normalizer"\s*:', re.DOTALL)
_ADDED = re.compile(r'"added_tokens"\s*:\s*(?=\[)')


class Difference(NamedTuple):
    """What two vocabularies say differently.

    Attributes:
        common: numbers that both give to a token.
        other: how many of them go to different tokens.
        examples: (number, token here, token there) of a few of those.
    """

    common: int
    other: int
    examples: tuple[tuple[int, str, str], ...]

    def __str__(self) -> str:
        shown = "; ".join(f"{i} is {a!r} and {b!r}" for i, a, b in self.examples)
        return f"{self.other} of {self.common} tokens differ ({shown})"


UNKNOWN = Difference(0, 0, ((-1, "", ""),))
"""Of files that differ and are not understood."""


def compare(mine: Checkpoint, other: Checkpoint, read: dict[Path, dict[int, str] | None]) -> Difference | None:
    """Compares the vocabularies of two models by the first file that both have.

    Args:
        mine: one model.
        other: the other one.
        read: what :func:`tokens` said of files already.

    Returns:
        The difference, :data:`UNKNOWN`, or None where the models have no file in common.
    """
    for name in VOCABULARIES:
        a, b = vocabulary_file(mine, name), vocabulary_file(other, name)
        if a is None or b is None:
            continue
        if same_bytes(a, b) or same_parts(a, b):
            return Difference(0, 0, ())
        if a not in read:
            read[a] = tokens(a)
        x, y = read[a], tokens(b)
        return UNKNOWN if x is None or y is None else _difference(x, y)
    return None


def vocabulary_file(model: Checkpoint, name: str) -> Path | None:
    """A file of a model; None where there is none, or it is no ordinary file of this model."""
    path = model.path / name
    return path if path.is_file() and contained(path, model.path) else None


def has_vocabulary(model: Checkpoint) -> bool:
    """Whether a model has a file that numbers tokens."""
    return any(vocabulary_file(model, name) is not None for name in VOCABULARIES)


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two files are equal, read in pieces."""
    try:
        if os.path.samefile(a, b):  # noqa: PTH121
            return True
        if a.stat().st_size != b.stat().st_size:
            return False
        with a.open("rb", buffering=0) as x, b.open("rb", buffering=0) as y:
            while block := x.read(_BLOCK):
                if y.read(len(block)) != block:
                    return False
    except OSError:
        return False
    return True


def same_parts(a: Path, b: Path) -> bool:
    """Whether two tokenizer.json have equal bytes where they number tokens, whatever else they say: no parsing."""
    found = []
    for path in (a, b):
        try:
            data = path.read_bytes() if path.name == "tokenizer.json" and path.stat().st_size <= MOST else b""
        except OSError:
            return False
        vocabulary, added = _VOCABULARY_PART.search(data), _ADDED_PART.search(data)
        merges = _MERGES.search(data, vocabulary.end()) if vocabulary else None
        if vocabulary is None or merges is None or added is None:
            return False
        found.append((data[vocabulary.start() : merges.start()], added[0]))
    return found[0] == found[1]


def tokens(path: Path, *, added: bool = True) -> dict[int, str] | None:
    """The tokens of a vocabulary file by number, each byte of their UTF-8 as one character (see :func:`text`).

    Decoded so, text takes a quarter of the memory that one emoji in it would cost otherwise.

    Args:
        path: of the file.
        added: whether those that added_tokens.json adds to a vocab.json count.

    Returns:
        None where the file is too large, or says nothing that is understood.
    """
    try:
        if path.stat().st_size > MOST:
            return None
        data = path.read_bytes()
        if path.suffix == ".model" and path.stem != "tiktoken":
            return dict(enumerate(_pieces(data)))
        said = data.decode("latin-1")
        if path.suffix == ".txt":
            return dict(enumerate(_lines(said)))
        if path.suffix in {".model", ".tiktoken"}:
            return {int(rank): token for token, rank in (line.split() for line in said.splitlines() if line)}
        if path.name == "vocab.json":
            return _numbered(json.loads(said)) | (_added_file(path.parent) if added else {})
        return _tokenizer(said)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def _lines(said: str) -> list[str]:
    """The tokens of a vocab.txt, one a line, without the white space behind them."""
    found = said.split("\n")
    if not found[-1]:
        found.pop()
    return [line.rstrip(" \t\r\v\f") for line in found]  # bytes of UTF-8 look like other white space


def _tokenizer(text: str) -> dict[int, str] | None:
    """Vocabulary and added tokens of a tokenizer.json, without its merges, which are most of its objects."""
    decoder = json.JSONDecoder()
    found: dict[int, str] = {}
    for match in _VOCABULARY.finditer(text):
        raw, _ = decoder.raw_decode(text, match.end())
        if isinstance(raw, list):  # [token, score] in order, or mistral's mappings
            found = {i: str(t["token_bytes"] if isinstance(t, dict) else t[0]) for i, t in enumerate(raw)}
        elif isinstance(raw, dict):
            found = _numbered(raw)
        if found:
            break
    added = _ADDED.search(text)
    if added is not None:
        new = decoder.raw_decode(text, added.end())[0]
        found |= {i: t for t, i in given({t: i for i, t in found.items()}, new).items()}
    return found or None


def given(vocabulary: Mapping[str, int], added: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The numbers that programs which read a tokenizer.json give its added tokens, whatever it says itself.

    They go by the vocabulary, and count on for what is not in it, in the order of the file.
    """
    numbers: dict[str, int] = {}
    following = len(vocabulary)
    for token in added:
        content = str(token["content"])
        number = numbers[content] = vocabulary.get(content, numbers.get(content, following))
        following = max(following, number + 1)
    return numbers


def _numbered(raw: dict[str, Any]) -> dict[int, str]:
    return {i: token for token, i in raw.items() if isinstance(i, int)}


def _added_file(directory: Path) -> dict[int, str]:
    path = directory / "added_tokens.json"
    if not path.is_file() or not contained(path, directory) or path.stat().st_size > MOST:
        return {}
    return _numbered(json.loads(path.read_bytes().decode("latin-1")))


def _pieces(data: bytes) -> Iterator[str]:
    """The pieces of a sentencepiece model, in their order: field 1 of field 1 of its protocol buffer."""
    for field, piece in _fields(data):
        if field == 1:
            yield next((text for inner, text in _fields(piece) if inner == 1), b"").decode("latin-1")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the fields of a protocol buffer; numbers are passed over."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("no protocol buffer")

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            varint()
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size = varint()
            if at + size > len(data):
                raise ValueError("no protocol buffer")
            yield key >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError("no protocol buffer")


def special(model: Checkpoint) -> dict[str, tuple[str, int]]:
    """The tokens with which a tokenizer begins and ends a text, by the key of a configuration: token and number."""
    path = vocabulary_file(model, "tokenizer_config.json")
    vocabulary = vocabulary_file(model, "tokenizer.json")
    try:
        said = json.loads(path.read_bytes()) if path is not None and path.stat().st_size <= MOST else None
    except (OSError, ValueError, RecursionError):
        return {}
    found: dict[str, tuple[str, int]] = {}
    wanted: dict[str, str] = {}
    for name in ("bos_token", "eos_token"):
        token = said.get(name) if isinstance(said, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            wanted[name] = token
    numbered = (tokens(vocabulary) if wanted and vocabulary is not None else None) or {}
    for i, token in numbered.items():
        for name, one in wanted.items():
            if token == one or text(token) == one:
                found[f"{name}_id"] = (one, i)
    return found


def _difference(x: Mapping[int, str], y: Mapping[int, str]) -> Difference:
    common = x.keys() & y.keys()
    other = sorted(i for i in common if x[i] != y[i] and text(x[i]) != text(y[i]))
    return Difference(len(common), len(other), tuple((i, text(x[i]), text(y[i])) for i in other[:EXAMPLES]))


def text(token: str) -> str:
    """A token as people read it; what was escaped in the file is as it is."""
    try:
        return token.encode("latin-1").decode()
    except ValueError:
        return token


def listed(tokens: Collection[str]) -> str:
    """A few tokens, sorted, and how many more there are."""
    shown = ", ".join(repr(t) for t in sorted(tokens)[:EXAMPLES])
    return shown if len(tokens) <= EXAMPLES else f"{shown} and {len(tokens) - EXAMPLES:,} more"


def check(tokenizer: Checkpoint, models: Iterable[Checkpoint]) -> tuple[list[str], list[str]]:
    """Compares the vocabulary of the tokenizer that the output takes with those of the models that are merged.

    Args:
        tokenizer: the model whose tokenizer the output takes.
        models: models whose embeddings are merged row by row.

    Returns:
        Problems and warnings.
    """
    problems: list[str] = []
    warnings: list[str] = []
    read: dict[Path, dict[int, str] | None] = {}
    for model in models:
        if model is tokenizer:
            continue
        found = compare(tokenizer, model, read)
        if found is None or found is UNKNOWN:
            if found is UNKNOWN or (has_vocabulary(model) and has_vocabulary(tokenizer)):
                warnings.append(
                    f"tokenizer: the vocabularies of {tokenizer.ref!r} and {model.ref!r} cannot be compared"
                )
        elif 2 * found.other > found.common:
            problems.append(
                f"tokenizer: {model.ref!r} has another vocabulary than {tokenizer.ref!r}: {found}; 'tokenizer_source' "
                "merges rows by their tokens"
            )
        elif found.other:
            warnings.append(
                f"tokenizer: {model.ref!r} has other tokens than {tokenizer.ref!r}, whose tokenizer the output takes: "
                f"{found}; their rows are merged as they are"
            )
    return problems, warnings
