"""Every method by itself, statistics, solve and apply, on one unit of the stream, beside memcpy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bench import calls, cases
from fastmerge.commands import bench as command
from fastmerge.commands.bench import MethodCall, method_calls
from fastmerge.methods import METHODS

pytestmark = [pytest.mark.hot, pytest.mark.host]


@pytest.fixture(scope="module")
def every(toy: bool) -> dict[str, MethodCall]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "ELEMENTS", cases.TOY if toy else command.ELEMENTS)
        return {call.method: call for call in method_calls()}


@pytest.mark.parametrize("method", METHODS)
def test_method(measure: Callable[..., None], every: dict[str, MethodCall], method: str) -> None:
    if method not in every:
        pytest.skip("has no kernels here")
    call = every[method]
    source = np.zeros(call.nbytes // 2, np.uint8)
    out = np.ones_like(source)
    measure(
        call.work,
        group="methods",
        runs=30,
        nbytes=call.nbytes,
        beside=calls.copy(out, source),
        beside_bytes=2 * source.nbytes,
        elements=command.ELEMENTS,
        method=method,
        statistics="yes" if call.statistics else "no",
    )
