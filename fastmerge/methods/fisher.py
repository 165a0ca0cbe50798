"""Fisher-weighted averaging: every element of every model counts as much as its Fisher information says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.errors import OutputError
from fastmerge.methods.base import Contract, per_input, shared
from fastmerge.methods.elementwise import Elementwise
from fastmerge.ops.elementwise import Array
from fastmerge.ops.segments import I64

if TYPE_CHECKING:
    from fastmerge.ops.spec import Op, Spec


@dataclass(frozen=True, kw_only=True)
class Fisher(Elementwise):
    r"""Average of models, weighted element by element with the diagonals of their Fisher information.

    The recipe lists pairs: each model, then the checkpoint that holds its Fisher diagonal under the same tensor names.

    .. math:: \frac{\sum_i w_i F_i x_i}{\sum_i w_i F_i}, \quad F_i = \max(f_i, \text{floor})

    Shapes: ``x_i, f_i: [*S]`` -> ``[*S]``; inputs x_1, f_1, x_2, f_2, ...
    Numerics: fp64 throughout, one rounding. Where the divisor is 0 (floor 0, and no model has information) the
    weights alone count. A negative f is an error. The result has the type that the models and the diagonals promote to,
    unless ``dtype`` or ``out_dtype`` says which.
    Paper: Matena and Raffel 2021, "Merging Models with Fisher-Weighted Averaging", arXiv 2111.09832.
    """

    name = "fisher"
    summary = "Average weighted by Fisher information; the recipe lists each model and then its diagonal."
    formula = "out = sum_i w_i F_i x_i / sum_i w_i F_i, F_i = max(f_i, floor); inputs x_1, f_1, x_2, f_2, ..."
    paper = "https://arxiv.org/abs/2111.09832"
    contract = Contract("ignored", least=2, pairs=True)
    cases = (
        {"models": 4},
        {"weight": [0.7, 1.0, 0.2, 1.0, 0.4, 1.0], "floor": 0.0},
        {"models": 2, "floor": 1e-3},
    )

    weight: tuple[float, ...] = per_input("coefficient of the model; of a diagonal nothing reads it", 1.0, low=0.0)
    floor: float = shared("least Fisher information of an element", 1e-6, low=0.0)

    def merged(self, op: Op, xs: list[Array], counts: I64) -> Array:
        """Weigh, add up, divide."""
        above = below = plain = np.zeros(len(xs[0]))
        weights = self.weight[::2]
        total = sum(weights)
        for w, x, f in zip(weights, xs[::2], xs[1::2], strict=True):
            if (f < 0).any():
                raise OutputError(
                    f"{op.name}: a Fisher diagonal holds a negative number; expected pairs of a model and its diagonal"
                )
            much = w * np.maximum(f.astype(np.float64), self.floor)
            above, below, plain = above + much * x, below + much, plain + w / total * x
        return np.where(below == 0, plain, above / below)

    def check(self, spec: Spec) -> list[str]:
        """Refuses weights that are all 0, and a tensor that half of a pair lacks."""
        if len(spec.dtypes) % 2:
            return ["fisher: expected a model and its Fisher diagonal for every tensor, got one alone"]
        return [] if any(self.weight[::2]) else ["fisher: all weights are 0"]

    def warn(self, spec: Spec) -> list[str]:
        """Names weights that nothing reads."""
        lost = any(w != 1 for w in self.weight[1::2])
        return ["fisher: the weight of a Fisher diagonal has no effect; give it to the model before it"] if lost else []
