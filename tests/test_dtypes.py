"""Element types: one object each, wherever it travels."""

import copy
import pickle

import pytest

from fastmerge.dtypes import BF16, BY_TAG, F32, FLOATS, promote


@pytest.mark.parametrize("dtype", BY_TAG.values(), ids=list(BY_TAG))
def test_copies_and_pickles_are_the_type_itself(dtype):
    assert pickle.loads(pickle.dumps(dtype)) is dtype
    assert copy.deepcopy([dtype])[0] is dtype
    assert copy.copy(dtype) is dtype


def test_a_type_that_came_from_another_process_promotes_alike():
    sent = pickle.loads(pickle.dumps(BF16))
    assert sent in FLOATS
    assert promote(sent, BF16) is BF16
    assert promote(sent, F32) is F32


@pytest.mark.parametrize(
    ("tag", "count", "nbytes"),
    [("F4", 6, 3), ("F4", 3, -1), ("F6_E2M3", 4, 3), ("F6_E3M2", 2, -1), ("BF16", 3, 6), ("F8_E5M2FNUZ", 3, 3)],
)
def test_bytes_of_types_below_a_byte(tag, count, nbytes):
    assert BY_TAG[tag].nbytes(count) == nbytes
    assert not (BY_TAG[tag].bits and BY_TAG[tag].mergeable)
