"""Calls in memory as a user makes them: one small tensor, models of many and of few tensors, task vectors.

Wall time of whole calls, checks and allocations included; on a GPU until the device has done everything. Parameters
are those of ``recipes.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="calls in memory need torch")

import torch
from safetensors.torch import save_file

import fastmerge as fm
from bench.generate import SIZES, drawn, shapes

Measure = Callable[..., None]
State = dict[str, torch.Tensor]

pytestmark = pytest.mark.cores

METHODS: Mapping[str, tuple[Mapping[str, Any], int | None, int]] = {
    "linear": ({"weight": 0.5}, None, 2),
    "slerp": ({"t": 0.4}, 0, 2),
    "task_arithmetic": ({"weight": 0.5}, 0, 3),
    "ties": ({"weight": 0.5, "density": 0.2}, 0, 3),
    "dare_linear": ({"weight": 0.5, "density": 0.5}, 0, 3),
    "model_stock": ({}, 0, 3),
}
"""Method to its parameters, which input is the base, and how many inputs there are."""


POOL = 1 << 20


@functools.cache
def pool(model: int) -> torch.Tensor:
    """Bits of a million weights in bf16."""
    return torch.from_numpy(drawn(0, model, 2, POOL).view("int16"))


def place(device: str) -> str:
    if device == "interpreted":
        pytest.skip("calls choose their own backend")
    return device


def tensor(model: int, n: int, device: str) -> torch.Tensor:
    """bf16 weights of a base (0) or a fine-tune: a pool, repeated."""
    bits = pool(model).to(device)
    return bits.repeat(-(-n // POOL))[:n].view(torch.bfloat16)


def cut(whole: torch.Tensor, size: str) -> State:
    """A model of that size, as views of one tensor."""
    state, at = {}, 0
    for name, shape in shapes(SIZES[size]).items():
        n = math.prod(shape)
        state[name] = whole[at : at + n].view(shape)
        at += n
    return state


def elements(size: str) -> int:
    return sum(math.prod(shape) for shape in shapes(SIZES[size]).values())


@pytest.mark.hot
@pytest.mark.parametrize("method", METHODS)
def test_merge_tensors_of_64_elements(measure: Measure, device: str, method: str) -> None:
    parameters, base, count = METHODS[method]
    inputs = [tensor(i, 64, place(device)) for i in range(count)]
    floats = torch.stack(inputs)
    measure(
        lambda: fm.merge_tensors(inputs, method, parameters=parameters, base_index=base),
        group="merge_tensors of 64 elements",
        runs=300,
        beside=lambda: floats.float().mean(0).to(torch.bfloat16),
        times="torch's mean",
        unit=1e-6,
        method=method,
    )


@pytest.mark.large
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_merge_state_dicts_of_many_tensors(measure: Measure, device: str, toy: bool, method: str) -> None:
    """As many bytes in 18,867 tensors and in 219: views of the same memory, in turn."""
    sizes = ("tiny-moe", "tiny") if toy else ("moe18k", "dense3g")
    parameters, base, count = METHODS[method]
    wholes = [tensor(i, max(map(elements, sizes)), place(device)) for i in range(count)]
    many, few = ([cut(whole, size) for whole in wholes] for size in sizes)

    def merge(states: list[State]) -> None:
        fm.merge_state_dicts(states, method, parameters=parameters, base=base)

    measure(
        lambda: merge(many),
        group="merge_state_dicts",
        runs=3,
        nbytes=2 * elements(sizes[0]) * (count + 1),
        beside=lambda: merge(few),
        beside_bytes=2 * elements(sizes[1]) * (count + 1),
        times="dense",
        unit=1.0,
        method=method,
        tensors=len(many[0]),
    )


@pytest.fixture(scope="module")
def size(toy: bool) -> str:
    """0.27 GB a model."""
    return "tiny" if toy else "160m"


@pytest.fixture(scope="module")
def models(device: str, size: str) -> list[State]:
    """A base and two fine-tunes."""
    return [cut(tensor(i, elements(size), place(device)), size) for i in range(3)]


@pytest.fixture(scope="module")
def vectors(models: list[State]) -> list[State]:
    return [{name: t - models[0][name] for name, t in tuned.items()} for tuned in models[1:]]


@pytest.fixture(scope="module")
def files(models: list[State], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    for i, state in enumerate(models):
        save_file({name: t.contiguous() for name, t in state.items()}, root / f"{i}.safetensors")
    return sorted(root.iterdir())


FUNCTIONS: Mapping[str, tuple[int, Callable[..., Any]]] = {
    "compute_task_vector": (2, lambda _m, _v, f: fm.compute_task_vector(f[0], f[1])),
    "apply_task_vectors": (3, lambda _m, v, f: fm.apply_task_vectors(f[0], v, [0.5, 0.5])),
    "slerp_models": (2, lambda m, _v, _f: fm.slerp_models(m[1], m[2], 0.4)),
    "ties_merge": (3, lambda m, v, _f: fm.ties_merge(m[0], v)),
    "dare_sparsify": (1, lambda _m, v, _f: fm.dare_sparsify(v[0])),
    "dare_ties_merge": (3, lambda m, v, _f: fm.dare_ties_merge(m[0], v)),
}
"""The functions over state dictionaries, with the models that each reads; results are fp32."""


@pytest.mark.parametrize("function", FUNCTIONS)
def test_task_vectors(
    measure: Measure, models: list[State], vectors: list[State], files: list[Path], size: str, function: str
) -> None:
    count, call = FUNCTIONS[function]
    measure(
        lambda: call(models, vectors, files),
        group="task vectors",
        runs=5,
        nbytes=elements(size) * (2 * count + 4),
        function=function,
    )


@pytest.mark.parametrize("noise", [0.0, 1e-3], ids=["clean", "noise"])
def test_replicate_experts(measure: Measure, device: str, toy: bool, noise: float) -> None:
    x = tensor(0, 1 << (16 if toy else 25), place(device))
    room = torch.empty((4, len(x)), dtype=x.dtype, device=x.device)
    measure(
        lambda: fm.replicate_experts(x, 4, noise=noise, mode="absolute", out=room),
        group="replicate_experts",
        runs=5,
        nbytes=5 * x.nbytes,
        experts=4,
        noise=noise,
    )
