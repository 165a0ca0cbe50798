"""DELLA: drop elements of task vectors at random, small ones rather than large ones; then elect, or add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastmerge.methods.base import Contract, per_model, shared
from fastmerge.methods.sparse import Sparse
from fastmerge.ops import blocks
from fastmerge.ops.consensus.masked import Draw
from fastmerge.philox import DROP

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastmerge.ops.spec import Op, Spec

ROWS = 1 << 16
"""Elements that are ranked at a time; what is ranked together is the least."""


def ranked(keys: blocks.Keys) -> npt.NDArray[np.intp]:
    """Places of ``[K, n, ...]`` along n in the order of their keys, the first of equal ones first.

    Keys of 32 bits are sorted with their places as one number: several times faster than a stable sort.
    """
    n = keys.shape[1]
    if keys.dtype.itemsize == 8 or n >= 1 << 32:
        return np.argsort(keys, axis=1, kind="stable")
    places = np.arange(n, dtype=np.uint64).reshape(1, n, *[1] * (keys.ndim - 2))
    both = keys.astype(np.uint64)
    both <<= np.uint64(32)
    both |= places
    both.sort(axis=1)
    both &= np.uint64(0xFFFFFFFF)
    return both.view(np.int64)


@dataclass(frozen=True, kw_only=True)
class DellaLinear(Sparse):
    r"""Keep each element of a delta with a probability that grows with its rank in the row, rescale, and add up.

    .. math:: b + \lambda \sum_i w_i r_i\, m_i \odot (x_i - b), \quad m_i \sim \text{Bernoulli}(p_i), \quad
              p_i = \rho_i - \epsilon_i + 2 \epsilon_i \frac{\operatorname{rank}}{n - 1}

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``; ranks run along the second dimension (of a matrix: in each row), those of a
    tensor of fewer dimensions over all of it, as in mergekit.
    Numerics: ranks are exact, of equal magnitudes the first one has the lower; a row of one element has the
    probability ``density``. Masks are a function of (seed, tensor, model, element); probabilities are multiples of
    1/65536. The rescale is ``sum |d| / sum |m d|`` of the tensor; everything else as breadcrumbs.
    Paper: Deep et al. 2024, "DELLA-Merging", arXiv 2406.11617.
    """

    name = "della_linear"
    summary = "Random sparsification of deltas by magnitude ranks, then task arithmetic."
    formula = "out = b + lambda sum_i w_i r_i m_i d_i, m_i ~ Bernoulli(density_i - epsilon_i .. density_i + epsilon_i)"
    paper = "https://arxiv.org/abs/2406.11617"
    contract = Contract("required")
    cases: ClassVar[tuple[dict[str, Any], ...]] = (
        {"weight": [1.0, 0.5, 0.8], "density": [0.3, 0.5, 0.0], "epsilon": [0.1, 0.4, 0.1]},
        {"weight": [0.6, 0.4], "density": [1.0, 0.66], "normalize": True, "lambda": 1.3, "models": 2},
        {"weight": [0.6, 0.4], "models": 2},
    )

    epsilon: tuple[float, ...] = per_model("how far the least and the most likely are from the density", 0.15, low=0.0)
    rescale: bool = shared("restore the sum of magnitudes that the drop took", default=True)

    @property
    def random(self) -> bool:
        """Where anything is dropped."""
        return any(0 < x < 1 for x in self.density)

    def thresholds(self, keys: blocks.Keys, model: int) -> npt.NDArray[np.int32]:
        """Which 16-bit random numbers keep an element of ``[K, n, ...]``, ranked along n: those below this."""
        order, n = ranked(keys), keys.shape[1]
        share = np.arange(n) / (n - 1) if n > 1 else np.array([0.5])
        density, epsilon = self.density[model], self.epsilon[model]
        of_rank = np.floor((density - epsilon + 2 * epsilon * share) * 65536 + 0.5).clip(min=1).astype(np.int32)
        out = np.empty(order.shape, np.int32)
        np.put_along_axis(out, order, of_rank.reshape(1, -1, *[1] * (order.ndim - 2)), axis=1)
        return out

    def keep(self, keys: blocks.Keys, op: Op, model: int, draw: Draw) -> blocks.Mask:
        """At random, large ones rather than small ones."""
        shape = op.spec.shape if len(op.spec.shape) > 1 else (1, op.spec.numel)
        out = np.zeros(op.spec.numel, np.bool_)
        if self.density[model] <= 0 or not len(out):
            return out
        each = len(out) // shape[0]
        step = max(1, ROWS // each) * each
        for first in range(0, len(out), step):
            some = keys[first : first + step].reshape(-1, *shape[1:])
            noise = draw(op.key, op.spec.models[model], DROP, first, some.size)
            out[first : first + step] = noise < self.thresholds(some, model).reshape(-1)
        return out

    def workspace(self, spec: Spec) -> int:
        """And what ranks are found in: 32 bytes for each element that is ranked at a time."""
        each = spec.numel // spec.shape[0] if len(spec.shape) > 1 and spec.numel else spec.numel
        return super().workspace(spec) + 32 * min(spec.numel, max(ROWS, each)) if self.thins else 0

    def check(self, spec: Spec) -> list[str]:
        """Refuses probabilities that are none, as mergekit does."""
        return [
            f"{self.name}: density {p:g} and epsilon {e:g} make probabilities {p - e:g} .. {p + e:g}; "
            "expected density - epsilon > 0 and density + epsilon < 1"
            for p, e in dict.fromkeys(zip(self.density, self.epsilon, strict=True))
            if 0 < p < 1 and not 0 < p - e <= p + e < 1
        ]


@dataclass(frozen=True, kw_only=True)
class Della(DellaLinear):
    r"""Keep each element of a delta with a probability that grows with its rank in the row, then elect as TIES does.

    .. math:: b + \lambda\,\frac{\sum_{i \in A} w_i d_i}{\sum_{i \in A} w_i}, \quad d_i = r_i\, m_i \odot (x_i - b)

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``.
    Numerics: the drop of della_linear, then the election of ties; deltas that are dropped have no vote.
    Paper: Deep et al. 2024, "DELLA-Merging", arXiv 2406.11617.
    """

    name = "della"
    summary = "Random sparsification of deltas by magnitude ranks, then sign election."
    formula = "out = b + lambda sum_A w_i r_i m_i d_i / sum_A w_i, m_i ~ Bernoulli(density_i +- epsilon_i by rank)"
    paper = "https://arxiv.org/abs/2406.11617"
    contract = Contract("required")
    elects: ClassVar[bool] = True
    cases: ClassVar[tuple[dict[str, Any], ...]] = (
        {"weight": [1.0, 0.5, 0.8], "density": [0.3, 0.5, 1.0], "epsilon": 0.1},
        {"weight": [0.6, 0.4], "normalize": False, "delta_dtype": "base", "models": 2},
    )

    normalize: bool = shared("divide by the weights of what agrees; false sums", default=True)
