"""TIES: trim small task vectors, elect a sign per element, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastmerge.methods.base import REQUIRED, Contract, per_model, shared
from fastmerge.methods.deltas import PAPER, PEFT, SNIPPET, Election
from fastmerge.ops.consensus.rules import Consensus

if TYPE_CHECKING:
    from fastmerge.ops.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Ties(Election):
    r"""Trim each model's delta to its largest magnitudes, elect a sign per element, average what agrees.

    .. math:: b + \lambda\,\frac{\sum_{i \in A} w_i d_i}{\sum_{i \in A} w_i}, \quad
              A = \{i : \operatorname{sign}(w_i d_i) = s\}, \quad s = \operatorname{sign} \sum_i w_i d_i

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``; thresholds per tensor, or one for the whole model.
    Numerics: deltas in fp32 (fp64 where an input is fp64; ``delta_dtype: base`` rounds them), exact selection of
    the k-th magnitude, everything else in fp32 (fp64 also where the result is fp32) in model order, one rounding. NaN
    deltas rank above infinity.
    With bf16 weights many elements tie at the threshold: ``ties`` says what happens to them.
    Paper: Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708.
    """

    name = "ties"
    summary = "Trim small deltas, elect a sign per element, merge the deltas that agree."
    formula = "out = b + lambda sum_A w_i d_i / sum_A w_i, A = models whose trimmed delta has the elected sign"
    paper = "https://arxiv.org/abs/2306.01708"
    contract = Contract("required")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "paper": {**PAPER, "weight": 1.0, "density": 0.2},
        "fusionbench": {**PAPER, "weight": 1.0, "density": 0.2, "merge": "sum", "lambda": 0.3},
        "peft": {"density": REQUIRED, **PEFT},
        "task_vectors": {**SNIPPET, "density": 0.2},
        "sdmecha": {**SNIPPET, "weight": 1.0, "density": 0.2, "elect": "count"},
    }
    cases = (
        {"weight": [1.0, 0.5, 0.8], "density": [0.2, 0.5, 0.8]},
        {"weight": [1.0, 0.7], "density": 0.4, "normalize": False, "rescale": True, "lambda": 0.9, "models": 2},
        {"weight": 1.0, "density": 0.3, "ties": "spread", "delta_dtype": "base"},
        {"weight": [1.0, -0.6, 0.4], "density": [0.0, 1.0, 0.5], "merge": "max"},
        {"weight": 1.0},
        {"preset": "paper"},
        {"preset": "fusionbench", "models": 4},
        {"preset": "peft", "weight": [0.9, 1.1], "density": 0.35, "models": 2},
        {"preset": "task_vectors"},
        {"preset": "sdmecha"},
        {"preset": "paper", "trim_scope": "tensor", "ties": "index"},
    )

    density: tuple[float, ...] = per_model("share of the task vector that is kept", 1.0, low=0.0, high=1.0)
    normalize: bool = shared("divide by what agrees; false sums", default=True)
    rescale: bool = shared("restore the sum of magnitudes that trimming took", default=False)

    def rules(self, spec: Spec) -> Consensus:
        """The parameters as the kernels take them."""
        trim = any(d < 1 for d in self.density)
        l1: Literal["trim", "none"] = "trim" if trim and self.rescale else "none"
        election = self.election(normalize=self.normalize)
        return super().rules(spec)._replace(density=self.density, trim=trim, l1=l1, **election)

    @property
    def random(self) -> bool:
        """Only thinned ties draw random numbers."""
        return self.ties == "spread"

    def warn(self, spec: Spec) -> list[str]:
        """Names weights that do not do what one may expect."""
        return [f"ties: {line}" for line in self.unusual(normalize=self.normalize)]
