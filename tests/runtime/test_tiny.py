"""Tens of thousands of tensors of a few elements: what is done once per unit, and not once per tensor."""

import numpy as np
import pytest

import fastmerge as fm
from fastmerge.checkpoint import Place, TensorInfo
from fastmerge.checkpoint import io as _io
from fastmerge.dtypes import BF16
from fastmerge.ops.segments import segment_row, segment_table
from fastmerge.ops.sources import FileRange, Memory
from fastmerge.ops.spec import Op
from fastmerge.runtime import placement, schedule
from fastmerge.runtime.budget import PIECES
from fastmerge.runtime.laying import outs_of, results_of, runs_of, spread
from fastmerge.runtime.schedule import ALIGN, BLOCK
from tests.checkpoint.shim import save
from tests.runtime.ops import op
from tests.runtime.test_past import numbers

SHAPES = [(8,), (8, 1), (1, 8)]
NAMES = [f"model.layers.{i // 300:02d}.mlp.experts.{i % 300:03d}.w{i % 3}.weight" for i in range(3000)]


class Counting:
    """The extension's primitive; notes the rows of every call."""

    def __init__(self, real):
        self._real = real
        self.reads, self.writes = [], []

    def __getattr__(self, name):
        return getattr(self._real, name)

    def read_some(self, table, row, done):
        self.reads.append(len(table))
        return self._real.read_some(table, row, done)

    def write_some(self, table, row, done):
        self.writes.append(len(table))
        return self._real.write_some(table, row, done)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    made = []
    for m in range(3):
        tensors = {name: numbers((m, i), *SHAPES[i % 3]) for i, name in enumerate(NAMES)}
        made.append(save(root / f"m{m}", {"model.safetensors": tensors}))
    return made


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_ties"])
def test_a_unit_reads_one_run_per_model_and_writes_one(models, tmp_path, monkeypatch, method):
    io, jobs = Counting(_io.native()), []
    monkeypatch.setattr(_io, "native", lambda: io)
    monkeypatch.setattr(placement, "schedule", lambda *a, **k: jobs.extend(schedule.schedule(*a, **k)) or tuple(jobs))
    recipe = {"merge_method": method, "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]}
    if method == "slerp":
        recipe = {"merge_method": method, "models": [{"model": str(m)} for m in models[:2]], "parameters": {"t": 0.4}}
    if method != "linear":
        recipe["base_model"] = str(models[0])
    plan = fm.plan(recipe)
    report = fm.merge(plan, tmp_path / "out", device="cpu", memory="100MB")
    units = [u for j in jobs for u in j.units]
    assert report.tensors == sum(len(u.pieces) for u in units) == 3000
    assert len(units) < 3000 // PIECES
    assert io.reads == [len(plan.ops[0].inputs)] * len(units)
    beside = len(plan.layout.shards) + len(list((tmp_path / "out").iterdir()))  # headers, and files that are no weights
    assert set(io.writes) == {1}
    assert len(units) < len(io.writes) <= len(units) + beside


def test_a_unit_takes_as_many_neighbours_as_fit_whatever_their_specs():
    ops = [op(i, SHAPES[i * 7 % 3], "tensor") for i in range(500)]
    slot = 20 * (3 * 8 * 2 + 2 * ALIGN + BLOCK)
    units = [u for j in schedule.schedule(ops, slot=slot, elements=1 << 20) for u in j.units]
    assert [len(u.pieces) for u in units] == [20] * 25
    assert {u.nbytes for u in units} == {slot}
    assert [p for u in units for p in u.pieces] == [(i, 0, 8) for i in range(500)]
    units = [u for j in schedule.schedule(ops, slot=slot, elements=100) for u in j.units]
    assert [len(u.pieces) for u in units] == [12] * 41 + [8]


def test_runs_end_at_gaps_at_other_files_and_at_what_is_in_no_file():
    def there(offset, file=0, model=0):
        return FileRange(TensorInfo("x", BF16, (8,), file, offset, 16), model)

    spec = op(0, (8,), "element", models=1).spec
    memory = Memory(1 << 20, BF16, (8,))
    sources = [there(0), there(16), there(40), there(56, file=1), there(72, file=1, model=1), memory, there(88)]
    places = [*(Place(0, 16 * i, 16) for i in range(4)), Place(1, 64, 16), Place(1, 80, 16), Place(1, 112, 16)]
    pairs = zip(sources, places, strict=True)
    ops = [Op(str(i), spec, 0, (source,), (place,)) for i, (source, place) in enumerate(pairs)]
    firsts, lengths = [0, 0, 0, 0, 0, 2, 0], [8, 8, 8, 8, 8, 4, 8]
    (runs,) = runs_of(spec, ops, firsts, lengths)
    places = [(0, 32, 2), (40, 16, 1), (56, 16, 1), (72, 16, 1), (2, 8, 1), (88, 16, 1)]
    assert [run[1:] for run in runs] == places
    assert [run.end for run in runs] == [sources[i] for i in (0, 2, 3, 4, 5, 6)]
    assert spread(spec, [runs], [[100, 200, 300, 400, 500, 600]], lengths) == [[100, 116, 200, 300, 400, 500, 600]]
    results = results_of(ops, [0] * 7, lengths, 2)
    assert [run[1:] for run in results[0]] == [(0, 64, 4), (64, 24, 2), (112, 16, 1)]
    (outs,), end = outs_of(ops, results, lengths, BLOCK)
    assert outs == [BLOCK + at for at in (0, 16, 32, 48, 64, 80, 112)]  # each where it is in a block of its file
    assert end == BLOCK + 128


def test_a_table_is_its_rows():
    spec = op(0, (3, 5), "element").spec
    ops = [Op("a", spec, 0), Op("b", spec, (1 << 64) - 1), Op("c", spec, 1 << 63), Op("d", spec, 7)]
    groups, firsts, lengths = [3, 0, 1, 2], [0, 5, 10, 0], [15, 10, 5, 15]
    outs, inputs = [[11, 12, 13, 14], [21, 22, 23, 24]], [[31, 32, 33, 34], [41, 42, 43, 44]]
    table = segment_table(ops, groups, firsts, lengths, outs, inputs)
    for i, row in enumerate(table.tolist()):
        one = segment_row(ops[i], groups[i], firsts[i], lengths[i], outs[0][i], [c[i] for c in inputs])
        assert row == [*one, outs[1][i]]
    assert table.flags.c_contiguous
    assert table.dtype == np.int64
