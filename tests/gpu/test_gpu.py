"""On a real GPU (``TRITON_INTERPRET=0 pytest -m gpu``): the bytes of the CPU, streamed or in memory, and its limits."""

import numpy as np
import pytest
import torch

import fastmerge as fm
from fastmerge.errors import BackendUnavailable, BudgetError, ShapeError
from fastmerge.kernels import TritonKernels, _call
from fastmerge.runtime import placement
from fastmerge.runtime.devices import cuda
from fastmerge.runtime.devices.streams import CudaStreams
from tests import tiny
from tests.api.test_merge import RECIPES, recipe_of, weights
from tests.compare import differences
from tests.methods.test_definitions import add
from tests.session.series import SERIES, documents

pytestmark = pytest.mark.gpu
if _call.INTERPRETED or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and TRITON_INTERPRET=0", allow_module_level=True)

GIVEN = {
    "linear": {"weight": 0.4},
    "task_arithmetic": {"weight": 0.7},
    "slerp": {"t": 0.3},
    "model_stock": {},
    "ties": {"weight": 0.5, "density": 0.3},
    "dare_linear": {"weight": 0.5, "density": 0.4},
    "dare_ties": {"weight": 0.5, "density": 0.4},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), hidden=256, vocab=9001)


@pytest.mark.parametrize("name", RECIPES)
def test_every_device_list_and_unit_gives_the_bytes_of_the_cpu(paths, name, tmp_path, monkeypatch):
    text = recipe_of(paths, name)
    fm.merge(text, tmp_path / "cpu", device="cpu")
    for unit in (1 << 25, 1 << 18, 1 << 16):
        monkeypatch.setattr(cuda, "UNIT_ELEMENTS", unit)
        monkeypatch.setattr(placement, "SMALLEST", 1 << 16)
        for devices in ("cuda:0", "cuda:0,cuda:0"):
            out = tmp_path / f"{unit} {devices}"
            report = fm.merge(text, out, device=devices)
            assert weights(out) == weights(tmp_path / "cpu"), (unit, devices)
            assert set(report.devices) == {"cuda:0"}
            assert report.backend == "triton"


def test_auto_takes_the_gpu(paths, tmp_path):
    report = fm.merge(recipe_of(paths, "linear"), tmp_path / "out")
    assert "cuda:0" in report.devices


def test_resume_on_another_device(paths, tmp_path, monkeypatch):
    text = recipe_of(paths, "ties")
    fm.merge(text, tmp_path / "cpu", device="cpu")
    whole = TritonKernels.consensus
    calls = []

    def fail(self, *args):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        whole(self, *args)

    monkeypatch.setattr(TritonKernels, "consensus", fail)
    monkeypatch.setattr(cuda, "UNIT_ELEMENTS", 1 << 16)
    monkeypatch.setattr(placement, "SMALLEST", 1 << 16)
    with pytest.raises(BudgetError, match="less does not do"):
        fm.merge(text, tmp_path / "out", device="cuda")
    monkeypatch.undo()
    fm.merge(text, tmp_path / "out", device="cuda", resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "cpu")


def test_max_vram_bounds_the_slots(paths, tmp_path, monkeypatch):
    text = recipe_of(paths, "dare_ties")
    fm.merge(text, tmp_path / "cpu", device="cpu")
    fm.merge(text, tmp_path / "gpu", device="cuda", max_vram="4MB")
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")
    with pytest.raises(BudgetError, match="--max-vram 1000 bytes"):
        fm.merge(text, tmp_path / "no", device="cuda", max_vram=1000)
    before = torch.cuda.memory_allocated()
    fm.merge(text, tmp_path / "more", device="cuda", max_vram="4TB", memory="256MB")
    assert torch.cuda.memory_allocated() == before, "slots are given back"


def test_slots_that_do_not_fit_are_made_smaller(paths, tmp_path, monkeypatch):
    text = recipe_of(paths, "ties")
    fm.merge(text, tmp_path / "cpu", device="cpu")
    most, whole, tries = 6_000_000, CudaStreams.reserve, []

    def reserve(self, nbytes):
        tries.append(nbytes)
        return whole(self, nbytes if nbytes <= most else 1 << 50)  # the real error of the real allocator

    monkeypatch.setattr(CudaStreams, "reserve", reserve)
    fm.merge(text, tmp_path / "gpu", device="cuda")
    assert tries[0] > most >= tries[-1]
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


def test_a_gpu_that_is_not_there(paths, tmp_path):
    with pytest.raises(BackendUnavailable, match="no GPU 99"):
        fm.merge(recipe_of(paths, "linear"), tmp_path / "out", device="cuda:99")


# ---- tensors in memory ------------------------------------------------------------------------------------


def models(method, *, shift=0, dtype=torch.bfloat16, special=False):
    """State dicts on the CPU of odd sizes, at odd addresses, with special values."""
    out = {}
    sizes = {"one": (1,), "odd": (7, 13), "row": (3, 70_001), "large": (513, 1031)}
    for i in range(2 if method == "slerp" else 4):
        rng = torch.Generator().manual_seed(i)
        state = {}
        for n, shape in sizes.items():
            flat = torch.randn(shift + int(np.prod(shape)), generator=rng) * 0.02
            if special and len(flat) > 50:
                flat[5 + shift :: 997] = [float("nan"), float("inf"), -float("inf"), 0.0][i]
            state[n] = flat.to(dtype)[shift:].view(shape)
        out[f"m{i}"] = state
    return out


def there(state, shift):
    """A copy on the GPU that keeps its elements of misalignment."""
    moved = {}
    for n, t in state.items():
        room = torch.empty(t.numel() + shift, dtype=t.dtype, device="cuda")
        moved[n] = room[shift:].view(t.shape).copy_(t)
    return moved


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("method", GIVEN)
def test_tensors_in_memory_are_those_of_the_cpu(method, shift, dtype, special):
    here = models(method, shift=shift, dtype=dtype, special=special)
    how = dict(parameters=GIVEN[method], base=None if method == "linear" else "m0")
    want = fm.merge_state_dicts(here, method, backend="native", **how)
    got = fm.merge_state_dicts({k: there(s, shift) for k, s in here.items()}, method, **how)
    assert {t.device.type for t in got.values()} == {"cuda"}
    assert differences(got, want) == []


def test_the_callers_stream_is_used_and_nothing_waits():
    a, b = (torch.randn(1 << 20, device="cuda") for _ in range(2))
    want = (0.5 * a + 0.5 * b).cpu()
    fm.merge_tensors([a, b], "linear", parameters={"weight": 0.5})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)
        late = a * 1
        out = fm.merge_tensors([late, b], "linear", parameters={"weight": 0.5, "normalize": False})
        busy = not stream.query()
    stream.synchronize()
    assert busy, "the call came back before its kernels ran"
    assert torch.equal(out.cpu(), want)


def test_a_method_without_kernels_works_on_tensors_of_the_gpu_and_on_disk(paths, tmp_path, monkeypatch):
    add(monkeypatch)
    here = models("ties")
    how = dict(parameters={"share": 0.25}, base="m0")
    want = fm.merge_state_dicts({k: here[k] for k in ("m0", "m1")}, "halfway", **how)
    got = fm.merge_state_dicts({k: there(here[k], 1) for k in ("m0", "m1")}, "halfway", **how)
    assert {t.device.type for t in got.values()} == {"cuda"}
    assert differences(got, want) == []
    text = tiny.recipe(paths, "halfway", names=("a",), extra="parameters: {share: 0.25}")
    for device in ("cpu", "cuda"):
        fm.merge(text, tmp_path / device, device=device)
    assert weights(tmp_path / "cuda") == weights(tmp_path / "cpu")


def test_mixed_devices_are_refused():
    with pytest.raises(ShapeError, match="cuda:0"):
        fm.merge_tensors([torch.zeros(3), torch.zeros(3, device="cuda")], "linear", parameters={"weight": 0.5})
    with pytest.raises(BackendUnavailable, match="native runs on CPU cores"):
        fm.merge_tensors([torch.zeros(3, device="cuda")], "linear", parameters={"weight": 0.5}, backend="native")


def test_task_vector_functions_stay_on_the_gpu():
    here = models("ties", dtype=torch.float32)
    base, *vectors = here.values()
    want = fm.ties_merge(base, vectors)
    got = fm.ties_merge(there(base, 0), [there(v, 0) for v in vectors])
    assert {t.device.type for t in got.values()} == {"cuda"}
    assert differences(got, want) == []


# ---- sessions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERIES)
def test_renders_of_a_session_are_those_of_the_cpu(paths, name, monkeypatch):
    """A series with other numbers, into tensors of the GPU and of the CPU; the launches become a graph."""
    replayed = []
    graph = _call.Gpu.graph
    monkeypatch.setattr(_call.Gpu, "graph", lambda self, some: (r := graph(self, some)) and (replayed.append(r) or r))
    some = documents(paths, name)
    with fm.Session(list(paths.values()), device="cuda:0") as gpu, fm.Session(list(paths.values())) as cpu:
        target, expected, here = None, None, None
        for document in [*some, *some[::-1], some[0]]:
            target = gpu.render(document, target, everything=True)
            expected = cpu.render(document, expected)
            assert {t.device.type for t in target.values()} == {"cuda"}
            assert differences(target, expected) == []
            here = here or {n: torch.zeros_like(t) for n, t in expected.items()}
            gpu.render(document, here)
            assert differences(here, expected) == []
    assert replayed or name != "ties"


def test_a_session_on_all_gpus_has_the_bytes_of_the_cpu(paths):
    every = ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    with fm.Session(list(paths.values()), device=every) as gpus, fm.Session(list(paths.values())) as cpu:
        for name in ("linear", "ties"):
            target = None
            for document in documents(paths, name):
                target = gpus.render(document, target)
                assert differences(target, cpu.render(document)) == []
            assert {t.device.index for t in target.values()} == set(range(torch.cuda.device_count()))
