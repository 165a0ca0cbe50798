"""Sources that slices are made of: every run of them is what numpy makes of the whole tensor."""

import numpy as np
import pytest

from fastmerge.dtypes import BF16, F32
from fastmerge.ops.made import array
from fastmerge.ops.picked import Gain, Held, Picked
from fastmerge.ops.rotated import TurnedColumns, TurnedRows
from fastmerge.ops.sources import Memory
from fastmerge.runtime.stores import OpStore

RNG = np.random.default_rng(3)
BRING = OpStore(()).bring


def filled(source, bits, cuts):
    """A source, in runs that begin at the cuts."""
    n = int(np.prod(source.shape))
    out = np.zeros(n, bits)
    for e0, end in zip([0, *cuts], [*cuts, n], strict=True):
        part = np.zeros(end - e0, bits)
        source.fill(BRING, e0, end - e0, part.ctypes.data)
        out[e0:end] = part
    return out.reshape(source.shape)


def cuts(n):
    return sorted(RNG.choice(np.arange(1, n), min(n - 1, 7), replace=False).tolist()) if n > 1 else []


def weights(*shape, bits=np.uint16):
    values = RNG.integers(0, 1 << 16, shape).astype(bits)
    return values, Memory(values.ctypes.data, BF16 if bits is np.uint16 else F32, shape)


@pytest.mark.parametrize("rows", [None, [4, 5, 6, 0, 2], [1]])
@pytest.mark.parametrize("columns", [None, [3, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_rows_and_columns_are_those_of_the_index(rows, columns):
    values, source = weights(7, 9)
    index = [None if i is None else np.array(i, np.int64) for i in (rows, columns)]
    expected = values
    expected = expected if rows is None else expected[rows]
    expected = expected if columns is None else expected[:, columns]
    picked = Picked(source, *index, expected.shape)
    for _ in range(5):
        assert np.array_equal(filled(picked, np.uint16, cuts(expected.size)), expected)


def test_columns_that_are_few_are_all_that_is_read_of_wide_rows():
    values, source = weights(3, 40_000, bits=np.uint32)
    brought = []

    def bring(of, runs):
        brought.extend(runs[:, 1].tolist())
        BRING(of, runs)

    columns = np.array([70, 50, 61])
    out = np.zeros((3, 3), np.uint32)
    Picked(source, None, columns, (3, 3)).fill(bring, 0, 9, out.ctypes.data)
    assert np.array_equal(out, values[:, columns])
    assert brought == [21, 21, 21]


def test_a_vector_has_one_row_and_a_fused_tensor_those_of_all_experts():
    values, source = weights(11)
    index = np.array([10, 0, 3])
    assert np.array_equal(filled(Picked(source, None, index, (3,)), np.uint16, [1]), values[index])
    values, source = weights(4, 3, 5)
    picked = Picked(source, np.array([2, 0]) + 3 * 3, np.array([4, 1, 0]), (2, 3))
    assert np.array_equal(filled(picked, np.uint16, [2, 5]), values[3][[2, 0]][:, [4, 1, 0]])


def test_gains_are_scaled_with_their_one():
    values = RNG.standard_normal(9).astype(np.float32)
    source = Memory(values.ctypes.data, F32, (9,))
    wide = values.astype(np.float64)
    assert np.array_equal(filled(Gain(source, 1.25, plus_one=False), np.float64, [4]), wide * 1.25)
    assert np.array_equal(filled(Gain(source, 1.25, plus_one=True), np.float64, [4]), (wide + 1) * 1.25 - 1)


def test_tensors_that_were_computed_are_as_they_are():
    values = RNG.standard_normal((3, 5)).astype(np.float32)
    assert np.array_equal(filled(Held(values), np.float32, [2, 9]), values)


@pytest.mark.parametrize("height", [1, 130])
def test_products_have_the_same_bytes_in_any_runs(height):
    values = RNG.standard_normal((height, 300)).astype(np.float32)
    gains = RNG.standard_normal(300).astype(np.float32)
    right, left = RNG.standard_normal((300, 7)), RNG.standard_normal((70, height))
    source, gain = Memory(values.ctypes.data, F32, values.shape), Memory(gains.ctypes.data, F32, (300,))
    wide = values.astype(np.float64)
    for made, expected in (
        (TurnedColumns(source, right), wide @ right),
        (TurnedColumns(source, right, gain), wide * gains @ right),
        (TurnedColumns(source, right, gain, plus_one=True), wide * (1.0 + gains.astype(np.float64)) @ right),
        (TurnedRows(source, left), left @ wide),
    ):
        whole = filled(made, np.float64, [])
        assert np.allclose(whole, expected, rtol=1e-12, atol=1e-12)
        for _ in range(2):
            assert np.array_equal(filled(made, np.float64, cuts(whole.size)), whole)
    bias = Memory(values.ctypes.data, F32, (height,))
    assert np.allclose(filled(TurnedRows(bias, left), np.float64, [3]), left @ wide.reshape(-1)[:height])
    assert array(0, 0, np.float64).size == 0
