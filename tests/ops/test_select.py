"""Brackets and passes of the exact selection: any data, any luck of the sample, any cut of the work."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.keys import tensor_key
from fastmerge.methods.linear import Linear
from fastmerge.ops.blocks import top
from fastmerge.ops.consensus.rules import kept
from fastmerge.ops.kernels import Deltas
from fastmerge.ops.segments import TILE, Segments, segment_row
from fastmerge.ops.selection import brackets, select
from fastmerge.ops.selection.brackets import Span, blocks, bracket
from fastmerge.ops.selection.select import ALL_TILES, Select
from fastmerge.ops.spec import Op, Spec
from fastmerge.ops.tiles import Partial, gather, number
from fastmerge.philox import TIES, u16
from tests import oracle


class ArrayKernels:
    """delta_keys and count over keys in arrays instead of memory; counts how much is read."""

    def __init__(self, keys):
        self.keys = keys  # per group, [n, N]
        self.read = 0

    def _rows(self, segments):
        for s in segments.table.tolist():
            self.read += s[1]
            yield s, self.keys[s[5]][s[2] : s[2] + s[1]]

    def delta_keys(self, segments, deltas, out):
        at = 0
        for s, k in self._rows(segments):
            out[at : at + s[1]] = k
            at += s[1]

    def count(self, segments, deltas, brackets, found):
        (lo, hi), (counts, keys, where, used) = brackets, found
        for s, data in self._rows(segments):
            for i in range(data.shape[1]):
                a, b = lo[s[5], i], hi[s[5], i]
                for n, start in enumerate(range(0, s[1], TILE)):
                    part = data[start : start + TILE, i].astype(np.uint64)
                    inside = np.flatnonzero((part > a) & (part < b))
                    low = 0 if a == b else int((part == a).sum())
                    counts[s[6] + n, i] = ((part > b).sum(), (part == b).sum(), low, len(inside))
                    room = max(0, min(len(inside), keys.shape[1] - int(used[i])))
                    at = slice(int(used[i]), int(used[i]) + room)
                    keys[i, at] = part[inside[:room]]
                    where[i, at, 0], where[i, at, 1] = s[5], s[2] + start + inside[:room]
                    used[i] += len(inside)


def groups_of(keys):
    wide = keys[0].dtype == np.uint64
    types = oracle.TYPES["fp64" if wide else "fp32"]
    names = [chr(97 + len(keys) - i) for i in range(len(keys))]
    models = keys[0].shape[1]
    kinds = tuple(types(models + 1))
    method = Linear(weight=(1.0,) * models, normalize=True)
    return [
        Op(name, Spec(method, (len(k),), kinds, kinds[0], has_base=True), tensor_key(99, name))
        for name, k in zip(names, keys, strict=True)
    ]


def solve(keys, ranks, ties="index", *, whole_model=False, step=1 << 16, most=140):
    """Thresholds and cuts, found in pieces; returns them with the number of passes and the elements read."""
    groups = groups_of(keys)
    models = keys[0].shape[1]
    thr = np.zeros((len(groups), models), np.uint64)
    cut = np.full((len(groups), models, 3), -1)
    cut[:] = (ALL_TILES, 0, -1)
    ranks = np.array(ranks).reshape(len(groups), models)
    chosen = Select(groups, ranks, ties, whole_model=whole_model, thr=thr, cut=cut)
    kernels, passes = ArrayKernels(keys), 0
    while not chosen.done:
        passes += 1
        assert passes <= most
        due = chosen.pieces()
        due = np.array([(g, 0, len(k)) for g, k in enumerate(keys)]) if due is None else due
        partials = []
        for g, e0, n in reversed(oracle.smaller(due, step).tolist()):
            table = np.array([segment_row(groups[g], g, e0, n, 0, [0] * (models + 1))])
            args = Deltas(-1, False, None, None)
            partials.append(
                chosen.statistics(Segments(table, groups[g].spec.dtypes, groups[g].spec.out_dtype), kernels, args)
            )
        chosen.advance(partials)
    return groups, thr, cut, passes, kernels.read


def mask(k, thr, cut, group, model):
    """What the kernels keep."""
    t, (tile, rank, tie) = np.uint64(thr), (int(c) for c in cut)
    k = k.astype(np.uint64)
    equal = k == t
    if tie >= 0:
        return (k > t) | (equal & (u16(group.key, model, TIES, 0, len(k)).astype(np.int64) < tie))
    tiles = np.arange(len(k)) // TILE
    before = np.zeros(len(k), np.int64)
    for j in range(len(k) // TILE + 1):
        part = slice(j * TILE, (j + 1) * TILE)
        before[part] = np.cumsum(equal[part]) - equal[part]
    return (k > t) | (equal & ((tiles < tile) | ((tiles == tile) & (before < rank))))


def select_all(keys, ranks, ties="index", *, whole_model=False, **how):
    """What is kept wrongly, in words; the number of passes and of elements read."""
    groups, thr, cut, passes, read = solve(keys, ranks, ties, whole_model=whole_model, **how)
    order = sorted(range(len(groups)), key=lambda g: groups[g].name.encode())
    wrong = []
    for i in range(keys[0].shape[1]):
        for members in [order] if whole_model else [[g] for g in order]:
            noise = np.concatenate([u16(groups[g].key, i, TIES, 0, len(keys[g])) for g in members])
            every = np.concatenate([keys[g][:, i] for g in members]).astype(np.uint64)
            want = top(every, int(np.array(ranks).reshape(len(keys), -1)[members[0], i]), ties, noise)
            got = np.concatenate([mask(keys[g][:, i], thr[g, i], cut[g, i], groups[g], i) for g in members])
            # zeros add nothing, kept or not, so the tie rule is moot there
            bad = np.flatnonzero((every > 0) & (got != want))
            if len(bad):
                wrong.append(f"model {i}, tensors {members}: {len(bad)} of {len(every)}, first at {bad[0]}")
    return wrong, passes, read


def normal_keys(n, models=1, seed=0, scale=1e-3):
    rng = np.random.default_rng(seed)
    return (np.abs(rng.standard_normal((n, models))) * scale).astype(np.float32).view(np.uint32)


def lattice_keys(n, seed=0):
    """Differences of bf16 numbers: few values, many zeros."""
    rng = np.random.default_rng(seed)
    base = (rng.standard_normal(n) * 0.02).astype(np.float32)
    tuned = base + (rng.standard_normal(n) * 2e-4).astype(np.float32)
    bf = [(x.view(np.uint32) & 0xFFFF0000).view(np.float32) for x in (base, tuned)]
    return np.abs(bf[1] - bf[0]).astype(np.float32).view(np.uint32)[:, None]


@pytest.mark.parametrize("ties", ["index", "all", "spread"])
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("data", [normal_keys, lattice_keys], ids=["normal", "lattice"])
def test_ordinary_data_takes_a_sample_and_one_pass(data, share, ties):
    keys = data(700_001)
    n = len(keys)
    wrong, passes, read = select_all([keys], [[int(share * n)]], ties)
    assert wrong == []
    if 0 < int(share * n) < n:
        assert passes <= 3
        assert read <= 2.2 * n
    if share in {0.2, 0.5}:
        assert passes == 2
        assert read <= 1.2 * n


ADVERSARIES = {
    "all equal": lambda n: np.full(n, 7),
    "all zero": np.zeros,
    "two values": lambda n: np.arange(n) % 2 * 1000 + 5,
    "rising": np.arange,
    "falling": lambda n: np.arange(n)[::-1],
    "large only in one tile": lambda n: np.where(np.arange(n) // TILE == 1, 2**30 + np.arange(n), np.arange(n) % 50),
    "nan and inf": lambda n: np.where(np.arange(n) % 3 == 0, 0x7FC00000, 0x7F800000),
    "largest key": lambda n: np.full(n, 0x7FFFFFFF),
    "one large": lambda n: np.where(np.arange(n) == n - 3, 2**30, 1),
    "exponential": lambda n: np.int64(1) << (np.arange(n) % 31),
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_any_data(name):
    n = 3 * TILE + 11
    keys = ADVERSARIES[name](n).astype(np.uint32)[:, None]
    for k in (1, 2, n // 3, TILE + 1, n - 1):
        wrong, *_ = select_all([keys], [[k]])
        assert wrong == [], k


def test_unsampled_elements_decide():
    """Everything that the sample does not see is larger than everything that it sees."""
    n = 4 * TILE
    keys = normal_keys(n)
    seen = np.zeros(n, bool)
    for _, e0, m in blocks(np.array([0]), np.array([n])).tolist():
        seen[e0 : e0 + m] = True
    keys[~seen] |= 1 << 30
    wrong, passes, _ = select_all([keys], [[int(0.2 * n)]])
    assert wrong == []
    assert passes > 2
    keys[~seen] &= (1 << 20) - 1
    wrong, *_ = select_all([keys], [[int(0.2 * n)]])
    assert wrong == []


def test_lists_that_overflow_are_narrowed(monkeypatch):
    monkeypatch.setattr(brackets, "SIGMAS", 60.0)  # brackets far too wide for the lists
    keys = normal_keys(5 * TILE)
    wrong, passes, _ = select_all([keys], [[TILE]])
    assert wrong == []
    assert 2 < passes < 12


def test_thinned_lists_bound_the_memory(monkeypatch):
    monkeypatch.setattr(select, "LISTED", 2000)
    keys = [normal_keys(4 * TILE, seed=1), normal_keys(3 * TILE, seed=2)]
    kept_keys = []
    statistics = Select.statistics

    def watch(self, *args):
        partial = statistics(self, *args)
        if partial.extra is not None:
            kept_keys.append(sum(len(k) for k, _ in partial.extra))
        return partial

    monkeypatch.setattr(Select, "statistics", watch)
    wrong, passes, _ = select_all(keys, [[100_000], [100_000]], whole_model=True)
    assert wrong == []
    assert passes <= 4
    assert max(kept_keys) <= 2000


def test_bits_are_halved_when_nothing_else_helps(monkeypatch):
    """Without samples and lists the passes are a binary search over the bits of the key."""
    monkeypatch.setattr(select.Select, "_end_sample", lambda self, partials: None)  # no sample arrives
    keys = (np.arange(2 * TILE + 5, dtype=np.uint64) ** 3 % (1 << 60))[:, None]
    wrong, passes, _ = select_all([keys], [[TILE]], most=70)
    assert wrong == []
    assert passes > 5


@pytest.mark.parametrize("ties", ["index", "all", "spread"])
def test_whole_model_cuts_ties_by_name_then_element(ties):
    rng = np.random.default_rng(3)
    keys = [rng.integers(0, 4, (n, 2), dtype=np.uint32) for n in (TILE + 7, 3 * TILE, 1, 0, 40_000)]
    total = sum(len(k) for k in keys)
    for share in (0.1, 0.3, 0.6):
        wrong, *_ = select_all(keys, [[int(share * total)] * 2] * len(keys), ties, whole_model=True)
        assert wrong == [], share


def test_small_tensors_are_read_once():
    keys = [normal_keys(n, 3, seed=n) for n in (1, 5, 1000, TILE)]
    ranks = [[0, 1, 1], [2, 5, 4], [0, 200, 999], [1, 30_000, TILE]]
    wrong, passes, read = select_all(keys, ranks)
    assert wrong == []
    assert passes == 1
    assert read == 5 + 1000 + TILE  # nothing is unknown about the first one


def test_models_and_tensors_are_independent():
    keys = [normal_keys(2 * TILE + 1, 3, seed=0), lattice_keys(100_000).repeat(3, axis=1), normal_keys(70, 3)]
    wrong, *_ = select_all(keys, [[10, 50_000, 2 * TILE + 1], [0, 20_000, 99_999], [7, 0, 70]])
    assert wrong == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 9), min_size=1, max_size=400),
    st.floats(0, 1),
    st.sampled_from(["index", "all", "spread"]),
    st.booleans(),
)
def test_any_keys_with_tiny_samples(values, share, ties, whole_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "EXHAUSTIVE", 16)
        patch.setattr(brackets, "LEAST", 8)
        patch.setattr(brackets, "BLOCK", 4)
        keys = np.array(values, np.uint32)[:, None]
        parts = np.split(keys, [len(keys) // 3])
        ranks = [[int(share * (len(keys) if whole_model else len(p)))] for p in parts]
        wrong, *_ = select_all(parts, ranks, ties, whole_model=whole_model)
    assert wrong == []


def test_samples_lie_inside_and_apart():
    sizes = np.array([5, 100_000, 0, 1_000_000, 3])
    rows = blocks(np.arange(5), sizes)
    assert (rows[:, 1] >= 0).all()
    assert (rows[:, 1] + rows[:, 2] <= sizes[rows[:, 0]]).all()
    assert (rows[:, 2] > 0).all()
    wanted = brackets.LEAST
    assert abs(rows[:, 2].sum() - wanted) < wanted // 4
    starts = rows[rows[:, 0] == 3]
    assert (starts[1:, 1] >= starts[:-1, 1] + starts[:-1, 2]).all()


def test_brackets_hold_the_rank_and_little_else():
    rng = np.random.default_rng(0)
    missed = 0
    for trial in range(50):
        data = np.sort(rng.integers(0, 2**31 - 1, 1_000_000, dtype=np.uint32))
        sample = np.sort(rng.choice(data, 1 << 15))
        k = 1 + trial * 19_000
        (lo, hi), expected = bracket(Span(k, len(data), 0, 2**31 - 1), sample, 1.0, 1, 1000)
        missed += not lo <= data[len(data) - k] <= hi
        inside = np.searchsorted(data, hi) - np.searchsorted(data, lo, side="right")
        assert inside < 0.05 * len(data)
        assert abs(inside - expected) < 0.2 * expected + 2000
    assert missed == 0


@pytest.mark.parametrize(
    ("n", "density", "rule", "want"),
    [
        (10, 0.2, "at_least_one", 2),
        (3, 0.1, "at_least_one", 1),
        (3, 0.1, "floor", 0),
        (10, 0.2, "plus_one", 3),
        (10, 0.2, "complement", 3),
        (10, 0.95, "complement", 10),
        (0, 0.5, "at_least_one", 0),
        (7, 1.0, "floor", 7),
        (7, 0.0, "at_least_one", 0),
    ],
)
def test_counts(n, density, rule, want):
    assert kept(n, density, rule) == want


def test_gather_restores_any_order():
    tiles = np.array([3, 0, 2])
    spans = np.array([[2, 1, 1], [0, 2, 1], [0, 0, 2], [2, 0, 1]])
    values = np.array([21, 2, 0, 1, 20])[:, None]
    whole = gather([Partial(spans[:2], values[:2]), Partial(spans[2:], values[2:])], tiles)
    assert whole[:, 0].tolist() == [0, 1, 2, 20, 21]
    with pytest.raises(ValueError, match="expected"):
        gather([Partial(spans[:2], values[:2])], tiles)


def test_rows_restart_tiles():
    table = np.array([[0, 3 * 70_000, 70_000, 70_000, 0, 4, 0, 0], [0, 10, 0, 5, 0, 5, 0, 0]])
    kinds = tuple(oracle.TYPES["fp32"](1))
    numbered, spans, tiles = number(Segments(table, kinds, kinds[0]), per_row=True)
    assert spans.tolist() == [[4, 2, 6], [5, 0, 2]]
    assert tiles == 8
    assert numbered.table[:, 6].tolist() == [0, 6]
    assert table[:, 6].tolist() == [0, 0]
