"""What the host does before a launch: cut a segment table into work items and put tables on the device.

A *work item* is what one program (a sum) or one column of programs (an elementwise kernel) works on: int64 rows
of segment, first element relative to the segment, elements, parameter row, output row. Items are split in two by
speed, never by result: *unmasked* ones have 16-byte aligned addresses and only full blocks, so their kernel has no
masks and moves 128 bits per access; the rest (the last elements of a tensor, views at odd addresses) runs in the
masked variant of the same kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton

from ._jit import HEADER, LANES, TILE

I64 = npt.NDArray[np.int64]

SIZES = (8, 4, 2, 2)
"""Bytes per element of each type code."""

CONFIGS: dict[str, dict[str, int]] = {
    # Elementwise kernels: elements per program and warps. 2048 / 4 warps is two 128-bit accesses of bf16 per thread and
    # input: the scalar prologue over 16 elements. At the 128 registers of TIES with eight models (tests/kernels/aot.py)
    # 512 threads are resident with 288 bytes each in flight, by estimate three times what an H200 needs (48 KB);
    # programs no larger than 2048 keep small tensors out of the masked variant. Not measured on a GPU: the part `tune`
    # of bench/gpu compares.
    "combine": {"BLOCK": 2048, "num_warps": 4},
    "consensus": {"BLOCK": 2048, "num_warps": 4},
    "delta_keys": {"BLOCK": 2048, "num_warps": 4},
    # Tile kernels: one program per tile of 65,536, 2048 lanes a step. 8 warps hold 8 lanes per thread and column.
    "gram": {"BLOCK": LANES, "num_warps": 8},
    "l1": {"BLOCK": LANES, "num_warps": 8},
    "count": {"BLOCK": LANES, "num_warps": 8},
    "votes": {"BLOCK": LANES, "num_warps": 8},
    "cuts": {"BLOCK": LANES, "num_warps": 8},
}
"""Launch table: data, with the reason beside it. Results do not depend on it."""

INTERPRETER_BLOCK = 16_384
"""Elements per program of elementwise kernels in the interpreter, whose cost is per program."""

GRAM_PAIRS = 10
"""Inner products of one launch: 10 columns (four inputs) keep 80 running sums a thread, within 128 registers."""

L1_MODELS = 4
"""Models of one launch of the L1 sums: two running sums each."""


@dataclass(frozen=True, slots=True)
class Items:
    """Work items of one call, the unmasked ones and the masked ones, each int64 ``[T, 5]``."""

    unmasked: I64
    masked: I64

    def variants(self) -> list[tuple[bool, I64]]:
        """(UNMASKED, items) of each launch that has work."""
        return [(p, i) for p, i in ((True, self.unmasked), (False, self.masked)) if len(i)]

    def split(self, ties: npt.NDArray[np.bool_]) -> list[tuple[bool, bool, I64]]:
        """(UNMASKED, CUT, items) of each launch; ``ties``: whether ties are decided in an unmasked item."""
        every = ((True, False, self.unmasked[~ties]), (True, True, self.unmasked[ties]), (False, True, self.masked))
        return [(p, c, i) for p, c, i in every if len(i)]


def _runs(table: I64, per_row: bool) -> tuple[I64, I64, I64, I64, I64]:
    """Contiguous elements with one parameter row: a segment, or by row each row that it touches.

    Returns:
        Segment, start, length, parameter row and first output row of every run.
    """
    s = np.arange(len(table), dtype=np.int64)
    length, e0, row, group, stats = (table[:, c] for c in (1, 2, 3, 5, 6))
    if not per_row:
        return s, np.zeros_like(s), length, group, stats
    row = np.maximum(row, 1)
    first = e0 // row
    rows = np.where(length > 0, (e0 + length - 1) // row - first + 1, 0)
    s = np.repeat(s, rows)
    k = np.arange(len(s), dtype=np.int64) - np.repeat(np.cumsum(rows) - rows, rows)
    begin = np.maximum((first[s] + k) * row[s], e0[s])
    end = np.minimum((first[s] + k + 1) * row[s], (e0 + length)[s])
    tiles = -(-row // TILE)
    return s, begin - e0[s], end - begin, group[s] + first[s] + k, stats[s] + k * tiles[s]


def _tiles(table: I64, per_row: bool) -> I64:
    """Items of at most 65,536 elements: the tiles of every run; the output row is the tile's."""
    seg, start, length, prow, stat = _runs(table, per_row)
    n = -(-length // TILE)
    r = np.repeat(np.arange(len(seg), dtype=np.int64), n)
    t = np.arange(len(r), dtype=np.int64) - np.repeat(np.cumsum(n) - n, n)
    count = np.minimum(length[r] - t * TILE, TILE)
    return np.stack([seg[r], start[r] + t * TILE, count, prow[r], stat[r] + t], axis=1)


def _aligned(table: I64, items: I64, codes: Sequence[int], out_code: int, lanes: bool) -> npt.NDArray[np.bool_]:
    """Which items may be read and written 128 bits at a time (and, with random lanes, 8 elements per block)."""
    seg, start = items[:, 0], items[:, 1]
    ok = np.ones(len(items), bool)
    for i, code in enumerate(codes):
        ok &= (table[seg, HEADER + i] + start * SIZES[code]) % 16 == 0
    if out_code >= 0:
        ok &= (table[seg, 0] + start * SIZES[out_code]) % 16 == 0
    if lanes:
        e = table[seg, 2] + start
        ok &= (e % 8 == 0) & ((e >> 3) >> 32 == (e + items[:, 2] - 1 >> 3) >> 32)
    return ok


def tile_items(table: I64, codes: Sequence[int], *, block: int, per_row: bool = False, lanes: bool = False) -> Items:
    """One item per tile, for kernels whose programs sum a whole tile.

    Args:
        table: segment table int64 ``[S, 7 + M]``.
        codes: type code of each input.
        block: elements per step of the kernel; a unmasked tile is a multiple of it.
        per_row: tiles restart at each row, and the parameter row is group + row index.
        lanes: the kernel draws random numbers.
    """
    items = _tiles(table, per_row)
    unmasked = _aligned(table, items, codes, -1, lanes) & (items[:, 2] % block == 0)
    return Items(items[unmasked], items[~unmasked])


def element_items(
    table: I64,
    codes: Sequence[int],
    out_code: int,
    *,
    block: int,
    per_row: bool = False,
    lanes: bool = False,
    rows: bool = False,
) -> Items:
    """Items for elementwise kernels: a tile's full blocks are unmasked, what is left is masked.

    Args:
        table: segment table int64 ``[S, 7 + M]``.
        codes: type code of each input.
        out_code: type code of the output; -1 where the kernel does not write to the segment's address.
        block: elements per program.
        per_row: the parameter row is group + row index.
        lanes: the kernel draws random numbers.
        rows: the output row counts elements (``stats`` is that of the segment's first), not tiles.
    """
    items = _tiles(table, per_row)
    if rows:
        items[:, 4] = table[items[:, 0], 6] + items[:, 1]
    full = np.where(_aligned(table, items, codes, out_code, lanes), items[:, 2] // block * block, 0)
    unmasked, rest = items.copy(), items.copy()
    unmasked[:, 2] = full
    rest[:, 1] += full
    rest[:, 4] += full * rows
    rest[:, 2] -= full
    return Items(unmasked[full > 0], rest[rest[:, 2] > 0])


@dataclass(frozen=True, slots=True)
class Keep:
    """The keep pipeline of one call, on the device.

    Attributes:
        tables: model_index int32 ``[N]``, bern int32 ``[P, N]``, thr int32 (int64 where the work is fp64) ``[P, N]``,
            cut int64 ``[S, N]`` (element index from which ties are lost) and tie int32 ``[P, N]`` (-1: by cut).
        flags: ROUND, DROP, TRIM, SPREAD.
    """

    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    flags: tuple[int, bool, bool, bool]


def undecided(table: I64, items: I64, thr: npt.NDArray[np.uint64], cut: I64, *, wide: bool) -> npt.NDArray[np.bool_]:
    """Which items need every element's tie rule: ties thinned or cut inside, or a threshold that is a NaN's key.

    Args:
        table: segment table.
        items: int64 ``[T, 5]``.
        thr: ``[P, N]``.
        cut: ``[P, N, 3]`` (tile, rank, tie).
        wide: keys are of fp64.
    """
    first = table[items[:, 0], 2] + items[:, 1]
    last = first + items[:, 2] - 1
    tile, rank, tie = (cut[items[:, 3], :, c] for c in range(3))
    inside = (tile >= (first // TILE)[:, None]) & (tile <= (last // TILE)[:, None]) & (rank > 0)
    above = thr[items[:, 3]] > np.uint64(0x7FF0000000000000 if wide else 0x7F800000)
    some: npt.NDArray[np.bool_] = (inside | (tie >= 0) | above).any(axis=1)
    return some


def pack(codes: Sequence[int]) -> int:
    """Type codes as one integer, four bits each, input 0 lowest: a constexpr of the kernels."""
    word = 0
    for i, code in enumerate(codes):
        word |= int(code) << (4 * i)
    return word


def spread(items: I64, block: int) -> int:
    """Base-2 logarithm of the programs that each item of an elementwise launch gets."""
    return int(-(-int(items[:, 2].max()) // block) - 1).bit_length()


def bounds(keys: npt.NDArray[np.uint64], *, wide: bool) -> npt.NDArray[Any]:
    """Thresholds as signed keys, int32 (int64 where wide); one above every key stays so."""
    most = np.iinfo(np.int64 if wide else np.int32).max
    return np.minimum(keys, np.uint64(most)).astype(np.int64 if wide else np.int32)


def signed(array: Any) -> npt.NDArray[Any]:
    """The array, contiguous and writable, its unsigned integers as the signed ones of the same bits."""
    a = np.ascontiguousarray(array)
    if a.dtype == np.uint64:
        a = a.view(np.int64)
    elif a.dtype == np.uint32:
        a = a.view(np.int32)
    return a if a.flags.writeable else a.copy()


def upload(array: Any, device: torch.device) -> torch.Tensor:
    """A numpy array (or a tensor that is there already) on the device, without waiting for the copy."""
    if isinstance(array, torch.Tensor):
        return array
    t = torch.from_numpy(signed(array))
    # Pinned first: a copy from pageable memory waits for the stream, and the pinned block outlives the copy by itself.
    return t if device.type == "cpu" else t.pin_memory().to(device, non_blocking=True)


def fold_here(partials: npt.NDArray[np.float64], first: I64) -> npt.NDArray[np.float64]:
    """Ordered fp64 sums, from +0, of the row ranges of ``partials [R, C]`` that start at ``first [G + 1]``.

    Few long ranges are summed one by one, many short ones (rows) all at once.
    """
    out = np.zeros((len(first) - 1, partials.shape[1]))
    starts, counts = first[:-1], np.diff(first)
    most = int(counts.max(initial=0))
    with np.errstate(all="ignore"):
        if most > len(counts):
            for g, (start, end) in enumerate(zip(first[:-1].tolist(), first[1:].tolist(), strict=True)):
                if end > start:  # numpy adds up in order; + 0.0 makes the +0 of it that +0 + -0 is
                    out[g] = np.cumsum(partials[start:end], axis=0)[-1] + 0.0
            return out
        longest = np.argsort(-counts, kind="stable")
        left = int((counts > 0).sum())
        for k in range(most):
            while left and counts[longest[left - 1]] <= k:
                left -= 1
            some = longest[:left]
            out[some] += partials[starts[some] + k]
    return out


def chunks(items: torch.Tensor, programs: int, *, most: int = 2**31 - 1) -> list[torch.Tensor]:
    """The items in pieces of at most ``most``, whose programs fit one grid."""
    most = max(1, min(most, (2**31 - 1) // max(1, programs)))
    return [items[i : i + most] for i in range(0, len(items), most)]


OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Options of every launch: no multiply-add is ever contracted (design law L1)."""


def registers(*, fast: bool) -> dict[str, int]:
    """Options of a kernel of sums: how many registers it may take.

    At most 128 where speed counts, so that two programs share a multiprocessor (the compiler would take more);
    elsewhere all, so that nothing spills.
    """
    return {"maxnreg": 128 if fast else 255}


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU addresses (TRITON_INTERPRET=1 at import)."""
    return bool(triton.knobs.runtime.interpret)


def config(name: str) -> dict[str, int]:
    """Launch configuration of an elementwise kernel, the caller's to change."""
    cfg = CONFIGS[name]
    return {**cfg, "BLOCK": INTERPRETER_BLOCK} if interpreted() else {**cfg}
