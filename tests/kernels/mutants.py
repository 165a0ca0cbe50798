"""Three kernels with the hazards that ``aot.py`` looks for: a gate that does not see its own is no gate.

Written as the package's kernels were when an H100 met them (``bench/results/h100-20261128.md``, "Bits that differ").
"""

import triton
import triton.language as tl

SIGNATURES = {
    "direct": {"x": "*fp64", "y": "*fp16"},
    "smallest": {"x": "*fp32", "y": "*fp32"},
    "halves": {"x": "*u16", "y": "*u16", "z": "*i32", "n": "i32"},
}


@triton.jit
def direct(x, y):
    """Rounds fp64 to fp16 in one instruction, which keeps a NaN's sign and payload."""
    offs = tl.arange(0, 128)
    tl.store(y + offs, tl.load(x + offs).to(tl.float16))


@triton.jit
def smallest(x, y):
    """Looks for a minimum from a literal zero on: it becomes min.f32, for which -0 is below +0."""
    offs = tl.arange(0, 128)
    low = tl.zeros((128,), tl.float32)
    for i in tl.static_range(2):
        v = tl.load(x + offs + i * 128)
        low = tl.where(v < low, v, low)
    tl.store(y + offs, low)


@triton.jit
def halves(x, y, z, n):
    """Adds a constant to 16-bit values that come alone: LLVM packs them."""
    offs = tl.arange(0, 1024)
    u = tl.load(x + offs, mask=offs < n, other=0).to(tl.uint32)
    bad = (((u & 0x7FFF7FFF) + 0x00800080) >> 15) & 0x00010001
    u = u & ((bad * 0x3F) ^ 0xFFFFFFFF)
    tl.store(y + offs, u.to(tl.uint16), mask=offs < n)
    tl.atomic_add(z, tl.sum(bad.to(tl.int32)))
