"""The k-th largest magnitudes of whole small tensors, without a sort and without the host.

``(key, keep, tied)`` are the key of the k-th largest ``|x_i - b|`` (rounded and dropped as asked) of a tensor, how many
elements at it belong to the k largest, and how many there are. One pass, ``2 b`` bytes read per element and model.
Tiling: one program per tensor and model holds all keys of the tensor in registers, and finds the threshold bit by bit:
31 counts of keys (63 in fp64).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._call import Call, Place
from ._jit import at, load, magnitude
from ._keep import delta, drop

LEAST, MOST = 1024, 16_384
"""Elements of the smallest and the largest program, one kernel for each power of two: 32 keys in the registers of each
of 512 threads. (A whole tile would fill the register file; twice as many spill.) In fp64 half of that."""


@triton.jit
def kth_kernel(
    out,
    table,
    model_index,
    bern,
    ranks,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    WIDE: tl.constexpr,
    BITS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (s, i), one tensor and model: (key, keep, tied) into out int64 ``[P, N, STRIDE]``."""
    N: tl.constexpr = M - 1
    s = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    row = table + s * (7 + M)
    length = tl.load(row + 1).to(tl.int32)
    at_model = tl.load(row + 5) * N + i
    k = tl.load(ranks + at_model)
    if (k > 0) & (k < length):
        e = tl.load(row + 2)
        key = tl.load(row + 4)
        offs = tl.arange(0, BLOCK)
        mask = offs < length
        b = load(at(tl.load(row + 7), tl.zeros((), tl.int64), CODES & 15, False), 0, offs, mask, WIDE, False)
        mine = tl.load(row + 8 + i)
        d = b
        for j in tl.static_range(N):
            if j == i:
                p = at(mine, tl.zeros((), tl.int64), (CODES >> (4 * j + 4)) & 15, False)
                d = delta(p, 0, offs, mask, b, ROUND, WIDE, False)
        if DROP:
            d = drop(d, key, e, tl.load(model_index + i), tl.load(bern + at_model), BLOCK, False)
        keys = tl.where(mask, magnitude(d), -1)
        bound = tl.zeros((), keys.dtype)
        one = tl.full((), 1, keys.dtype)
        for bit in tl.range(0, BITS):
            higher = bound | (one << (BITS - 1 - bit))
            enough = tl.sum((keys >= higher).to(tl.int32), axis=0) >= k
            bound = tl.where(enough, higher, bound)
        above = tl.sum((keys > bound).to(tl.int32), axis=0).to(tl.int64)
        tied = tl.sum((keys == bound).to(tl.int32), axis=0).to(tl.int64)
        to = out + at_model * STRIDE
        tl.store(to, bound.to(tl.int64))
        tl.store(to + 1, k - above)
        tl.store(to + 2, tied)


def kth(
    call: Call,
    out: Place,
    table: Place,
    model_index: Place,
    bern: Place,
    ranks: Place,
    *,
    inputs: int,
    codes: int,
    round_code: int,
    drop: bool,
    wide: bool,
    most: int,
) -> None:
    """Adds the launch.

    Args:
        call: that it belongs to.
        out: int64 ``[P, N, 3]`` or wider, zeros: written where something is asked.
        table: int64 ``[S, 7 + M]``: whole tensors of at most :data:`MOST` elements (half in fp64).
        model_index: int32 ``[N]``.
        bern: int32 ``[P, N]``.
        ranks: int64 ``[P, N]``; nothing is asked where one is not inside 0 .. length.
        inputs: M = N + 1, the base included.
        codes: packed type codes of the inputs.
        round_code: type that task vectors are rounded to, -1 for none.
        drop: whether the Bernoulli drop comes first.
        wide: work in fp64.
        most: elements of the largest of the tensors.
    """
    block = max(LEAST, 1 << max(0, most - 1).bit_length())
    warps = max(4, min(16, block // 1024))
    args = (out, table, model_index, bern, ranks)
    flags = (inputs, codes, round_code, drop, wide, 63 if wide else 31, out.shape[-1], block)
    call.launch(kth_kernel, (table.shape[0], inputs - 1), args, *flags, num_warps=warps)
