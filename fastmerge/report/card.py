"""The model card: README.md of the merged model, as the Hub expects it.

Names, templates and recipes are other people's text. None of it may end its place in the card: titles are escaped,
code is fenced by more backticks than it holds, and the front matter is YAML of plain values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

_ID = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}"
_INVISIBLE = "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]+"
_MARKUP = r"([\\`*_{}\[\]()#+.!|<>&~$:=-])"
_TICKS = r"`+"


def card(
    name: str,
    method: str,
    formula: str,
    paper: str,
    models: Sequence[tuple[str, bool]],
    recipe: str,
    licences: Mapping[str, str] | None = None,
) -> str:
    """Text of the card.

    Args:
        name: title.
        method: name of the merge method.
        formula: of the method.
        paper: of the method; a link is shown as one.
        models: name of every input, and whether that is a Hub id.
        recipe: the YAML that was merged.
        licences: of the inputs whose cards name one, by the names of the inputs. That of all is the output's.
    """
    licences = licences or {}
    ids: list[str] = []
    shown: list[str] = []
    for model, on_hub in models:
        if on_hub and re.fullmatch(_ID, model):
            ids.append(model)
            shown.append(f"[{model}](https://huggingface.co/{model})")
        else:
            shown.append(_code(model))
        if model in licences:
            shown[-1] += f", licence {_code(licences[model])}"
    front: dict[str, object] = {"library_name": "transformers", "tags": ["mergekit", "merge", "fastmerge"]}
    if ids:
        front = {"base_model": list(dict.fromkeys(ids)), **front}
    said = {licences.get(model) for model, _ in models}
    if len(said) == 1 and None not in said:
        front = {"license": said.pop(), **front}
    listed = "\n".join(f"* {s}" for s in dict.fromkeys(shown))
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {_text(name)}\n\n"
        f"This model was merged with fastmerge by the method **{_text(method)}**"
        f"{f' ([paper]({paper}))' if paper.startswith('http') else ''}.\n\n"
        f"{_code(formula)}\n\n## Models\n\n{listed}\n\n## Recipe\n\n{_block(recipe, 'yaml')}\n"
    )


def adapter_card(name: str, base: str, model: str, holds: str) -> str:
    """The card of an adapter that was extracted.

    Args:
        name: title.
        base: what it is applied to.
        model: the fine-tune that both together are.
        holds: what is in it.
    """
    front: dict[str, object] = {"library_name": "peft", "tags": ["mergekit", "peft", "fastmerge"]}
    if re.fullmatch(_ID, base):
        front = {"base_model": base, **front}
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {_text(name)}\n\n"
        f"This LoRA adapter was extracted by fastmerge from {_code(model)}. It is applied to {_code(base)}.\n\n"
        f"{_code(holds)}\n"
    )


def _line(text: str) -> str:
    """Text without line breaks and characters that cannot be seen."""
    return re.sub(_INVISIBLE, " ", text).strip() or "model"


def _text(text: str) -> str:
    """One line in which nothing is markup; letters, digits and what no markup knows stay as they are."""
    return re.sub(_MARKUP, r"\\\1", _line(text)).replace(r"\-", "-").replace(r"\.", ".").replace(r"\_", "_")


def _code(text: str) -> str:
    """One line as code, between more backticks than it holds."""
    line = _line(text)
    ticks = "`" * (1 + _longest(line))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def _block(text: str, language: str) -> str:
    """Lines as code, fenced by more backticks than they hold."""
    fence = "`" * max(3, 1 + _longest(text))
    lines = text.replace("\r", " ").rstrip()
    return f"{fence}{language}\n{lines}\n{fence}"


def _longest(text: str) -> int:
    return max(map(len, re.findall(_TICKS, text)), default=0)
