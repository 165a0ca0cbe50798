"""From budgets to slots: what is asked for, what fits, what is stated where nothing does."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastmerge.dtypes import BF16
from fastmerge.errors import BudgetError
from fastmerge.methods.linear import Linear
from fastmerge.ops.low_rank import LowRank
from fastmerge.ops.segments import TILE
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Spec
from fastmerge.runtime import budget, placement
from fastmerge.runtime.budget import Need, Slots, fit, need
from fastmerge.runtime.devices import cuda
from fastmerge.runtime.placement import Budget, TooSmall, VramLimit, cpu_slots, gpu_slots
from fastmerge.runtime.schedule import cost
from tests.runtime.ops import copied, op


def test_less_memory_means_smaller_slots_then_fewer_then_a_clear_refusal():
    wants = need([op(0, (4_000_000,), "element")])
    large = cpu_slots(wants, None, 2)
    assert large == (wants.best, 2)
    small = cpu_slots(wants, wants.best, 2)
    assert small.number == 2
    assert small.nbytes == wants.best // 2
    assert cpu_slots(wants, wants.least, 8) == (wants.least, 1)
    assert cpu_slots(wants, 3 * wants.least + 5, 8) == (wants.least + 1, 3)
    with pytest.raises(BudgetError, match=f"^--memory {wants.least - 1} bytes .* >= {wants.least} bytes$"):
        cpu_slots(wants, wants.least - 1, 8)


def test_workers_that_wait_for_reads_go_before_slots_get_smaller():
    wants = need([op(0, (4_000_000,), "element")])
    assert cpu_slots(wants, None, 22) == cpu_slots(wants, 22 * wants.best, 22) == (wants.best, 22)
    for memory in (18 * wants.best, 22 * wants.best, None):
        assert cpu_slots(wants, memory, 22, warm=True) == (wants.best, 18), "no read waits for the disk"
    for warm in (False, True):
        assert cpu_slots(wants, 18 * wants.best, 22, warm=warm) == (wants.best, 18)
        assert cpu_slots(wants, 18 * wants.best - 1, 22, warm=warm) == (wants.best - 1, 18)
        assert cpu_slots(wants, None, 3, warm=warm).number == 3


def test_the_stated_minimum_counts_the_tables_of_rows():
    ops = [op(0, (400_000, 64), "row"), op(1, (10_000_000,), "element")]  # 120 MB of tables, for one of them
    wants = need(ops)
    assert wants.apart == 300 * 400_000
    with pytest.raises(BudgetError, match="--memory 120000001 bytes") as refused:
        cpu_slots(wants, 120_000_001, 1)
    assert "by row" in str(refused.value)
    least = int(re.search(r">= (\d+)", str(refused.value))[1])
    assert cpu_slots(wants, least, 1).number == 1
    with pytest.raises(BudgetError):
        cpu_slots(wants, least - 1, 1)


def test_small_tables_do_not_count():
    wants = need([op(0, (1000, 64), "row")])
    assert wants.tables == 300_000
    assert wants.apart == 0


def test_what_a_plan_asks_for():
    element, tensor = op(0, (4_000_000,), "element"), op(1, (4_000_000,), "tensor")
    assert need([element]).best == cost(element).of(budget.UNIT_ELEMENTS) + cost(element).past
    assert need([tensor]).best == cost(tensor).of(2 * budget.UNIT_ELEMENTS) + cost(tensor).past
    assert [need([o]).statistics for o in (element, tensor, op(2, (3,), "model"), op(3, (3, 3), "row"))] == [
        False, True, True, False,
    ]  # fmt: skip
    rows = op(4, (4, 3 * TILE), "row")
    assert need([rows]).least == cost(rows).of(3 * TILE), "a row is never cut"
    short = op(5, (900_000, 7), "row")
    assert need([short]).least == cost(short).of(TILE)
    small = [op(i, (10,), "element") for i in range(1000)]
    assert need(small).best == cost(small[0]).of(10_000, budget.PIECES) + cost(small[0]).past, (
        "room for some neighbours"
    )
    assert need([copied(0, 10**9)]) == Need(0, 0, 0, False)
    assert need([]) == Need(0, 0, 0, False)


WANTED = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3000)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(WANTED, st.integers(0, 10_000), st.integers(0, 2000), st.integers(0, 2000))
def test_the_first_wish_that_fits_is_granted(wanted, room, least, more):
    best = least + more
    got = fit(least, best, wanted, lambda n: room // n)

    def granted(count, worth):
        nbytes = min(best, room // count)
        return Slots(nbytes, count) if nbytes >= least and nbytes >= min(worth, best) else None

    assert got == next((s for s in (granted(*w) for w in wanted) if s), None)
    assert got is None or got.number * got.nbytes <= room


NEED = st.builds(
    lambda least, more, tables, statistics: Need(least, least + more, tables, statistics),
    st.integers(1, 10**6), st.integers(0, 10**7), st.sampled_from([0, 10**6, budget.SPARE + 7]), st.booleans(),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(NEED, st.integers(1, 4), st.integers(1, 1 << 27) | st.none(), st.integers(1, 1 << 27) | st.none())
def test_gpus_stay_within_both_budgets_and_the_stated_minimum_is_exact(wants, gpus, memory, vram):
    how = Budget(memory), None if vram is None else VramLimit(vram)
    try:
        slots = gpu_slots(wants, gpus, *how)
    except TooSmall as error:
        stated, least = re.search(r"^--(memory|max-vram) .* >= (\d+) bytes", str(error)).groups()
        memory, vram = (int(least), vram) if stated == "memory" else (memory, int(least))

        def again(a, b):
            return gpu_slots(wants, gpus, Budget(a), None if b is None else VramLimit(b))

        try:
            slots = again(memory, vram)
        except TooSmall as error:
            assert f"--{stated} " not in str(error), "the other budget is too small as well"
            slots = None
        else:
            with pytest.raises(TooSmall, match=f"^--{stated} .* >= {least} bytes"):
                again(*((memory - 1, vram) if stated == "memory" else (memory, vram - 1)))
    assume(slots is not None)
    assert wants.least <= slots.nbytes <= wants.best
    assert 1 <= slots.number <= gpus * placement.workers_each(gpus)
    if vram is not None:
        assert cuda.arena(-(-slots.number // gpus), slots.nbytes) <= vram
    if memory is not None:
        charge = 1 + placement.LISTS if wants.statistics else 1
        assert slots.number * slots.nbytes * charge + wants.apart <= memory + charge * slots.number


def test_gpus_rather_have_fewer_workers_than_small_units():
    wants = Need(1000, 1 << 28, 0, False)
    worth = wants.best * placement.SMALLEST // cuda.UNIT_ELEMENTS
    few = gpu_slots(wants, 1, Budget(worth * (cuda.LEAST_WORKERS + 1)), None)
    assert few.number == cuda.LEAST_WORKERS or placement.workers_each(1) <= cuda.LEAST_WORKERS + 1
    assert gpu_slots(wants, 2, Budget(None), None).number == 2 * placement.workers_each(2)
    assert gpu_slots(wants, 2, Budget(2000), None) == (1000, 2)
    assert gpu_slots(wants, 2, Budget(1500), None) == (1500, 1)


def test_methods_with_statistics_are_charged_for_their_lists():
    plain, ranked = Need(1000, 1000, 0, False), Need(1000, 1000, 0, True)
    assert gpu_slots(plain, 1, Budget(1000), None).number == 1
    with pytest.raises(TooSmall, match=">= 2900 bytes"):
        gpu_slots(ranked, 1, Budget(2899), None)
    assert gpu_slots(ranked, 1, Budget(2900), None).number == 1


def test_what_making_inputs_takes_counts_for_each_worker():
    wants = Need(1000, 4000, 0, False, beside=500)
    assert cpu_slots(wants, 9000, 4) == (1750, 4)
    assert cpu_slots(wants, 5999, 4) == (1499, 3)
    assert gpu_slots(wants, 1, Budget(1500), None) == (1000, 1)
    for refused in (lambda: cpu_slots(wants, 1499, 4), lambda: gpu_slots(wants, 1, Budget(1499), None)):
        with pytest.raises(TooSmall, match=">= 1500 bytes"):
            refused()
    base, b, a = (Memory(0, BF16, shape) for shape in ((100, 50), (100, 8), (8, 50)))
    update = LowRank(base, b, a, 1.0)
    spec = Spec(Linear(weight=(1.0,), normalize=True), (100, 50), (update.dtype,), BF16)
    assert need([Op("x", spec, inputs=(update,), targets=(base,))]).beside == update.workspace > 0
    assert need([Op("x", spec, inputs=(base,), targets=(base,))]).beside == 0
