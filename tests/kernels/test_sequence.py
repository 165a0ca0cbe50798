"""Every method's cases as one sequence of launches, in the interpreter, bit for bit against the definition."""

import pytest

from tests import oracle
from tests.methods.test_methods import CASE_IDS, CASES, batch, ids, unlike_reference

pytest.importorskip("triton", reason="the Triton kernels need triton")
import triton.language as tl

from fastmerge.kernels import TritonKernels, _call, kth, selection

if not _call.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1; tests/gpu does the same on a GPU", allow_module_level=True)

SHAPES = ((), (0,), (33, 41), (2, 2049))
BOUND = [
    (m, case)
    for m, case in CASES
    if m.name not in oracle.PASS_BY_PASS
    and TritonKernels("cpu").supports(oracle.op_of(m, case, (4, 4), "bf16").spec) is None
]
every_case = pytest.mark.parametrize(("method", "case"), BOUND, ids=ids(BOUND))
BRACKETED = ("ties-0", "ties-1", "ties-2", "dare_ties-2", "dare_ties-4")
"""Cases whose thresholds are found in every way: index, rescale, spread, with a drop, all ties."""
SPECIAL = ("ties-1", "dare_ties-4")
"""Those of them with NaNs, infinities and signed zeros; test_selection.py has such keys too."""


def unlike_definition(method, case, types, shapes, **data):
    ops, inputs = batch(method, case, types, shapes, **data)
    return unlike_reference(ops, inputs, TritonKernels("cpu"), bound=True)


@every_case
def test_small_shapes_in_one_call(method, case):
    """Among them empty ones; another type for each case."""
    types = list(oracle.TYPES)[CASES.index((method, case)) % len(oracle.TYPES)]
    assert unlike_definition(method, case, types, SHAPES) == []


@every_case
def test_special_values(method, case):
    """NaN, infinities, zeros of either sign, subnormals; where sums are not finite, the error of the definition."""
    types = ("bf16", "fp32", "mixed64")[CASES.index((method, case)) % 3]
    special = (True, "finite")[CASES.index((method, case)) % 2]
    assert unlike_definition(method, case, types, ((1,), (13, 100)), special=special) == []


@pytest.mark.parametrize("name", ["ties-0", "ties-1", "ties-5", "ties-9", "dare_linear-0", "dare_ties-1"])
def test_sums_in_fp64(name):
    """What is stored in fp32, with and without rescales, majorities and elections."""
    method, case = CASES[CASE_IDS.index(name)]
    assert unlike_definition(method, case, "fp32", ((5,), (33, 41))) == []


@pytest.mark.parametrize("name", BRACKETED)
def test_selected_by_brackets(name, monkeypatch):
    """Tensors of a thousand elements are sampled, bracketed and counted, beside some that are not."""
    monkeypatch.setattr(kth, "MOST", 1000)
    monkeypatch.setattr(selection, "MIDDLE", 1000)
    monkeypatch.setattr(selection, "RANKED", tl.constexpr(512))
    method, case = CASES[CASE_IDS.index(name)]
    data = {"special": True} if name in SPECIAL else {}
    assert unlike_definition(method, case, "fp32" if data else "bf16", ((5,), (33, 41), (7, 11)), **data) == []
