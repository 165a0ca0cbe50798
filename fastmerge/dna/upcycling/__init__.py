"""Upcycling: a dense model becomes a mixture of experts that starts as the same function."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fastmerge.dna.parent import Parent
from fastmerge.dna.results import deliver
from fastmerge.dna.upcycling.options import UpcyclingConfig
from fastmerge.dna.upcycling.planner import plan_upcycle

__all__ = ["UpcyclingConfig", "plan_upcycle", "upcycle_dense_to_moe"]


def upcycle_dense_to_moe(
    dense_model: Any,
    config: UpcyclingConfig | None = None,
    *,
    model_config: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Makes a mixture of experts of a dense model; see :func:`plan_upcycle`.

    Args:
        dense_model: a transformers module, a state dictionary with the names that files have, or a path; not changed.
        config: what to make of it.
        model_config: of a state dictionary: its config.json.
        out: directory to write, for a model on disk.
        options: of :func:`fastmerge.dna.results.write` on disk; in memory ``backend`` alone.

    Returns:
        A module for a module, on its device and with ``get_moe_aux_loss()``; a state dictionary with its configuration
        (:class:`~fastmerge.dna.results.Made`) for a state dictionary; the report for a model on disk.

    Raises:
        RecipeError, CheckpointError: as of :func:`plan_upcycle`, before anything is made.
        OutputError: weights are not finite, or the directory cannot be written.
    """
    if out is not None:
        options.setdefault("device", "cpu")  # writing is what takes the time, and GPUs have no kernel in the stream
    draft = plan_upcycle(Parent.open(dense_model, config=model_config), config)
    made = deliver(draft, dense_model, out, **options)
    if hasattr(made, "named_modules"):
        from fastmerge.dna.upcycling.balance import attach_moe_aux_loss

        attach_moe_aux_loss(made)
    return made
