"""The CUDA kernels of expert replication against the CPU kernels, bit for bit, on a GPU."""

import numpy as np
import pytest

import fastmerge as fm
from fastmerge import _native
from fastmerge.backends.native import NativeKernels
from fastmerge.dtypes import BY_CODE
from fastmerge.ops.replicate import launch
from fastmerge.ops.segments import Segments
from tests.backends.test_native import TORCH, values
from tests.compare import differences

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="built without CUDA"),
]

PAIRS = [(i, o) for i in range(4) for o in range(4)]
SIGMA, NUMBERS = np.array([[0.0, 0.02, 1.5], [9e3, 0.0, 0.1]]), np.array([0, 3, 2**32 - 1])
# elements, logical index of the first one, elements by which input and outputs are moved from an aligned address
SEGMENTS = [
    (1 << 20, 0, 0, 0), (0, 5, 0, 0), (70_001, 3, 3, 3), (9, 2**35 - 1, 0, 1), (4096, 8, 8, 8), (1, 0, 0, 0),
    (50_000, 2**40 + 16, 0, 1), (33_333, 0, 1, 0), (0, 0, 0, 0),
]  # fmt: skip


def batch(code, out_code, device, sigma):
    """One table over all segments, and the outputs with room around them."""
    rng = np.random.default_rng(code)
    inputs, outputs, table = [], [], []
    for s, (n, e0, shift, moved) in enumerate(SEGMENTS):
        x = torch.from_numpy(values(code, n + shift, rng)).view(TORCH[code]).to(device)
        outs = [torch.full((n + moved + 1,), 7.0, dtype=TORCH[out_code], device=device) for _ in NUMBERS]
        first, *others = (t.data_ptr() + moved * t.element_size() for t in outs)
        head = [first, n, e0, n, 0x1234567890ABCDEF, s % len(sigma), 0]
        table.append([*head, x.data_ptr() + shift * x.element_size(), *others])
        inputs.append(x)
        outputs += outs
    bad = np.zeros(len(table), np.int64)
    segments = Segments(np.array(table), (BY_CODE[code],), BY_CODE[out_code], bad)
    return segments, outputs, inputs


@pytest.mark.parametrize("sigma", [SIGMA, 0 * SIGMA], ids=["noisy", "clean"])
@pytest.mark.parametrize(("code", "out_code"), PAIRS)
def test_cuda_equals_native(code, out_code, sigma):
    host, want, _keep = batch(code, out_code, torch.device("cpu"), sigma)
    NativeKernels().replicate(host, sigma, NUMBERS)
    device = torch.device("cuda", 0)
    there, got, _kept = batch(code, out_code, device, sigma)
    there.nonfinite = torch.zeros(len(there), dtype=torch.int64, device=device)
    launch(there, sigma, NUMBERS, device)
    assert differences(got, want) == []
    assert there.nonfinite.tolist() == host.nonfinite.tolist()


@pytest.mark.parametrize("dtype", TORCH.values(), ids=str)
def test_the_public_call_is_the_same_on_both(dtype):
    x = (torch.randn(513, 300) * 0.02).to(dtype)
    want = fm.replicate_experts(x, 4, noise=0.1, name="w", seed=2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        there = x.cuda()
        got = fm.replicate_experts(there, 4, noise=0.1, name="w", seed=2)
        slow = fm.replicate_experts(there, 4, noise=0.1, name="w", seed=2, backend="reference")
    stream.synchronize()
    assert differences(got, want) == []
    assert differences(slow, want) == []


def test_a_launch_leaves_the_current_device_and_its_errors_alone():
    device = torch.cuda.device_count() - 1
    before = torch.cuda.current_device()
    x = torch.ones(1000, device=f"cuda:{device}")
    got = fm.replicate_experts(x, 2, noise=0.5, mode="absolute")
    assert torch.cuda.current_device() == before
    assert torch.equal(got[0], x)
    args = np.zeros((1, 8), np.int64), np.array([3], np.int32), 3, np.zeros((1, 1)), np.zeros(1, np.int64)
    assert _native.cuda_replicate(10_000, 0, *args, np.zeros(2, np.int64), 8, 0) == 0  # nothing to launch
    torch.cuda.synchronize()
