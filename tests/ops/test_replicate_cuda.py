"""The CUDA kernels of expert replication without a GPU: their walk on the host, and gates on the machine code.

tests/kernels/test_replicate_gpu.py runs them for real.
"""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fastmerge import _native
from fastmerge.ops.replicate import first_tiles
from fastmerge.philox import normal_lines
from tests.compare import differences
from tests.ops.test_replicate import PAIRS, run, stored, want

ROOT = Path(__file__).resolve().parents[2]
THREADS = 32

# Instructions that a block of eight elements takes on sm_90. A noisy bf16 expert: 37 of Philox, 92 that make, add and
# round the normals, 8 that convert the input, 5 that look for results that are not finite, the rest loads, stores and
# branches. That is 19 per element; an H100 at 1.7 GHz issues 28.7e12 in a second, so 3.0 TB/s may be written.
NOISY_ON_90 = 152
COPY_ON_90 = 11


class Walk:
    """The kernel's walk over a table, with the interface of the kernels."""

    def __init__(self, library, blocks, programs, group=3):
        self.library, self.blocks, self.programs, self.group = library, blocks, programs, group

    def replicate(self, segments, sigma, numbers):
        t = np.ascontiguousarray(segments.table)
        first, lines = first_tiles(t, self.blocks), normal_lines()
        at = [a.ctypes.data_as(ctypes.c_void_p) for a in (sigma, numbers, lines, segments.nonfinite, first)]
        self.library.walk(
            t.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(t)), segments.outputs, segments.dtypes[0].code,
            segments.out_dtype.code, *at, self.blocks, self.group, self.programs, THREADS, int(sigma.max() > 0),
        )  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("walk") / "walk.so"
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, str(ROOT / "tests/ops/replicate_walk.cpp"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize(("code", "out_code"), PAIRS)
def test_the_walk_equals_the_reference(library, code, out_code):
    for n, e0, shift, blocks, programs in [
        (0, 0, 0, 4, 1), (1, 7, 1, 4, 3), (7, 8, 0, 1, 1), (16, 2**35 - 3, 2, 1, 2), (1999, 5, 3, 64, 2),
        (2048, 0, 0, 16, 5), (3000, 2**40, 1, 1024, 1),
    ]:  # fmt: skip
        x = stored(code, n + shift, seed=n)[shift:]
        walk = Walk(library, blocks, programs)
        got = run(walk, x, code, out_code, e0=e0, shift=shift)
        assert differences(got, want(x, code, out_code, e0=e0)) == [], (n, e0, shift)
        clean = {"numbers": [1, 2], "sigma": [0.0, 0.0]}
        got = run(walk, x, code, out_code, e0=e0, **clean)
        assert differences(got, want(x, code, out_code, e0=e0, **clean)) == [], (n, e0, clean)


@pytest.mark.parametrize("experts", [1, 3, 8, 64])
@pytest.mark.parametrize(("group", "programs"), [(1, 1), (2, 7), (5, 3), (128, 40)])
def test_the_walk_reaches_every_expert(library, experts, group, programs):
    """Clean and noisy experts in one call, groups that the tiles do not fill, segments whose blocks are not whole."""
    x = stored(3, 1301)
    numbers, sigma = list(range(experts)), [0.0 if e % 3 == 1 else 0.1 * (e + 1) for e in range(experts)]
    options = {"e0": 5, "numbers": numbers, "sigma": sigma}
    pieces = [(0, 1), (1, 1), (1, 400), (400, 403), (403, 1301)]
    for blocks, shift in [(1, 0), (8, 3), (40, 1)]:
        got = run(Walk(library, blocks, programs, group), x, 3, 3, shift=shift, pieces=pieces, **options)
        assert differences(got, want(x, 3, 3, **options)) == [], (blocks, shift)


def test_the_walk_where_the_blocks_numbers_pass_32_bits(library):
    x = stored(3, 4000)
    got = run(Walk(library, 64, 2), x, 3, 3, e0=2**35 - 2000)
    assert differences(got, want(x, 3, 3, e0=2**35 - 2000)) == []


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 4), (12, 5, 4), (9, 1, 128), (300, 8, 128), (2, 64, 1)])
def test_items_follow_by_tile_then_expert_then_group(library, shape):
    tiles, outputs, group = shape
    order = [(t, e) for g in range(0, tiles, group) for e in range(outputs) for t in range(g, min(g + group, tiles))]
    for step in (1, 2, 7, 396):
        got = np.full((len(order) + 1, 2), -1, np.int32)
        n = library.places(tiles, group, outputs, step, got.ctypes.data_as(ctypes.c_void_p))
        assert [tuple(p) for p in got[:n].tolist()] == order[::step]


@pytest.mark.parametrize("noise", [0.0, 1e3, 1e5])
def test_the_walk_counts_what_is_not_finite(library, noise):
    x = np.linspace(-65_504, 65_504, 2048).astype(np.float16).view(np.uint16)
    x[77] = 0x7C00
    got = run(Walk(library, 16, 3), x, 2, 2, sigma=[0.0, noise, noise, 0.0])  # run compares the counts
    assert differences(got, want(x, 2, 2, sigma=[0.0, noise, noise, 0.0])) == []
    assert np.isinf(got[0].view(np.float16)).sum() == 1


def test_the_walk_finds_its_segments(library):
    """Many segments, some empty, at the ends too, of lengths that do not fill their tiles."""
    x = stored(3, 5000)
    cuts = np.sort(np.concatenate([[0, 0, 5000, 5000], np.random.default_rng(1).integers(0, 5000, 60), [64, 64, 64]]))
    pieces = list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))
    expected = want(x, 3, 3, e0=3)
    for blocks, programs in [(1, 1), (4, 7), (1024, 2)]:
        got = run(Walk(library, blocks, programs), x, 3, 3, e0=3, pieces=pieces)
        assert differences(got, expected) == [], (blocks, programs)


# ---- machine code ------------------------------------------------------------------------------------------


def cuobjdump(*arguments):
    """Output of the toolkit's tool, or of the one that triton brings along, on the extension."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="needs cuobjdump")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    done = subprocess.run([tool, *arguments, _native.__file__], capture_output=True, text=True, check=True)
    return done.stdout


TYPES = {"d": 8, "f": 4, "Fp16": 2, "Bf16": 2}


def types_of(name):
    """Bytes of the input's and the output's elements, and whether there is noise, from a mangled name."""
    words = re.search(r"replicate_kernelI(.*)Lb([01])E", name)
    first, *rest = re.findall(r"NS_4(Fp16|Bf16)E|S\d_|([df])", words.group(1))
    kinds = [a or b for a, b in (first, *rest)]
    kinds = [k or kinds[0] for k in (*kinds, "")[:2]]  # S2_: the same type again
    return TYPES[kinds[0]], TYPES[kinds[1]], words.group(2) == "1"


def code_of(arch):
    """Machine instructions of every kernel by its name."""
    text = cuobjdump("-sass", "-arch", arch)
    kernels = re.split(r"\n\s+Function : (\S+)\n", text)[1:]
    lines = [re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S.*)", k, re.MULTILINE) for k in kernels[1::2]]
    return dict(zip(kernels[::2], [[(int(a, 16), t) for a, t in some] for some in lines], strict=True))


needs_cuda = pytest.mark.skipif(not _native.has_cuda(), reason="built without CUDA")


def architectures():
    if not _native.has_cuda():
        return []
    try:
        return sorted(set(re.findall(r"\.(sm_\d+)\.cubin", cuobjdump("-lelf"))))
    except (OSError, subprocess.SubprocessError, pytest.skip.Exception):
        return []


@needs_cuda
@pytest.mark.parametrize("arch", architectures() or [pytest.param("none", marks=pytest.mark.skip("needs cuobjdump"))])
def test_machine_code(arch):
    usage = cuobjdump("-res-usage", "-arch", arch)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(found) == 32
    for name, registers, stack, local in found:
        read, written, noise = types_of(name)
        assert (stack, local) == ("0", "0"), f"{name}: spills"
        assert int(registers) <= (64 if not noise else 128 if 8 in (read, written) else 80), name
    code = code_of(arch)
    assert len(code) == 32
    for name, instructions in code.items():
        read, written, noise = types_of(name)
        text = "\n".join(t for _, t in instructions)
        assert not re.search(r"\b(FFMA|DFMA|MUFU|LDL|STL|\w+\.FTZ)", text), name
        assert len(re.findall(r"\bLDG\.E\S*\.128", text)) >= read // 2, name
        assert len(re.findall(r"\bSTG\.E\S*\.128", text)) >= written // 2, name
        if arch == "sm_90" and "Bf16ES2_" in name:
            assert min(blocks_of(instructions, 0)) <= COPY_ON_90 + 1
            assert not noise or max(sorted(blocks_of(instructions, 8))[:3]) <= NOISY_ON_90 * 1.03


def blocks_of(instructions, lookups):
    """Instructions from one store of 128 bits to the next, where there are so many loads from shared memory between."""
    text = [t for _, t in instructions]
    stores = [i for i, t in enumerate(text) if re.search(r"\bSTG\S*\.128", t)]
    spans = [text[a:b] for a, b in itertools.pairwise(stores)]
    return [len(s) for s in spans if sum("LDS.64" in t for t in s) == lookups]


@needs_cuda
def test_intermediate_code():
    if not architectures():
        pytest.skip("needs cuobjdump")
    text = cuobjdump("-ptx")
    assert "replicate_kernel" in text
    # Packed ones look for results that are not finite (finite8).
    assert not re.findall(r"\S*(?:fma\.(?!rn\.b?f16x2)|\.approx|div\.full|\.ftz)\S*", text)


@pytest.mark.skipif(_native.has_cuda() or shutil.which("nvcc") is None, reason="needs nvcc, and a build without it")
def test_nvcc_compiles(tmp_path):
    flags = ["-std=c++17", "--fmad=false", "-arch=sm_90", "-cubin", "--Werror", "all-warnings", "-DFASTMERGE_HAS_CUDA"]
    flags += ["-Xcicc", "-O1", "-Xptxas", "-O0"]  # half the time: what it makes is not looked at
    command = ["nvcc", *flags, str(ROOT / "csrc/replicate.cu"), "-o", str(tmp_path / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
