#!/usr/bin/env bash
# triton 3.6.0: comparing an fp64 block with a Python number rounds the number to fp32 first.
#
# A literal within the range of fp32 is taken for an fp32 one. Sums, products, tl.where and tl.full give it the type of
# the block before it is made, but comparisons and tl.maximum widen what has been rounded: x <= 1e-8 asks whether
# x <= 9.9999999392252903e-09. The interpreter does the same, so it shows no difference. A number to compare with has to
# be written as tl.full((), 1e-8, tl.float64).
#
# Seen for sm_90, without a GPU: setp.le.f64 with 0d3E45798EE0000000, add.f64 with 0d3E45798EE2308C3A, which is 1e-8.
# With 3.7.0 and 3.8.0 the same; 3.9.0, the newest there is, compares with 1e-8.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
# A torch for GPUs asks for a later triton: pip says so, and does it.
"$room/venv/bin/pip" install --quiet triton==3.6.0 2>/dev/null
cd "$room"
cat >kernels.py <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def compared(x, out):
    tl.store(out, (tl.load(x) <= 1e-8).to(tl.int32))


@triton.jit
def compared_with_fp64(x, out):
    tl.store(out, (tl.load(x) <= tl.full((), 1e-8, tl.float64)).to(tl.int32))


@triton.jit
def limited(x, out):
    tl.store(out, tl.maximum(tl.load(x), 1e-8))


@triton.jit
def added(x, out):
    tl.store(out, tl.load(x) + 1e-8)


@triton.jit
def multiplied(x, out):
    tl.store(out, tl.load(x) * 1e-8)


@triton.jit
def chosen(x, out):
    x = tl.load(x)
    tl.store(out, tl.where(x == x, x, 1e-8))
PYTHON
TRITON_CACHE_DIR=$room/cache venv/bin/python - <<'PYTHON'
import re
import struct

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels


def bits(number):
    return "0d" + struct.pack(">d", number).hex().upper()


exact, rounded = bits(1e-8), bits(struct.unpack("f", struct.pack("f", 1e-8))[0])
print(f"triton {triton.__version__}: 1e-8 is {exact}, rounded to fp32 {rounded}")
for name, want in {
    "compared": rounded,
    "limited": rounded,
    "compared_with_fp64": exact,
    "added": exact,
    "multiplied": exact,
    "chosen": exact,
}.items():
    out = "*i32" if name.startswith("compared") else "*fp64"
    source = ASTSource(getattr(kernels, name), {"x": "*fp64", "out": out}, {})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    found = re.findall(r"0d[0-9A-F]{16}", ptx)
    print(f"{name}: {', '.join(sorted(set(found)))}")
    assert set(found) == {want}, (name, found)
PYTHON
TRITON_INTERPRET=1 venv/bin/python - <<'PYTHON'
import torch

import kernels

x, out = torch.tensor([1e-8], dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
for name, want in {"compared": 0, "compared_with_fp64": 1}.items():
    getattr(kernels, name)[(1,)](x, out)
    print(f"interpreter, 1e-8 <= 1e-8, {name}: {bool(out[0])}")
    assert out[0] == want, (name, out)
PYTHON
