"""The model card: README.md of the merged model, as the Hub expects it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")


def hub_id(ref: str) -> str | None:
    """The Hub id behind a model reference: itself, or the one that its cache path tells; None for local paths."""
    cached = _CACHED.search(ref)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    name = ref.split("@", maxsplit=1)[0]
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not ref.startswith((".", "/")) else None


def card(name: str, method: str, formula: str, paper: str, models: Sequence[tuple[str, bool]], recipe: str) -> str:
    """Text of the card.

    Args:
        name: title.
        method: name of the merge method.
        formula: of the method.
        paper: of the method; a link is shown as one.
        models: (reference, whether it is a local path) of every input; local paths are shown by their last part.
        recipe: the YAML that was merged.
    """
    ids: list[str] = []
    shown: list[str] = []
    for ref, local in models:
        hub = hub_id(ref) if not local or "models--" in ref else None
        if hub and hub not in ids:
            ids.append(hub)
        last = ref.rstrip("/").rsplit("/", maxsplit=1)[-1]
        shown.append(f"[{hub}](https://huggingface.co/{hub})" if hub else f"`{last}`")
    front: dict[str, object] = {"library_name": "transformers", "tags": ["mergekit", "merge", "fastmerge"]}
    if ids:
        front = {"base_model": ids, **front}
    listed = "\n".join(f"* {s}" for s in dict.fromkeys(shown))
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {name}\n\n"
        f"This model was merged with [fastmerge](https://pypi.org/project/fastmerge/) by the method **{method}**"
        f"{f' ([paper]({paper}))' if paper.startswith('http') else ''}.\n\n"
        f"`{formula}`\n\n## Models\n\n{listed}\n\n## Recipe\n\n```yaml\n{recipe.rstrip()}\n```\n"
    )
