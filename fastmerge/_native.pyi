# ruff: noqa: PYI021 (the extension itself carries no docstrings)
"""Native kernels and file transfers.

Arrays are C-contiguous and of exactly the type named; everything else raises :class:`ValueError`. Every call
releases the GIL and runs on the calling thread. ``table`` is int64 ``[S, 7 + M]`` (see
:class:`fastmerge.methods.base.Segments`), ``ins`` int32 ``[M]`` type codes (0 fp64, 1 fp32, 2 fp16, 3 bf16); P rows
of parameters, N = M - 1 models, R rows of partials, one per tile.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

_Row = TypeVar("_Row", bound=tuple[Any, ...])
_I32: TypeAlias = npt.NDArray[np.int32]
_I64: TypeAlias = npt.NDArray[np.int64]
_U16: TypeAlias = npt.NDArray[np.uint16]
_U32: TypeAlias = npt.NDArray[np.uint32]
_U64: TypeAlias = npt.NDArray[np.uint64]
_F32: TypeAlias = npt.NDArray[np.float32]
_F64: TypeAlias = npt.NDArray[np.float64]
_Keys: TypeAlias = npt.NDArray[Any]

def combine(
    table: _I64,
    ins: _I32,
    out_code: int,
    coef: _F64,
    scale: _F64,
    delta: bool,
    per_row: bool,
    nonfinite: _I64,
    far: bool = False,
    wide: bool = False,
) -> None:
    """``sum c_i x_i / div``, or ``b + lambda (sum c_i (x_i - b) / div)``; coef [P, M], scale [P, 2], nonfinite [S].

    The parameter row is the segment's group, or group + e // row with ``per_row``. Counts of results that are not
    finite are added to ``nonfinite``. Results that are ``far``, as large ones always are, are written past the caches.
    ``wide`` computes in fp64, whatever the inputs are.
    """

def gram(table: _I64, ins: _I32, partials: _F64, delta: bool, diff: bool, per_row: bool) -> None:
    """Inner products of every tile into partials [R, columns], from row ``stats`` of each segment on.

    Columns: the upper triangle by rows, then ``sum (x0 - x1)^2`` with ``diff``.
    """

def gram_kept(table: _I64, ins: _I32, partials: _F64, model_index: _I32, bern: _I32, thr: _U64, cut: _I64) -> None:
    """The same of deltas, as far as variance keeps them: thr [P, 1], cut [P, 1, 3], of ties by index."""

def dot(table: _I64, ins: _I32, partials: _F64) -> None:
    """``sum g (x_i - x_0)`` of every tile into partials [R, N], N = M - 2, from row ``stats`` of each segment on.

    Input 0 is the base, the last is the gradient g; products in the work type, sums in the written order.
    """

def fold(partials: _F64, first: _I64) -> _F64:
    """Ordered fp64 sums of the rows [first[g], first[g + 1]): [G, columns]."""

def delta_keys(
    table: _I64,
    ins: _I32,
    round_code: int,
    drop: bool,
    model_index: _I32,
    bern: _I32,
    out: _Keys,
    variance: bool = False,
) -> None:
    """Magnitude keys of all elements of all segments, uint32 (uint64 where an input is fp64) [elements, N].

    With ``variance``, here and below, one key in place of N: of the sum of the squared differences of all pairs of
    models. Nothing is rounded or dropped then.
    """

def count(
    table: _I64,
    ins: _I32,
    round_code: int,
    drop: bool,
    model_index: _I32,
    bern: _I32,
    lo: _U64,
    hi: _U64,
    counts: _I64,
    keys: _Keys,
    where: _I64,
    used: _I64,
    variance: bool = False,
) -> None:
    """Per tile and model [R, N, 4]: keys above hi, at hi, at lo (0 where lo == hi), strictly between.

    Those strictly between are appended to keys [N, cap] and where [N, cap, 2] (group, e) from ``used`` [N] on; past
    cap they are only counted.
    """

def kth(
    table: _I64,
    ins: _I32,
    round_code: int,
    drop: bool,
    model_index: _I32,
    bern: _I32,
    ranks: _I64,
    thr: _U64,
    found: _I64,
    variance: bool = False,
) -> None:
    """The ``ranks`` [P, N] largest keys of whole tensors into thr [P, N], and of the ties found [P, N, 4].

    found: how many ties belong to the k largest, how many there are, the tile of the first that does not, and how
    many that do lie in that tile. Nothing is asked where a rank is not inside 0 .. length; a query that is not
    settled keeps its 0 ties.
    """

def l1(
    table: _I64,
    ins: _I32,
    round_code: int,
    drop: bool,
    trim: bool,
    model_index: _I32,
    bern: _I32,
    thr: _U64,
    cut: _I64,
    sums: _F64,
    bits: _U32 | None = None,
    given: bool = False,
    wide_sums: bool = False,
) -> None:
    """Tile sums of |d| and of |d| where kept, sums [R, N, 2].

    bits [blocks, N, 32], of the 1024 elements of each block of the table in turn, receive what the drop keeps, or
    say it where they are given. ``wide_sums`` adds the lanes of a tile in fp64.
    """

def votes(
    table: _I64,
    ins: _I32,
    round_code: int,
    drop: bool,
    trim: bool,
    model_index: _I32,
    bern: _I32,
    thr: _U64,
    cut: _I64,
    elect: int,
    split: bool,
    f: _F64,
    counts: _I64,
    wide_sums: bool = False,
) -> None:
    """Elements per tile whose vote is above and below 0, counts [R, 2]; f and wide_sums as in :func:`consensus`."""

def consensus(
    table: _I64,
    ins: _I32,
    out_code: int,
    round_code: int,
    drop: bool,
    trim: bool,
    model_index: _I32,
    bern: _I32,
    thr: _U64,
    cut: _I64,
    elect: int,
    split: bool,
    zero: int,
    merge: int,
    f: _F64,
    scale: _F64,
    nonfinite: _I64,
    bits: _U32 | None = None,
    wide_sums: bool = False,
    variance: bool = False,
) -> None:
    """``b + lambda mix`` of the kept, weighted, elected deltas.

    elect 0 none, 1 mass, 2 count; zero 0 plus, 1 majority, 2 base; merge 0 mean, 1 sum, 2 max; f [P, N, 3]
    (coefficient, gate, vote weight), scale [P, 3] (lambda, div, majority sign), nonfinite [S], added to; bits as l1
    left them for the same table. With ``wide_sums`` everything from the kept deltas on is fp64.
    """

def importance(table: _I64, ins: _I32, divergence: _F64, out: _Keys) -> None:
    """Divergences of whole rows of a base and a model, and ``|x - b|`` times them into out [elements] of the work type.

    That of row r goes to divergence [P], row ``group + r``, rounded to the work type.
    """

def fuse(table: _I64, ins: _I32, out_code: int, divergence: _F64, least: float, nonfinite: _I64) -> None:
    """``b + (x - b) m``; m is 1 where |x - b| times the row's divergence is at least ``least``, else 0."""

def replicate(table: _I64, ins: _I32, out_code: int, sigma: _F64, numbers: _I64, lines: _F32, nonfinite: _I64) -> None:
    """``x + sigma n`` for every output; table [S, 7 + E], sigma [P, E], numbers [E], lines [177, 2], nonfinite [S].

    The table's columns after that of the one input are the addresses of the outputs after the first. A sigma of 0
    converts, or copies bytes where the types agree. Counts of results that are not finite are added to ``nonfinite``,
    unless it is empty.
    """

def cuda_replicate(
    device: int,
    stream: int,
    table: _I64,
    ins: _I32,
    out_code: int,
    sigma: _F64,
    numbers: _I64,
    first: _I64,
    there: int,
    nonfinite: int,
) -> int:
    """The same on a CUDA device; only where :func:`has_cuda`. Returns a status, 0 for success, and does not wait.

    ``there`` is an address on the device that holds a copy of ``table``, ``first``, ``sigma``, ``numbers``, the lines
    of the normals and eight bytes that are 0, one after the other: this call checks all but the last two, allocates
    nothing and copies nothing. The kernel counts in the eight bytes, so they serve one launch. ``first`` [S + 1] counts
    tiles of 16 KB of an output, 2048 Philox blocks over its bytes per element. ``nonfinite`` is the address of [S]
    counters on the device, or 0.
    """

def cuda_error(status: int) -> str:
    """A status of :func:`cuda_replicate` in words; only where :func:`has_cuda`."""

def philox_u16(key: int, model: int, op: int, e0: int, n: int) -> _U16:
    """The 16 random bits of the elements e0 .. e0 + n."""

def philox4x32(counter: _U32, key: _U32) -> _U32:
    """One block of Philox4x32-10: counter [4], key [2] -> [4]."""

def count_nonfinite(address: int, n: int, code: int) -> int:
    """How many of n values at an address are NaN or infinite."""

def apart(x: int, x_code: int, y: int, y_code: int, n: int) -> tuple[int, int, float, float, float, float, float]:
    """Unequal pairs, pairs with NaN or Inf, the largest ``|x - y|``, and sums of x x, x y, y y and (x - y)^2, in fp64.

    From the addresses and types of two streams of ``n`` values. Pairs with NaN or Inf enter no sum.
    """

def peel(x: int, replica: int, drawn: int, share: float, n: int, code: int) -> None:
    """A replica of each of n numbers, of which the rest stays in x: :mod:`fastmerge.ops.replicas`.

    Addresses of fp32, fp64 for code 0, and of int8.
    """

def low_rank(
    out: int, left: int, right: int, x: int, scale: float, rows: int, columns: int, rank: int, stride: int, code: int
) -> None:
    """``out = x + scale (left right)`` in fp32, the sum in the order of ranks: :class:`fastmerge.ops.made.LowRank`.

    Addresses of fp32 ``[rows, columns]``, ``[rows, rank]`` and ``[rank, columns]``, whose rows are ``stride`` elements
    apart, and of ``[rows, columns]`` of the type ``code``, which is not fp64.
    """

def dequantise(table: int, rows: int, width: int, code: int) -> None:
    """Codes to fp32: ``(value - zero) * scale``, scale and zero by blocks of ``width`` columns.

    ``table`` is the address of int64 rows (address of the row's codes, first element, elements, address of the fp32
    scales of the row's blocks, of their zeros or 0, address of the result). Codes: 0 float8_e4m3fn, 1 float8_e5m2,
    2 int8, 3 int4 (+ 8), 4 float4_e2m1fn; those of 4 bits lie two in a byte, the first one low.
    """

def largest(table: int, rows: int, width: int) -> None:
    """The largest magnitude of each block, where it is above what is there; NaN is above all.

    ``table`` is the address of int64 rows (address of fp32 x, elements, address of one fp32 per block).
    """

def quantise(table: int, rows: int, width: int, code: int, divide: bool) -> tuple[float, float, float]:
    """fp32 to codes (0 or 4 of :func:`dequantise`): of ``x * factor``, or ``x / factor``; nearest even, saturating.

    ``table`` is the address of int64 rows (address of x, elements, of the fp32 factors of the row's blocks, of their
    scales, of the codes).

    Returns:
        Sums of ``x x`` and of ``(code scale - x)^2``, and the largest ``|code scale - x|``.
    """

def read_some(table: _I64, row: int, done: int) -> tuple[int, int, int]:
    """Reads rows (fd, offset, address, nbytes) in order from byte ``done`` of ``row`` on.

    Returns:
        (row, done, errno): where it stopped: at the end (row == R), at a short read (errno 0) or an error.
    """

def write_some(table: _I64, row: int, done: int) -> tuple[int, int, int]:
    """Writes rows (fd, offset, address, nbytes); otherwise as :func:`read_some`."""

def copy_some(table: _I64, row: int, done: int) -> tuple[int, int, int]:
    """Copies rows (fd in, offset in, fd out, offset out, nbytes) in the kernel; otherwise as :func:`read_some`."""

def move_some(table: _I64, row: int, done: int) -> tuple[int, int, int]:
    """Copies rows (source address, address, nbytes) in memory; none overlap; otherwise as :func:`read_some`."""

def resident(table: _I64) -> _I64:
    """For each row (fd, offset, address, nbytes) 1 where all of it is in the page cache or nobody can tell, else 0."""

def header_rows(
    raw: bytes, data_start: int, file: int, row: type[_Row], kind: Callable[[str, str, int], tuple[Any, Any, int]]
) -> tuple[int, list[_Row], int] | None:
    """The header of a safetensors file that is written as programs write it; None for any other.

    Such a one is compact JSON, maybe with ``__metadata__`` first, then the tensors in the order of their bytes, without
    holes, their names of 1 to 512 printable ASCII characters without escapes.

    Args:
        raw: the header.
        data_start: where the data starts in the file.
        file: number of the file.
        row: a class of tuples with the fields name, dtype, shape, file, offset, nbytes.
        kind: called once for each tag, sizes as they are written, and bytes; gives type, shape and bytes.

    Returns:
        Where the first tensor starts in ``raw``, the rows, and the end of the data. What comes before the first tensor
        and names that are there twice are still to be checked.
    """

def read_past(table: _I64, row: int, done: int) -> tuple[int, int, int]:
    """Reads rows (fd, offset, direct fd, address, nbytes) past the page cache, except for what is resident there.

    Offsets and addresses are congruent modulo 4096, and the blocks of 4096 around a row are written too. Everything
    before the returned place has been read; otherwise as :func:`read_some`.
    """

def isa() -> str:
    """The instruction set in use: baseline, v3, v4 or neon (the best that runs here, or FASTMERGE_ISA)."""

def set_isa(name: str) -> None:
    """Switches the instruction set of the process, for tests.

    Raises:
        ValueError: where it was not built or this machine cannot run it.
    """

def has_cuda() -> bool:
    """Whether CUDA kernels were built."""
