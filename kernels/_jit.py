"""Device functions that every kernel family shares: loads, stores, keys, random lanes and the ordered fold.

The frozen arithmetic of single values, once for Triton. Everything is written so that the interpreter and the
compiler give the same bits: values are widened right after the load, bf16 is rounded with integers (the
interpreter's cast truncates), random numbers are integers, and sums have a written order. Nothing here uses
libdevice, inline assembly, fused multiply-add or approximate instructions. (Branches on constants need their
``else``, and a function one ``return``: the compiler takes what follows a ``return`` for reachable.)

Vocabulary of the kernels: ``table`` int64 ``[S, 7 + M]`` is the segment table, ``prefix`` and ``skip`` say what each
program works on (see :func:`place` and ``_launch.py``); ``CODES`` packs the type codes of the inputs, four bits each,
base first (0 fp64, 1 fp32, 2 fp16, 3 bf16); ``WIDE`` is true where the arithmetic is fp64; ``UNMASKED`` is true where
every address is a multiple of 16 bytes and every block is full, so that all accesses are unmasked and 128 bits wide.
"""

import triton
import triton.language as tl

TILE = 65_536
"""Elements per tile of every ordered sum."""

LANES = 2_048
"""Running sums of a tile; lane ``j`` adds elements ``j, j + 2048, ...``."""

HEADER = 7
"""Columns of a segment row before its input addresses: out, length, e0, row, key, group, stats."""

HARDWARE = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether casts from fp32 to 16 bits are the processor's: exact, but every NaN is 0x7fff. (From fp64 a NaN would keep
its sign and payload, so nothing is cast that way: see :func:`round_odd`.) The interpreter truncates to bf16."""


@triton.jit
def find(prefix, rows, at):
    """The last row r with ``prefix[r] <= at``: int64 ``[rows + 1]``, of which the row of ``at`` is not empty.

    The lanes of a warp look at 32 rows at a time, equally far apart: two rounds up to 1024 rows, three up to 32,768,
    each one load deep and without a barrier. (Halving takes 10 and 15 loads, one after the other.)
    """
    low = rows * 0
    step = rows
    while step > 1:
        step = (step + 31) // 32
        probe = low + tl.arange(0, 32) * step
        here = (probe < rows) & (tl.load(prefix + tl.minimum(probe, rows)) <= at)
        low += (tl.sum(here.to(tl.int32), axis=0) - 1) * step
    return low


@triton.jit
def place(
    prefix, skip, table, segments, M: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, UNMASKED: tl.constexpr
):
    """What this program works on.

    Returns:
        Segment (int64), its row of the table, first element relative to the segment (int64), elements, row of the
        tensor (0 but with ROWS), number of the unit within the tensor or row.
    """
    pid = tl.program_id(0)
    s = find(prefix, segments, pid).to(tl.int64)
    before = tl.load(prefix + s)
    unit = pid.to(tl.int64) - before
    row = table + s * (7 + M)
    length = tl.load(row + 1)
    begin = tl.zeros((), tl.int64)
    r = begin
    if ROWS:
        run = tl.maximum(tl.load(row + 3), 1)
        each = (tl.load(prefix + s + 1) - before) // (length // run)
        r = unit // each
        unit = unit - r * each
        begin = r * run
        length = begin + run
    if not UNMASKED:
        unit += tl.load(skip + s)
    start = begin + unit * UNIT
    count = tl.minimum(length - start, UNIT).to(tl.int32)
    return s, row, start, count, r, unit


@triton.jit
def typed(address, CODE: tl.constexpr, UNMASKED: tl.constexpr):
    """The address (or block of them) as pointers to elements of type ``CODE``; bf16 as bits, see :func:`load`."""
    if CODE == 0:
        p = address.to(tl.pointer_type(tl.float64), bitcast=True)
    elif CODE == 1:
        p = address.to(tl.pointer_type(tl.float32), bitcast=True)
    elif CODE == 2:
        p = address.to(tl.pointer_type(tl.float16), bitcast=True)
    else:
        p = address.to(tl.pointer_type(tl.uint16), bitcast=True)
    if UNMASKED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def at(address, start, CODE: tl.constexpr, UNMASKED: tl.constexpr):
    """Pointer to element ``start`` (int64) of the array at ``address``."""
    if CODE == 0:
        offset = start * 8
    elif CODE == 1:
        offset = start * 4
    else:
        offset = start * 2
    return typed(address + offset, CODE, UNMASKED)


@triton.jit
def load(p, done, offs, mask, WIDE: tl.constexpr, UNMASKED: tl.constexpr):
    """Elements ``p[done + offs]`` widened exactly to the work type; +0 where the mask is off.

    bf16 is widened by a shift of its bits: the interpreter's own cast loses subnormal numbers. Where accesses are
    UNMASKED it is read in pairs: the upper half is then one AND away from fp32 (as 16 bits: three instructions).
    """
    p = p + done
    if UNMASKED:
        if p.dtype.element_ty == tl.uint16:
            q = tl.multiple_of(p.to(tl.pointer_type(tl.uint32), bitcast=True), 16)
            w = tl.load(q + tl.arange(0, offs.shape[0] // 2), eviction_policy="evict_first")
            x = tl.reshape(tl.join(w << 16, w & 0xFFFF0000), (offs.shape[0],)).to(tl.float32, bitcast=True)
        else:
            x = tl.load(tl.multiple_of(p, 16) + offs, eviction_policy="evict_first")
    else:
        x = tl.load(p + offs, mask=mask, other=0)
        if x.dtype == tl.uint16:
            x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float64 if WIDE else tl.float32)


@triton.jit
def round_bf16(x):
    """fp32 -> the bits (uint16) of the nearest bf16, ties to even; a NaN stays one."""
    if HARDWARE:
        r = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    else:
        u = x.to(tl.uint32, bitcast=True)
        r = tl.where(x == x, (u + ((u >> 16) & 1) + 0x7FFF) >> 16, 0x7FFF).to(tl.uint16)
    return r


@triton.jit
def round_odd(x):
    """fp64 -> fp32 rounded to odd, so that a second rounding to 16 bits equals a single one; NaNs are canonical."""
    y = x.to(tl.float32)
    back = y.to(tl.float64)
    u = y.to(tl.uint32, bitcast=True)
    above = (tl.abs(back) > tl.abs(x)).to(tl.uint32)
    odd = (u - above) | 1
    return tl.where(x == x, tl.where(back != x, odd, u), 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, CODE: tl.constexpr):
    """The work type rounded once to type ``CODE``: its bits as an unsigned integer.

    A NaN is any NaN; of 16 bits it has a plus and the quiet bit.
    """
    if CODE == 0:
        u = x.to(tl.float64).to(tl.uint64, bitcast=True)
    elif CODE == 1:
        u = x.to(tl.float32).to(tl.uint32, bitcast=True)
    elif CODE == 2:
        if x.dtype == tl.float64:
            x = round_odd(x)
        u = x.to(tl.float16).to(tl.uint16, bitcast=True)
        if not HARDWARE:
            u = tl.where(x == x, u, 0x7FFF).to(tl.uint16)
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
def canonical_nan(u, CODE: tl.constexpr, PAIRS: tl.constexpr):
    """Bits of type ``CODE`` with canonical NaNs, and where they are an infinity or a NaN: 1, else 0.

    PAIRS of a 16-bit type are two in 32 bits, and so are their ones: adding the exponent's last place carries into the
    sign's bit exactly there. An infinity has no bits below the exponent, so clearing those below the quiet bit is
    harmless to it and leaves of 0x7fff the canonical NaN. What comes alone is compared instead: LLVM would make 16-bit
    additions of it, and ptxas up to 13.1.80 drops the constant of a packed one of which it needs a half.
    """
    if CODE == 0:
        wrong = (u & 0x7FF0000000000000) == 0x7FF0000000000000
        u = tl.where((u & 0x7FFFFFFFFFFFFFFF) > 0x7FF0000000000000, 0x7FF8000000000000, u)
        bad = wrong.to(tl.int32)
    elif CODE == 1:
        wrong = (u & 0x7F800000) == 0x7F800000
        u = tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, u)
        bad = wrong.to(tl.int32)
    elif not PAIRS:
        infinity: tl.constexpr = 0x7C00 if CODE == 2 else 0x7F80
        nan: tl.constexpr = 0x7E00 if CODE == 2 else 0x7FC0
        u = tl.where((u & 0x7FFF) > infinity, nan, u)
        bad = ((u & infinity) == infinity).to(tl.int32)
    else:
        one: tl.constexpr = 0x04000400 if CODE == 2 else 0x00800080
        low: tl.constexpr = 0x1FF if CODE == 2 else 0x3F
        bad = (((u & 0x7FFF7FFF) + one) >> 15) & 0x00010001
        u = u & ((bad * low) ^ 0xFFFFFFFF)
        bad = bad.to(tl.int32)
    return u, bad


@triton.jit
def store(p, offs, mask, x, bad, CODE: tl.constexpr, UNMASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Rounds ``x`` once into ``p[offs]``; adds the number of results that are not finite to ``bad`` (int64)."""
    u = narrow(x, CODE)
    # Neighbours of 16 bytes belong to one thread: no shuffle, no barrier, and an atomic only where something is wrong.
    if CODE >= 2 and UNMASKED:
        NEAR: tl.constexpr = 8
        a, b = tl.split(tl.reshape(u.to(tl.uint32), (BLOCK // 2, 2)))
        w, wrong = canonical_nan(a | (b << 16), CODE, True)
        q = tl.multiple_of(p.to(tl.pointer_type(tl.uint32), bitcast=True), 16)
        tl.store(q + tl.arange(0, BLOCK // 2), w, cache_modifier=".cs")
        some = tl.sum(tl.reshape(wrong, (BLOCK // 8, 4)), axis=1)
        some = (some & 0xFFFF) + (some >> 16)
    else:
        NEAR: tl.constexpr = 2 if CODE == 0 else (4 if CODE == 1 else 8)
        if CODE >= 2:
            u, wrong = canonical_nan(u.to(tl.uint32), CODE, False)
            y = u.to(tl.uint16)
        else:
            u, wrong = canonical_nan(u, CODE, False)
            y = u
        if CODE == 0:
            y = y.to(tl.float64, bitcast=True)
        elif CODE == 1:
            y = y.to(tl.float32, bitcast=True)
        elif CODE == 2:
            y = y.to(tl.float16, bitcast=True)
        if UNMASKED:
            tl.store(p + offs, y, cache_modifier=".cs")
        else:
            tl.store(p + offs, y, mask=mask)
            wrong = tl.where(mask, wrong, 0)
        some = tl.sum(tl.reshape(wrong, (BLOCK // NEAR, NEAR)), axis=1)
    ROWS: tl.constexpr = BLOCK // NEAR
    THREADS: tl.constexpr = tl.extra.cuda.num_threads() if HARDWARE else 32
    LAST: tl.constexpr = min(ROWS, THREADS)  # one row per thread
    some = tl.sum(tl.reshape(some, (ROWS // LAST, LAST)), axis=0)
    tl.atomic_add(bad + tl.zeros((LAST,), tl.int32), some.to(tl.int64), mask=some > 0, sem="relaxed")


@triton.jit
def divide(x, y):
    """IEEE quotient of two blocks; ``/`` is that for fp64 only."""
    if x.dtype == tl.float64:
        q = x / y
    else:
        q = tl.div_rn(x, y)
    return q


@triton.jit
def limited(x):
    """The largest number of its sign in place of an infinity."""
    most: tl.constexpr = 1.7976931348623157e308 if x.dtype == tl.float64 else 3.4028234663852886e38
    return tl.where(x > most, most, tl.where(x < -most, -most, x))


@triton.jit
def magnitude(d):
    """Key that orders |d| as a signed integer (int32, fp64: int64); every NaN has the same, above infinity."""
    if d.dtype == tl.float64:
        k = tl.minimum(d.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, 0x7FF8000000000000)
    else:
        k = tl.minimum(d.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7FC00000)
    return k


@triton.jit
def product(x, FACTOR: tl.constexpr):
    """High and low word of an unsigned 32-bit product: one multiplication, where ``umulhi`` and ``*`` are two."""
    wide = x.to(tl.uint64) * FACTOR
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def philox(key, c0, c1, c2, c3):
    """Philox4x32-10 of counter words (uint32, blocks or numbers) under a 64-bit key.

    What numbers alone decide (the keys of the rounds, the products of the model) is not computed per element, and
    what does not depend on the model only once.
    """
    k0 = key.to(tl.uint32)
    k1 = (key.to(tl.uint64, bitcast=True) >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = product(c0, 0xD2511F53)
        c, d = product(c2, 0xCD9E8D57)
        c0 = c ^ c1 ^ k0
        c1 = d
        c2 = a ^ c3 ^ k1
        c3 = b
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def halves(key, e, model_word, op):
    """The 16 random bits of each element e (int64, one per lane), from a call of its own."""
    n = e >> 3
    w0, w1, w2, w3 = philox(key, (n & 0xFFFFFFFF).to(tl.uint32), (n >> 32).to(tl.uint32), model_word, op)
    word = ((e >> 1) & 3).to(tl.int32)
    w = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return tl.where((e & 1) == 1, w >> 16, w & 0xFFFF)


@triton.jit
def drawn(key, e, model, bound, OP: tl.constexpr):
    """:func:`bernoulli` of elements e that are no neighbours; ``key`` and ``bound`` may be one per lane."""
    return halves(key, e, model.to(tl.uint32), tl.full((), OP, tl.uint32)).to(tl.int32) < bound


@triton.jit
def bernoulli(key, e, model, bound, OP: tl.constexpr, BLOCK: tl.constexpr, UNMASKED: tl.constexpr):
    """Whether the 16 random bits of elements ``e .. e + BLOCK - 1`` are below ``bound`` (int32, 0 .. 65536).

    Counter (lo32(e >> 3), hi32(e >> 3), model, op), key (lo32, hi32); element e takes half ``e & 1``, low first,
    of word ``(e >> 1) & 3``. Where ``e`` is a multiple of 8 and its block's counters share their high word
    (``UNMASKED``) one call serves 8 elements; else each element makes its own.
    """
    model_word = model.to(tl.uint32)
    op = tl.full((), OP, tl.uint32)
    if UNMASKED:
        n = e >> 3
        lo = (n & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, BLOCK // 8).to(tl.uint32)
        w0, w1, w2, w3 = philox(key, lo, (n >> 32).to(tl.uint32), model_word, op)
        w = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [n, e bit 2, e bit 1]
        u = tl.reshape(tl.join(w & 0xFFFF, w >> 16), (BLOCK,))
    else:
        u = halves(key, e + tl.arange(0, BLOCK), model_word, op)
    return u.to(tl.int32) < bound


@triton.jit
def halve(x, LANES: tl.constexpr, C: tl.constexpr):
    """Three halvings, ``[LANES, C]`` to ``[C, LANES / 8]``: lane j += lane j + LANES / 2, then LANES / 4, LANES / 8."""
    x = tl.permute(tl.reshape(x, (2, 2, 2, LANES // 8, C)), (4, 3, 2, 1, 0))  # a thread gets the eight that it adds
    for _ in tl.static_range(3):
        a, b = tl.split(x)
        x = a + b
    return x


@triton.jit
def fold(columns, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Sums of columns of ``LANES`` (2048) lanes by halves: lane j += lane j + 1024, then 512, ..., 1.

    Returns ``[COUNT]``, filled up to a power of two with the last column. An addition of two blocks, or a sum over an
    axis of length two, is one addition, and a + b == b + a: the order is fixed by the shape, not by the layout or the
    compiler. (``tl.sum`` over all lanes has an unwritten order.)

    Each column goes through shared memory once, then all of them together: with four columns 17 barriers, and a
    third of the instructions that halvings one by one take.
    """
    some = ()
    for c in tl.static_range(triton.next_power_of_2(COUNT)):
        some = some + (tl.reshape(halve(columns[min(c, COUNT - 1)], LANES, 1), (LANES // 8,)),)
    for _level in tl.static_range(4):
        if len(some) > 1:
            pairs = ()
            for c in tl.static_range(len(some) // 2):
                pairs = pairs + (tl.join(some[c], some[c + len(some) // 2]),)
            some = pairs
    x = halve(some[0], LANES // 8, triton.next_power_of_2(COUNT))
    for s in tl.static_range(5):
        x = tl.sum(tl.reshape(x, (triton.next_power_of_2(COUNT), 2, LANES >> (s + 7))), axis=1)
    return tl.reshape(x, (triton.next_power_of_2(COUNT),))
