"""The module that candidates are rendered into."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastmerge.errors import BackendUnavailable
from fastmerge.search.space import Space


def live(space: Space, directory: Path | None = None) -> Any:
    """A model of the candidates' shape, loaded with transformers: the middle of the space, merged on disk.

    Args:
        space: whose candidates.
        directory: where the merge lies until it is loaded; None for a temporary place.

    Raises:
        BackendUnavailable: transformers is not there.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise BackendUnavailable("a live model needs transformers: install it, or give search(model=...)") from None
    from fastmerge.api.merge import merge

    place = Path(tempfile.mkdtemp(prefix=".model-", dir=directory))
    try:
        merge(space.recipe(space.middle()), place / "model")
        model = AutoModelForCausalLM.from_pretrained(place / "model", dtype="auto")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return model.eval().requires_grad_(requires_grad=False)
