"""A method that is nothing but its definition merges at once: on disk, in memory, whatever the units are."""

import json
import logging
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import pytest
import torch
from click.testing import CliRunner

import fastmerge as fm
from fastmerge.api import tensors as in_memory
from fastmerge.backends import choose as choosing
from fastmerge.backends.choose import Backend, cpu_backend
from fastmerge.backends.native import NativeKernels
from fastmerge.cli import main
from fastmerge.dtypes import F32
from fastmerge.methods import METHODS
from fastmerge.methods.base import Contract, Method, per_model, shared
from fastmerge.ops import blocks
from fastmerge.ops.segments import TILE
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Spec
from fastmerge.runtime import placement, resident
from tests import tiny
from tests.compare import differences
from tests.runtime.fake_device import FakeDevice


@dataclass(frozen=True, kw_only=True)
class Halfway(Method):
    r"""The base and one model, so far apart as ``share`` says, but only where both have the same sign.

    .. math:: (1 - s) a + s b
    """

    name = "halfway"
    summary = "Between two models, where they agree."
    formula = "out = (1 - s) a + s b where a b > 0, else a"
    paper = "none"
    contract = Contract("required", least=1, most=1)

    share: float = shared("how far", 0.5, low=0.0, high=1.0)

    def reference(self, inputs, op):
        a, b = blocks.work(inputs, op.spec)
        s = blocks.number(self.share, a)
        return blocks.finish(torch.where(a * b > 0, (1 - s) * a + s * b, a), op.spec)


@dataclass(frozen=True, kw_only=True)
class Spectral(Method):
    """The largest singular direction of each task vector: no element without the whole matrix."""

    name = "spectral"
    summary = "Adds the largest singular direction of each task vector."
    formula = "out = b + sum_i w_i rank1(x_i - b)"
    paper = "none"
    contract = Contract("required")

    weight: tuple[float, ...] = per_model("factor", 1.0)
    rounds: Literal["few", "many"] = shared("of the power iteration", "few")

    def reference(self, inputs, op):
        spec = op.spec
        base, *others = (x.reshape(spec.rows or 1, -1).double() for x in blocks.work(inputs, spec))
        out = base.clone()
        for w, x in zip(self.weight, others, strict=True):
            delta = x - base
            v = torch.ones(delta.shape[1], dtype=torch.float64)
            for _ in range(3 if self.rounds == "few" else 9):
                u = delta @ v
                v = delta.T @ (u / u.norm().clamp(min=1e-300))
            out += w * torch.outer(u / u.norm().clamp(min=1e-300), v)
        return blocks.finish(out.reshape(-1), spec)


def add(monkeypatch):
    """Makes the methods of this file known wherever the others are."""
    known = MappingProxyType({**METHODS, "halfway": Halfway, "spectral": Spectral})
    for name, module in list(sys.modules.items()):
        if name.startswith("fastmerge") and getattr(module, "METHODS", None) is METHODS:
            monkeypatch.setattr(module, "METHODS", known)
    choosing.say.cache_clear()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    add(monkeypatch)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    base = tiny.state(0, layers=1, hidden=128, vocab=1200)
    states = {
        "base": base,
        **{n: tiny.state(i, layers=1, hidden=128, vocab=1200, base=base) for i, n in enumerate("ab", 1)},
    }
    return {n: tiny.write(root / n, s, layers=1) for n, s in states.items()}, states


RECIPES = {
    "halfway": dict(names=("a",), extra="parameters: {share: [{filter: mlp, value: 0.1}, {value: 0.25}]}"),
    "spectral": dict(names=("a", "b"), weight=0.5, extra="parameters: {rounds: many}"),
}


def load(directory):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def expected(name, states):
    out = {}
    for key, base in states["base"].items():
        if name == "halfway":
            method, inputs = Halfway(share=0.1 if "mlp" in key else 0.25), [base, states["a"][key]]
        else:
            method, inputs = Spectral(weight=(0.5, 0.5), rounds="many"), [base, states["a"][key], states["b"][key]]
        dtypes = (fm_dtype(base),) * len(inputs)
        spec = Spec(method, tuple(base.shape), dtypes, dtypes[0], has_base=True)
        out[key] = method.reference(inputs, Op(key, spec))
    return out


def fm_dtype(t):
    from fastmerge.dtypes import BY_NAME

    return BY_NAME[str(t.dtype).removeprefix("torch.")]


@pytest.mark.parametrize("unit", [TILE, 1 << 20])
@pytest.mark.parametrize("name", RECIPES)
def test_on_disk(family, name, unit, tmp_path, monkeypatch, caplog):
    paths, states = family
    monkeypatch.setattr(placement, "UNIT_ELEMENTS", unit)
    text = tiny.recipe(paths, name, **RECIPES[name])
    report = fm.merge(text, tmp_path / "out", device="cpu")
    assert report.backend == "native"
    assert differences(load(tmp_path / "out"), expected(name, states)) == []
    said = [r for r in caplog.records if "definition" in r.getMessage()]
    assert [r.levelno for r in said] == [logging.WARNING]
    assert said[0].getMessage() == (
        f"{name} has no kernels yet (native): its definition in plain torch merges whole tensors, slowly"
    )
    fakes = [FakeDevice(name=f"fake:{i}", latency=0.001, seed=i) for i in range(3)]
    monkeypatch.setattr(placement, "workers", lambda chosen: 3)
    monkeypatch.setattr(placement, "CpuDevice", iter(fakes).__next__)
    fm.merge(text, tmp_path / "fakes", device="cpu")
    assert differences(load(tmp_path / "fakes"), load(tmp_path / "out")) == []
    assert not any(f.uploads for f in fakes), "definitions work on the host"


@pytest.mark.parametrize("name", RECIPES)
def test_the_stated_minimum_holds_the_largest_tensor(family, name, tmp_path):
    paths, _ = family
    text = tiny.recipe(paths, name, **RECIPES[name])
    with pytest.raises(fm.BudgetError) as e:
        fm.merge(text, tmp_path / "out", device="cpu", memory=1000)
    least = int(str(e.value).split(">= ")[1].split()[0])
    inputs = len(RECIPES[name]["names"]) + 1
    assert least >= 1200 * 128 * 2 * (inputs + 1)
    with pytest.raises(fm.BudgetError, match=f">= {least} bytes"):
        fm.merge(text, tmp_path / "out", device="cpu", memory=least - 1)
    fm.merge(text, tmp_path / "out", device="cpu", memory=least)
    assert load(tmp_path / "out")


@pytest.mark.parametrize("backend", [None, "native", "reference", "triton"])
@pytest.mark.parametrize("name", RECIPES)
def test_in_memory(family, name, backend):
    _, states = family
    names = ("base", *RECIPES[name]["names"])
    given = {"share": [{"filter": "mlp", "value": 0.1}, {"value": 0.25}]}
    given = given if name == "halfway" else {"weight": 0.5, "rounds": "many"}
    got = fm.merge_state_dicts({n: states[n] for n in names}, name, parameters=given, base="base", backend=backend)
    assert differences(got, expected(name, states)) == []
    key = "model.layers.0.mlp.up_proj.weight"
    one = fm.merge_tensors([states[n][key] for n in names], name, parameters=given, base_index=0, name=key)
    assert differences([one], [got[key]]) == []


def test_out_may_be_an_input():
    a, b = torch.randn(300, 400), torch.randn(300, 400)
    want = fm.merge_tensors([a, b], "halfway", base_index=0)
    fm.merge_tensors([a, b], "halfway", base_index=0, out=b)
    assert torch.equal(b, want)


def test_it_is_a_matter_of_each_spec():
    """Beside a method with kernels, whose tensors are cut as ever."""
    native = cpu_backend("native")
    mine = Spec(Halfway(share=0.5), (4, 4), (F32, F32), F32, has_base=True)
    theirs = Spec(METHODS["linear"](weight=(1.0, 1.0), normalize=True), (4, 4), (F32, F32), F32)
    assert (native.whole(mine), native.whole(theirs)) == (True, False)
    assert mine.grain == "matrix"
    assert native.reason(mine) == "halfway has no kernels yet"
    assert native.reason(theirs) is None


PARTLY = {
    "nuslerp": {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": [{"filter": "q_proj", "value": True}]},
}


@pytest.mark.parametrize("name", PARTLY)
def test_some_parameters_of_a_method_have_no_kernels(family, name, tmp_path):
    """Tensors of either kind in one merge: each goes its way, on disk and in memory."""
    paths, states = family
    text = tiny.recipe(paths, name, names=("a", "b"), extra=f"parameters: {json.dumps(PARTLY[name])}")
    planned = fm.plan(text)
    chosen = cpu_backend("native")
    assert {chosen.whole(op.spec) for op in planned.ops if op.spec.grain != "copy"} == {True, False}
    fm.merge(text, tmp_path / "out", device="cpu")
    want = fm.merge_state_dicts(states, name, parameters=PARTLY[name], base="base", backend="reference")
    assert differences(load(tmp_path / "out"), want) == []
    assert differences(fm.merge_state_dicts(states, name, parameters=PARTLY[name], base="base"), want) == []
    assert f"and with {METHODS[name].only_defined}" in CliRunner().invoke(main, ["methods", name]).output


def test_it_describes_itself():
    text = CliRunner().invoke(main, ["methods", "halfway"]).output
    assert "backends  its definition (plain torch, whole tensors) on every device; it has no kernels yet" in text
    assert Halfway.formula in text
    assert "share" in text
    assert "halfway" in CliRunner().invoke(main, ["methods"]).output
    assert "native, triton" in CliRunner().invoke(main, ["methods", "ties"]).output


def test_wrong_parameters_are_refused_as_ever():
    for wrong, words in (({"share": 2}, "expected a number in 0 .. 1; got 2"), ({"shar": 1}, "did you mean 'share'")):
        with pytest.raises(fm.RecipeError, match=words):
            fm.merge_tensors([torch.ones(2)] * 2, "halfway", parameters=wrong, base_index=0)
    with pytest.raises(fm.RecipeError, match="expected 1 models besides the base, got 2"):
        fm.merge_tensors([torch.ones(2)] * 3, "halfway", base_index=0)


def test_without_torch_it_says_what_to_install(family, tmp_path, monkeypatch):
    paths, _ = family
    monkeypatch.setattr(choosing, "torch_reason", lambda: "torch is not installed; install it (the extra 'torch')")
    with pytest.raises(fm.BackendUnavailable) as e:
        fm.merge(tiny.recipe(paths, "halfway", **RECIPES["halfway"]), tmp_path / "out", device="cpu")
    assert str(e.value) == (
        "halfway has no kernels yet, and its definition needs torch: "
        "torch is not installed; install it (the extra 'torch')"
    )
    assert not (tmp_path / "out").exists()
    fm.merge(tiny.recipe(paths, "linear", names=("a", "b"), base=None, weight=1.0), tmp_path / "out", device="cpu")


def test_planning_it_imports_no_torch(family):
    paths, _ = family
    text = tiny.recipe(paths, "halfway", names=("a",))
    code = (
        "import sys\nfrom dataclasses import dataclass\nimport fastmerge.methods as m\n"
        "from fastmerge.methods.base import Contract, Method\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Halfway(Method):\n"
        "    name = 'halfway'; contract = Contract('required')\n"
        "    def reference(self, inputs, op): ...\n"
        "m.METHODS = {**m.METHODS, 'halfway': Halfway}\n"
        "import fastmerge as fm\nfrom fastmerge.commands.estimate import estimate\n"
        f"planned = fm.plan({text!r})\n"
        "print(estimate(planned, memory=None, device='cpu', backend=None)['units'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    units, loaded = done.stdout.split()
    assert int(units) > 0
    assert loaded == "False"


def test_a_definition_knows_where_the_tensors_are(monkeypatch):
    """On a GPU it brings them to the host by their device, not as if their addresses were the host's."""
    seen, program = [], Backend.program

    def look(self, ops):
        seen.append(self.home)
        return program(replace(self, home="cpu"), ops)

    monkeypatch.setattr(Backend, "program", look)
    monkeypatch.setattr(in_memory, "choose", lambda *a, **k: Backend("triton", NativeKernels(), (0,)))
    monkeypatch.setattr(resident, "current", lambda home: nullcontext())
    a, b, out = torch.ones(5), torch.full((5,), 3.0), torch.empty(5)
    spec = Spec(Halfway(share=0.5), (5,), (F32, F32), F32, has_base=True)
    ours = [Memory(t.data_ptr(), F32, (5,)) for t in (a, b, out)]
    in_memory.run([Op("w", spec, 0, tuple(ours[:2]), (ours[2],))], torch.device("cuda:3"))
    assert seen == ["cuda:3"]
    assert out.tolist() == [2.0] * 5
