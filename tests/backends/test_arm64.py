"""The kernels on arm64, emulated: whatever they write has to be what the extension writes here.

The calls are those of the other tests, whose references hold the extension.
"""

import contextlib
import errno
import fcntl
import functools
import os
import re

import numpy as np
import pytest

from fastmerge import _native
from fastmerge.backends.native import NativeKernels
from tests.backends import (
    arm64,
    test_native,
    test_native_candidates,
    test_native_coded,
    test_native_consensus,
    test_native_importance,
    test_native_select,
    test_native_values,
    test_native_variance,
    test_native_wide_sums,
)
from tests.ops import test_gathered, test_quantised, test_replicate

pytestmark = [
    pytest.mark.arm64,
    pytest.mark.skipif(bool(arm64.MISSING), reason=f"needs {' and '.join(arm64.MISSING)}"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The compiled program: one for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "arm64"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return folder / "arm64" if (folder / "arm64").exists() else arm64.build(folder)


@pytest.fixture
def arm(program):
    """The kernels on arm64, asked at every call of the extension."""
    with contextlib.closing(arm64.Arm64(program)) as other, other.beside(), np.errstate(all="ignore"):
        yield other


def test_every_kernel_is_known():
    table = set(re.findall(r"isa::(\w+)", (arm64.ROOT / "csrc/dispatch.cpp").read_text()))
    assert table | {"kth", "gram_kept"} == {name.removesuffix("_u16") for name in arm64.KERNELS}


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("kinds", [(3,), (2,), (1,), (0,), (3, 1, 2)], ids=str)
def test_combine(arm, kinds, delta):
    test_native.test_combine([_native.isa()], kinds, delta)
    assert arm.unlike() == []


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("kinds", [(1,), (1, 3)], ids=str)
def test_combine_in_fp64(arm, kinds, delta):
    test_native.test_combine_in_fp64(kinds, delta)
    assert arm.unlike() == []


@pytest.mark.parametrize("delta", [False, True])
def test_candidates_of_the_same_inputs(arm, delta):
    test_native_candidates.test_candidates_of_the_same_inputs(3, 3e38, delta)
    assert arm.unlike() == []


def test_combine_of_rows_and_large_tensors(arm):
    for row in (5, 100):
        test_native.test_combine_by_row_from_the_middle_of_a_row(row, True)
    test_native.test_combine_in_place_and_base_alone()
    large = test_native.Batch((2, 2), [(4 << 20) + 37], 2, np.random.default_rng(0), special=False)
    _native.combine(large.table, large.ins, 2, np.ones((1, 2)), np.ones((1, 2)), True, False, large.nonfinite)
    assert arm.unlike() == []


@pytest.mark.parametrize("kinds", [(3, 1, 2), (0, 3, 1, 2)], ids=str)
def test_gram(arm, kinds):
    test_native.test_gram([_native.isa()], kinds)
    assert arm.unlike() == []


@pytest.mark.parametrize("codes", [(3, 3, 3, 3), (0, 3, 1)], ids=str)
def test_variance(arm, codes):
    test_native_variance.test_keys_and_counts(codes)
    test_native_variance.test_thresholds_of_whole_tensors(codes)
    test_native_variance.test_sums_and_merges_of_what_stays(codes)
    test_native_variance.test_coded_inputs(test_native_coded.SHAPES[0], (4, 3, 4))
    assert arm.unlike() == []


@pytest.mark.parametrize("codes", [(3, 3), (1, 0)], ids=str)
def test_importance(arm, codes):
    for kind in ("normal", "two", "special"):
        test_native_importance.test_importances_and_merges(codes, kind)
    assert arm.unlike() == []


def test_gram_of_special_values_and_fold(arm):
    test_native.test_gram_of_special_values_is_canonical()
    test_native.test_fold_is_ordered()
    assert arm.unlike() == []


@pytest.mark.parametrize("kinds", [(3,), (2,), (1,), (0, 3, 1, 2)], ids=str)
def test_dot(arm, kinds):
    test_native.test_dot([_native.isa()], kinds)
    test_native.test_dot_of_special_values_and_any_chunking()
    assert arm.unlike() == []


@pytest.mark.parametrize("code", [2, 3])
def test_conversions(arm, code):
    test_native_values.test_all_16_bit_patterns_round_trip(code)
    test_native_values.test_rounding_equals_torch(code)
    test_native_values.test_fp64_is_rounded_once(code)
    assert arm.unlike() == []


def test_values(arm):
    test_native_select.test_philox_lanes_and_words(_native.isa())
    for code in range(4):
        test_native_values.test_count_nonfinite(code)
        test_native_values.test_apart(code, (0, 2, 3, 3)[code])
    assert arm.unlike() == []


def test_low_rank(arm):
    # Which NaN a sum of two gives is not said: such values have none.
    for code in (1, 2, 3):
        test_native_values.low_rank(9, 65, 5, code, special=False)
    assert arm.unlike() == []


def test_codes(arm):
    for code in ("float8_e4m3fn", "float8_e5m2"):
        test_quantised.test_every_float8_is_the_number_that_torch_says(None, code)
    test_quantised.test_edges_of_blocks_have_scales_of_their_own(None)
    test_quantised.test_blocks_of_gpt_oss_as_transformers_reads_them(None)
    test_quantised.test_float8_blocks_are_those_of_transformers(None)
    test_quantised.test_mxfp4_is_that_of_compressed_tensors(None)
    test_quantised.test_every_float32_near_a_tie_goes_to_the_even_code(None)
    assert arm.unlike() == []


@pytest.mark.parametrize("shape", test_native_coded.SHAPES, ids=lambda s: s[0])
def test_coded_inputs(arm, shape):
    # Which NaN a sum of two gives is not said, nor its sign: fp32 results are canonical, keys and sums as well.
    test_native_coded.test_combine(shape, (4, 3, 4))
    test_native_coded.test_sums_and_selection(shape, (4, 0, 4))
    test_native_coded.test_consensus(shape, (4, 4, 4))
    test_native_coded.test_thresholds_of_whole_tensors(shape)
    assert arm.unlike() == []


def test_splits(arm, monkeypatch):
    test_gathered.test_the_extension_splits_as_numpy_does(monkeypatch)
    assert arm.unlike() == []


@pytest.mark.parametrize("codes", [(0, 0), (2, 3, 2, 1)], ids=str)
def test_selection(arm, codes, monkeypatch):
    monkeypatch.setattr(test_native_select, "SIZES", [1, 7, 1023, 4096, 65_541])
    monkeypatch.setattr(test_native_select, "ISAS", [_native.isa()])
    test_native_select.test_delta_keys(codes, 3, True)
    test_native_select.test_count(codes, 2, True, 1)
    test_native_select.test_kth(codes, -1, False)
    test_native_select.test_l1(codes, False, True, False, -1)
    test_native_select.test_l1(codes, True, True, True, 3)
    assert arm.unlike() == []


@pytest.mark.parametrize("part", range(4))
def test_consensus(arm, part):
    for i, mode in list(enumerate(test_native_consensus.MODES))[part::4]:
        codes = test_native_consensus.DTYPES[i % 7] if i > part else (3, 2, 1) * 4
        case = test_native_consensus.Case(
            i, codes, i % 4, test_native_consensus.KEEPS[i % 5], mode, sizes=[9, 1025, 66_003, 33, 2050, 4111],
            round_code=[-1, 3, 2][i % 3],
        )  # fmt: skip
        case.run()
    assert arm.unlike() == []


@pytest.mark.parametrize(("elect", "split"), [(1, False), (1, True), (2, False)])
def test_votes(arm, elect, split, monkeypatch):
    monkeypatch.setattr(test_native_consensus, "ISAS", [_native.isa()])
    test_native_consensus.test_votes("drop+index", elect, split, (2, 3, 1) if split else (1, 0, 2))
    assert arm.unlike() == []


def test_wide_sums(arm):
    test_native_wide_sums.test_every_mode(1)
    for models in (1, 3, 4):
        test_native_wide_sums.test_fused_loops(models)
    test_native_wide_sums.test_votes_and_l1_sums("drop+index")
    assert arm.unlike() == []


@pytest.mark.parametrize(("code", "out_code"), test_replicate.PAIRS)
def test_experts(arm, code, out_code):
    test_replicate.test_native_equals_the_reference(NativeKernels(), code, out_code)
    assert arm.unlike() == []


def test_experts_by_pieces(arm):
    test_replicate.test_pieces_and_subsets_of_experts_change_nothing(NativeKernels())
    assert arm.unlike() == []


def test_transfers(program, tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (9 << 20) + 77, np.uint8)
    (tmp_path / "in").write_bytes(data.tobytes())
    files = [os.open(tmp_path / "in", os.O_RDONLY), os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)]
    source, to = files
    room = np.zeros(2 * data.size, np.uint8)
    at = -(-room.ctypes.data // arm64.PAGE) * arm64.PAGE
    short = [source, 5009, source, at + (6 << 20) + 5009 % arm64.PAGE, data.size]
    try:
        with contextlib.closing(arm64.Arm64(program, files)) as other:
            ask = {name: functools.partial(other.call, name, getattr(_native, name)) for name in arm64.TRANSFERS}
            past = np.array([[source, 5000, source, at + 5000 % arm64.PAGE, 4_300_000], short])
            assert ask["read_past"](past, 0, 77) == (1, data.size - 5009, 0)
            some = np.array([[source, 9, at, 70_001], [source, data.size - 9, at + 70_001, 10]])
            assert ask["read_some"](some, 0, 5) == (1, 9, 0)
            out = np.array([[to, 3, data.ctypes.data, 70_001], [-1, 0, data.ctypes.data, 1]])
            assert ask["write_some"](out, 0, 1) == (1, 0, errno.EBADF)
            assert other.unlike() == []
    finally:
        for fd in files:
            os.close(fd)
    assert (tmp_path / "out").read_bytes()[4:] == data[1:70_001].tobytes()
