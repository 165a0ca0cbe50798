"""A table of magnitudes gives what selection gives, for every rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.ops.segments import TILE
from fastmerge.ops.selection.ranks import FEW, Ranks, counted, small
from fastmerge.ops.selection.select import ALL_TILES

KINDS = {np.uint32: 1 << 31, np.uint64: 1 << 63}


def table(keys):
    return Ranks([counted(keys[i : i + TILE]) for i in range(0, len(keys), TILE)])


def sorted_way(keys, rank):
    """Threshold and cut by sorting all elements: the largest first, equal ones by their place."""
    order = np.lexsort((np.arange(len(keys)), ~keys))
    at = keys[order[rank - 1]]
    kept = np.sort(order[:rank])
    tied = kept[keys[kept] == at]
    if at == 0 or len(tied) == int((keys == at).sum()):
        return int(at), (ALL_TILES, 0, -1)
    going = np.setdiff1d(np.flatnonzero(keys == at), tied)[0]  # the first that goes
    tile = int(going) // TILE
    return int(at), (tile, int((tied // TILE == tile).sum()), -1)


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 3 * TILE), st.sampled_from([*KINDS]))
@settings(max_examples=12, deadline=None)
def test_every_rank_is_that_of_a_sort(seed, different, size, kind):
    rng = np.random.default_rng(seed)
    keys = rng.choice(rng.integers(0, KINDS[kind], different, dtype=kind), size)
    found = table(keys)
    for rank in {1, size // 3, size // 2, size - 1} & set(range(1, size)):
        assert found.find(rank, "index") == sorted_way(keys, rank)
    assert found.find(size, "index") == (0, (ALL_TILES, 0, -1))
    assert found.find(0, "index") == (int(np.iinfo(kind).max), (0, 0, -1))


def test_ties_that_all_stay_or_are_thinned():
    keys = np.array([5, 7, 5, 5, 0, 9], np.uint32)
    assert table(keys).find(3, "all") == (5, (ALL_TILES, 0, -1))
    assert table(keys).find(3, "spread") == (5, (0, 0, 21845))  # a third of 65,536
    assert table(keys).find(5, "spread") == (5, (ALL_TILES, 0, -1))


@pytest.mark.parametrize(("different", "fine"), [(FEW, True), (FEW + 1, False)])
def test_a_table_of_too_many_keys_is_not_made(different, fine):
    assert small([counted(np.arange(different, dtype=np.uint32))], different) is fine
