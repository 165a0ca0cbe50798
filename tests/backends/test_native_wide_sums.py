"""Task vectors in fp32 whose sums are fp64: the native consensus, votes and L1 sums against plain numpy."""

import itertools

import numpy as np
import pytest

from fastmerge.backends.native import NativeKernels
from tests.backends.isas import ISAS, using
from tests.backends.test_native_consensus import KEEPS, MODES
from tests.compare import differences
from tests.kernels.cases import Case
from tests.kernels_numpy import NumpyKernels

NATIVE, NUMPY = NativeKernels(), NumpyKernels()
MIXES = [(1, 1, 1), (3, 1, 2), (1,) * 10]
FUSED = [(0, False, 0, 0), (1, False, 0, 0), (1, False, 1, 1)]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with using(request.param):
        yield


def unlike_numpy(case, words, mode):
    args = case.keep_args(f"{words} wide"), case.rules(*mode)
    each = [case.written(lambda s, k=k: k.consensus(s, *args)) for k in (NATIVE, NUMPY)]
    return differences(*([*outs, bad] for outs, bad in each))


@pytest.mark.parametrize("part", range(3))
def test_every_mode(part):
    found = [
        unlike_numpy(Case(MIXES[i % 3], out=1, sizes=(9, 2048 + 8), seed=i), KEEPS[i % len(KEEPS)], mode)
        for i, mode in list(enumerate(MODES))[part::3]
    ]
    assert found == [[]] * len(found)


@pytest.mark.parametrize("models", [1, 2, 3, 4, 5])
def test_fused_loops(models):
    """Those of up to four models, all in fp32, and one model more."""
    found = [
        unlike_numpy(Case((1,) * (models + 1), out=1, sizes=(9, 1024, 4099), shift=shift), words, mode)
        for mode, words, shift in itertools.product(FUSED, ("all", "drop", "never"), (0, 1))
    ]
    assert found == [[]] * len(found)


@pytest.mark.parametrize("words", ["drop+index", "all"])
def test_votes_and_l1_sums(words):
    case = Case((1, 1, 1), sizes=(5000, 9, 70_001))
    keep = case.keep_args(f"{words} wide")
    sums, counts = np.full((2, case.tiles, case.n, 2), 7.0), np.full((2, case.tiles, 2), 7, np.int64)
    votes = case.rules(1, True).votes
    for kernels, s, c in zip((NATIVE, NUMPY), sums, counts, strict=True):
        kernels.l1(case.segments, keep, s)
        kernels.votes(case.segments, keep, votes, c)
    assert differences([sums[0], counts[0]], [sums[1], counts[1]]) == []
