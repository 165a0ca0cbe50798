#!/usr/bin/env bash
# ptxas 12.9.86 (in triton 3.6.0): mul.rn.f32x2 and add.rn.f32x2 become one multiply-add, in spite of .rn and of
# --fmad=false.
#
# The PTX manual keeps operations with an explicit .rn from being contracted, and --fmad=false asks for no contraction
# at all. For one fp32 product and sum both hold. For the packed ones of two, which LLVM makes of neighbouring products
# and sums for GPUs from sm_100 on, neither does: sm_120a gets two FFMA, sm_100a one FFMA2. So a program whose bits are
# right on sm_90 gets others there.
#
# Seen without a GPU, in the machine code of six lines of PTX.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet triton==3.6.0
cd "$room"
tools=$(echo venv/lib/python3*/site-packages/triton/backends/nvidia/bin)
"$tools/ptxas-blackwell" --version | grep -oE 'V[0-9]+[0-9.]*'

assembled() { # ARCH LINE...: the arithmetic of a kernel that computes %rd7 of %rd3, %rd4 and %rd5
  local arch=$1
  shift
  {
    printf '.version 8.7\n.target %s\n.address_size 64\n' "$arch"
    printf '.visible .entry k(.param .u64 a, .param .u64 b) {\n.reg .b64 %%rd<9>;\n.reg .f32 %%f<8>;\n'
    printf 'ld.param.u64 %%rd1, [a];\nld.param.u64 %%rd2, [b];\n'
    printf 'ld.global.b64 %%rd3, [%%rd1];\nld.global.b64 %%rd4, [%%rd1+8];\nld.global.b64 %%rd5, [%%rd1+16];\n'
    printf '%s\n' "$@" 'st.global.b64 [%rd2], %rd7;' 'ret;' '}'
  } >k.ptx
  "$tools/ptxas-blackwell" --fmad=false -arch "$arch" k.ptx -o k.cubin
  "$tools/cuobjdump" -sass k.cubin | grep -oE '\b(FFMA2?|FMUL2?|FADD2?)\b' | sort | uniq -c | tr -s ' ' | xargs
}

packed=('mul.rn.f32x2 %rd6, %rd3, %rd4;' 'add.rn.f32x2 %rd7, %rd6, %rd5;')
single=('mov.b64 {%f0, %f1}, %rd3;' 'mov.b64 {%f2, %f3}, %rd4;' 'mov.b64 {%f4, %f5}, %rd5;'
  'mul.rn.f32 %f0, %f0, %f2;' 'mul.rn.f32 %f1, %f1, %f3;'
  'add.rn.f32 %f0, %f0, %f4;' 'add.rn.f32 %f1, %f1, %f5;' 'mov.b64 %rd7, {%f0, %f1};')
for arch in sm_120a sm_100a; do
  echo "$arch packed: $(assembled $arch "${packed[@]}")"
  echo "$arch single: $(assembled $arch "${single[@]}")"
done | tee seen
diff seen - <<'WANT'
sm_120a packed: 2 FFMA
sm_120a single: 2 FADD 2 FMUL
sm_100a packed: 1 FFMA2
sm_100a single: 2 FADD 2 FMUL
WANT
