"""Device functions that every kernel family shares: loads, stores, keys, random lanes and the ordered fold.

The frozen arithmetic of single values, once for Triton. Everything is written so that the interpreter and the
compiler give the same bits: values are widened right after the load, bf16 is rounded with integers (the
interpreter's cast truncates), random numbers are integers, and sums have a written order. Nothing here uses
libdevice, inline assembly, fused multiply-add or approximate instructions. (Branches on constants need their
``else``, and a function one ``return``: the compiler takes what follows a ``return`` for reachable.)

Vocabulary of the kernels: ``table`` int64 ``[S, 7 + M]`` is the segment table, ``items`` int64 ``[T, 5]`` says what
one program works on (segment, first element relative to the segment, elements, parameter row, output row);
``CODES`` packs the type codes of the inputs, four bits each, base first (0 fp64, 1 fp32, 2 fp16, 3 bf16);
``WIDE`` is true where the arithmetic is fp64; ``PLAIN`` is true where every address is a multiple of 16 bytes and
every block is full, so that all accesses are unmasked and 128 bits wide.
"""

import triton
import triton.language as tl

TILE = 65_536
"""Elements per tile of every ordered sum."""

LANES = 2_048
"""Running sums of a tile; lane ``j`` adds elements ``j, j + 2048, ...``."""

HEADER = 7
"""Columns of a segment row before its input addresses: out, length, e0, row, key, group, stats."""

ITEM = 5
"""Columns of a work item: segment, start, count, parameter row, output row."""


@triton.jit
def typed(address, CODE: tl.constexpr, PLAIN: tl.constexpr):
    """The address as a pointer to elements of type ``CODE``; bf16 as bits (uint16), see :func:`load`."""
    if CODE == 0:
        p = address.to(tl.pointer_type(tl.float64), bitcast=True)
    elif CODE == 1:
        p = address.to(tl.pointer_type(tl.float32), bitcast=True)
    elif CODE == 2:
        p = address.to(tl.pointer_type(tl.float16), bitcast=True)
    else:
        p = address.to(tl.pointer_type(tl.uint16), bitcast=True)
    if PLAIN:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def at(address, start, CODE: tl.constexpr, PLAIN: tl.constexpr):
    """Pointer to element ``start`` (int64) of the array at ``address``."""
    if CODE == 0:
        offset = start * 8
    elif CODE == 1:
        offset = start * 4
    else:
        offset = start * 2
    return typed(address + offset, CODE, PLAIN)


@triton.jit
def load(p, done, offs, mask, WIDE: tl.constexpr, PLAIN: tl.constexpr):
    """Elements ``p[done + offs]`` widened exactly to the work type; +0 where the mask is off.

    bf16 is widened by a shift of its bits: the interpreter's own cast loses subnormal numbers.
    """
    p = p + done
    if PLAIN:
        x = tl.load(tl.multiple_of(p, 16) + offs, eviction_policy="evict_first")
    else:
        x = tl.load(p + offs, mask=mask, other=0)
    if x.dtype == tl.uint16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float64 if WIDE else tl.float32)


@triton.jit
def round_bf16(x):
    """fp32 -> the bits (uint16) of the nearest bf16, ties to even; every NaN is 0x7fc0."""
    u = x.to(tl.uint32, bitcast=True)
    r = (u + ((u >> 16) & 1) + 0x7FFF) >> 16
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, r).to(tl.uint16)


@triton.jit
def round_odd(x):
    """fp64 -> fp32 rounded to odd, so that a second rounding to 16 bits equals a single one."""
    y = x.to(tl.float32)
    back = y.to(tl.float64)
    u = y.to(tl.uint32, bitcast=True)
    above = (tl.abs(back) > tl.abs(x)).to(tl.uint32)
    odd = (u - above) | 1
    return tl.where((back != x) & (x == x), odd, u).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, CODE: tl.constexpr):
    """The work type rounded once to type ``CODE``: its bits as an unsigned integer, with canonical NaNs."""
    if CODE == 0:
        u = tl.where(x == x, x.to(tl.float64).to(tl.uint64, bitcast=True), 0x7FF8000000000000)
    elif CODE == 1:
        u = tl.where(x == x, x.to(tl.float32).to(tl.uint32, bitcast=True), 0x7FC00000)
    elif CODE == 2:
        u = tl.where(x == x, x.to(tl.float16).to(tl.uint16, bitcast=True), 0x7E00).to(tl.uint16)
    elif x.dtype == tl.float64:
        u = round_bf16(round_odd(x))
    else:
        u = round_bf16(x)
    return u


@triton.jit
def widen(u, CODE: tl.constexpr, WIDE: tl.constexpr):
    """Bits of type ``CODE`` back to the work type, exactly."""
    if CODE == 0:
        x = u.to(tl.float64, bitcast=True)
    elif CODE == 1:
        x = u.to(tl.float32, bitcast=True)
    elif CODE == 2:
        x = u.to(tl.float16, bitcast=True)
    else:
        x = (u.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float64 if WIDE else tl.float32)


@triton.jit
def unfit(u, CODE: tl.constexpr):
    """1 where the bits of type ``CODE`` are an infinity or a NaN, else 0 (int32)."""
    if CODE == 0:
        wrong = (u & 0x7FF0000000000000) == 0x7FF0000000000000
    elif CODE == 1:
        wrong = (u & 0x7F800000) == 0x7F800000
    elif CODE == 2:
        wrong = (u & 0x7C00) == 0x7C00
    else:
        wrong = (u & 0x7F80) == 0x7F80
    return wrong.to(tl.int32)


@triton.jit
def store(p, offs, mask, x, bad, CODE: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    """Rounds ``x`` once into ``p[offs]``; adds the number of results that are not finite to ``bad`` (int64)."""
    u = narrow(x, CODE)
    wrong = unfit(u, CODE)
    if CODE == 0:
        y = u.to(tl.float64, bitcast=True)
    elif CODE == 1:
        y = u.to(tl.float32, bitcast=True)
    elif CODE == 2:
        y = u.to(tl.float16, bitcast=True)
    else:
        y = u
    if PLAIN:
        tl.store(p + offs, y, cache_modifier=".cs")
    else:
        tl.store(p + offs, y, mask=mask)
        wrong = tl.where(mask, wrong, 0)
    # Neighbours of 16 bytes belong to one thread: no shuffle, no barrier, and an atomic only where something is wrong.
    NEAR: tl.constexpr = 2 if CODE == 0 else (4 if CODE == 1 else 8)
    some = tl.sum(tl.reshape(wrong, (BLOCK // NEAR, NEAR)), axis=1)
    tl.atomic_add(bad + tl.zeros((BLOCK // NEAR,), tl.int32), some.to(tl.int64), mask=some > 0, sem="relaxed")


@triton.jit
def divide(x, y):
    """IEEE quotient of two blocks; ``/`` is that for fp64 only."""
    if x.dtype == tl.float64:
        q = x / y
    else:
        q = tl.div_rn(x, y)
    return q


@triton.jit
def magnitude(d):
    """Key that orders |d| as a signed integer (int32, fp64: int64); every NaN has the same, above infinity."""
    if d.dtype == tl.float64:
        k = tl.minimum(d.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, 0x7FF8000000000000)
    else:
        k = tl.minimum(d.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7FC00000)
    return k


@triton.jit
def random16(key, e, model, OP: tl.constexpr, BLOCK: tl.constexpr, PLAIN: tl.constexpr):
    """16 random bits (int32, 0 .. 65535) of elements ``e .. e + BLOCK - 1``: Philox4x32-10.

    Counter (lo32(e >> 3), hi32(e >> 3), model, op), key (lo32, hi32); element e takes half ``e & 1``, low first,
    of word ``(e >> 1) & 3``. Where ``e`` is a multiple of 8 (``PLAIN``) one call serves 8 elements; else each
    element makes its own.
    """
    if PLAIN:
        n = (e >> 3) + tl.arange(0, BLOCK // 8)
    else:
        each = e + tl.arange(0, BLOCK)
        n = each >> 3
    lo = (n & 0xFFFFFFFF).to(tl.uint32)
    hi = (n >> 32).to(tl.uint32)
    op = tl.full(lo.shape, OP, tl.uint32)
    who = tl.zeros(lo.shape, tl.uint32) + model.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key.to(tl.uint64, bitcast=True), lo, hi, who, op)
    if PLAIN:
        w = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [n, e bit 2, e bit 1]
        u = tl.reshape(tl.join(w & 0xFFFF, w >> 16), (BLOCK,))
    else:
        word = ((each >> 1) & 3).to(tl.int32)
        w = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
        u = tl.where((each & 1) == 1, w >> 16, w & 0xFFFF)
    return u.to(tl.int32)


@triton.jit
def fold(x, LANES: tl.constexpr):
    """Sum of ``LANES`` (2048) lanes by halves: lane j += lane j + 1024, then 512, ..., 1.

    A sum over an axis of length two is one addition, and a + b == b + a: the order is fixed by the shape, not by
    the layout or the compiler. (On sm_90 212 instructions a thread more than ``tl.sum``, of unwritten order.)
    """
    for s in tl.static_range(11):
        x = tl.sum(tl.reshape(x, (2, LANES >> (s + 1))), axis=0)
    return tl.sum(x, axis=0)
