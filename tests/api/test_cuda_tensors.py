"""Tensors on a GPU without a GPU: the way of a merge in memory, with Triton's interpreter on host memory."""

import pytest
import torch

import fastmerge as fm
from fastmerge.api import tensors as memory
from fastmerge.api.call import call_of
from fastmerge.backends.choose import Backend
from fastmerge.errors import OutputError
from fastmerge.kernels import TritonKernels, _call
from fastmerge.runtime.resident import bind
from tests import tiny
from tests.compare import differences

if not _call.INTERPRETED:
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


def test_one_upload_and_no_wait_before_the_last_launch(monkeypatch, gpu_tensors):
    """Whatever the method and the number of tensors; what can fail on its data waits once, at the end."""
    log = []
    for name in ("send", "bring", "runner"):
        whole = getattr(_call.Gpu, name)

        def noted(self, *args, name=name, whole=whole):
            log.append(name)
            return whole(self, *args)

        monkeypatch.setattr(_call.Gpu, name, noted)
    for method, given in (("linear", {}), ("ties", {"density": 0.3}), ("dare_linear", {"density": 0.3})):
        seen = []
        for number in (2, 6):
            log.clear()
            models = [{f"t{i}": torch.randn(40, generator=torch.Generator().manual_seed(i + j)) for i in range(number)}
                      for j in range(3)]  # fmt: skip
            base = None if method == "linear" else 0
            fm.merge_state_dicts(models, method, parameters={"weight": 0.5, **given}, base=base)
            seen.append([n for n in log if n == "runner"])
            rest = [n for n in log if n != "runner"]
            assert rest == (["send", "bring"] if method == "dare_linear" else ["send"])
            assert log[-1] == rest[-1], "the wait is the last thing"
        assert seen[0] == seen[1], "launches do not grow with the number of tensors"


def test_sums_that_are_not_finite_are_refused_as_on_the_cpu(gpu_tensors):
    a, b = torch.ones(300), torch.ones(300)
    b[7] = float("nan")
    given = {"base": 0, "parameters": {"t": 0.5}}
    with pytest.raises(OutputError, match="second: the angle between its inputs is unknown"):
        fm.merge_state_dicts([{"first": a, "second": a}, {"first": a * 2, "second": b}], "slerp", **given)
    given = {"base": 0, "parameters": {"weight": 1.0, "density": 0.5}}
    with pytest.raises(OutputError, match="second: rescale needs finite sums"):
        fm.merge_state_dicts([{"first": a, "second": a}, {"first": a * 2, "second": b}], "dare_linear", **given)


def test_a_bound_call_runs_again_on_new_data():
    """The tables stay, counters and what was found start anew."""
    base, x, out = torch.zeros(5000), torch.randn(5000, generator=torch.Generator().manual_seed(0)), torch.empty(5000)
    call = call_of("ties", [0, 1], 0, {"weight": 1.0, "density": 0.2}, None, 0)
    group, spec = call.spec("w", [base, x], None)
    (bound,) = bind(
        [call.op("w", spec, [x.data_ptr() for x in group], out.data_ptr())],
        Backend("triton", TritonKernels("cpu"), (0,)),
    )
    for turn in range(2):
        x *= -(turn + 1.5)
        bound.run()
        bound.check()
        want = fm.merge_tensors([base, x], "ties", base_index=0, parameters={"weight": 1.0, "density": 0.2})
        assert torch.equal(out, want)
