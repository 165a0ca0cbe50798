"""AdaMerging++: experts of whose task vectors only the entries are left that TIES selects."""

from __future__ import annotations

import torch

from fastmerge.adamerging.states import States
from fastmerge.api.tensors import merge_state_dicts

PRESET = "fusionbench"
"""Of ``ties``: as the authors of AdaMerging select. The largest magnitudes of each task vector as a whole, ties
included, then of each entry those whose sign is that of their sum."""


def trimmed(states: States, density: float, backend: str | None = None) -> list[dict[str, torch.Tensor]]:
    """Copies of the experts that equal the base wherever TIES drops or outvotes their task vectors.

    The selection is that of ``ties`` itself, which is asked for one expert after the other: it reads all models as
    often as there are experts.

    Args:
        states: base and experts.
        density: share of each task vector that is kept before the election.
        backend: as in :func:`fastmerge.merge_state_dicts`.
    """
    models, found = states.dicts, []
    for expert in range(states.models):
        alone = [float(i == expert) for i in range(states.models)]
        given = {"weight": alone, "density": density, "lambda": 1.0}
        kept = merge_state_dicts(models, "ties", preset=PRESET, parameters=given, base=0, backend=backend)
        own = models[expert + 1]
        found.append({name: torch.where(kept[name] != x, own[name].to(x.dtype), x) for name, x in models[0].items()})
    return found
