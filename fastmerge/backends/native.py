"""The kernel backend in C++: one single-threaded call at a time, with the GIL released."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from fastmerge.ops.kernels import U64, Brackets, Deltas, Found, Keep, Rules, Votes
from fastmerge.ops.segments import F64, I64, Segments
from fastmerge.ops.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

I32: TypeAlias = "npt.NDArray[np.int32]"

CODED = 4
"""What kernels call inputs that are codes and scales."""

_CODES: dict[tuple[int, ...], I32] = {}


def codes(segments: Segments) -> I32:
    """Input types as the kernels take them."""
    key = tuple([d.code for d in segments.dtypes])
    if segments.coded:
        key = tuple([CODED if c else code for code, c in zip(key, segments.coded, strict=True)])
    if key not in _CODES:
        import numpy as np

        _CODES[key] = np.array(key, np.int32)
    return _CODES[key]


def nonfinite(segments: Segments) -> I64:
    """The caller's counters of non-finite outputs, or ones to throw away."""
    if len(segments.nonfinite) == len(segments):
        return segments.nonfinite
    import numpy as np

    return np.zeros(len(segments), np.int64)


class NativeKernels:
    """The functions of the extension; see :class:`fastmerge.ops.kernels.Kernels`.

    Every table is fp64 and rounded once to the work type by the kernel.
    """

    def __init__(self) -> None:
        """Loads the extension.

        Raises:
            ImportError: where it was not built.
        """
        from fastmerge import _native

        self._native: Any = _native

    def supports(self, spec: Spec) -> str | None:
        """Every kernel is here."""
        return None

    @property
    def launcher(self) -> None:
        """None: kernels run at once."""

    def combine(
        self, segments: Segments, coef: F64, scale: F64, *, delta: bool, per_row: bool, wide: bool = False
    ) -> None:
        """Weighted sums into the output addresses."""
        s, bad = segments, nonfinite(segments)
        self._native.combine(s.table, codes(s), s.out_dtype.code, coef, scale, delta, per_row, bad, s.far, wide)

    def gram(self, segments: Segments, partials: F64, *, delta: bool, diff: bool, per_row: bool) -> None:
        """Inner products of every tile."""
        self._native.gram(segments.table, codes(segments), partials, delta, diff, per_row)

    def gram_kept(self, segments: Segments, keep: Keep, partials: F64) -> None:
        """Inner products of every tile, of what variance keeps of the task vectors."""
        deltas, _, thr, cut, *_ = keep
        self._native.gram_kept(segments.table, codes(segments), partials, deltas.models, deltas.bernoulli, thr, cut)

    def dot(self, segments: Segments, partials: F64) -> None:
        """Inner products of a gradient with the task vectors of every tile."""
        self._native.dot(segments.table, codes(segments), partials)

    def fold(self, partials: F64, first: I64) -> F64:
        """Ordered fp64 sums of row ranges."""
        out: F64 = self._native.fold(partials, first)
        return out

    def delta_keys(self, segments: Segments, deltas: Deltas, out: npt.NDArray[Any]) -> None:
        """Magnitude keys of all elements."""
        *about, variance = deltas
        self._native.delta_keys(segments.table, codes(segments), *about, out, variance)

    def count(self, segments: Segments, deltas: Deltas, brackets: Brackets, found: Found) -> None:
        """Counts and lists of keys per tile."""
        *about, variance = deltas
        self._native.count(segments.table, codes(segments), *about, *brackets, *found, variance)

    def kth(self, segments: Segments, deltas: Deltas, ranks: I64, thr: U64, found: I64) -> None:
        """Thresholds of whole tensors."""
        *about, variance = deltas
        self._native.kth(segments.table, codes(segments), *about, ranks, thr, found, variance)

    def l1(self, segments: Segments, keep: Keep, sums: F64) -> None:
        """Magnitudes of every tile before and after ``keep``."""
        self._native.l1(segments.table, codes(segments), *_flat(keep), sums, keep.bits, keep.given, keep.wide_sums)

    def lanes(self, key: int, model: int, op: int, e0: int, n: int) -> npt.NDArray[np.uint16]:
        """As :func:`fastmerge.philox.u16`."""
        out: npt.NDArray[np.uint16] = self._native.philox_u16(key, model, op, e0, n)
        return out

    def votes(self, segments: Segments, keep: Keep, votes: Votes, counts: I64) -> None:
        """Positive and negative votes of every tile."""
        self._native.votes(segments.table, codes(segments), *_flat(keep), *votes, counts, keep.wide_sums)

    def consensus(self, segments: Segments, keep: Keep, rules: Rules) -> None:
        """The merge of task vectors."""
        s, (votes, zero, merge, scale) = segments, rules
        self._native.consensus(
            s.table,
            codes(s),
            s.out_dtype.code,
            *_flat(keep),
            votes.elect,
            votes.split,
            zero,
            merge,
            votes.factors,
            scale,
            nonfinite(s),
            keep.bits,
            keep.wide_sums,
            keep.deltas.variance,
        )

    def importance(self, segments: Segments, divergence: F64, out: npt.NDArray[Any]) -> None:
        """Divergences of whole rows and importances of their elements."""
        self._native.importance(segments.table, codes(segments), divergence, out)

    def fuse(self, segments: Segments, divergence: F64, least: float) -> None:
        """The base, and the other model where it is important."""
        s = segments
        self._native.fuse(s.table, codes(s), s.out_dtype.code, divergence, least, nonfinite(s))

    def replicate(self, segments: Segments, sigma: F64, numbers: I64) -> None:
        """One input to E outputs, each with its noise."""
        from fastmerge.philox import normal_lines

        s = segments
        self._native.replicate(s.table, codes(s), s.out_dtype.code, sigma, numbers, normal_lines(), s.nonfinite)


def _flat(keep: Keep) -> tuple[Any, ...]:
    """The seven arguments that ``keep`` is in C++, beside the bits."""
    deltas, trim, thr, cut, *_ = keep
    return deltas.round_code, deltas.drop, trim, deltas.models, deltas.bernoulli, thr, cut
