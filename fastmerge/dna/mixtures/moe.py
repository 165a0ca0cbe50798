"""Dense models into one mixture of experts: from a file for mergekit-moe or from values, on disk or in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fastmerge.dna import results
from fastmerge.dna.draft import Draft
from fastmerge.dna.mixtures.dense import check_moe_merge, plan_moe_merge
from fastmerge.dna.mixtures.document import MoEMergeConfig, models, read
from fastmerge.dna.mixtures.gates import router_rows
from fastmerge.dna.parent import Parent
from fastmerge.errors import CheckpointError


def open_models(config: MoEMergeConfig, model_config: Mapping[str, Any] | None = None) -> list[Parent]:
    """Opens every model once, the base first.

    Raises:
        CheckpointError: with the problems of all.
    """
    found: list[Parent] = []
    problems: list[str] = []
    for i, given in enumerate(models(config)):
        one = given
        try:
            if isinstance(given, str) and "@" in given and not os.path.lexists(given):
                from fastmerge.checkpoint import Checkpoint

                path, _, revision = given.rpartition("@")
                one = Checkpoint.open(path, revision=revision)
            found.append(Parent.open(one, config=model_config, at=i))
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    return found


def merge_to_moe(
    config: MoEMergeConfig | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    *,
    model_config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    **options: Any,
) -> Any:
    """Dense models of one architecture into one mixture of experts: see :func:`plan_moe_merge`.

    Args:
        config: a :class:`~fastmerge.dna.mixtures.document.MoEMergeConfig`, or mergekit-moe's YAML: a file, a text or a
            mapping.
        out: directory to write, for models on disk.
        model_config: of state dictionaries: their config.json.
        tokenizer: of transformers, for prompts to a base model in memory.
        device: on which states of prompts are computed, and the merge.
        options: of :func:`fastmerge.dna.results.write` on disk; in memory ``backend`` alone.

    Returns:
        As :func:`fastmerge.dna.results.deliver`, in the form of the base model.

    Raises:
        FastMergeError: as of :func:`plan_moe_merge`, and of writing.
    """
    said: list[str] = []
    if not isinstance(config, MoEMergeConfig):
        config, said = read(config)
    draft = draft_of(config, model_config, tokenizer=tokenizer, device=device)
    draft.warnings[:0] = said
    if out is not None:
        options["device"] = device
    return results.deliver(draft, config.base_model, out, **options)


def draft_of(
    config: MoEMergeConfig,
    model_config: Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    device: str = "auto",
) -> Draft:
    """The draft, with the router's rows computed; what is wrong is said before prompts are run. As above otherwise."""
    parents = open_models(config, model_config)
    check_moe_merge(parents, config)
    gates = router_rows(config, parents[0], config.base_model, tokenizer=tokenizer, device=device)
    return plan_moe_merge(parents, config, gates)
