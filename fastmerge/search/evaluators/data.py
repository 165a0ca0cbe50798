"""Items from a file of JSON lines, as tokens."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmerge.errors import BackendUnavailable, CheckpointError, RecipeError

log = logging.getLogger("fastmerge")

KINDS = ({"text"}, {"prompt", "completion"}, {"question", "choices", "answer"})
"""The keys of a line; ``category`` and ``id`` may stand beside them."""

BESIDE = {"category", "id"}

EXPECTED = "expected text, or prompt and completion, or question, choices and answer"


class Tokens(NamedTuple):
    """A text whose last tokens are scored.

    Attributes:
        ids: all tokens.
        start: the first one that is scored; the one before it is there to predict it.
        characters: of the text that is scored.
    """

    ids: tuple[int, ...]
    start: int
    characters: int


class Item(NamedTuple):
    """What is asked.

    Attributes:
        texts: the choices in their order, or the only text.
        answer: which choice is right; None where there is nothing to choose from.
        exact: whether the scored part is an answer that a model could write (a completion).
        category: as the line says.
    """

    texts: tuple[Tokens, ...]
    answer: int | None = None
    exact: bool = False
    category: str | None = None


def read(file: str | os.PathLike[str], tokenizer: Any, *, max_length: int, separator: str) -> list[Item]:
    """Reads and tokenizes a file.

    Args:
        file: one JSON object per line; empty lines are skipped.
        tokenizer: of transformers.
        max_length: most tokens of a text.
        separator: stands between a question and each choice.

    Raises:
        RecipeError: with every line that is none of :data:`KINDS` or has nothing to score.
    """
    path = Path(file)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: expected UTF-8: {error}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot read: {error.strerror}") from None
    maker = _Maker(tokenizer, max_length, separator)
    items: list[Item] = []
    problems: list[str] = []
    # Not splitlines(), which also splits at characters that JSON allows in strings.
    for count, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(maker.item(_object(line)))
        except _Bad as bad:
            problems.append(f"{path}:{count}: {bad}")
    if problems or not items:
        raise RecipeError(problems or f"{path}: expected one JSON object per line, got none")
    if maker.cut:
        log.warning("%s: %d texts are longer than max_length %d and were cut", path, maker.cut, max_length)
    return items


def tokenizer_of(given: Any) -> Any:
    """The tokenizer of a model: a directory or hub id, or a tokenizer, which is returned as it is.

    Raises:
        BackendUnavailable: transformers is not installed.
        CheckpointError: there is no tokenizer.
    """
    if not isinstance(given, str | os.PathLike):
        return given
    from fastmerge.checkpoint import hub
    from fastmerge.recipe.refs import model_ref

    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise BackendUnavailable("perplexity and accuracy need transformers: pip install transformers") from None
    place = os.fspath(given)
    try:
        model = model_ref(place)
        path = hub.locate(model.path, model.revision)[1]
        return AutoTokenizer.from_pretrained(str(path.parent if path.is_file() else path))
    except (OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{place}: no tokenizer, which the evaluator needs: {first}") from None


class _Bad(Exception):
    """What is wrong with a line."""


def _object(line: str) -> dict[str, Any]:
    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            raise _Bad(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
        return made

    try:
        value = json.loads(line, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _Bad(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _Bad(f"expected a JSON object, got {type(value).__name__}")
    return value


class _Maker:
    """Makes items of lines."""

    def __init__(self, tokenizer: Any, max_length: int, separator: str) -> None:
        self._tokenizer, self._most, self._separator = tokenizer, max_length, separator
        self.cut = 0

    def item(self, line: Mapping[str, Any]) -> Item:
        keys = set(line) - BESIDE
        if keys not in KINDS:
            raise _Bad(f"{EXPECTED}; got {', '.join(sorted(line)) or 'no key'}")
        category = line.get("category")
        if category is not None and not isinstance(category, str):
            raise _Bad(f"category: expected text, got {category!r:.80}")
        if "text" in line:
            return Item((self._tokens("", _text(line, "text")),), category=category)
        if "prompt" in line:
            one = self._tokens(_text(line, "prompt", empty=True), _text(line, "completion"))
            return Item((one,), exact=True, category=category)
        choices, question = line["choices"], _text(line, "question")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise _Bad(f"choices: expected a list of two texts or more, got {choices!r:.80}")
        if len(set(choices)) < len(choices):
            raise _Bad("choices: two of them are equal")
        answer = _answer(line["answer"], choices)
        texts = [self._tokens(question, self._separator + choice, len(choice)) for choice in choices]
        return Item(tuple(texts), answer, category=category)

    def _tokens(self, before: str, scored: str, characters: int | None = None) -> Tokens:
        """Tokens of both as one text; scored is from the first token on in which they differ from ``before`` alone."""
        ids = self._ids(before + scored)
        start = 0
        if before:
            alone = self._ids(before)
            pairs = zip(alone, ids, strict=False)
            start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(ids)))
        start = max(start, 1)
        if start >= len(ids):
            raise _Bad(f"nothing to score: the text is {len(ids)} token(s), of which a model is told {start}")
        if len(ids) > self._most:
            self.cut += 1
            if before:
                ids, start = ids[len(ids) - self._most :], start - (len(ids) - self._most)
                if start < 1:
                    raise _Bad(f"the part that is scored is longer than max_length {self._most}")
            else:
                ids = ids[: self._most]
        return Tokens(tuple(ids), start, len(scored) if characters is None else characters)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])


def _text(line: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = line[key]
    if not isinstance(value, str) or not (value or empty):
        raise _Bad(f"{key}: expected text, got {value!r:.80}")
    return value


def _answer(value: Any, choices: Sequence[str]) -> int:
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise _Bad(f"answer: expected one of the choices, or its number from 0 to {len(choices) - 1}; got {value!r:.80}")
