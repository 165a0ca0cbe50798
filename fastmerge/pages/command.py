"""``fastmerge page``: which page a directory has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastmerge.checkpoint import seal
from fastmerge.errors import OutputError

if TYPE_CHECKING:
    from fastmerge.pages.document import Document


def page(directory: str | os.PathLike[str]) -> Document:
    """The page of a search, or of a merged model.

    Raises:
        OutputError: the directory is neither.
    """
    place = Path(directory)
    if (place / "search.json").exists():
        from fastmerge.pages import search

        return search.page(place)
    if (place / seal.REPORT_NAME).exists():
        from fastmerge.pages import merge

        return merge.page(place)
    raise OutputError(
        f"{place}: expected the directory of a search (search.json) or a merged model (merge_report.json)"
    )
