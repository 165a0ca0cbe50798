"""Spherical interpolation of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from fastmerge.methods.base import Contract, Method, shared
from fastmerge.ops.segments import F64

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec

EPSILON = 1e-8
"""Vectors no longer than this count as unit vectors (mergekit's constant)."""


def angle(stats: F64, norm_a: F64, norm_b: F64, exact: npt.NDArray[np.bool_]) -> tuple[F64, F64]:
    """Cosine and angle of pairs of vectors.

    Args:
        stats: ``[P, 4]``: <a,a>, <a,b>, <b,b>, |a-b|^2.
        norm_a: ``[P]`` what the length of the first counts as.
        norm_b: of the second.
        exact: ``[P]`` whether that is what they are.
    """
    import numpy as np

    from fastmerge.methods import angles

    dot = np.minimum(np.maximum(stats[:, 1] / (norm_a * norm_b), -1.0), 1.0)
    apart = norm_a - norm_b
    chord2 = np.maximum(0.0, (stats[:, 3] - apart * apart) / (norm_a * norm_b))
    # Where the vectors are close, their difference knows the angle better than their product does.
    close = (dot > 0.5) & exact
    some = bool(close.any())
    theta = angles.chord_angle(chord2) if some else angles.acos(dot)
    if some and not close.all():
        theta = np.where(close, theta, angles.acos(dot))
    return np.where(close, 1.0 - chord2 / 2, dot), theta


def arc(t: F64, theta: F64, parallel: npt.NDArray[np.bool_]) -> F64:
    """Coefficients ``[P, 2]`` of two vectors on the arc between them, or where they are parallel on the line."""
    import numpy as np

    from fastmerge.methods import angles

    share = np.stack([1 - t, t])
    sines = angles.sin(np.concatenate([theta[None], share * theta]))
    return np.ascontiguousarray(np.where(parallel, share, sines[1:] / sines[0]).T)


def coefficients(stats: F64, t: F64, threshold: F64, every: F64) -> F64:
    """Blend weights of two vectors from their inner products.

    Args:
        stats: ``[P, 4]``: <a,a>, <a,b>, <b,b>, |a-b|^2.
        t: ``[P]`` position between a (0) and b (1).
        threshold: ``[P]`` |cosine| above which a pair counts as parallel.
        every: ``[P]`` number of the tensor that must be parallel in all rows for any row to be blended
            linearly; NaN where each row decides for itself.

    Returns:
        ``[P, 2]`` coefficients of a and b.
    """
    import numpy as np

    norm_a, norm_b = np.sqrt(stats[:, 0]), np.sqrt(stats[:, 2])
    zero = (norm_a <= EPSILON) | (norm_b <= EPSILON)
    norm_a, norm_b = np.where(norm_a <= EPSILON, 1.0, norm_a), np.where(norm_b <= EPSILON, 1.0, norm_b)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        cosine, theta = angle(stats, norm_a, norm_b, ~zero)
        parallel = (np.abs(cosine) > threshold) | (theta == 0)  # without an arc, whatever the threshold
        grouped = ~np.isnan(every)
        for g in set(every[grouped].tolist()):
            rows = every == g
            # Exactly parallel rows have no arc; they are blended linearly in any case.
            parallel[rows] = parallel[rows].all() | (np.abs(cosine[rows]) >= 1.0)
        return arc(t, theta, parallel)


@dataclass(frozen=True, kw_only=True)
class Slerp(Method):
    r"""Spherical interpolation of the base ``a`` and one other model ``b``; linear where they are parallel.

    .. math:: \frac{\sin((1-t)\theta)}{\sin\theta}\,a + \frac{\sin(t\theta)}{\sin\theta}\,b,
              \quad \cos\theta = \frac{\langle a, b\rangle}{|a||b|}

    Shapes: ``a, b: [*S]`` -> ``[*S]``; one angle per tensor, or per row of the last dimension.
    Numerics: inner products in the ordered sum (fp32 products, fp64 across tiles), the angle in fp64, taken
    from |a-b|^2 where the vectors are close; the blend in fp32 (fp64 for fp64), one rounding. Coefficients
    apply to the vectors as they are, so the norm is kept only where both have the same one. A vector of norm
    1e-8 or less counts as a unit vector. Inputs that are not finite, or whose
    squares overflow, are an error.
    Paper: Shoemake 1985, "Animating rotation with quaternion curves".
    """

    name = "slerp"
    summary = "Spherical interpolation of two models, per tensor or per row."
    formula = "out = sin((1-t) th)/sin th a + sin(t th)/sin th b; (1-t) a + t b where |cos th| > threshold"
    paper = "https://dl.acm.org/doi/10.1145/325165.325242"
    contract = Contract("required", least=1, most=1)
    coded = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "task_vectors": {"t": 0.5, "scope": "row", "fallback": "all_rows"},
    }
    cases = (
        {"t": 0.3},
        {"t": 0.0},
        {"t": 1.0},
        {"t": 1.25, "threshold": 1.0},
        {"t": 0.5, "threshold": 0.0},
        {"t": 0.35, "scope": "row"},
        {"preset": "task_vectors"},
    )

    t: float = shared("position between the base (0) and the other model (1)")
    scope: Literal["tensor", "row"] = shared("what one angle belongs to", "tensor")
    fallback: Literal["per_vector", "all_rows"] = shared(
        "linear for each parallel row, or only where all rows of the tensor are parallel", "per_vector"
    )
    threshold: float = shared("|cosine| above which vectors count as parallel", 0.9995, low=0.0, high=1.0)

    @classmethod
    def solve(cls, ops: Sequence[Op], stats: F64, rows: Sequence[int]) -> tuple[F64, F64]:
        """Coefficients ``[P, 2]`` and scales ``[P, 2]`` for all vectors of all tensors, in order."""
        import numpy as np

        from fastmerge.ops.gram import check_sums

        check_sums(ops, stats, rows)
        methods = [cast("Slerp", op.spec.method) for op in ops]
        t = np.repeat([m.t for m in methods], rows)
        threshold = np.repeat([m.threshold for m in methods], rows)
        every = np.repeat([float(i) if m.all_rows else np.nan for i, m in enumerate(methods)], rows)
        return coefficients(stats, t, threshold, every), np.ones((len(stats), 2))

    @property
    def kind(self) -> tuple[str, bool]:
        """What tensors of one sequence have in common."""
        return self.scope, self.all_rows

    @property
    def all_rows(self) -> bool:
        """Whether rows are blended linearly only together."""
        return self.scope == "row" and self.fallback == "all_rows"

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """Inner products of each vector, then the blend."""
        from fastmerge.ops import blocks

        spec = op.spec
        if not spec.numel:
            return blocks.finish(inputs[0].reshape(-1), spec)
        rows = spec.rows if self.scope == "row" else 1
        a, b = (x.reshape(rows, -1) for x in blocks.work(inputs, spec))
        coef, _ = self.solve([op], blocks.gram([a, b], diff=True), [rows])
        blends = [blocks.column(coef[:, i], a) for i in (0, 1)]
        return blocks.finish(blends[0] * a + blends[1] * b, spec)

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """Gram, solve, combine."""
        from fastmerge.ops.gram import GramProgram
        from fastmerge.ops.per_spec import PerSpec
        from fastmerge.ops.split import by_kind

        kinds = PerSpec(lambda spec: cast("Slerp", spec.method).kind, ops).all()

        def steps(sequence: Any, vectors: Any, some: Sequence[Op]) -> tuple[Any, Any]:
            methods = PerSpec(lambda spec: cast("Slerp", spec.method), some)
            numbers = methods.rows(lambda m: (m.t, m.threshold))
            found: tuple[Any, Any] = sequence.slerp(vectors, numbers, every=methods[0].all_rows)
            return found

        def build(some: list[int]) -> Program:
            return GramProgram(
                kernels,
                [ops[i] for i in some],
                cls.solve,
                per_row=kinds[some[0]][0] == "row",
                diff=True,
                delta=False,
                steps=steps,
            )

        return by_kind(kinds, build)

    def grain(self, spec: Spec) -> Grain:
        """One angle per tensor or row."""
        return "row" if self.scope == "row" else "tensor"

    def warn(self, spec: Spec) -> list[str]:
        """Names extrapolation."""
        return [] if 0 <= self.t <= 1 else [f"slerp: t = {self.t:g} is outside 0 .. 1 and extrapolates"]
