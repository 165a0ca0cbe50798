"""Tokenizers as they lie in files: the numbers of tokens, and one tokenizer with the tokens of several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.errors import RecipeError
from fastmerge.planning import slow
from fastmerge.planning import tokens as tokenfiles
from fastmerge.planning.slow import FLAGS, Flags

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint

REPLACED = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Files that number the ordinary tokens beside a tokenizer.json: left out where that one gets more of them."""

_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")


@dataclass
class Tokenizer:
    """What a model's files say of its tokens.

    Attributes:
        ref: the model.
        numbers: every token with its number.
        added: tokens beside the ordinary ones (special ones and others), with their flags.
        kind: how text is cut: ``BPE``, ``byte-level BPE``, ``Unigram``, ``WordPiece``, ``WordLevel`` or ``unknown``.
        merges: of BPE, as the file writes them.
        tree: of tokenizer.json; None where other files say it.
        files: those, where they can take tokens.
    """

    ref: str
    numbers: dict[str, int]
    added: dict[str, Flags] = field(default_factory=dict)
    kind: str = "unknown"
    merges: list[Any] = field(default_factory=list)
    tree: dict[str, Any] | None = None
    files: slow.Files | None = None

    def within(self, rows: int) -> dict[str, int]:
        """The tokens that have one of so many rows."""
        if max(self.numbers.values(), default=-1) < rows:
            return self.numbers
        return {token: i for token, i in self.numbers.items() if i < rows}


@dataclass
class United:
    """The tokenizer of the output.

    Attributes:
        numbers: every token with its number.
        tree: tokenizer.json where it changes; None where the model's files stay as they are.
        files: what changes of a tokenizer without tokenizer.json, by name.
        settings: what its tokenizer_config.json says beside its own.
        new: added tokens that the model does not have, or that are none there.
        gone: tokens of the model without a row, which the output's tokenizer does not have.
        ordinary: whether ordinary tokens came or any went, so that :data:`REPLACED` say something else.
        warnings: what deserves a look.
    """

    numbers: dict[str, int]
    tree: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    new: list[Flags] = field(default_factory=list)
    gone: frozenset[str] = frozenset()
    ordinary: bool = False
    warnings: list[str] = field(default_factory=list)


def read(model: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a model: tokenizer.json, or else another file that numbers tokens and those added to it.

    Returns:
        None where the model has no such file.

    Raises:
        RecipeError: where the file is not understood.
    """
    for name in tokenfiles.VOCABULARIES:
        path = tokenfiles.vocabulary_file(model, name)
        if path is None:
            continue
        if name == "tokenizer.json":
            return _fast(model, path)
        numbers = tokenfiles.tokens(path, added=False)
        if not numbers:
            raise RecipeError(f"{path}: cannot read the vocabulary")
        found = Tokenizer(model.ref, {tokenfiles.text(token): i for i, token in numbers.items()})
        merges = tokenfiles.vocabulary_file(model, "merges.txt")
        if name == "vocab.json" and merges is not None and merges.stat().st_size <= tokenfiles.MOST:
            lines = merges.read_text("utf-8", errors="replace").split("\n")
            found.merges = [line for line in lines if line and not line.startswith("#version")]
            found.kind = "BPE" if any(line.endswith("</w>") for line in found.merges) else "byte-level BPE"
        found.added, found.files = slow.read(model, path, found.numbers)
        if name == "vocab.txt" and found.files is not None:
            found.kind = "WordPiece"
        return found
    return None


def _fast(model: Checkpoint, path: Path) -> Tokenizer:
    try:
        if path.stat().st_size <= tokenfiles.MOST:
            return _parsed(model, json.loads(path.read_bytes()))
        why = f"larger than {tokenfiles.MOST >> 20} MB"
    except OSError as e:
        why = str(e.strerror)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        why = f"expected the JSON of a tokenizer ({', '.join(_KINDS)})"
    raise RecipeError(f"{path}: cannot read the vocabulary: {why}")


def _parsed(checkpoint: Checkpoint, tree: Any) -> Tokenizer:
    """The tokenizer in a tokenizer.json, with the tokens that settings beside it add."""
    model = tree["model"]
    raw = model["vocab"]
    pieces = isinstance(raw, list)
    kind = model.get("type") or ("Unigram" if pieces else "BPE" if "merges" in model else "WordLevel")
    vocabulary = {piece[0]: i for i, piece in enumerate(raw)} if pieces else dict(raw)
    said = tree["added_tokens"] = list(tree.get("added_tokens") or ())
    beside = slow.beside(checkpoint, said)
    given = tokenfiles.given(vocabulary, [*said, *beside])
    said += [{"id": 0} | flags for flags in beside if flags["content"] not in vocabulary]
    added = {}
    for flags in said:
        flags["id"] = given[flags["content"]]
        added[flags["content"]] = flags
    added = {flags["content"]: flags for flags in beside} | added
    numbers = vocabulary | given
    odd = set(map(type, numbers.values())) - {int} or set(map(type, numbers)) - {str} or min(numbers.values()) < 0
    if odd or kind not in _KINDS or pieces is not (kind == "Unigram"):
        raise ValueError(kind)
    if kind == "BPE" and any('"ByteLevel"' in json.dumps(tree.get(part)) for part in ("pre_tokenizer", "decoder")):
        kind = "byte-level BPE"
    return Tokenizer(checkpoint.ref, numbers, added, kind, model.get("merges") or [], tree)


def unite(
    base: Tokenizer, others: Sequence[Tokenizer], rows: Mapping[str, int], more: Mapping[str, Flags | None]
) -> United:
    """The tokenizer of the output: that of a model, with the tokens of others.

    The model's tokens keep their numbers. Then come the ordinary tokens that only others have, then their added ones,
    each in the order of the models and of the numbers there, then ``more``. Tokens without a row are left out. An
    ordinary token is one in the output: it goes into the vocabulary, with its merges behind the model's own, or with
    its score; where the tokenizers cut text in different ways it has a number and a row, and no text becomes it.

    Args:
        base: whose tokens come first.
        others: whose tokens are added; none of them for that tokenizer alone.
        rows: of the embedding of every model.
        more: tokens that the recipe names, with the flags that a model has for them.

    Returns:
        The tokenizer. The tree of ``base`` is changed, and is its.

    Raises:
        RecipeError: where tokens must be added, and the model's files cannot take them.
    """
    numbers = dict(base.within(rows[base.ref]))
    out = United(numbers, gone=frozenset(base.numbers.keys() - numbers.keys()))
    if out.gone:
        shown = tokenfiles.listed(out.gone)
        out.warnings.append(f"tokenizer: tokens of {base.ref!r} without a row of its embedding are left out: {shown}")
    theirs = [(t, t.within(rows[t.ref])) for t in others if t.numbers is not base.numbers]
    had = {token: flags for token, flags in base.added.items() if token in numbers}
    added: dict[str, Flags] = {}
    unlike: set[str] = set()
    for tokenizer, own in theirs:
        for token in sorted(tokenizer.added.keys() & own.keys(), key=own.__getitem__):
            flags = tokenizer.added[token]
            known = had.get(token) or added.setdefault(token, flags)
            if _flags(known) != _flags(flags):
                unlike.add(token)
    if unlike:
        shown = tokenfiles.listed(unlike)
        out.warnings.append(f"tokenizer: models add these tokens with different flags; the first's are taken: {shown}")
    following = max(numbers.values(), default=-1) + 1
    ordinary: dict[str, Tokenizer] = {}
    for tokenizer, own in theirs:
        new = own.keys() - numbers.keys() - added.keys() - ordinary.keys()
        ordinary |= dict.fromkeys(sorted(new, key=own.__getitem__), tokenizer)
    added |= {t: flags or FLAGS for t, flags in more.items() if t not in numbers and t not in ordinary}
    fresh = [*ordinary, *(t for t in added if t not in numbers)]
    numbers.update(zip(fresh, range(following, following + len(fresh)), strict=True))
    out.new = [_flags(flags) | {"id": numbers[token], "content": token} for token, flags in added.items()]
    if not (fresh or out.new or out.gone):
        return out
    out.ordinary = bool(ordinary or out.gone)
    if base.tree is None:
        if base.files is None or base.kind not in ("byte-level BPE", "BPE", "WordPiece"):
            if fresh or out.new:
                shown = tokenfiles.listed(fresh or added)
                raise RecipeError(
                    f"tokenizer: {base.ref!r} has no tokenizer.json, nor a vocab.json with merges.txt or a vocab.txt "
                    f"of a class that is known here, which could take the tokens of the others ({shown}): save it as "
                    "a fast tokenizer first (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
                )
            return out
        others = _others(base, ordinary, out)
        merges = _merges(base, others, ordinary, out) if base.kind.endswith("BPE") else None
        out.files, out.settings = slow.write(base.files, numbers, out.new, out.gone, merges)
        return out
    out.tree = base.tree
    _edit(base, ordinary, out)
    return out


def _flags(token: Mapping[str, Any]) -> Flags:
    return {key: bool(token.get(key, default)) for key, default in FLAGS.items()}


def _edit(base: Tokenizer, ordinary: Mapping[str, Tokenizer], out: United) -> None:
    """Writes the tokens into the tree of tokenizer.json."""
    tree = base.tree or {}
    model, known = tree["model"], {t["content"] for t in out.new}
    known |= out.gone
    kept = [t for t in tree.get("added_tokens") or () if t["content"] not in known]
    tree["added_tokens"] = sorted([*kept, *({"id": t["id"], "content": t["content"]} | t for t in out.new)],
                                  key=lambda t: int(t["id"]))  # fmt: skip
    others = _others(base, ordinary, out)
    if base.kind == "Unigram":
        _pieces(model, ordinary, out)
        return
    vocabulary = {t: i for t, i in model["vocab"].items() if t not in out.gone} if out.gone else model["vocab"]
    model["vocab"] = vocabulary | {token: out.numbers[token] for token in ordinary}
    if "merges" in model:
        model["merges"] = _merges(base, others, ordinary, out)
    numbers = {t["content"]: t["id"] for t in tree["added_tokens"]}
    if tokenfiles.given(model["vocab"], tree["added_tokens"]) != numbers:
        model["vocab"] |= numbers


def _others(base: Tokenizer, ordinary: Mapping[str, Tokenizer], out: United) -> list[Tokenizer]:
    """The tokenizers that give ordinary tokens; those whose tokens no text becomes get a warning."""
    others = list({id(t): t for t in ordinary.values()}.values())
    for other in others:
        how = f"{other.kind}, that of {base.ref!r} {base.kind}" if other.kind != base.kind else ""
        if not how and base.kind.endswith("BPE") and not other.merges:
            how = "one without merges"
        if how:
            count = sum(t is other for t in ordinary.values())
            out.warnings.append(
                f"tokenizer: {count:,} tokens of {other.ref!r} have rows, and no text becomes them: its tokenizer is "
                f"{how}"
            )
    return others


def _merges(base: Tokenizer, others: Sequence[Tokenizer], ordinary: Mapping[str, Tokenizer], out: United) -> list[Any]:
    """The merges of the model, then those of the others that make tokens which it does not have."""
    merges, gone = base.merges, out.gone
    prefix = ((base.tree or {}).get("model") or {}).get("continuing_subword_prefix") or ""

    def parts(merge: Any) -> tuple[str, str]:
        a, b = merge if isinstance(merge, list) else merge.split(" ")
        return a, b

    def made(merge: Any) -> str:
        a, b = parts(merge)
        return a + b.removeprefix(prefix)

    try:
        if gone - base.added.keys():
            merges = [m for m in merges if not gone.intersection((*parts(m), made(m)))]
        pairs = base.tree is not None and (not merges or isinstance(merges[0], list))
        seen: dict[tuple[str, str], None] = {}
        for other in others:
            for merge in other.merges if other.kind == base.kind else ():
                if made(merge) in ordinary:
                    a, b = parts(merge)
                    if a in out.numbers and b in out.numbers:
                        seen[a, b] = None
    except (ValueError, TypeError, AttributeError):
        raise RecipeError(f"tokenizer: the merges of {base.ref!r} or of another model are not understood") from None
    return [*merges, *(([a, b] if pairs else f"{a} {b}") for a, b in seen)]


def _pieces(model: dict[str, Any], ordinary: Mapping[str, Tokenizer], out: United) -> None:
    """A list of pieces numbers them by place: added tokens that stand before new ones get a place as well."""
    pieces: list[list[Any]] = model["vocab"]
    while pieces and pieces[-1][0] in out.gone:
        pieces.pop()
    if out.gone.intersection(p[0] for p in pieces) or not ordinary:
        return
    least = min(p[1] for p in pieces)
    scores: dict[int, dict[str, float]] = {}
    for other in {id(t): t for t in ordinary.values()}.values():
        if other.kind == "Unigram" and other.tree is not None:
            scores[id(other)] = dict(other.tree["model"]["vocab"])
    by_number = {i: token for token, i in out.numbers.items()}
    last = max(out.numbers[token] for token in ordinary)
    for i in range(len(pieces), last + 1):
        token = by_number.get(i)
        if token is None:
            raise RecipeError(f"tokenizer: no token has the number {i}, and pieces are numbered without gaps")
        score = scores.get(id(ordinary[token]), {}).get(token, least) if token in ordinary else 0.0
        pieces.append([token, score])
