"""Tokens from a file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    import torch

LENGTH = 2048
"""Tokens of a text that count; longer ones are cut."""


def batches(file: str, model: str) -> list[torch.Tensor]:
    """Token ids ``[1, T]`` of each line.

    Args:
        file: lines of JSON: a list of token ids, or an object with ``input_ids`` or ``text``.
        model: whose tokenizer texts are for.

    Raises:
        RecipeError: a line is none of these; all are listed.
        BackendUnavailable: there are texts, and transformers is not installed.
        CheckpointError: there are texts, and the model has no tokenizer.
    """
    import torch

    found: list[torch.Tensor] = []
    problems = []
    tokenizer: Any = None
    try:
        text = Path(file).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: expected UTF-8: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            tokenizer = tokenizer or _tokenizer(model)
            value = tokenizer(value["text"], truncation=True, max_length=LENGTH)["input_ids"]
        elif isinstance(value, dict):
            value = value.get("input_ids")
        if isinstance(value, list) and value and all(type(i) is int and 0 <= i < 2**31 for i in value):
            found.append(torch.tensor([value]))
        else:
            problems.append(f"{file}: line {number}: expected token ids, or an object with input_ids or text")
    if problems or not found:
        raise RecipeError(problems or f"{file}: expected lines of JSON, got none")
    return found


def _tokenizer(model: str) -> Any:
    from fastmerge.dna.mixtures.gates import tokenizer_of
    from fastmerge.dna.parent import Parent

    return tokenizer_of(Parent.open(model))
