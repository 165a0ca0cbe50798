"""Packed fp32 arithmetic, taken apart again before it is assembled for GPUs from sm_100 on.

LLVM makes ``mul.rn.f32x2`` and ``add.rn.f32x2`` of neighbouring products and sums for them, and ptxas (12.9.86, with
``--fmad=false``) contracts a pair of the two into one multiply-add, whatever ``.rn`` says: not the bits of the other
processors. Of scalar products and sums it does not. Triton has no option for it, so our own kernels are compiled with
a stage in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton

PACKED = re.compile(r"(add|sub|mul|fma)((?:\.rn)?)\.f32x2\s+(%\w+), (%\w+), (%\w+)(?:, (%\w+))?;")


def scalar(ptx: str) -> str:
    """The same program with every packed operation on two fp32 numbers as two of one."""

    def apart(found: re.Match[str]) -> str:
        op, rounding, to, *operands = found.groups()
        some = [x for x in operands if x is not None]
        lines = [f".reg .f32 {', '.join(f'%fm{n}a, %fm{n}b' for n in range(len(some) + 1))};"]
        lines += [f"mov.b64 {{%fm{n}a, %fm{n}b}}, {x};" for n, x in enumerate(some, 1)]
        for half in "ab":
            lines.append(f"{op}{rounding}.f32 {', '.join(f'%fm{n}{half}' for n in range(len(some) + 1))};")
        lines.append(f"mov.b64 {to}, {{%fm0a, %fm0b}};")
        return "{ " + " ".join(lines) + " }"

    return PACKED.sub(apart, ptx)


@contextmanager
def unpacked() -> Iterator[None]:
    """Compiles what is compiled meanwhile so; Triton's hook is process-wide, and one that was there still runs."""
    runtime: Any = triton.knobs.runtime
    before = runtime.add_stages_inspection_hook

    def add(backend: Any, stages: dict[str, Any], *rest: Any) -> None:
        if before is not None:
            before(backend, stages, *rest)
        make = stages["ptx"]
        stages["ptx"] = lambda source, metadata: scalar(make(source, metadata))

    runtime.add_stages_inspection_hook = add
    try:
        yield
    finally:
        runtime.add_stages_inspection_hook = before
