"""Slots that cannot be had: halved until they fit, GPUs left out, on GPUs of host memory."""

import itertools

import pytest

import fastmerge as fm
from fastmerge.backends.choose import Backend
from fastmerge.errors import BudgetError
from fastmerge.ops.segments import TILE
from fastmerge.runtime import placement
from fastmerge.runtime.budget import need
from fastmerge.runtime.devices import cuda
from fastmerge.runtime.devices.cuda import Gpu
from fastmerge.runtime.devices.streams import NoRoom
from fastmerge.runtime.placement import Budget, place, smaller
from tests.api.test_merge import recipe_of
from tests.runtime.test_cuda import Native, Tight, family


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return family(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("limit", [{"pins": 1_500_000}, {"most": 1_500_000}, {"most": 663_000}])
@pytest.mark.parametrize("memory", [None, 1 << 32])
@pytest.mark.parametrize("gpus", [1, 3])
def test_a_refusal_halves_what_was_asked_for(paths, monkeypatch, limit, memory, gpus):
    """Of all slots together; not the budgets, from which tables and lists would go off again."""
    made = [Gpu(f"cuda:{i}", Tight(**limit)) for i in range(gpus)]
    monkeypatch.setattr(placement, "logical", lambda chosen: made)
    ops = fm.plan(recipe_of(paths, "ties")).ops
    chosen, budget, asked = Backend("triton", Native(), tuple(range(gpus))), Budget(memory, 1 << 32), []
    for _ in range(12):
        try:
            with place(ops, chosen, budget) as placed:
                taken = len(placed.workers) * placed.slot
                taken //= 1 if "pins" in limit else gpus
            break
        except NoRoom as error:
            chosen, budget = smaller(chosen, budget, error)
            asked.append(error.nbytes)
            assert (budget.memory, budget.vram, budget.halved) == (memory, 1 << 32, str(error))
            assert error.gpu == (None if "pins" in limit else "cuda:0")
            assert (budget.host, budget.device)["most" in limit] == error.nbytes // 2
    assert asked
    least = need(ops).least
    assert all(after <= before // 2 or after == least for before, after in itertools.pairwise([*asked, taken]))
    assert taken > asked[-1] / 4, "not less than that"
    assert not any(g.streams.locked for g in made)


def test_a_gpu_that_refuses_small_slots_alone_is_left_out(paths, monkeypatch):
    """Whatever the others can, what is asked of all of them is halved until the one gives up."""
    monkeypatch.setattr(cuda, "UNIT_ELEMENTS", TILE)
    made = [Gpu("cuda:0", Tight()), Gpu("cuda:1", Tight(most=1000)), Gpu("cuda:2", Tight())]
    monkeypatch.setattr(placement, "logical", lambda chosen: [made[i] for i in chosen.gpus])
    ops = fm.plan(recipe_of(paths, "ties")).ops
    chosen, budget, tries = Backend("triton", Native(), (0, 1, 2), "auto"), Budget(1 << 32), 0
    while 1 in chosen.gpus:
        tries += 1
        assert tries < 20
        with pytest.raises(BudgetError) as caught, place(ops, chosen, budget):
            pytest.fail("cuda:1 has no room for a slot")
        chosen, budget = smaller(chosen, budget, caught.value)
    assert chosen.gpus == (0, 2)
    assert budget == Budget(1 << 32), "the others start again with everything"
    with place(ops, chosen, budget) as placed:
        assert {w.name for w in placed.workers} == {"cuda:0", "cuda:2"}
