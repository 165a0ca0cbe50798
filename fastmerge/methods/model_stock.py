"""Model Stock: how far to move towards the average follows from the angle between the fine-tunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from fastmerge.methods.base import Contract, Method, shared
from fastmerge.ops.segments import F64

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec


def ratio(stats: F64, models: int, angle: bool, clamp: bool, floor: float) -> F64:
    """How far each vector moves from the base (0) to the average (1).

    Args:
        stats: ``[P, N (N + 1) / 2]`` inner products of the offsets, pairs (0,0), (0,1), .., (1,1), ...
        models: N.
        angle: average the angles instead of their cosines.
        clamp: limit the result to 0 .. 1.
        floor: least product of two norms.

    Returns:
        ``[P]``: ``N c / (1 + (N - 1) c)``; 0 at its pole.
    """
    import numpy as np

    from fastmerge.methods import angles

    column = {(i, j): n for n, (i, j) in enumerate((i, j) for i in range(models) for j in range(i, models))}
    total = np.zeros(len(stats))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for i in range(models):
            for j in range(i + 1, models):
                norms = np.sqrt(stats[:, column[i, i]]) * np.sqrt(stats[:, column[j, j]])
                norms = np.where(norms < floor, floor, norms)
                norms = np.where(norms == 0, 1.0, norms)
                c = np.clip(stats[:, column[i, j]] / norms, -1.0, 1.0)
                total = total + (angles.acos(c) if angle else c)
        mean = total / (models * (models - 1) // 2)
        c = angles.cos(mean) if angle else mean
        below = 1 + (models - 1) * c
        pole = np.abs(below) < 1e-6
        t = np.where(pole, 0.0, models * c / np.where(pole, 1.0, below))
    return np.clip(t, 0.0, 1.0) if clamp else t


@dataclass(frozen=True, kw_only=True)
class ModelStock(Method):
    r"""Between the base and the average of N fine-tunes, as far as their mutual angle suggests.

    .. math:: t\,\bar w + (1 - t)\,w_0, \quad t = \frac{N\cos\theta}{1 + (N - 1)\cos\theta}

    Shapes: ``w_i: [*S]`` -> ``[*S]``; one angle per tensor, or per row of the last dimension.
    Numerics: inner products of the offsets in the ordered sum, the ratio in fp64, and
    ``b + t ((sum w_i - b) / N)`` in fp32 (fp64 for fp64), one rounding. More than two models: the mean of the
    pairwise cosines (as its authors say), or of the angles (FusionBench). Products of norms below ``floor``
    are raised to it, which sends tiny updates towards the base (mergekit's behaviour). Offsets that are not finite, or
    whose squares overflow, are an error.
    Paper: Jang et al. 2024, "Model Stock: All we need is just a few fine-tuned models", arXiv 2403.19522.
    """

    name = "model_stock"
    summary = "Average of fine-tunes, pulled towards the base by the angle between them."
    formula = "out = t mean(w) + (1 - t) w0, t = N cos th / (1 + (N - 1) cos th)"
    paper = "https://arxiv.org/abs/2403.19522"
    contract = Contract("required", least=2)
    coded = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "paper": {"floor": 0.0},
        "fusionbench": {"cos_agg": "angle", "floor": 0.0},
    }
    cases = (
        {"models": 2},
        {"models": 3, "filter_wise": True},
        {"models": 4, "preset": "fusionbench"},
        {"models": 3, "preset": "paper", "clamp_t": "unit", "filter_wise": True},
    )

    filter_wise: bool = shared("one angle per row of the last dimension", default=False)
    cos_agg: Literal["cos", "angle"] = shared("what is averaged over pairs of models", "cos")
    clamp_t: Literal["none", "unit"] = shared("limit t to 0 .. 1", "none")
    floor: float = shared("least product of two offset norms", 1e-6, low=0.0)

    @classmethod
    def solve(cls, ops: Sequence[Op], stats: F64, rows: Sequence[int]) -> tuple[F64, F64]:
        """Coefficients ``[P, 1 + N]`` and scales (t, N) ``[P, 2]`` for all vectors of all tensors, in order."""
        import numpy as np

        from fastmerge.ops.gram import check_sums

        check_sums(ops, stats, rows)
        models = len(ops[0].spec.dtypes) - 1
        scale = np.full((len(stats), 2), float(models))
        ends = np.cumsum([0, *rows])
        for op, first, last in zip(ops, ends[:-1], ends[1:], strict=True):
            m = cast("ModelStock", op.spec.method)
            scale[first:last, 0] = ratio(stats[first:last], models, m.cos_agg == "angle", m.clamp_t == "unit", m.floor)
        return np.ones((len(stats), 1 + models)), scale

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """Inner products of the offsets of each vector, then the way from the base."""
        from fastmerge.ops import blocks

        spec = op.spec
        base, *others = blocks.work(inputs, spec)
        if not spec.numel:
            return blocks.finish(base, spec)
        rows = spec.rows if self.filter_wise else 1
        base, *offsets = (x.reshape(rows, -1) for x in (base, *(x - base for x in others)))
        _, scale = self.solve([op], blocks.gram(offsets), [rows])
        total = blocks.weighted_sum(offsets, [1.0] * len(offsets))
        mean = total / blocks.column(scale[:, 1], base)
        return blocks.finish(base + blocks.column(scale[:, 0], base) * mean, spec)

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """Gram of the offsets, solve, combine."""
        from fastmerge.ops.gram import GramProgram
        from fastmerge.ops.per_spec import PerSpec
        from fastmerge.ops.split import by_kind

        methods = PerSpec(lambda spec: cast("ModelStock", spec.method), ops)

        def steps(sequence: Any, vectors: Any, some: Sequence[Op]) -> tuple[Any, Any]:
            mine = PerSpec(lambda spec: cast("ModelStock", spec.method), some)
            angle, clamp = mine[0].cos_agg == "angle", mine[0].clamp_t == "unit"
            numbers = mine.rows(lambda m: (m.floor,))
            found: tuple[Any, Any] = sequence.model_stock(vectors, numbers, angle=angle, clamp=clamp)
            return found

        def build(some: list[int]) -> Program:
            per_row = methods[some[0]].filter_wise
            return GramProgram(kernels, [ops[i] for i in some], cls.solve, per_row=per_row, delta=True, steps=steps)

        kinds = PerSpec(lambda spec: cast("ModelStock", spec.method).kind, ops).all()
        return by_kind(kinds, build)

    @property
    def kind(self) -> tuple[bool, str, str]:
        """What tensors of one sequence have in common."""
        return self.filter_wise, self.cos_agg, self.clamp_t

    def grain(self, spec: Spec) -> Grain:
        """One angle per tensor or row."""
        return "row" if self.filter_wise else "tensor"
