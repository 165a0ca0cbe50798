"""Functions of peft on tensors, by the engine: for adapters on disk, and inside peft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.methods.deltas import PEFT

if TYPE_CHECKING:
    import torch

MIXED = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Names of the functions; peft calls the first ``task_arithmetic`` where it is one of tensors."""


def mixed(
    kind: str,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    out_dtype: torch.dtype,
    density: float = 1.0,
    elect: str = "mass",
    name: str = "",
    seed: int = 0,
) -> torch.Tensor:
    """One of peft's functions on tensors (``peft.utils.merge_utils``), by the engine.

    Args:
        kind: one of :data:`MIXED`.
        tensors: ``[*S]`` each; they are not changed.
        weights: of each; positive where signs are elected, since agreement is that of weighted tensors here.
        out_dtype: of the result.
        density: share that stays, ``int(density n)`` elements or a probability.
        elect: the sign of the sum (``mass``) or of the number of signs (``count``).
        name: of the tensor, for random masks.
        seed: of random masks.

    Returns:
        ``[*S]``
    """
    import torch

    from fastmerge.api.tensors import merge_tensors

    if kind == "magnitude_prune":
        # A lone model's election is its own sign, so that only the trim of TIES is left.
        tensors = [mixed("ties", [t], [1.0], out_dtype=t.dtype, density=density) for t in tensors]
    parameters: dict[str, Any] = {"weight": list(weights)}
    if kind.endswith("ties"):
        parameters |= {**PEFT, "elect": elect, "normalize": True}
    if kind.startswith("dare"):
        parameters["rescale_norm"] = "keep"
    if kind.endswith("ties") or kind.startswith("dare"):
        parameters["density"] = density
    method = "task_arithmetic" if kind in ("linear", "magnitude_prune") else kind
    zeros = torch.zeros(tensors[0].shape, dtype=tensors[0].dtype, device=tensors[0].device)
    return merge_tensors(
        [zeros, *tensors], method, base_index=0, parameters=parameters, name=name, out_dtype=out_dtype, seed=seed
    )
