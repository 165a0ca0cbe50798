"""The schedule as a pure function: everything covered once, within the slot, cut only where allowed."""

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastmerge.dtypes import BF16, F32
from fastmerge.ops.segments import TILE
from fastmerge.ops.sources import Memory
from fastmerge.runtime.budget import need
from fastmerge.runtime.placement import TooSmall, cpu_slots
from fastmerge.runtime.schedule import COPY_BYTES, cost, sample_units, schedule
from tests.runtime.ops import TOYS, copied, op

UNIT = 1 << 20

shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 3 * TILE)),
    st.tuples(st.integers(1, 700), st.integers(1, 900)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, TILE)),
)
plans = st.lists(
    st.tuples(shapes, st.sampled_from(sorted(TOYS)), st.sampled_from([BF16, F32]), st.integers(1, 3)),
    min_size=1,
    max_size=12,
)


def whole(spec):
    """What a backend without a kernel for element-wise work would say."""
    return spec.grain == "element"


@settings(max_examples=80, deadline=None)
@given(
    plans, st.integers(1, 4), st.integers(10_000, 1_000_000) | st.integers(2_000_000, 40_000_000),
    st.sampled_from([TILE, 3 * TILE, UNIT]), st.booleans(),
)  # fmt: skip
@example([((TILE,), "element", F32, 1)], 2, 300_000, UNIT, False)
@example([((3, 5, TILE), "row", F32, 2), ((0,), "tensor", F32, 3)], 3, 20_000_000, TILE, False)
def test_every_element_is_in_exactly_one_unit(specs, workers, memory, elements, definitions):
    ops = [op(i, shape, grain, dtype, targets=n) for i, (shape, grain, dtype, n) in enumerate(specs)]
    uncut = whole if definitions else lambda spec: False
    wants = need(ops, elements=elements, whole=uncut)
    try:
        slots = cpu_slots(wants, memory, workers)
    except TooSmall:
        assert memory < wants.least + wants.apart
        memory = wants.least + wants.apart
        slots = cpu_slots(wants, memory, workers)
    assert 1 <= slots.number <= workers
    assert wants.least <= slots.nbytes <= wants.best
    assert slots.number * slots.nbytes + wants.apart <= memory
    jobs = schedule(ops, slot=slots.nbytes, elements=elements, whole=uncut)
    seen = Counter()
    for number, job in enumerate(jobs):
        assert len(set(job.ops)) == len(job.ops)
        for unit in job.units:
            assert unit.job == number
            assert unit.nbytes <= slots.nbytes
            assert unit.nbytes == sum(cost(ops[o]).of(n) for o, _, n in unit.pieces)
            kinds = {(ops[o].spec.batch, cost(ops[o]), ops[o].spec.grain == "model") for o, _, _ in unit.pieces}
            assert len(kinds) == 1, "one kernel call takes one kind of tensor"
            for o, e0, length in unit.pieces:
                spec = ops[o].spec
                assert o in job.ops
                assert e0 == seen[o], "in order, no element left out or twice"
                seen[o] += length
                assert e0 % (spec.row if spec.grain == "row" and spec.row else TILE) == 0
                if spec.grain == "row" and spec.row:
                    assert length % spec.row == 0
                if spec.grain == "matrix" or uncut(spec):
                    assert length == spec.numel
                if spec.grain in {"tensor", "row", "matrix"}:
                    assert set(job.ops) == {o} or job.resident
    assert seen == Counter({i: o.spec.numel for i, o in enumerate(ops)})
    assert len([j for j in jobs if any(ops[o].spec.grain == "model" for o in j.ops)]) <= 1


@settings(max_examples=60, deadline=None)
@given(plans, st.booleans())
def test_the_stated_minimum_is_exactly_the_smallest_that_works(specs, definitions):
    """One byte less than what is asked for cannot hold some piece; what is asked for holds every one."""
    ops = [op(i, shape, grain, dtype, targets=n) for i, (shape, grain, dtype, n) in enumerate(specs)]
    uncut = whole if definitions else lambda spec: False
    least = need(ops, whole=uncut).least

    def smallest(o):
        spec = o.spec
        rows = min(spec.numel, max(spec.row, TILE // spec.row * spec.row if spec.row else 0))
        piece = spec.numel if spec.grain == "matrix" or uncut(spec) else rows if spec.grain == "row" else TILE
        return cost(o).of(min(spec.numel, piece))

    largest = max(map(smallest, ops))
    assert all(u.nbytes <= least for j in schedule(ops, slot=least, elements=UNIT, whole=uncut) for u in j.units)
    by_row = any(o.spec.grain == "row" for o in ops)
    assert largest <= least if by_row else largest == least
    with pytest.raises(TooSmall, match=f">= {least + need(ops, whole=uncut).apart} bytes"):
        cpu_slots(need(ops, whole=uncut), least + need(ops, whole=uncut).apart - 1, 1)


def test_small_tensors_share_a_unit_and_large_ones_are_cut():
    ops = [op(0, (100,), "tensor"), op(1, (200,), "tensor"), op(2, (4_000_000,), "tensor")]
    jobs = schedule(ops, slot=10**9, elements=UNIT)
    assert [len(j.units) for j in jobs] == [1, 4]
    assert jobs[0].ops == (0, 1)
    assert jobs[0].resident
    assert not jobs[1].resident


def test_a_tensor_with_statistics_that_is_a_little_too_large_is_kept_whole():
    n = UNIT + 5
    assert [len(j.units) for j in schedule([op(0, (n,), "tensor")], elements=UNIT)] == [1]
    assert [len(j.units) for j in schedule([op(0, (n,), "element")], elements=UNIT)] == [2]


@pytest.mark.parametrize("grain", ["element", "tensor", "row"])
def test_a_tensor_that_fits_its_slot_is_not_cut(grain):
    """Slots are as large as the largest tensor where that is less than they would be: not a tile less."""
    ops = [op(0, (140, 1000), grain), op(1, (7,), "element")]
    jobs = schedule(ops, slot=need(ops).best, elements=UNIT)
    assert all(j.resident for j in jobs)
    assert jobs[0].units[0].pieces[0] == (0, 0, 140_000)


def test_what_a_caller_owns_takes_no_slot():
    spec = op(0, (4_000_000,), "tensor").spec
    mine = Memory(0, BF16, spec.shape)
    inside = op(0, None, None, spec=spec)._replace(inputs=(mine, mine), targets=(mine,))
    assert cost(inside) == (0, 0, 0)
    assert need([inside]).best == 0
    jobs = schedule([inside], slot=0, elements=UNIT)
    assert [u.nbytes for j in jobs for u in j.units] == [0] * 4
    assert sum(u.pieces[0][2] for u in jobs[0].units) == 4_000_000


def test_specs_in_the_slot_and_in_memory_do_not_share_a_unit():
    there, here = op(0, (100,), "element"), op(1, (100,), "element")
    mine = Memory(0, BF16, (100,))
    here = here._replace(inputs=(mine, mine))
    assert there.spec.batch == here.spec.batch
    assert [j.ops for j in schedule([there, there, here, here], elements=UNIT)] == [(0, 1), (2, 3)]


def test_copies_are_ranges_of_bounded_size():
    ops = [copied(0, COPY_BYTES * 2 + 10), copied(1, 0), copied(2, 100)]
    assert need(ops).least == 0
    sizes = Counter()
    for job in schedule(ops, slot=0, elements=UNIT):
        assert job.copy
        assert sum(p[2] for p in job.units[0].pieces) <= COPY_BYTES
        for o, start, length in job.units[0].pieces:
            assert start == sizes[o]
            sizes[o] += length
    assert sizes == Counter({0: COPY_BYTES * 2 + 10, 1: 0, 2: 100})


def test_definitions_get_whole_tensors():
    ops = [op(0, (3_000_000,), "element"), op(1, (3_000_000,), "tensor")]
    jobs = schedule(ops, slot=10**9, elements=UNIT, whole=whole)
    assert [len(j.units) for j in jobs] == [1, 3]
    assert need(ops, whole=whole).least == cost(ops[0]).of(3_000_000)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 3 * TILE)), max_size=30),
    st.sampled_from([0, TILE * 6 + 12_000, 10**6, 10**8]),
)
def test_samples_are_cut_at_tiles_and_fit_the_slot(asked, slot):
    ops = [op(i, (10 * TILE,), "tensor", models=m) for i, m in enumerate((2, 2, 1, 2))]
    (job,) = schedule([o._replace(spec=ops[0].spec) for o in ops], slot=None, elements=100 * TILE)
    pieces = [(g, tile * TILE, n) for g, tile, n in asked]
    units = list(sample_units(ops, job, pieces, slot))
    got = [p for u in units for p in u.pieces]
    want = [
        (g, e0, min(TILE, start + n - e0)) for g, start, n in pieces for e0 in range(start, start + max(n, 1), TILE)
    ]
    assert got == want
    assert not slot or all(u.nbytes <= slot for u in units)
    assert all(len({ops[o].spec.batch for o, _, _ in u.pieces}) == 1 for u in units)
