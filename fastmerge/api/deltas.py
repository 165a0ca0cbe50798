"""Thinning one task vector, and which of several agree: the steps of TIES and its kin by themselves.

Names and arguments are those of DNA transfer's documents; results are those of the merge methods, whose kernels
they run on, so that selection is exact and random masks are the same on every machine.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from fastmerge.api.tensors import merge_tensors
from fastmerge.choices import chosen
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.tensors import check

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class SparsificationMethod(Enum):
    """How the elements that stay are chosen."""

    NONE = "none"
    MAGNITUDE = "magnitude"
    RANDOM = "random"
    MAGNITUDE_OUTLIERS = "magnitude_outliers"
    DELLA_MAGPRUNE = "della_magprune"


class ConsensusMethod(Enum):
    """How models vote on a sign: by the sum of their task vectors, or one vote each."""

    COUNT = "count"
    SUM = "sum"


_METHODS = {
    SparsificationMethod.MAGNITUDE: "ties",
    SparsificationMethod.RANDOM: "dare_linear",
    SparsificationMethod.MAGNITUDE_OUTLIERS: "breadcrumbs",
    SparsificationMethod.DELLA_MAGPRUNE: "della_linear",
}


def sparsify_delta(
    delta: torch.Tensor,
    density: float = 1.0,
    method: SparsificationMethod | str = SparsificationMethod.MAGNITUDE,
    rescale: bool = True,
    gamma: float = 0.01,
    epsilon: float = 0.15,
    *,
    name: str = "",
    seed: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    r"""A task vector of which a share of the elements stays, and the others are 0.

    .. math:: m_i d_i \frac{\sum |d|}{\sum |m d|}

    the factor with ``rescale`` only. ``magnitude``: exactly the largest (lowest index first where they tie), as in
    ``ties``; ``random``: each with the probability ``density``, as in ``dare_linear``; ``magnitude_outliers``: the
    next largest below the share ``gamma`` of outliers, as in ``breadcrumbs``; ``della_magprune``: with a probability
    from ``density - epsilon`` to ``density + epsilon`` that grows with the rank in the row, as in ``della_linear``.

    Args:
        delta: ``[*S]`` floats, on the CPU or one GPU; not changed.
        density: share that stays, 0 .. 1.
        method: how they are chosen.
        rescale: restore the sum of magnitudes.
        gamma: of ``magnitude_outliers``.
        epsilon: of ``della_magprune``; at most 15/16 of the distance from ``density`` to 0 or 1 is taken.
        name: of the tensor; with the seed it keys the random numbers.
        seed: of the random methods.
        backend: as in :func:`fastmerge.merge_tensors`.

    Returns:
        A new tensor ``[*S]`` of the same type.

    Raises:
        RecipeError: a parameter is out of range.
        ShapeError: ``delta`` is no dense tensor.
    """
    import torch

    how = chosen("method", SparsificationMethod, method)
    check("delta", delta)
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 <= density <= 1:
        raise RecipeError(f"density: expected a number from 0 to 1, got {density!r:.80}")
    if how is SparsificationMethod.NONE or density == 1:
        return delta.detach().clone()
    if density == 0:
        return torch.zeros_like(delta)
    parameters: dict[str, Any] = {"weight": 1.0, "density": density, "rescale": rescale}
    if how is SparsificationMethod.MAGNITUDE:
        parameters["normalize"] = False
    elif how is SparsificationMethod.MAGNITUDE_OUTLIERS:
        parameters["gamma"] = gamma
    elif how is SparsificationMethod.DELLA_MAGPRUNE:
        parameters["epsilon"] = min(epsilon, 0.9375 * min(density, 1 - density))
    return merge_tensors(
        [torch.zeros_like(delta), delta],
        _METHODS[how],
        parameters=parameters,
        base_index=0,
        name=name,
        seed=seed,
        backend=backend,
    )


def get_consensus_mask(
    deltas: torch.Tensor | Sequence[torch.Tensor],
    method: ConsensusMethod | str = ConsensusMethod.SUM,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    r"""Which elements have the sign that the models elect: ``sign(d_i) = +1`` where the vote is 0 or more, else -1.

    Args:
        deltas: ``[N, *S]``, or N tensors ``[*S]``.
        method: ``sum``: the sign of the sum, in fp32 or fp64, in the order of the models; ``count``: one vote each.
        dtype: of the mask; bool where absent.

    Returns:
        ``[N, *S]``; zeros agree with nobody.

    Raises:
        RecipeError: no such method.
        ShapeError: shapes differ, or there is no model.
    """
    import torch

    how = chosen("method", ConsensusMethod, method)
    parts = list(deltas)
    if not parts:
        raise ShapeError("deltas: expected at least one, got none")
    for i, part in enumerate(parts):
        check(f"deltas[{i}]", part)
        if part.shape != parts[0].shape:
            raise ShapeError(f"deltas[{i}]: expected shape {tuple(parts[0].shape)}, got {tuple(part.shape)}")
    double = any(p.dtype == torch.float64 for p in parts)
    wide = [p.detach().to(torch.float64 if double else torch.float32) for p in parts]
    votes = torch.zeros_like(wide[0])
    for part in wide:
        votes = votes + (part if how is ConsensusMethod.SUM else part.sign())
    elected = torch.where(votes >= 0, 1.0, -1.0)
    mask = torch.stack([part.sign() == elected for part in wide])
    return mask if dtype is None else mask.to(dtype)
