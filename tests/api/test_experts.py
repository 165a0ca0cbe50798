"""What a caller of ``replicate_experts`` meets: devices and backends, threads, arguments of all kinds."""

import logging
import threading

import numpy as np
import pytest
import torch

import fastmerge as fm
from fastmerge import _native
from fastmerge.api import experts as replicate
from fastmerge.api import tensors
from fastmerge.backends import choose as dispatch
from fastmerge.backends.native import NativeKernels
from fastmerge.errors import BackendUnavailable, RecipeError, ShapeError


@pytest.fixture
def fresh(monkeypatch):
    dispatch.say.cache_clear()
    monkeypatch.delenv("FASTMERGE_BACKEND", raising=False)
    return monkeypatch


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("named", [None, "auto", "native", "triton"])
def test_on_cuda_the_backend_of_the_environment_does_not_count(fresh, named):
    """All but the reference: it names what computes on CPU cores, or merges."""
    if named is not None:
        fresh.setenv("FASTMERGE_BACKEND", named)
    fresh.setattr(_native, "has_cuda", lambda: True)
    assert replicate._has_kernel(CUDA, None) is True
    fresh.setenv("FASTMERGE_BACKEND", "reference")
    assert replicate._has_kernel(CUDA, None) is False


def test_on_cuda_a_missing_kernel_is_said_or_an_error(fresh, caplog):
    fresh.setattr(_native, "has_cuda", lambda: False)
    for _ in range(2):
        assert replicate._has_kernel(CUDA, None) is False
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert "on cuda:0: the extension was built without nvcc" in said.getMessage()
    assert "falling back to the reference" in said.getMessage()
    with pytest.raises(BackendUnavailable, match="backend native: the extension was built without nvcc"):
        replicate._has_kernel(CUDA, "native")
    with pytest.raises(BackendUnavailable, match="backend triton: has no expert replication"):
        replicate._has_kernel(CUDA, "triton")
    with pytest.raises(BackendUnavailable, match="unknown backend 'cuda'"):
        replicate._has_kernel(CUDA, "cuda")


@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.bfloat16, None), (torch.float32, torch.float16)])
def test_any_number_of_threads_gives_the_same_bytes(fresh, dtype, out_dtype):
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    used, inner = [], NativeKernels.replicate

    def count(self, segments, *tables):
        used.append((threading.current_thread() is threading.main_thread(), int(segments.table[0, 1])))
        inner(self, segments, *tables)

    fresh.setattr(NativeKernels, "replicate", count)
    given = {"noise": 0.3, "name": "w", "seed": 1, "out_dtype": out_dtype}
    want = fm.replicate_experts(x, [0, 3, 9], **given)
    assert used == [(True, x.numel())], "what is small stays on the calling thread"
    fresh.setattr(replicate, "PIECE", 1)
    for number in (1, 2, 3, 64):
        fresh.setattr(tensors, "cores", lambda number=number: number)
        fresh.setattr(replicate, "cores", lambda number=number: number)
        used.clear()
        got = fm.replicate_experts(x, [0, 3, 9], **given)
        assert len(used) == min(number, 5), "a run of whole tiles for each core"
        assert all(main == (number == 1) for main, _ in used)
        assert sum(n for _, n in used) == x.numel()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("experts", [np.array([2, 0]), torch.tensor([2, 0]), (2, 0), [np.int64(2), 0]])
def test_numbers_may_come_as_arrays(experts):
    x = torch.randn(8)
    want = fm.replicate_experts(x, [2, 0], noise=0.1, seed=3)
    got = fm.replicate_experts(x, experts, noise=torch.tensor(0.1, dtype=torch.float64), seed=np.int64(3))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(fm.replicate_experts(x, np.int64(2), noise=np.float64(0.1))) == 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tensor": np.zeros(4, np.float32)}, ShapeError, "tensor: expected a torch tensor, got numpy.ndarray"),
        ({"tensor": torch.eye(2).to_sparse()}, ShapeError, "tensor: expected a dense tensor"),
        ({"noise": "a"}, RecipeError, "noise: expected a number"),
        ({"noise": torch.ones(2)}, RecipeError, "noise: expected a number"),
        ({"noise": None}, RecipeError, "noise: expected a number"),
        ({"name": None}, RecipeError, "name: expected a string"),
        ({"seed": 1.5}, RecipeError, "seed: expected a 64-bit"),
        ({"experts": np.array([0.5])}, RecipeError, "experts"),
        ({"experts": None}, RecipeError, "experts"),
        ({"out": 3}, ShapeError, "out: expected 2 tensors"),
        ({"out": [np.zeros(4)] * 2}, ShapeError, r"out\[0\]: expected a torch tensor"),
    ],
)
def test_arguments_of_other_kinds_are_named(change, error, words):
    given = {"tensor": torch.ones(4), "experts": 2, "noise": 0.1, **change}
    with pytest.raises(error, match=words):
        fm.replicate_experts(given.pop("tensor"), given.pop("experts"), **given)
