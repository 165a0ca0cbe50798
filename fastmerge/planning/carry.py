"""Files that go into the output beside the weights: tokenizer, generation settings, chat template, licence, code."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.discover import contained
from fastmerge.checkpoint.formats import parse_config
from fastmerge.errors import RecipeError
from fastmerge.planning import tokens
from fastmerge.planning.code import Code
from fastmerge.planning.config_json import set_ids, special_ids

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint
    from fastmerge.planning.tokenizers import United

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*.txt", "*.spm", "*.tiktoken",
    "tiktoken.model", "spiece.model", "sentencepiece*.model", "*.bpe.model", "bpe.codes", "codes.bpe", "*.bpe",
    "dict.txt", "tekken.json", "ice_text.model", "normalizer.json", "chat_template*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Names of tokenizers, their vocabularies and templates, as patterns with one ``*`` at most."""

OTHERS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "feature_extraction_config.json", "modules.json", "sentence_*_config.json", "config_sentence_transformers.json",
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "Notice*", "License*",
)  # fmt: skip
"""Names of what else a model is used with, likewise."""

_NEVER = (".py", ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".onnx", ".gguf", ".msgpack", ".h5")
"""Endings that no pattern takes: weights, and code that only a configuration may name."""

_MODULE_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
_MOST_JSON = 16 << 20
_MOST_FILES = 1000

Carry = tuple[tuple[str, Path | bytes], ...]


def carry(
    template: str | None,
    donor: Checkpoint,
    tokenizer: Checkpoint,
    models: Sequence[Checkpoint],
    by_row: Sequence[Checkpoint],
    config: dict[str, Any] | None,
    united: United | None = None,
) -> tuple[Carry, list[str]]:
    """What the output takes over.

    Args:
        template: of chats: a name, the template itself, or ``auto`` for that of most models.
        donor: the model whose other files are copied.
        tokenizer: the model whose tokenizer files are copied.
        models: all, for their chat templates.
        by_row: those that give rows to the output's embeddings as they are: they must number their tokens alike.
        config: of the output; the tokens that the tokenizer's model stops at, and where its code is, are written to it.
        united: the tokenizer that the recipe asks for, where it may be another than the files say.

    Returns:
        Names with files or bytes, and warnings.

    Raises:
        RecipeError: where vocabularies differ, so that rows of embeddings do not belong together.
    """
    problems, warnings = tokens.check(tokenizer, by_row)
    if problems:
        raise RecipeError(problems)
    found: dict[str, Path | bytes] = {}
    for patterns, model in ((TOKENIZER, tokenizer), (OTHERS, donor)):
        found |= _matching(model, patterns, warnings)
    if united is not None and (united.tree is not None or united.files):
        _unite(found, united, warnings)
    found |= _modules(donor, warnings)
    if tokenizer is not donor:
        _tokens_of(tokenizer, donor, found, config, warnings)
    _code(donor, tokenizer, found, config, warnings)
    if template == "auto":
        template = _plurality(models)
        if template is None:
            warnings.append("chat_template: auto: no model has one")
    if template is not None:
        from fastmerge.planning.templates import TEMPLATES

        _set_template(found, TEMPLATES.get(template, template))
    return tuple(found.items()), warnings


def is_tokenizer(name: str) -> bool:
    """Whether a file of :func:`carry` belongs to the tokenizer."""
    return any(_matches(name, pattern) for pattern in TOKENIZER)


def _matching(model: Checkpoint, patterns: Sequence[str], warnings: list[str]) -> dict[str, Path | bytes]:
    """Files of a model whose names match, in the order of the patterns."""
    found: dict[str, Path | bytes] = {}
    listed = {"": _names(model.path)}
    for pattern in patterns:
        directory, _, last = pattern.rpartition("/")
        if directory not in listed:
            listed[directory] = _names(model.path / directory)
        for name in listed[directory]:
            if _matches(name, last) and not name.endswith(_NEVER):
                full = f"{directory}/{name}" if directory else name
                path = _inside(model, full, warnings)
                if path is not None:
                    found.setdefault(full, path)
    return found


def _matches(name: str, pattern: str) -> bool:
    """What ``fnmatch`` says, which would compile 34 expressions for that: 12 million instructions."""
    head, star, tail = pattern.partition("*")
    if not star:
        return name == pattern
    return len(name) >= len(head) + len(tail) and name.startswith(head) and name.endswith(tail)


def _names(directory: Path) -> list[str]:
    """Names of the ordinary files of a directory that are safe to write."""
    try:
        with os.scandir(directory) as entries:
            names = sorted(e.name for e in entries if re.fullmatch(_MODULE_PART, e.name) and e.is_file())
    except OSError:
        return []
    return names[:_MOST_FILES]


def _inside(model: Checkpoint, name: str, warnings: list[str]) -> Path | None:
    """A file of a model, unless it is a link that leaves the model (or the hub cache that it lies in)."""
    path = model.path / name
    if not path.is_file():
        return None
    if not contained(path, model.path) and not _blob(path):
        text = f"{path}: a link that leaves the model's directory; not copied"
        if text not in warnings:
            warnings.append(text)
        return None
    return path


def _blob(path: Path) -> bool:
    """Whether a link leads to a file that was downloaded from the hub."""
    blobs = Path(os.path.realpath(path)).parent
    return blobs.name == "blobs" and blobs.parent.name.startswith("models--")


def _modules(donor: Checkpoint, warnings: list[str]) -> dict[str, Path | bytes]:
    """The directories that modules.json of a sentence-transformers model names (pooling, normalisation, dense)."""
    tree = _json(_inside(donor, "modules.json", warnings))
    found: dict[str, Path | bytes] = {}
    weights: list[str] = []
    for module in tree if isinstance(tree, list) else []:
        said = module.get("path") if isinstance(module, dict) else None
        if not isinstance(said, str) or not said.strip("/"):
            continue
        parts = PurePosixPath(said).parts
        if len(parts) > 3 or not all(re.fullmatch(_MODULE_PART, p) for p in parts):
            warnings.append(f"modules.json names {said!r}, which is no plain directory of the model; not copied")
            continue
        directory = "/".join(parts)
        for name in _names(donor.path / directory):
            full = f"{directory}/{name}"
            path = _inside(donor, full, warnings)
            if path is not None and not name.endswith(".py"):
                found[full] = path
                weights += [full] if name.endswith(_NEVER) else []
    if weights:
        warnings.append(f"copied from {donor.ref!r}, not merged: {', '.join(weights)}")
    return found


def _tokens_of(
    tokenizer: Checkpoint,
    donor: Checkpoint,
    found: dict[str, Path | bytes],
    config: dict[str, Any] | None,
    warnings: list[str],
) -> None:
    """The tokens that a model begins, stops and pads with go along with its tokenizer."""
    settings = "generation_config.json"
    own = _json(_inside(tokenizer, settings, warnings))
    named = tokens.special(tokenizer)
    ids = {**{key: number for key, (_, number) in named.items()}, **special_ids(tokenizer.config)}
    generation = {**ids, **special_ids(own if isinstance(own, dict) else {})}
    if "eos_token_id" in named:
        token, number = named["eos_token_id"]
        stops = generation["eos_token_id"]
        if number not in (stops if isinstance(stops, list) else [stops]):
            warnings.append(
                f"the tokenizer of {tokenizer.ref!r} ends with {token!r} ({number}), which is not among the tokens "
                f"that this model stops at: eos_token_id {stops}"
            )
    changed = set_ids(config, ids) if config is not None else []
    tree = _json(found.get(settings))
    if generation and (isinstance(tree, dict) or (isinstance(own, dict) and settings not in found)):
        tree = tree if isinstance(tree, dict) else {}
        before = set_ids(tree, generation)
        if before:
            found[settings] = (json.dumps(tree, indent=2) + "\n").encode()
            changed += [f"{text} (generation)" for text in before]
    if changed:
        warnings.append(
            f"the tokenizer is that of {tokenizer.ref!r} and the configuration that of {donor.ref!r}, with the "
            f"tokenizer's tokens: {', '.join(changed)}"
        )


def _unite(found: dict[str, Path | bytes], united: United, warnings: list[str]) -> None:
    """Writes the tokenizer of the output, and what other files say of its added tokens and of those that are gone."""
    from fastmerge.planning.tokenizers import REPLACED

    stale = [name for name in REPLACED if united.ordinary and found.pop(name, None) is not None]
    stale = [name for name in stale if name not in united.files]
    if stale:
        warnings.append(f"tokenizer: left out, as the output has other tokens: {', '.join(stale)}")
    if united.tree is not None:
        found["tokenizer.json"] = _dump(united.tree, indent=None)
    else:
        found |= united.files
        tree = _json(found.get("tokenizer_config.json"))
        found["tokenizer_config.json"] = _dump((tree if isinstance(tree, dict) else {}) | united.settings)
    gone = united.gone - united.numbers.keys()
    tree = _json(found.get("added_tokens.json"))
    if isinstance(tree, dict):
        kept = {token: number for token, number in tree.items() if token not in united.gone}
        found["added_tokens.json"] = _dump(kept | {flags["content"]: flags["id"] for flags in united.new})
    lost: dict[str, None] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        tree = _json(found.get(name))
        if not isinstance(tree, dict):
            continue
        out = {key: value for key, value in tree.items() if not (key.endswith("_token") and _content(value) in gone)}
        lost |= dict.fromkeys(f"{key} {_content(tree[key])!r}" for key in tree.keys() - out.keys())
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(out.get(key), list):
                out[key] = [value for value in out[key] if _content(value) not in gone]
        decoder = out.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            out["added_tokens_decoder"] = _decoder(decoder, united)
        if out != tree:
            found[name] = _dump(out)
    if lost:
        warnings.append(f"tokenizer: these have no row, and are left out of its settings: {', '.join(sorted(lost))}")


def _decoder(decoder: Mapping[str, Any], united: United) -> dict[str, Any]:
    """Every added token of the output by its number: a class may add those of this list before any other."""
    kept: dict[str, Any] = {}
    for number, flags in decoder.items():
        token = flags.get("content") if isinstance(flags, dict) else None
        if token not in united.gone:
            kept[str(united.numbers.get(token, number)) if isinstance(token, str) else number] = flags
    said = {_content(flags) for flags in kept.values()} - {flags["content"] for flags in united.new}
    every = [*(united.tree or {}).get("added_tokens", ()), *united.new] if united.new else []
    more = [flags for flags in every if flags["content"] not in said]
    return kept | {str(flags["id"]): {k: v for k, v in flags.items() if k != "id"} for flags in more}


def _content(token: Any) -> Any:
    """The text of a token that may come with its flags."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _code(
    donor: Checkpoint,
    tokenizer: Checkpoint,
    found: dict[str, Path | bytes],
    config: dict[str, Any] | None,
    warnings: list[str],
) -> None:
    """Code that configurations name: copied as data from a directory, referred to where it is on the hub."""
    code = Code(warnings)
    if config is not None and "auto_map" in config:
        config["auto_map"] = code.take(donor, config["auto_map"], "config.json")
    for name in [n for n in found if n.endswith("_config.json") and "/" not in n]:
        tree = _json(found[name])
        if isinstance(tree, dict) and "auto_map" in tree:
            model = tokenizer if name.startswith("tokenizer") else donor
            mapped = code.take(model, tree["auto_map"], name)
            if mapped != tree["auto_map"]:
                found[name] = _dump({**tree, "auto_map": mapped})
    found |= code.files


def _json(file: Path | bytes | None) -> Any:
    """What a JSON file holds; None where there is none, or it is damaged or very large."""
    if file is None:
        return None
    try:
        if isinstance(file, Path):
            if file.stat().st_size > _MOST_JSON:
                return None
            file = file.read_bytes()
        return parse_config(file.decode(json.detect_encoding(file)))
    except (OSError, ValueError):
        return None


def template(model: Checkpoint) -> str | None:
    """The chat template of a model, as data; it is never rendered."""
    jinja = _inside(model, "chat_template.jinja", [])
    if jinja is not None and jinja.stat().st_size <= _MOST_JSON:
        return jinja.read_text("utf-8", errors="replace").strip() or None
    tree = _json(_inside(model, "tokenizer_config.json", []))
    found = tree.get("chat_template") if isinstance(tree, Mapping) else None
    if isinstance(found, list):  # several named ones
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found.strip() or None if isinstance(found, str) else None


def _plurality(models: Sequence[Checkpoint]) -> str | None:
    templates = Counter(t for t in (template(m) for m in models) if t)
    return templates.most_common(1)[0][0] if templates else None


def _set_template(found: dict[str, Path | bytes], template: str) -> None:
    found["chat_template.jinja"] = template.encode("utf-8", "replace")  # JSON can hold what UTF-8 cannot
    found.pop("chat_template.json", None)
    tree = _json(found.get("tokenizer_config.json"))
    if isinstance(tree, dict) and "chat_template" in tree:
        tree["chat_template"] = template
        found["tokenizer_config.json"] = _dump(tree)


def _dump(tree: Any, indent: int | None = 2) -> bytes:
    """JSON as people read it; with escapes where it holds lone surrogates, which UTF-8 cannot."""
    try:
        return json.dumps(tree, indent=indent, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(tree, indent=indent).encode()
