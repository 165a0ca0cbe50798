"""Segments of the same inputs, which share their loads, have the bytes of each by itself."""

import numpy as np
import pytest

from fastmerge import _native
from tests.backends.isas import ISAS, using
from tests.backends.test_native import Batch, bits, combined
from tests.kernels_numpy import store, widen

SCALES = [(1, 1), (1, 2), (0.5, 0.93), (1, 3), (-2, -7), (1, 2.0**70), (1, 0), (0, 1), (3, 0.5), (np.inf, 0.3)]
"""Lambda and divisor. Half of all quotients by 2 lie in the middle between two of the stored type."""


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with using(request.param):
        yield request.param


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("code", "most"), [(1, 3e38), (2, 60000.0), (3, 3e38)])
def test_candidates_of_the_same_inputs(code, most, delta):
    for models, size, odd in ((2, 9001, None), (3, 5000, np.nan), (4, 1024, None), (5, 3000, -most), (8, 2500, np.inf)):
        rng = np.random.default_rng(models)
        b = Batch((code,) * models, [size], code, rng, special=False)
        if odd is not None:  # in one block of several
            for x in b.inputs[0]:
                x[2000:2100] = store(np.full(100, odd, np.float32), code)
        count = len(SCALES)
        table = np.repeat(b.table, count, axis=0)
        table[:, 5] = np.arange(count)
        outs = [np.full(size + 64, 7, b.outputs[0].dtype) for _ in range(count)]
        at = [-o.ctypes.data % 64 // o.itemsize for o in outs]
        table[:, 0] = [o.ctypes.data + a * o.itemsize for o, a in zip(outs, at, strict=True)]
        coef = rng.standard_normal((count, models))
        coef[:2] = 1
        found = np.zeros(count, np.int64)
        _native.combine(table, b.ins, code, coef, np.array(SCALES, np.float64), delta, False, found, True)
        for i, scale in enumerate(np.array(SCALES, np.float32)):
            with np.errstate(all="ignore"):
                expected = store(combined(b.x(0), coef[i].astype(np.float32), *scale, delta), code)
            got = outs[i][at[i] : at[i] + size]
            assert np.array_equal(bits(got), bits(expected)), (models, SCALES[i])
            assert found[i] == (~np.isfinite(widen(expected, code, np.float64))).sum()
            assert (outs[i][: at[i]] == 7).all()
            assert (outs[i][at[i] + size :] == 7).all()


@pytest.mark.parametrize("divisor", [3.0, 0.7])
def test_quotients_beside_the_middle_of_two_results(divisor):
    """So many that some hundred are nearer to it than a product with the inverse is exact."""
    rng = np.random.default_rng(int(10 * divisor))
    b = Batch((3, 3), [1 << 20], 3, rng, special=False)
    table = np.repeat(b.table, 2, axis=0)
    outs = [np.empty(1 << 20, np.uint16) for _ in table]
    table[:, 0] = [o.ctypes.data for o in outs]
    table[:, 5] = (0, 1)
    coef = np.array([[0.6, 0.3], [1.1, 0.9]])
    scale = np.array([[1, divisor]] * 2)
    _native.combine(table, b.ins, 3, coef, scale, False, False, np.zeros(2, np.int64))
    for out, c in zip(outs, coef.astype(np.float32), strict=True):
        expected = store(combined(b.x(0), c, np.float32(1), np.float32(divisor), False), 3)
        assert np.array_equal(out, bits(expected))
