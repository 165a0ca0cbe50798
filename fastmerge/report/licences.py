"""Licences of models, as the front matter of their cards says them."""

from __future__ import annotations

import re
from pathlib import Path

from fastmerge.checkpoint.system import read_regular

_MOST = 1 << 20
"""Bytes of a card that are read."""

_VALUE = r"(?m)^{key}:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9 ._+-]{{0,95}}?)[\"']?[ \t]*$"


def licence(model: Path) -> str | None:
    """The licence of a model in a directory; None where its README.md names none.

    Of ``license: other`` the name beside it counts. What is no plain word is left out: it is other people's text.
    """
    try:
        text = read_regular(model / "README.md", _MOST).decode(errors="replace").replace("\r\n", "\n")
    except OSError:
        return None
    front = re.match(r"---\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
    found = [re.search(_VALUE.format(key=key), front[1] if front else "") for key in ("license", "license_name")]
    said, own = (match[1] if match else None for match in found)
    return own if own is not None and said in (None, "other") else said
