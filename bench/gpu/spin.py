"""A kernel that only issues instructions."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def spin_kernel(out, trips: tl.int32, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, N803
    """One multiplication and one exclusive or per element and round, on registers; all results are used once."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = offs * 3 + 1
    y = offs ^ 0x5BD1E995
    while trips > 0:
        for _ in tl.static_range(64):
            x = x * y
            y = y ^ x
        trips -= 1
    tl.store(out + offs, x ^ y)
