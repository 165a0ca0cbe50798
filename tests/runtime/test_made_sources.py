"""Made sources under methods of every grain: the same bytes in any budget, chunk, worker, device and interruption."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge as fm
from fastmerge.api.tensors import run
from fastmerge.checkpoint import Checkpoint, layout, past
from fastmerge.dtypes import BF16, BY_NAME, F32, F64
from fastmerge.errors import CheckpointError, FastMergeError
from fastmerge.keys import tensor_key
from fastmerge.methods import get
from fastmerge.methods.called import called
from fastmerge.methods.passthrough import COPY, Passthrough
from fastmerge.ops.blocks import torch_dtype
from fastmerge.ops.low_rank import LowRank
from fastmerge.ops.made import Constant, Noise, Rows, Wide
from fastmerge.ops.segments import TILE
from fastmerge.ops.sources import FileRange, Memory
from fastmerge.ops.spec import Op, Spec
from fastmerge.philox import NOISE, normal
from fastmerge.planning import Plan
from fastmerge.recipe import Recipe
from fastmerge.runtime import placement
from tests.checkpoint.shim import evict
from tests.compare import differences
from tests.runtime.fake_device import FakeDevice

V, H = 700, 200  # three tiles of elements


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, a model with another vocabulary, an adapter, and one of 8-bit floats."""
    root, g = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.bfloat16):
        return (torch.randn(shape, generator=g) * 0.1).to(dtype)

    tensors = {
        "base": {"embed": draw(V, H), "q": draw(300, 500), "conv": draw(500, 300), "steps": torch.arange(V)},
        "other": {
            "embed": draw(V + 9, H), "q": draw(300, 500), "conv": draw(500, 300), "steps": torch.arange(V).flip(0),
        },
        "adapter": {
            "q.b": draw(300, 4, dtype=torch.float32), "q.a": draw(4, 500, dtype=torch.float32),
            "conv.b": draw(300, 3), "conv.a": draw(3, 500),
        },
        "narrow": {"q": draw(300, 500).to(torch.float8_e4m3fn)},
    }  # fmt: skip
    opened = {}
    for name, some in tensors.items():
        (root / name).mkdir()
        save_file(some, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps({"model_type": "toy"}))
        opened[name] = Checkpoint.open(root / name)
    return opened, tensors


ORDER = np.random.default_rng(0).permutation(V + 9)[:V]
ORDER[::50] = -1  # tokens that the other vocabulary lacks


def planner(opened, memory=None):
    """The ops, each with what its inputs are as whole tensors."""
    numbers = {name: i for i, name in enumerate(opened)}

    def file(model, name):
        return FileRange(opened[model].tensors[name], numbers[model])

    embed = Rows((file("other", "embed"),), ORDER)
    tuned = LowRank(file("base", "q"), file("adapter", "q.b"), file("adapter", "q.a"), 0.5)
    turned = LowRank(file("base", "conv"), file("adapter", "conv.b"), file("adapter", "conv.a"), 2.0, transposed=True)
    narrow = Wide(file("narrow", "q"))
    constant, noise = Constant(0.3, BF16, (300, 500)), Noise(9, 2, 0.05, F32, (300, 500))

    def op(name, method, inputs, out=BF16, **parameters):
        kind = get(method)
        based = kind.contract.base == "required"
        who = tuple(range(len(inputs) - based))
        made = called(kind, parameters, who).method(name, [(i, name) for i in who])
        spec = Spec(made, inputs[0].shape, tuple(s.dtype for s in inputs), out, has_base=based)
        return Op(name, spec, tensor_key(0, name) if made.random else 0, inputs)

    def copy(name, *inputs):
        return Op(name, Spec(COPY, inputs[0].shape, (inputs[0].dtype,) * len(inputs), inputs[0].dtype), 0, inputs)

    return [
        op("a.element", "linear", (file("base", "embed"), embed), weight=[0.75, 0.25]),
        op("b.row", "slerp", (file("base", "embed"), embed), t=0.3, scope="row"),
        op("c.tensor", "ties", (file("base", "q"), tuned, narrow, file("other", "q")), weight=0.5, density=0.3),
        op("d.random", "dare_ties", (file("base", "q"), tuned, noise), weight=[1.0, 0.2], density=0.4),
        op("e.turned", "linear", (turned, file("other", "conv")), weight=0.5),
        op("f.angles", "model_stock", (file("base", "q"), narrow, tuned, constant)),
        op("g.one", "passthrough", (tuned,), out=F32, scale=None),
        op("h.noise", "passthrough", (noise,), scale=3.0),
        op("i.doubles", "linear", (Constant(0.1, F64, (40, 30)), Noise(1, 0, 1.0, F64, (40, 30))), out=F64, weight=1.0),
        copy("j.gathered", embed),
        copy("k.constant", constant),
        copy("l.compared", file("base", "steps"), Rows((file("other", "steps"),), np.arange(V)[::-1].copy())),
        copy("m.nothing", Rows((file("base", "embed"),), np.zeros(0, np.int64))),
    ]  # fmt: skip


def whole(source, tensors, names):
    """A source as a whole tensor, in plain torch."""
    if isinstance(source, FileRange):
        return tensors[names[source.model]][source.info.name]
    if isinstance(source, Rows):
        x = torch.cat([whole(s, tensors, names) for s in source.sources])
        return torch.cat([x, torch.zeros((1, *x.shape[1:]), dtype=x.dtype)])[source.index]
    if isinstance(source, Wide):
        return whole(source.source, tensors, names).to(torch.bfloat16)
    if isinstance(source, LowRank):
        x, b, a = (whole(s, tensors, names).float() for s in (source.base, source.b, source.a))
        update = torch.zeros(b.shape[0], a.shape[1])
        for k in range(a.shape[0]):
            update = update + b[:, k, None] * a[None, k]
        update = update * source.scale
        return x + (update.T if source.transposed else update)
    if isinstance(source, Constant):
        return torch.full(source.shape, source.value, dtype=torch.float64).to(torch_dtype(source.dtype))
    kind = np.float64 if source.dtype is F64 else np.float32
    found = normal(source.key, source.index, NOISE, 0, int(np.prod(source.shape))).astype(kind) * kind(source.sigma)
    return torch.from_numpy(found.reshape(source.shape))


@pytest.fixture(scope="module")
def expected(models):
    """By the definitions, on whole tensors."""
    opened, tensors = models
    names = list(opened)
    out = {}
    for op in planner(opened):
        inputs = [whole(s, tensors, names) for s in op.inputs]
        out[op.name] = op.spec.method.reference(inputs, op)
    return out


@pytest.fixture
def plan(models):
    """A plan that no recipe makes."""
    opened, _ = models
    ops = planner(opened)
    where = layout([(o.name, o.spec.out_dtype, o.spec.shape) for o in ops], shard_size=700_000, metadata={})
    named = {o.name: o for o in ops}
    return Plan(
        recipe=Recipe.load(
            f"{{merge_method: linear, models: [{{model: {opened['base'].path}}}], parameters: {{weight: 1}}}}"
        ),
        seed=0,
        checkpoints=tuple(opened.values()),
        ops=tuple(named[n]._replace(targets=(place,)) for n, place in where.places.items()),
        layout=where,
        config=None,
        carry=(),
        warnings=(),
        fingerprint="0" * 32,
    )


def tensors_of(directory):
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


WAYS = {
    "as it comes": {},
    "the definitions": {"backend": "reference"},
    "small units": {"unit": TILE},
    "small units, one worker": {"unit": TILE, "workers": 1},
    "small units, many workers": {"unit": TILE, "workers": 6},
    "the smallest slots": {"memory": "smallest"},
    "a little more": {"memory": 9_000_000, "unit": 2 * TILE},
    "devices with memory of their own": {"unit": TILE, "fakes": 3},
}


def minimum(plan, out):
    with pytest.raises(fm.BudgetError) as e:
        fm.merge(plan, out, device="cpu", memory=1)
    return int(str(e.value).split(">= ")[1].split()[0])


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_what_the_definitions_say(plan, expected, tmp_path, monkeypatch, way):
    how = dict(WAYS[way])
    if "unit" in how:
        monkeypatch.setattr(placement, "UNIT_ELEMENTS", how.pop("unit"))
    if "workers" in how:
        count = how.pop("workers")
        monkeypatch.setattr(placement, "workers", lambda chosen: count)
    if "fakes" in how:
        fakes = [FakeDevice(name=f"fake:{i}", latency=0.002, seed=i) for i in range(how.pop("fakes"))]
        monkeypatch.setattr(placement, "workers", lambda chosen: len(fakes))
        monkeypatch.setattr(placement, "CpuDevice", iter(fakes).__next__)
    if how.get("memory") == "smallest":
        how["memory"] = minimum(plan, tmp_path / "out")
    report = fm.merge(plan, tmp_path / "out", device="cpu", **how)
    assert differences(tensors_of(tmp_path / "out"), expected) == []
    assert report.nonfinite == {}
    assert report.warnings == ()


@pytest.mark.parametrize("fail_at", [0, 3, 9])
def test_an_interrupted_run_goes_on(plan, expected, tmp_path, monkeypatch, fail_at):
    with monkeypatch.context() as patch:
        patch.setattr(placement, "UNIT_ELEMENTS", TILE)
        patch.setattr(placement, "workers", lambda chosen: 1)
        patch.setattr(placement, "CpuDevice", lambda: FakeDevice(fail_at=fail_at))
        with pytest.raises(FastMergeError, match="injected fault"):
            fm.merge(plan, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    fm.merge(plan, tmp_path / "out", device="cpu", resume=True)
    assert differences(tensors_of(tmp_path / "out"), expected) == []


def test_of_files_that_are_not_in_the_page_cache(plan, models, expected, tmp_path, monkeypatch):
    """What is kept from the statistics to the result has room for what is made, too."""
    monkeypatch.setattr(placement, "UNIT_ELEMENTS", TILE)
    monkeypatch.setattr(past, "LEAST", 0)
    evict([file.path for model in models[0].values() for file in model.files])
    fm.merge(plan, tmp_path / "out", device="cpu")
    assert differences(tensors_of(tmp_path / "out"), expected) == []


@pytest.mark.parametrize("unit", [TILE, 1 << 20])
def test_targets_in_memory(models, expected, unit):
    opened, _ = models
    results, ops = {}, []
    for op in planner(opened):
        out = results[op.name] = torch.empty(op.spec.shape, dtype=torch_dtype(op.spec.out_dtype))
        ops.append(op._replace(targets=(Memory(out.data_ptr(), op.spec.out_dtype, op.spec.shape),)))
    run(ops, torch.device("cpu"), checkpoints=list(opened.values()), elements=unit)
    assert differences(results, expected) == []


def test_sources_in_memory_lie_beside_those_in_files(models, expected):
    """One op reads a file, what is made of it, and a tensor of the caller's."""
    opened, tensors = models
    other = tensors["other"]["q"]
    op = next(o for o in planner(opened) if o.name == "c.tensor")
    mine = Memory(other.data_ptr(), BY_NAME["bfloat16"], tuple(other.shape))
    out = torch.empty(op.spec.shape, dtype=torch.bfloat16)
    moved = op._replace(inputs=(*op.inputs[:3], mine), targets=(Memory(out.data_ptr(), BF16, op.spec.shape),))
    run([moved], torch.device("cpu"), checkpoints=list(opened.values()), elements=TILE)
    assert differences([out], [expected["c.tensor"]]) == []


def test_what_must_be_equal_is_compared_whatever_it_is_made_of(plan, tmp_path):
    i = next(i for i, op in enumerate(plan.ops) if op.name == "l.compared")
    first, second = plan.ops[i].inputs
    other = second.index.copy()
    other[V // 2] = 3
    ops = list(plan.ops)
    ops[i] = ops[i]._replace(inputs=(first, Rows(second.sources, other)))
    with pytest.raises(CheckpointError, match=r"l\.compared: int64 tensors are copied, not merged"):
        fm.merge(replace(plan, ops=tuple(ops)), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_nan_that_is_made_is_counted_with_its_tensor(plan, tmp_path):
    i = next(i for i, op in enumerate(plan.ops) if op.name == "h.noise")
    spec = Spec(Passthrough(scale=(2.0,)), (300, 500), (F32,), BF16)
    ops = list(plan.ops)
    ops[i] = Op("h.noise", spec, 0, (Constant(float("inf"), F32, (300, 500)),), ops[i].targets)
    report = fm.merge(replace(plan, ops=tuple(ops)), tmp_path / "out", device="cpu")
    assert report.nonfinite == {"h.noise": 150_000}
