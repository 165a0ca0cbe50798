#!/usr/bin/env bash
# triton 3.6.0: a literal -0.0 is +0.0.
#
# Constants that equal zero are made as the null value of their type, and -0.0 equals zero. So tl.full((), -0.0, ...)
# is +0, x * -0.0 has the sign of x where it should have the other one, and x + -0.0, which keeps every x, turns -0
# into +0.
#
# Seen for sm_90, without a GPU, in fp64 and fp32: add and mul with 0d0000000000000000, a store of 0. With 3.7.0 and
# 3.8.0 the same in fp64; 3.9.0, the newest there is, keeps the sign.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet triton==3.6.0
cd "$room"
cat >kernels.py <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def full(x, out):
    tl.store(out, tl.full((), -0.0, out.dtype.element_ty))


@triton.jit
def multiplied(x, out):
    tl.store(out, tl.load(x) * -0.0)


@triton.jit
def added(x, out):
    tl.store(out, tl.load(x) + -0.0)


@triton.jit
def halved(x, out):
    tl.store(out, tl.load(x) * -0.5)
PYTHON
TRITON_CACHE_DIR=$room/cache venv/bin/python - <<'PYTHON'
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels

print(f"triton {triton.__version__}")
for size, zero, half in ((64, "0d0000000000000000", "0dBFE0000000000000"), (32, "0f00000000", "0fBF000000")):
    for name, want in {
        "full": rf"mov\.b{size}\s+%\w+, 0;",
        "multiplied": rf"mul\.f{size}\s+%\w+, %\w+, {zero};",
        "added": rf"add\.f{size}\s+%\w+, %\w+, {zero};",
        "halved": rf"mul\.f{size}\s+%\w+, %\w+, {half};",
    }.items():
        source = ASTSource(getattr(kernels, name), {"x": f"*fp{size}", "out": f"*fp{size}"}, {})
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        found = re.search(want, ptx)
        assert found, (name, ptx)
        print(f"fp{size} {name}: {' '.join(found.group().split())}")
PYTHON
