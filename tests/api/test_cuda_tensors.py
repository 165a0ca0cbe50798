"""Tensors on a GPU without a GPU: the way of a merge in memory, with Triton's interpreter on host memory."""

import pytest
import torch

import fastmerge as fm
from fastmerge.api import tensors as memory
from fastmerge.backends.choose import Backend
from fastmerge.kernels import TritonKernels, _launch
from tests import tiny
from tests.compare import differences

if not _launch.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


@pytest.fixture
def gpu_tensors(monkeypatch):
    """CPU tensors take the way of GPU tensors."""
    monkeypatch.setattr(memory, "choose", lambda device, name, **_: Backend("triton", TritonKernels("cpu"), (0,)))


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("linear", {"weight": 0.4}),
        ("slerp", {"t": 0.3}),
        ("model_stock", {}),
        ("ties", {"weight": 0.5, "density": 0.3}),
        ("dare_ties", {"weight": 0.5, "density": 0.4}),
    ],
)
def test_tensors_on_a_gpu_are_merged_in_place(monkeypatch, method, given):
    based, names = method != "linear", "xy" if method == "slerp" else "xyz"
    models = {n: tiny.state(i, layers=1, hidden=24, vocab=9) for i, n in enumerate(names)}
    want = fm.merge_state_dicts(models, method, parameters=given, base="x" if based else None, backend="native")
    monkeypatch.setattr(memory, "choose", lambda device, name, **_: Backend("triton", TritonKernels("cpu"), (0,)))
    got = fm.merge_state_dicts(models, method, parameters=given, base="x" if based else None)
    assert differences(got, want) == []


def test_waits_and_launches_do_not_grow_with_the_number_of_tensors(monkeypatch, gpu_tensors):
    waits = []
    bring = TritonKernels._bring

    def count(self, *results):
        waits.append(sum(1 for _, a in results if a.size))
        bring(self, *results)

    monkeypatch.setattr(TritonKernels, "_bring", count)
    seen = []
    for number in (2, 12):
        waits.clear()
        models = [{f"t{i}": torch.randn(40, generator=torch.Generator().manual_seed(i + j)) for i in range(number)}
                  for j in range(3)]  # fmt: skip
        fm.merge_state_dicts(models, "ties", parameters={"weight": 0.5, "density": 0.3}, base=0)
        seen.append(sum(1 for w in waits if w))
    assert seen[0] == seen[1] <= 2
    waits.clear()
    fm.merge_state_dicts(models, "linear", parameters={"weight": 0.5})
    assert not any(waits), "a method without statistics waits for nothing"
