"""Which devices and backends are chosen, on machines that are pretended."""

import logging
from types import SimpleNamespace

import pytest
import torch

import fastmerge as fm
from fastmerge.api import tensors as memory
from fastmerge.backends import choose as choosing
from fastmerge.backends import probe
from fastmerge.backends.choose import Backend
from fastmerge.commands import estimate
from fastmerge.errors import BackendUnavailable
from tests import tiny


@pytest.fixture
def card(monkeypatch):
    """A machine where everything is there but the facts that a test changes."""
    monkeypatch.setattr(probe, "_WORKING", set())
    for module in (choosing, probe):
        monkeypatch.setattr(module, "absent_reason", lambda: None)
        monkeypatch.setattr(module, "driver_reason", lambda: None)
    choosing.say.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Some GPU")
    monkeypatch.setattr(probe, "_trial", lambda device: None)
    monkeypatch.setattr(choosing, "gpu_backend", lambda gpus: Backend("triton", None, gpus))
    return monkeypatch


def test_devices_by_name(card):
    assert choosing.choose("auto").gpus == (0, 1)
    assert choosing.choose("cuda").gpus == (1,)
    assert choosing.choose("cuda:0, cuda:1").gpus == (0, 1)
    assert choosing.choose("cuda:0,cuda:0", "triton").gpus == (0, 0)
    assert choosing.choose("cpu").gpus == ()
    assert choosing.choose("auto", "native").gpus == ()


def old_driver():
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update.")


@pytest.mark.parametrize(
    ("change", "spec", "words"),
    [
        ((choosing, "driver_reason", lambda: "no NVIDIA driver is installed"), "cuda", "no NVIDIA driver"),
        ((torch.version, "cuda", None), "cuda", "built without CUDA"),
        ((torch.cuda, "init", old_driver), "cuda", "too old"),
        ((torch.cuda, "get_device_capability", lambda i: (7, 5)), "cuda", "7.5; expected 8.0"),
        ((probe, "_trial", lambda device: 1 / 0), "cuda", "ZeroDivisionError"),
        ((probe, "_trial", lambda device: None), "cuda:2", "no GPU 2; torch sees 2"),
        ((probe, "_trial", lambda device: None), "cuda:0,cpu", "unknown device 'cpu'"),
        ((probe, "_trial", lambda device: None), "cuda:x", "unknown device"),
    ],
)
def test_a_named_gpu_works_or_says_why_in_one_line(card, change, spec, words):
    card.setattr(*change)
    with pytest.raises(BackendUnavailable) as caught:
        choosing.choose(spec)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_backend_for_the_cpu_refuses_gpus(card):
    with pytest.raises(BackendUnavailable, match="native runs on CPU cores"):
        choosing.choose("cuda", "native")
    card.setenv("FASTMERGE_BACKEND", "reference")
    with pytest.raises(BackendUnavailable, match="reference runs on CPU cores"):
        choosing.choose("cuda:0")


def test_auto_falls_back_and_warns_once(card, caplog):
    card.setattr(torch.cuda, "get_device_capability", lambda i: (7, 0))
    assert choosing.choose("auto").gpus == ()
    assert choosing.choose("auto").name == "native"
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert "GPUs not used: Some GPU has compute capability 7.0" in said.getMessage()


@pytest.mark.parametrize("variable", ["TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "no driver", "no device"])
def test_where_no_gpu_is_meant_nothing_is_said(monkeypatch, caplog, variable):
    choosing.say.cache_clear()
    for name, value in (("TRITON_INTERPRET", "1"), ("CUDA_VISIBLE_DEVICES", "")):
        monkeypatch.setenv(name, value) if name == variable else monkeypatch.delenv(name, raising=False)

    def load(name):
        if variable == "no driver":
            raise OSError
        return SimpleNamespace(cuInit=lambda flags: 100) if variable == "no device" else None

    monkeypatch.setattr(probe.ctypes, "CDLL", load)
    with caplog.at_level(logging.DEBUG, "fastmerge"):
        assert choosing.choose("auto").gpus == ()
    assert not caplog.records


@pytest.mark.parametrize("missing", [["triton"], ["torch", "triton"]])
def test_a_driver_without_torch_or_triton_is_said(monkeypatch, caplog, missing):
    choosing.say.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None if name in missing else object())
    assert choosing.choose("auto").gpus == ()
    (said,) = caplog.records
    words = f"GPUs not used: {' and '.join(missing)} not installed; install torch and triton (the extra 'gpu'); merging"
    assert words in said.getMessage()
    with pytest.raises(BackendUnavailable, match="not installed; install torch and triton"):
        choosing.choose("cuda")


def test_where_all_outputs_are_copies_no_gpu_is_asked(card, tmp_path):
    paths = tiny.family(tmp_path, models=1, layers=1, hidden=16, vocab=30)
    copied = f"{{merge_method: passthrough, models: [{{model: {paths['a']}}}]}}"
    for module in (choosing, probe):
        card.setattr(module, "cuda_reason", lambda: pytest.fail("CUDA was started"))
    report = fm.merge(copied, tmp_path / "out")
    assert set(report.devices) == {"cpu"}
    assert " s on cpu (" in str(report)
    facts = estimate.estimate(fm.plan(copied), memory=None, device="auto", backend=None)
    assert facts["backend"] == "native"
    ops = fm.plan(copied).ops
    assert choosing.device_for("cuda", ops, None) == "cuda"
    assert choosing.device_for("auto", ops, "triton") == "auto", "what is named is used"
    computed = fm.plan(tiny.recipe(paths, "linear", names=("a",), base=None, weight=0.5)).ops
    assert choosing.device_for("auto", computed, None) == "auto"


def test_a_gpu_that_failed_once_is_tried_again_and_one_that_worked_is_not(card):
    tries = []
    card.setattr(probe, "_trial", lambda device: (tries.append(device), "no" if len(tries) == 1 else None)[1])
    assert [probe.gpu_reason(0) for _ in range(4)] == ["no", None, None, None]
    assert len(tries) == 2


def test_errors_name_what_the_caller_passed(card):
    with pytest.raises(BackendUnavailable, match="^--device cuda:7: there is no GPU 7"):
        choosing.choose("cuda:7")
    card.setattr(probe, "_trial", lambda device: "no")
    tensor = torch.zeros(3)
    card.setattr(memory, "choose", lambda device, *a, **k: choosing.choose("cuda:0", *a, **k))
    for call in (
        lambda: fm.merge_tensors([tensor] * 2, "linear", parameters={"weight": 0.5}),
        lambda: fm.ties_merge({"a": tensor}, [{"a": tensor}]),
    ):
        with pytest.raises(BackendUnavailable, match="^tensors on cpu: no$"):
            call()


@pytest.mark.parametrize(
    ("told", "want"),
    [
        (None, 4),
        ("0,1", 2),
        ("3, 0", 2),
        ("GPU-5f2c,MIG-1a", 2),
        ("1,9,0", 1),
        ("1,-1,0", 1),
        ("7", 0),
        ("1,1", 0),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
    ],
)
def test_a_plan_counts_the_gpus_that_cuda_shows(monkeypatch, tmp_path, told, want):
    for i in range(4):
        (tmp_path / f"0000:0{i}:00.0").mkdir()
    monkeypatch.setattr(choosing, "PROC", tmp_path)
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FASTMERGE_BACKEND", raising=False)
    if told is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert choosing.expected_gpus("auto") == tuple(range(want))
    if told in ("", "-1"):
        with pytest.raises(BackendUnavailable, match="hides every GPU"):
            choosing.expected_gpus("cuda:0")
    elif want:
        assert choosing.expected_gpus("cuda:0,cuda") == (0, 0)
