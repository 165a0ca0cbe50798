"""Planners of a few lines: whatever emits ops over sources, the same stream brings it to disk."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge as fm
from fastmerge.backends.choose import cpu_backend
from fastmerge.checkpoint import Checkpoint, Files, Writer, layout
from fastmerge.dtypes import BF16, F32
from fastmerge.keys import tensor_key
from fastmerge.methods.linear import Linear
from fastmerge.methods.passthrough import COPY, Passthrough
from fastmerge.methods.replicate import Replicate
from fastmerge.ops.low_rank import LowRank
from fastmerge.ops.made import Constant, Noise, Rows
from fastmerge.ops.sources import FileRange
from fastmerge.ops.spec import Op, Spec
from fastmerge.philox import NOISE, normal
from fastmerge.runtime.budget import need
from fastmerge.runtime.devices import CpuDevice
from fastmerge.runtime.schedule import schedule
from fastmerge.runtime.stores import OpStore
from fastmerge.runtime.workers import Runner

WAYS = [(1 << 20, 1), (1 << 16, 1), (1 << 16, 3)]
"""Elements per unit, and workers."""


def model(path, **tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return Checkpoint.open(path)


def source(checkpoint, name, at=0):
    return FileRange(checkpoint.tensors[name], at)


def written(out, ops, checkpoints, elements, cores, backend="native"):
    """Runs (op, names of its results) pairs to a directory; gives its tensors."""
    places = layout(
        [(n, op.spec.out_dtype, op.spec.shape) for op, names in ops for n in names], shard_size=1e9, metadata={}
    )
    placed = [op._replace(targets=tuple(places.places[n] for n in names)) for op, names in ops]
    placed.sort(key=lambda op: op.targets[0])
    chosen = cpu_backend(backend)
    slot = need(placed, elements=elements, whole=chosen.whole).best
    jobs = schedule(placed, slot=slot, elements=elements, whole=chosen.whole)
    writer = Writer(out, places, fingerprint="test", inputs=[c.path for c in checkpoints])
    with writer, Files(checkpoints) as files:
        store = OpStore(placed, files, writer)
        Runner(placed, jobs, store, [CpuDevice() for _ in range(cores)], chosen.program, slot=slot).run()
        writer.commit()
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    return {
        "embed": torch.randn(700, 130).bfloat16(),
        "q": torch.randn(520, 260).bfloat16(),
        "norm": torch.randn(130),
        "steps": torch.arange(5),
    }


@pytest.mark.parametrize(("elements", "cores"), WAYS)
def test_a_vocabulary_permutation(tmp_path, tensors, elements, cores):
    """Rows of one model's embedding, at the places that the other model's tokens have, merged with its own."""
    torch.manual_seed(1)
    order = torch.randperm(700)
    other = torch.randn(700, 130).bfloat16()
    a, b = model(tmp_path / "a", **tensors), model(tmp_path / "b", embed=other[order])
    where = torch.argsort(order).numpy()
    mean = Linear(weight=(0.5, 0.5), normalize=True)
    ops = [
        (
            Op(
                "embed",
                Spec(mean, (700, 130), (BF16, BF16), BF16),
                inputs=(source(a, "embed"), Rows((source(b, "embed", 1),), where)),
            ),
            ["embed"],
        ),
        (
            Op(
                "steps",
                Spec(COPY, (5,), (a.tensors["steps"].dtype,), a.tensors["steps"].dtype),
                0,
                (source(a, "steps"),),
            ),
            ["steps"],
        ),
    ]
    got = written(tmp_path / "out", ops, [a, b], elements, cores)
    want = fm.merge_tensors([tensors["embed"], other], "linear", parameters={"weight": 0.5})
    assert torch.equal(got["embed"].view(torch.int16), want.view(torch.int16))
    assert torch.equal(got["steps"], tensors["steps"])


@pytest.mark.parametrize(("elements", "cores"), WAYS)
def test_a_dense_lora_and_generated_tensors(tmp_path, tensors, elements, cores):
    torch.manual_seed(2)
    down, up = torch.randn(4, 260), torch.randn(520, 4)
    base, lora = model(tmp_path / "base", **tensors), model(tmp_path / "lora", A=down, B=up)
    baked = Spec(Passthrough(scale=(None,)), (520, 260), (F32,), BF16)
    made = LowRank(source(base, "q"), source(lora, "B", 1), source(lora, "A", 1), 2.0)
    router = Spec(Linear(weight=(1.0, 1.0), normalize=False), (8, 130), (F32, F32), BF16)
    ops = [
        (Op("q", baked, inputs=(made,)), ["q"]),
        (Op("router", router, inputs=(Constant(0.5, F32, (8, 130)), Noise(5, 0, 0.02, F32, (8, 130)))), ["router"]),
    ]
    got = written(tmp_path / "out", ops, [base, lora], elements, cores)
    update = torch.zeros(520, 260)
    for k in range(4):
        update = update + up[:, k, None] * down[k]
    want = (tensors["q"].float() + update * 2.0).bfloat16()
    assert torch.equal(got["q"].view(torch.int16), want.view(torch.int16))
    noise = normal(5, 0, NOISE, 0, 8 * 130) * np.float32(0.02)
    assert torch.equal(got["router"].reshape(-1), (torch.from_numpy(noise) + 0.5).bfloat16())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("elements", "cores"), WAYS)
def test_experts_on_disk_from_one_dense_tensor(tmp_path, tensors, elements, cores, backend):
    """One source, many targets: the bytes are those of replicate_experts."""
    dense = model(tmp_path / "dense", **tensors)
    method = Replicate(experts=(0, 1, 2, 3), sigma=(0.0, 0.1, 0.1, 0.1))
    names = [f"experts.{e}.q" for e in range(4)]
    ops = [
        (Op("q", Spec(method, (520, 260), (BF16,), BF16), tensor_key(3, "q"), (source(dense, "q"),)), names),
        (Op("norm", Spec(COPY, (130,), (F32,), F32), 0, (source(dense, "norm"),)), ["norm"]),
    ]
    got = written(tmp_path / "out", ops, [dense], elements, cores, backend)
    want = fm.replicate_experts(tensors["q"], 4, noise=0.1, mode="absolute", name="q", seed=3)
    assert [torch.equal(got[n].view(torch.int16), w.view(torch.int16)) for n, w in zip(names, want, strict=True)] == [
        True
    ] * 4
    assert torch.equal(got["norm"], tensors["norm"])
