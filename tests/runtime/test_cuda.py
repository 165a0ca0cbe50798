"""The GPU's device, streams and placement without a GPU: the real classes over host memory.

Kernels are Triton's interpreter where they matter, and the native ones where only the bytes' way does.
"""

import itertools
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmerge as fm
from fastmerge.api import merge as engine
from fastmerge.backends.choose import Backend, say
from fastmerge.backends.native import NativeKernels
from fastmerge.errors import BudgetError, FastMergeError
from fastmerge.kernels import TritonKernels, _call
from fastmerge.ops.segments import TILE
from fastmerge.runtime import placement
from fastmerge.runtime.devices import cuda
from fastmerge.runtime.devices.cuda import Gpu
from fastmerge.runtime.devices.streams import CudaStreams, NoRoom
from tests import tiny
from tests.api.test_merge import RECIPES, recipe_of, weights
from tests.runtime.host_streams import HostStreams

if not _call.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


INTERPRETED = ("linear", "slerp rows", "model_stock", "ties", "dare_ties", "passthrough scaled")


class Native:
    """Native kernels for a device whose counters are a tensor."""

    def __init__(self):
        self._kernels = NativeKernels()

    def __getattr__(self, name):
        call = getattr(self._kernels, name)
        if name in ("supports", "launcher"):
            return call

        def run(segments, *args, **kwargs):
            if name != "fold" and isinstance(segments.nonfinite, torch.Tensor):
                segments = replace(segments, nonfinite=segments.nonfinite.numpy())
            return call(segments, *args, **kwargs)

        return run


class Tight(HostStreams):
    """Books of what was reserved and locked, and limits of both."""

    def __init__(self, *, most=1 << 60, pins=1 << 60, free=1 << 40):
        super().__init__(free)
        self.most, self.pins = most, pins
        self.reserved, self.locked, self.tries = [], {}, 0

    def reserve(self, nbytes):
        self.tries += 1
        if nbytes > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nand so on")
        self.reserved.append(nbytes)
        return super().reserve(nbytes)

    def pin(self, buffer):
        if sum(self.locked.values()) + buffer.nbytes > self.pins:
            raise NoRoom(f"{buffer.nbytes} bytes of host memory cannot be page-locked (CUDA error 2)")
        self.locked[buffer.address] = buffer.nbytes
        return super().pin(buffer)

    def unpin(self, buffer):
        del self.locked[buffer.address]


def family(root, wide=(7, 20_000)):
    """A few long rows: the interpreter pays per program. ``wide`` takes three units of a tile, or one large one."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"norm": (40,), "wide": wide, "bias": (333,), "embed": (3, 9_001)}
    base = {n: torch.randn(s, generator=rng) * 0.02 for n, s in shapes.items()}
    found = {}
    for name in ("base", "a", "b", "c"):
        tuned = {n: t + torch.randn(t.shape, generator=rng) * 2e-4 * (name != "base") for n, t in base.items()}
        found[name] = tiny.write(root / name, {n: t.to(torch.bfloat16) for n, t in tuned.items()})
    return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return family(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The same of two units of a tile."""
    return family(tmp_path_factory.mktemp("models"), wide=(5, 14_000))


@pytest.fixture
def pretend(monkeypatch):
    """Makes ``--device cuda...`` some GPUs of host memory; gives their streams as they are made."""

    choose = engine.choose

    def start(kernels, *, gpus=1, unit=1 << 25, smallest=TILE, **limits):
        made = [Tight(**limits) for _ in range(gpus)]
        chosen = Backend("triton", kernels, (0,) * gpus)
        monkeypatch.setattr(engine, "choose", lambda spec, name: choose(spec, name) if spec == "cpu" else chosen)
        monkeypatch.setattr(cuda, "UNIT_ELEMENTS", unit)
        monkeypatch.setattr(placement, "SMALLEST", smallest)
        monkeypatch.setattr(placement, "logical", lambda chosen: [Gpu("cuda:0", s, share=gpus) for s in made])
        return made

    return start


@pytest.mark.parametrize("name", RECIPES)
def test_two_logical_gpus_give_the_bytes_of_the_cpu(short, name, tmp_path, pretend):
    """Of some methods by Triton's kernels, of their variants by the native ones: the bytes' way is the same."""
    text = recipe_of(short, name)
    fm.merge(text, tmp_path / "cpu", device="cpu", backend="native")
    streams = pretend(TritonKernels("cpu") if name in INTERPRETED else Native(), gpus=2, unit=TILE)
    report = fm.merge(text, tmp_path / "gpu", device="cuda:0,cuda:0")
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")
    assert report.backend == "triton"
    assert set(report.devices) == {"cuda:0"}
    assert all(not s.locked for s in streams)


@pytest.mark.parametrize("name", ["ties", "slerp rows"])
def test_whole_tensors_stay_in_their_slots(paths, name, tmp_path, pretend):
    text = recipe_of(paths, name)
    pretend(TritonKernels("cpu"))
    report = fm.merge(text, tmp_path / "gpu", device="cuda")
    fm.merge(text, tmp_path / "cpu", device="cpu", backend="native")
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")
    assert report.bytes_read == sum(c["bytes_in"] for c in [fm.plan(text).summary()]), "each byte was read once"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["linear", "slerp", "ties", "ties whole model", "dare_ties"]),
    gpus=st.integers(1, 3),
    unit=st.sampled_from([TILE, 2 * TILE, 1 << 25]),
    cells=st.integers(3, 40),
    most=st.integers(1, 40),
)
def test_any_budgets_and_devices_give_the_same_bytes(paths, tmp_path_factory, pretend, name, gpus, unit, cells, most):
    root = tmp_path_factory.mktemp("any")
    text = recipe_of(paths, name)
    fm.merge(text, root / "cpu", device="cpu")
    slot = 5 * 2 * TILE + (1 << 16)
    streams = pretend(Native(), gpus=gpus, unit=unit, most=most * slot)
    fm.merge(text, root / "gpu", device="cuda", memory=cells * slot, max_vram=3 * slot)
    assert weights(root / "gpu") == weights(root / "cpu")
    assert sum(map(sum, (s.reserved for s in streams))) <= cells * slot + 512 * gpus + 512 * 24
    assert sum(map(sum, (s.reserved for s in streams))) <= 3 * slot, "one GPU has one budget, however often it is named"


def test_too_little_memory_for_slots_means_smaller_ones(paths, tmp_path, pretend):
    text = recipe_of(paths, "ties")
    fm.merge(text, tmp_path / "cpu", device="cpu")
    for i, limit in enumerate(({"most": 1_400_000}, {"pins": 1_400_000})):
        (streams,) = pretend(Native(), **limit)
        fm.merge(text, tmp_path / f"gpu{i}", device="cuda")
        assert weights(tmp_path / f"gpu{i}") == weights(tmp_path / "cpu")
        assert streams.tries > 1
        assert not streams.locked


@pytest.mark.parametrize("limit", [{"most": 100_000}, {"pins": 100_000}, {"free": 1000}])
def test_no_memory_at_all_is_said_with_the_minimum_and_nothing_is_written(paths, tmp_path, pretend, limit):
    (streams,) = pretend(Native(), **limit)
    with pytest.raises(BudgetError, match=r"expected >= \d+ bytes"):
        fm.merge(recipe_of(paths, "ties"), tmp_path / "out", device="cuda")
    assert not list(tmp_path.iterdir())
    assert not streams.locked


def test_max_vram_is_what_is_reserved(paths, tmp_path, pretend):
    for i, size in enumerate(["1.5MB", "20MB"]):
        (streams,) = pretend(Native())
        fm.merge(recipe_of(paths, "linear"), tmp_path / str(i), device="cuda", max_vram=size)
        assert 0 < streams.reserved[-1] <= fm.sizes.parse_bytes(size)


@pytest.mark.parametrize("gpus", [1, 3])
def test_the_minimum_of_max_vram_is_exact(paths, tmp_path, pretend, gpus):
    text = recipe_of(paths, "linear")
    pretend(Native(), gpus=gpus)
    with pytest.raises(BudgetError, match="--max-vram 1000 bytes") as caught:
        fm.merge(text, tmp_path / "out", device="cuda", max_vram=1000)
    least = int(re.search(r">= (\d+)", str(caught.value))[1])
    with pytest.raises(BudgetError, match=f">= {least} bytes"):
        fm.merge(text, tmp_path / "out", device="cuda", max_vram=least - gpus)
    fm.merge(text, tmp_path / "out", device="cuda", max_vram=least)


class Failing(Native):
    """Fails some calls of the last kernel."""

    def __init__(self, calls, error):
        super().__init__()
        self.left, self.error = calls, error

    def consensus(self, *args):
        if self.left:
            self.left -= 1
            raise self.error
        self.__getattr__("consensus")(*args)


def test_running_out_of_memory_in_a_unit_is_tried_again(paths, tmp_path, pretend):
    text = recipe_of(paths, "ties")
    fm.merge(text, tmp_path / "cpu", device="cpu")
    pretend(Failing(2, torch.OutOfMemoryError("CUDA out of memory. Tried")), unit=TILE)
    fm.merge(text, tmp_path / "gpu", device="cuda")
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    torch.AcceleratorError("CUDA error: out of memory\nmore"),
]


class Hungry(Native):
    """Kernels whose temporaries find no room in units of more than so many elements."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error = most, error

    def consensus(self, segments, *args):
        if segments.table[:, 1].sum() > self.most:
            raise self.error
        self.__getattr__("consensus")(segments, *args)


@pytest.mark.parametrize("error", SHORT, ids=["torch", "triton", "pinned"])
@pytest.mark.parametrize("gpus", [1, 2])
def test_running_out_of_memory_twice_means_smaller_slots(paths, tmp_path, pretend, caplog, error, gpus):
    text = recipe_of(paths, "ties")
    fm.merge(text, tmp_path / "cpu", device="cpu")
    streams = pretend(Hungry(TILE, error), gpus=gpus)
    report = fm.merge(text, tmp_path / "gpu", device="cuda")
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")
    assert report.backend == "triton"
    said = [r for r in caplog.records if "out of" in r.getMessage()]
    assert {r.levelno for r in said} == {logging.WARNING}
    assert all("memory for the kernels' temporaries beside slots of" in r.getMessage() for r in said)
    assert all(r.getMessage().endswith("; going on with half of that") for r in said)
    assert not any(s.locked for s in streams)
    largest = [max(tries) for tries in zip(*(s.reserved for s in streams), strict=True)]
    assert len(largest) == len(said) + 1
    assert all(after < before for before, after in itertools.pairwise(largest))


def test_smaller_slots_go_on_where_the_larger_ones_stopped(paths, tmp_path, pretend):
    text = recipe_of(paths, "ties")
    fm.merge(text, tmp_path / "cpu", device="cpu")
    pretend(Hungry(TILE, SHORT[0]), unit=2 * TILE)
    report = fm.merge(text, tmp_path / "gpu", device="cuda")
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")
    assert report.bytes_written == 2 * 7 * 20_000, "the small tensors had been written"
    assert any("resumed" in w for w in report.warnings)


def test_where_no_slot_is_small_enough_gpus_that_were_not_named_are_left(paths, tmp_path, several, caplog):
    text = recipe_of(paths, "ties")
    made = several(Tight(), Tight(), kernels=Hungry(0, SHORT[0]))
    report = fm.merge(text, tmp_path / "out")
    assert (report.backend, set(report.devices)) == ("native", {"cpu"})
    fm.merge(text, tmp_path / "cpu", device="cpu")
    assert weights(tmp_path / "out") == weights(tmp_path / "cpu")
    assert not any(s.locked for s in made)
    assert "and less does not do" in caplog.records[-1].getMessage()
    assert caplog.records[-1].getMessage().endswith("merging on the CPU")


def test_a_gpu_that_fails_while_slots_are_given_back_hides_nothing(paths, tmp_path, pretend):
    broken, whole = pretend(Failing(1 << 30, RuntimeError("CUDA error: unspecified launch failure")), gpus=2, unit=TILE)

    def fail(*_):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    broken.synchronize = broken.unpin = fail
    with pytest.raises(FastMergeError, match="^cuda:0: CUDA error: unspecified launch failure; continue"):
        fm.merge(recipe_of(paths, "ties"), tmp_path / "out", device="cuda")
    assert broken.locked
    assert not whole.locked


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (SHORT[0], BudgetError, r"^cuda:0: out of memory .* less does not do \(a slot of .*\); continue with"),
        (SHORT[1], BudgetError, r"^cuda:0: out of memory .* less does not do \(a slot of .*\); continue with"),
        (SHORT[2], BudgetError, r"^cuda:0: out of pinned host memory .* less does not do \(.*\); continue with"),
        (RuntimeError("CUDA error: unspecified launch failure\nmore"), FastMergeError, "launch failure; continue with"),
    ],
)
def test_a_gpu_that_fails_loses_nothing(paths, tmp_path, pretend, error, kind, words):
    text = recipe_of(paths, "ties")
    fm.merge(text, tmp_path / "cpu", device="cpu")
    (streams,) = pretend(Failing(1 << 30, error), unit=TILE)
    with pytest.raises(kind, match=words) as caught:
        fm.merge(text, tmp_path / "gpu", device="cuda")
    assert len(str(caught.value).splitlines()) == 1
    assert not streams.locked
    fm.merge(text, tmp_path / "gpu", device="cpu", resume=True)
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


def test_a_gpu_that_fails_while_memory_is_made_is_translated(paths, tmp_path, pretend):
    (streams,) = pretend(Failing(1, torch.OutOfMemoryError("CUDA out of memory. Tried")), unit=TILE)
    fail = [torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")]
    streams.synchronize = lambda: fail and (_ for _ in ()).throw(fail.pop())
    with pytest.raises(FastMergeError, match="^cuda:0: CUDA error: an illegal memory access was encountered; continue"):
        fm.merge(recipe_of(paths, "ties"), tmp_path / "out", device="cuda")


def test_settling_gives_back_pinned_memory_too():
    done = []
    log = lambda what: lambda: done.append(what)  # noqa: E731
    streams = CudaStreams.__new__(CudaStreams)
    streams._uploads = streams._compute = streams._downloads = SimpleNamespace(synchronize=log("wait"))
    for private in ({"_host_emptyCache": log("host")}, {}):
        done.clear()
        cuda = SimpleNamespace(empty_cache=log("device"))
        streams._torch = SimpleNamespace(cuda=cuda, _C=SimpleNamespace(**private))
        streams.synchronize()
        assert done == ["wait"] * 3 + ["device"] + ["host"] * len(private)


@pytest.fixture
def several(monkeypatch):
    """Makes every ``--device`` GPUs of host memory that were found, not named; gives their streams."""

    choose = engine.choose

    def start(*made, otherwise="auto", kernels=None):
        say.cache_clear()
        chosen = Backend("triton", kernels or Native(), tuple(range(len(made))), otherwise)
        monkeypatch.setattr(engine, "choose", lambda spec, name: choose(spec, name) if spec == "cpu" else chosen)
        monkeypatch.setattr(cuda, "UNIT_ELEMENTS", TILE)
        monkeypatch.setattr(placement, "SMALLEST", TILE)
        monkeypatch.setattr(placement, "logical", lambda chosen: [Gpu(f"cuda:{i}", made[i]) for i in chosen.gpus])
        return made

    return start


@pytest.mark.parametrize("full", [{"free": 1000}, {"most": 1000}])
def test_a_full_gpu_that_was_not_named_is_left_out(paths, tmp_path, several, caplog, full):
    text = recipe_of(paths, "ties")
    made = several(Tight(), Tight(**full), Tight())
    with caplog.at_level(logging.INFO, "fastmerge"):
        report = fm.merge(text, tmp_path / "gpu")
    assert set(report.devices) == {"cuda:0", "cuda:2"}
    assert sum("cuda:1 not used: " in r.getMessage() for r in caplog.records) == 1
    assert not any(s.locked for s in made)
    several(Tight(**full), Tight(**full))
    report = fm.merge(text, tmp_path / "cpu")
    assert (report.backend, set(report.devices)) == ("native", {"cpu"})
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


def test_a_full_gpu_is_no_reason_to_ignore_what_was_named(paths, tmp_path, several):
    text = recipe_of(paths, "ties")
    for otherwise in (None, "triton"):
        several(Tight(free=1000), otherwise=otherwise)
        with pytest.raises(BudgetError, match="free memory of cuda:0: 333 bytes is below"):
            fm.merge(text, tmp_path / "out")
    several(Tight(), Tight())
    with pytest.raises(BudgetError, match="^--max-vram 1000 bytes is below"):
        fm.merge(text, tmp_path / "out", max_vram=1000)
    assert not list(tmp_path.iterdir())


def test_nonfinite_outputs_are_counted_on_the_device(tmp_path, pretend):
    base, a = (tiny.state(seed, layers=1, vocab=300) for seed in (0, 1))
    a["model.norm.weight"][3] = float("nan")
    paths = {n: tiny.write(tmp_path / n, s, layers=1) for n, s in (("base", base), ("a", a), ("b", base))}
    pretend(TritonKernels("cpu"))
    for method, lead in (("linear", None), ("ties", "base")):
        text = tiny.recipe(paths, method, names=("a", "b"), base=lead, weight=0.5)
        report = fm.merge(text, tmp_path / method, device="cuda")
        assert report.nonfinite == {"model.norm.weight": 1}
