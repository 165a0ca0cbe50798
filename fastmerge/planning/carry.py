"""Files that go into the output beside the weights: tokenizer, generation settings, chat template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.discover import contained
from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint
    from fastmerge.recipe import Recipe

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
OTHERS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_MOST = 256 << 20

Carry = tuple[tuple[str, Path | bytes], ...]


def carry(
    recipe: Recipe, donor: Checkpoint, tokenizer: Checkpoint, models: Sequence[Checkpoint]
) -> tuple[Carry, list[str]]:
    """What the output takes over.

    Args:
        recipe: may ask for a tokenizer and a chat template.
        donor: the model whose other files are copied.
        tokenizer: the model whose tokenizer files are copied.
        models: all; where the recipe asks for a tokenizer, they must have the same vocabulary.

    Returns:
        Names with files or bytes, and warnings.

    Raises:
        RecipeError: where a tokenizer is asked for and the vocabularies differ.
    """
    warnings: list[str] = []
    if recipe.tokenizer_source is not None:
        _same_vocabulary(tokenizer, models, warnings)
    found: dict[str, Path | bytes] = {}
    for names, model in ((TOKENIZER, tokenizer), (OTHERS, donor)):
        for name in names:
            path = _inside(model, name, warnings)
            if path is not None:
                found[name] = path
    template = recipe.chat_template
    if template == "auto":
        template = _plurality(models)
        if template is None:
            warnings.append("chat_template: auto: no model has one")
    if template is not None:
        _set_template(found, template)
    return tuple(found.items()), warnings


def _inside(model: Checkpoint, name: str, warnings: list[str]) -> Path | None:
    """A file of a model, unless it is a link that leaves the model (or the hub cache that it lies in)."""
    path = model.path / name
    if not path.is_file():
        return None
    if not contained(path, model.path):
        warnings.append(f"{path}: a link that leaves the model's directory; not copied")
        return None
    return path


def _same_vocabulary(tokenizer: Checkpoint, models: Sequence[Checkpoint], warnings: list[str]) -> None:
    problems = []
    for model in models:
        if model is tokenizer:
            continue
        for name in _VOCABULARIES:
            mine, other = (_inside(m, name, warnings) for m in (tokenizer, model))
            if mine is not None and other is not None:
                if not _equal(mine, other):
                    problems.append(
                        f"tokenizer: {model.ref!r} has another vocabulary than {tokenizer.ref!r}; rearranging "
                        "embeddings is not supported yet"
                    )
                break
        else:
            warnings.append(f"tokenizer: the vocabularies of {tokenizer.ref!r} and {model.ref!r} cannot be compared")
    if problems:
        raise RecipeError(problems)


def _equal(a: Path, b: Path) -> bool:
    x, y = a.read_bytes()[:_MOST], b.read_bytes()[:_MOST]
    if x == y or a.suffix != ".json":
        return x == y
    mine = _tokens(x)
    return mine is not None and bool(mine == _tokens(y))


def _tokens(data: bytes) -> Any:
    """Vocabulary and added tokens of a tokenizer.json or vocab.json."""
    try:
        tree = json.loads(data)
        if "model" not in tree:
            return tree
        added = {t["content"]: t["id"] for t in tree.get("added_tokens") or []}
        vocabulary = tree["model"]["vocab"]
        return {**vocabulary, **added} if isinstance(vocabulary, dict) else (vocabulary, added)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _template(model: Checkpoint) -> str | None:
    """The chat template of a model, as data; it is never rendered."""
    jinja = _inside(model, "chat_template.jinja", [])
    if jinja is not None:
        return jinja.read_text("utf-8", errors="replace").strip() or None
    path = _inside(model, "tokenizer_config.json", [])
    if path is None:
        return None
    try:
        found = json.loads(path.read_bytes()).get("chat_template")
    except (ValueError, AttributeError, RecursionError):
        return None
    if isinstance(found, list):  # several named ones
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found.strip() or None if isinstance(found, str) else None


def _plurality(models: Sequence[Checkpoint]) -> str | None:
    templates = Counter(t for t in (_template(m) for m in models) if t)
    return templates.most_common(1)[0][0] if templates else None


def _set_template(found: dict[str, Path | bytes], template: str) -> None:
    found["chat_template.jinja"] = template.encode()
    found.pop("chat_template.json", None)
    config = found.get("tokenizer_config.json")
    if not isinstance(config, Path):
        return
    try:
        tree = json.loads(config.read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(tree, dict) and "chat_template" in tree:
        tree["chat_template"] = template
        found["tokenizer_config.json"] = json.dumps(tree, indent=2, ensure_ascii=False).encode()
