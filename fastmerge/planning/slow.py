"""Tokenizers without tokenizer.json: vocab.json with merges.txt, or vocab.txt, and the files that add tokens to them.

What transformers 5 makes of such files decides: added tokens are those of ``added_tokens_decoder`` in
tokenizer_config.json, else those of added_tokens.json; then come the special tokens that tokenizer_config.json,
special_tokens_map.json or the class itself name. One that is not in the vocabulary gets the next number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.formats import parse_config
from fastmerge.errors import RecipeError
from fastmerge.planning import tokens as tokenfiles

if TYPE_CHECKING:
    from pathlib import Path

    from fastmerge.checkpoint import Checkpoint

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""What an added token is that nobody says more of."""

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Settings that name a special token, in the order in which those that are missing are added."""

FILES = ("vocab.json", "vocab.txt")
"""Vocabularies that take tokens."""

_END = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
_BART = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
         "cls_token": "<s>", "mask_token": "<mask>"}  # fmt: skip

CLASSES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("gpt2", "codegen", "whisper"), _END),
    "gptneox": _END | {"pad_token": "<|padding|>"},
    "qwen2": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "clip": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>") | {"bos_token": "<|startoftext|>"},
    **dict.fromkeys(("roberta", "bart", "longformer", "led", "mvp", "blenderbot"), _BART),
    "mpnet": _BART | {"unk_token": "[UNK]"},
    "deberta": _BERT | {"bos_token": "[CLS]", "eos_token": "[SEP]"},
    **dict.fromkeys(("bert", "distilbert", "electra", "squeezebert", "mobilebert", "convbert", "layoutlm"), _BERT),
}
"""Classes that transformers builds from such files alone, in small letters without ``Tokenizer`` and ``Fast``, and the
special tokens that they have where no file says otherwise."""

_TYPES = (
    ("gpt2", ("gpt_neo", "gptj", "opt", "dbrx", "phi", "starcoder2", "jais2", "codegen")),
    ("gptneox", ("gpt_neox", "olmo", "olmoe", "mpt", "mamba", "mamba2", "falcon_mamba", "rwkv")),
    ("qwen2", ("qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe")),
)
"""Classes by the type of a model, where its configuration names none and the type is not the class's own name."""

Flags = dict[str, Any]


@dataclass
class Files:
    """Where a tokenizer's tokens are said, if not in a tokenizer.json.

    Attributes:
        path: of the vocabulary.
        declared: added tokens with flags of their own.
        settings: what special_tokens_map.json says beyond tokenizer_config.json, whose ``added_tokens_decoder`` would
            keep it from being read.
    """

    path: Path
    declared: list[Flags] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def defaults(model: Checkpoint) -> dict[str, str] | None:
    """The special tokens that a tokenizer's class names; None for a class that is not one of :data:`CLASSES`."""
    said = _tree(model, "tokenizer_config.json")
    if "auto_map" in said:
        return None
    config = model.config
    name = said.get("tokenizer_class") or config.get("tokenizer_class")
    if name is None:
        kind = str(config.get("model_type"))
        name = next((c for c, types in _TYPES if kind in types), kind)
    return CLASSES.get(str(name).removesuffix("Fast").removesuffix("Tokenizer").lower())


def read(model: Checkpoint, path: Path, numbers: dict[str, int]) -> tuple[dict[str, Flags], Files | None]:
    """Adds the tokens that other files add to those of a vocabulary file.

    Args:
        model: whose files they are.
        path: of the vocabulary file.
        numbers: of its tokens; the added ones are put in.

    Returns:
        The added tokens with their flags; and the files, where tokens can be added to them.
    """
    files = Files(path)
    stated = _stated(model, files)
    named = defaults(model) if path.name in FILES else None
    if named is None:  # by classes that number tokens as the files say
        for number, flags in stated:
            numbers[flags["content"]] = number
        return {flags["content"]: flags for _, flags in stated}, None
    files.declared = [flags for _, flags in sorted(stated, key=lambda one: one[0])]
    settings = named | _tree(model, "tokenizer_config.json") | files.settings
    named_here = special(settings, files.declared)
    numbers |= tokenfiles.given(numbers, [*files.declared, *(flags for flags, _ in named_here)])
    added = {flags["content"]: flags for flags in (*files.declared, *(flags for flags, _ in named_here))}
    files.declared += [flags for flags, own in named_here if own]
    return added, files


def beside(model: Checkpoint, added: Sequence[Mapping[str, Any]]) -> list[Flags]:
    """The added tokens that the files beside a tokenizer.json name, and it does not: a ``pad_token``, mostly.

    Args:
        model: whose files they are.
        added: tokens of tokenizer.json.
    """
    files = Files(model.path / "tokenizer.json")
    had = {token["content"] for token in added}
    found = [flags for _, flags in sorted(_stated(model, files), key=lambda one: one[0]) if flags["content"] not in had]
    settings = (defaults(model) or {}) | _tree(model, "tokenizer_config.json") | files.settings
    return found + [flags for flags, _ in special(settings, [*added, *found])]


def special(settings: Mapping[str, Any], had: Iterable[Mapping[str, Any]] = ()) -> list[tuple[Flags, bool]]:
    """The special tokens that settings name, and that are not among those that a tokenizer has.

    Returns:
        Their flags, and whether the settings give any.
    """
    known = {flags["content"] for flags in had}
    more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    more = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    found = []
    for token in (*map(settings.get, SPECIAL), *more):
        own = isinstance(token, dict)
        content = token.get("content") if own else token
        if isinstance(content, str) and content and content not in known:
            known.add(content)
            given = {key: bool(token[key]) for key in FLAGS if key in token} if own else {}
            found.append((FLAGS | {"normalized": False} | given | {"special": True, "content": content}, own))
    return found


def write(
    files: Files, numbers: Mapping[str, int], new: list[Flags], gone: frozenset[str], merges: list[Any] | None
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files with the tokens of the output.

    Args:
        files: that take them.
        numbers: of all tokens.
        new: added tokens that are not there yet, with their numbers.
        gone: tokens that are left out.
        merges: of the output; None where there are none.

    Returns:
        Files by name, and what tokenizer_config.json says beside its own.

    Raises:
        RecipeError: where the vocabulary cannot say it.
    """
    declared = [f | {"id": numbers[f["content"]]} for f in files.declared if f["content"] not in gone]
    decoder = sorted({f["content"]: f for f in (*declared, *new)}.values(), key=lambda f: int(f["id"]))
    fresh = {flags["content"] for flags in new}
    vocabulary = {token: i for token, i in numbers.items() if token not in fresh}
    if tokenfiles.given(vocabulary, decoder) != {flags["content"]: flags["id"] for flags in decoder}:
        vocabulary = dict(numbers)
    out: dict[str, bytes] = {}
    if files.path.suffix == ".json":
        out[files.path.name] = _encoded(json.dumps(vocabulary, ensure_ascii=False), files.path)
    else:
        out[files.path.name] = _encoded(_lines(files, vocabulary), files.path)
    if merges is not None:
        out["merges.txt"] = _encoded("\n".join(["#version: 0.2", *merges, ""]), files.path.with_name("merges.txt"))
    keys = ("content", *FLAGS)
    said = {str(flags["id"]): {key: flags[key] for key in keys} for flags in decoder}
    texts = {key: _content(value) or value for key, value in files.settings.items() if key in SPECIAL}
    extra = {key: [_content(v) or v for v in value] if isinstance(value, list) else value
             for key, value in files.settings.items() if key not in SPECIAL}  # fmt: skip
    return out, texts | extra | {"added_tokens_decoder": said}


def _encoded(text: str, path: Path) -> bytes:
    """Text as it goes into a file.

    Raises:
        RecipeError: where it holds what UTF-8 cannot say.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise RecipeError(f"tokenizer: {path}: a token is not Unicode, and cannot be written") from None


def _lines(files: Files, vocabulary: Mapping[str, int]) -> str:
    """A vocab.txt, in which the place of a line is the number of its token."""
    lines = [tokenfiles.text(line) for line in (tokenfiles.tokens(files.path) or {}).values()]
    by_number = {i: token for token, i in vocabulary.items()}
    last = max(by_number, default=-1)
    del lines[last + 1 :]
    for i in range(len(lines), last + 1):
        token = by_number.get(i)
        if token is None:
            raise RecipeError(f"tokenizer: {files.path}: no token has the number {i}, and lines have no gaps")
        if token != token.rstrip() or len(token.splitlines()) != 1:
            raise RecipeError(f"tokenizer: {files.path}: {token!r} cannot be a line of it")
        lines.append(token)
    return "\n".join([*lines, ""])


def _stated(model: Checkpoint, files: Files) -> list[tuple[int, Flags]]:
    """Added tokens with the numbers that files state; without a decoder, special_tokens_map.json is read as well."""
    decoder = _tree(model, "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return [
            (int(number), FLAGS | flags)
            for number, flags in decoder.items()
            if number.isdecimal() and isinstance(flags, dict) and isinstance(flags.get("content"), str)
        ]
    files.settings = {
        key: value
        for key, value in _tree(model, "special_tokens_map.json").items()
        if key in SPECIAL or key in ("additional_special_tokens", "extra_special_tokens")
    }
    settings = (defaults(model) or {}) | _tree(model, "tokenizer_config.json") | files.settings
    named = {flags["content"] for flags, _ in special(settings)}
    out = []
    for token, number in _tree(model, "added_tokens.json").items():
        if type(number) is int:
            flags = {"normalized": token not in named, "special": token in named}
            out.append((number, FLAGS | flags | {"content": token}))
    return out


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else None
    return found if isinstance(found, str) else None


def _tree(model: Checkpoint, name: str) -> dict[str, Any]:
    """What a file of settings says; nothing where there is none.

    Raises:
        RecipeError: where it cannot be read: the tokens that it names would be lost.
    """
    path = tokenfiles.vocabulary_file(model, name)
    if path is None:
        return {}
    try:
        tree = parse_config(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"tokenizer: {path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"tokenizer: {path}: expected a mapping; got a {type(tree).__name__}")
    return tree
