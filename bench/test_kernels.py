"""Every kernel of a backend by itself, beside memcpy: in the caches, beyond them, and by type and number of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench import calls, cases

REPLICATE = ("replicate", "replicate noise")

Measure = Callable[..., None]


def take(measure: Measure, where: str, case: cases.Case) -> None:
    measure(
        case.work,
        group=f"{case.kernel.split()[0]} {where}",
        runs=case.runs,
        nbytes=case.nbytes,
        beside=calls.copy(case.out, case.source),
        beside_bytes=2 * case.out.nbytes,
        unit=1e-3 if where == "cold" else 1e-6,
        elements=case.elements,
        kernel=case.kernel,
        type=case.type,
        models=case.models,
    )


def one(measure: Measure, kernels: Any, device: str, where: str, name: str, n: int) -> None:
    f = cases.family(n, device=device)
    take(measure, where, cases.case(kernels, name, f))


def copies(measure: Measure, where: str, name: str, n: int, code: int = cases.BF16) -> None:
    native = pytest.importorskip("fastmerge.backends.native")
    f = cases.family(n, code)
    for case in cases.replicate(native.NativeKernels(), f):  # which owns the copies
        if case.kernel == name:
            take(measure, where, case)


@pytest.mark.hot
@pytest.mark.parametrize("name", cases.ALL)
def test_hot(measure: Measure, kernels: Any, device: str, toy: bool, name: str) -> None:
    one(measure, kernels, device, "hot", name, cases.TOY if toy else cases.HOT)


@pytest.mark.hot
@pytest.mark.host
@pytest.mark.parametrize("name", REPLICATE)
def test_hot_copies(measure: Measure, toy: bool, name: str) -> None:
    copies(measure, "hot", name, cases.TOY if toy else cases.HOT)


@pytest.mark.cold
@pytest.mark.parametrize("name", cases.ALL)
def test_cold(measure: Measure, kernels: Any, device: str, toy: bool, name: str) -> None:
    one(measure, kernels, device, "cold", name, cases.TOY if toy else cases.COLD)


@pytest.mark.cold
@pytest.mark.host
@pytest.mark.parametrize("name", REPLICATE)
def test_cold_copies(measure: Measure, toy: bool, name: str) -> None:
    copies(measure, "cold", name, cases.TOY if toy else cases.COLD)


@pytest.mark.hot
@pytest.mark.parametrize(("name", "models"), [(name, n) for name, counts in cases.BY_TYPE.items() for n in counts])
@pytest.mark.parametrize("code", cases.TYPES, ids=lambda code: cases.TYPES[code][0])
def test_types(measure: Measure, kernels: Any, device: str, toy: bool, code: int, name: str, models: int) -> None:
    f = cases.family(cases.TOY if toy else cases.HOT, code, cases.MOST, device)
    take(measure, "by type", cases.case(kernels, name, f, models))


@pytest.mark.hot
@pytest.mark.host
@pytest.mark.parametrize("name", REPLICATE)
@pytest.mark.parametrize("code", cases.TYPES, ids=lambda code: cases.TYPES[code][0])
def test_copies_by_type(measure: Measure, toy: bool, code: int, name: str) -> None:
    copies(measure, "by type", name, cases.TOY if toy else cases.HOT, code)
