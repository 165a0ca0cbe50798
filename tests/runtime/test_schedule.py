"""The schedule as a pure function: everything covered once, within the budget, cut only where allowed."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastmerge.checkpoint import TensorInfo
from fastmerge.dtypes import BF16, F32
from fastmerge.errors import BudgetError
from fastmerge.methods.base import TILE, Group
from fastmerge.planning import Output
from fastmerge.runtime.schedule import COPY_BYTES, schedule


def method(scope):
    return SimpleNamespace(scope=lambda group: scope)


METHODS = {scope: method(scope) for scope in ("element", "tensor", "row", "model")}


def output(i, shape, scope, dtype=BF16, models=2):
    group = Group(
        name=f"t{i}", shape=shape, dtypes=(dtype,) * models, out_dtype=dtype, params={}, models=({},) * models,
        has_base=False, indices=tuple(range(models)),
    )  # fmt: skip
    return Output(name=group.name, dtype=dtype, shape=shape, models=(), inputs=(), method=METHODS[scope], group=group)


def copied(i, nbytes):
    info = TensorInfo(f"c{i}", BF16, (nbytes // 2,), 0, 0, nbytes)
    return Output(name=info.name, dtype=BF16, shape=info.shape, models=(0,), inputs=(info,), method=None, group=None)


shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 3 * TILE)),
    st.tuples(st.integers(1, 700), st.integers(1, 900)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, TILE)),
)
plans = st.lists(st.tuples(shapes, st.sampled_from(sorted(METHODS)), st.sampled_from([BF16, F32])), max_size=12)


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(1, 4), st.integers(300_000, 1_000_000) | st.integers(2_000_000, 40_000_000))
@example([((TILE,), "element", F32)], 2, 300_000)
def test_every_element_is_in_exactly_one_unit(specs, workers, memory):
    outputs = [output(i, shape, scope, dtype) for i, (shape, scope, dtype) in enumerate(specs)]
    try:
        work = schedule(outputs, workers=workers, memory=memory)
    except BudgetError as e:
        given, least = map(int, re.findall(r"\d+", str(e)))
        assert given == memory < least
        memory = least
        work = schedule(outputs, workers=workers, memory=memory)
    assert work.slots * work.slot_bytes <= memory
    seen = Counter()
    for number, job in enumerate(work.jobs):
        for unit in job.units:
            assert unit.job == number
            assert unit.nbytes <= work.slot_bytes
            keys = {(outputs[o].group.dtypes, outputs[o].method is METHODS["model"]) for o, _, _ in unit.pieces}
            assert len(keys) == 1
            for o, e0, length in unit.pieces:
                group = outputs[o].group
                scope = outputs[o].method.scope(group)
                assert o in job.outputs
                assert e0 % (group.row if scope == "row" and group.row else TILE) == 0
                seen[o] += length
                if scope in {"tensor", "row"}:
                    assert set(job.outputs) == {o} or job.resident
    assert seen == Counter({i: o.group.numel for i, o in enumerate(outputs)})
    model_jobs = [j for j in work.jobs if any(outputs[o].method is METHODS["model"] for o in j.outputs)]
    assert len(model_jobs) <= 1


def test_small_tensors_share_a_unit_and_large_ones_are_cut():
    outputs = [output(0, (100,), "tensor"), output(1, (200,), "tensor"), output(2, (4_000_000,), "tensor")]
    work = schedule(outputs, workers=2, memory=10**9)
    assert [len(j.units) for j in work.jobs] == [1, 4]
    assert work.jobs[0].outputs == (0, 1)
    assert work.jobs[0].resident
    assert not work.jobs[1].resident


def test_a_small_budget_means_smaller_units_then_fewer_slots_then_a_clear_refusal():
    outputs = [output(0, (4_000_000,), "element")]
    large = schedule(outputs, workers=2, memory=None)
    small = schedule(outputs, workers=2, memory=large.slot_bytes)
    assert small.elements < large.elements
    assert small.slots == 2
    least = schedule(outputs, workers=1, memory=TILE * 2 * 3 + 8192)
    one = schedule(outputs, workers=8, memory=least.slot_bytes)
    assert one.slots == 1
    with pytest.raises(BudgetError, match=f">= {least.slot_bytes} bytes"):
        schedule(outputs, workers=1, memory=least.slot_bytes - 1)


def test_the_stated_minimum_counts_the_tables_of_rows():
    outputs = [
        output(0, (400_000, 64), "row"),
        output(1, (10_000_000,), "element"),
    ]  # 120 MB of tables, for one of them
    with pytest.raises(BudgetError, match="--memory 120000001 bytes") as refused:
        schedule(outputs, workers=1, memory=120_000_001)
    least = int(str(refused.value).split(">= ")[1].split()[0])
    assert schedule(outputs, workers=1, memory=least).slots == 1
    with pytest.raises(BudgetError):
        schedule(outputs, workers=1, memory=least - 1)


def test_copies_are_ranges_of_bounded_size():
    outputs = [copied(0, COPY_BYTES * 2 + 10), copied(1, 0), copied(2, 100)]
    work = schedule(outputs, workers=1, memory=0)
    sizes = Counter()
    for job in work.jobs:
        assert job.kind == "copy"
        assert sum(p[2] for p in job.units[0].pieces) <= COPY_BYTES
        for o, start, length in job.units[0].pieces:
            assert start == sizes[o]
            sizes[o] += length
    assert sizes == Counter({0: COPY_BYTES * 2 + 10, 1: 0, 2: 100})


def test_the_reference_gets_whole_tensors_or_a_refusal():
    outputs = [output(0, (3_000_000,), "element")]
    assert schedule(outputs, workers=1, memory=None, whole=True).jobs[0].resident
    with pytest.raises(BudgetError):
        schedule(outputs, workers=1, memory=1_000_000, whole=True)
