"""Where models differ: crafted pairs, against the same figures from torch in fp64."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from fastmerge import _native
from fastmerge.checkpoint import Checkpoint
from fastmerge.cli import main
from fastmerge.commands import pairs
from fastmerge.commands.diff import diff
from fastmerge.errors import CheckpointError
from tests import tiny

CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def run(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


def figures(x, y):
    """What the definition says, of finite tensors."""
    x, y = x.double().flatten(), y.double().flatten()
    d = x - y
    return {
        "differ": int((x != y).sum()), "max": float(d.abs().max()), "rms": float(d.square().mean().sqrt()),
        "relative": float(d.norm() / x.norm()), "cosine": float(x @ y / x.norm() / y.norm()),
    }  # fmt: skip


@pytest.mark.parametrize("types", [(a, b) for a in CODES for b in CODES], ids=str)
@pytest.mark.parametrize("n", [0, 1, 255, 256, 1000])
def test_the_kernel(types, n):
    g = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, generator=g).to(t) for t in types)
    if n > 2:
        y[2] = x[2].to(types[1])
        x[0], y[1] = math.nan, math.inf
    finite = torch.isfinite(x) & torch.isfinite(y)
    u, v = x.double()[finite], y.double()[finite]
    want = (int((x.double() != y.double()).sum()), int((~finite).sum()), float((u - v).abs().max()) if len(u) else 0.0)
    differ, odd, most, *sums = _native.apart(x.data_ptr(), CODES[types[0]], y.data_ptr(), CODES[types[1]], n)
    assert (differ, odd, most) == want
    np.testing.assert_allclose(sums, [u @ u, u @ v, v @ v, (u - v) @ (u - v)], rtol=1e-12, atol=1e-12)


def test_nan_beside_nan_is_equal_and_signs_of_zero_are():
    x = torch.tensor([math.nan, 0.0, 1.0])
    y = torch.tensor([math.nan, -0.0, 1.0])
    assert _native.apart(x.data_ptr(), 1, y.data_ptr(), 1, 3)[:3] == (0, 1, 0.0)
    with pytest.raises(ValueError, match="aligned"):
        _native.apart(x.data_ptr() + 1, 1, y.data_ptr(), 1, 1)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), models=1)


@pytest.mark.parametrize("block", [pairs.BLOCK, 4096, 100])
def test_values_of_sharded_models(family, monkeypatch, block):
    """``base`` is one file and ``a`` two; whatever the reads."""
    monkeypatch.setattr(pairs, "BLOCK", block)
    base = tiny.state(0)
    tuned = tiny.state(1, base=base)
    found = diff(family["base"], family["a"], weights=True).facts()
    assert not found["equal"]
    assert found["values"].keys() == base.keys()
    for name, value in found["values"].items():
        want = figures(base[name], tuned[name])
        assert {k: value[k] for k in want} == pytest.approx(want, rel=1e-9)


def test_equal_models(family, tmp_path):
    twin = tiny.write(tmp_path / "twin", tiny.state(0), shards=3)
    assert run("diff", family["base"], twin).exit_code == 0
    done = run("diff", family["base"], twin, "--weights")
    assert done.exit_code == 0
    assert "21 of 21 tensors equal, byte for byte" in done.output
    assert done.output.endswith("\nequal\n")


def test_a_model_is_equal_to_itself_without_a_look(family, monkeypatch):
    monkeypatch.setattr(pairs, "read", None)
    found = diff(family["base"], family["base"] / "model.safetensors", weights=True)
    assert found.equal


def test_types_names_and_shapes(family, tmp_path):
    state = {n: t.float() if "norm" in n else t for n, t in tiny.state(0).items()}
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    state["lm_head.weight"] = state["lm_head.weight"][:200].contiguous()
    state["extra.weight"] = state.pop("model.embed_tokens.weight")
    tiny.write(tmp_path / "other", state)
    done = run("diff", family["base"], tmp_path / "other", "--weights")
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert "           only in A: model.embed_tokens.weight" in lines
    assert "           only in B: extra.weight" in lines
    assert "shapes     [300, 64] in A, [200, 64] in B: lm_head.weight" in lines
    assert any(line.startswith("types      bfloat16 in A, float32 in B: model.layers.*") for line in lines)
    assert "values     14 of 19 tensors equal, byte for byte" in lines
    assert "           4 equal in value, though not in type or in signs of zeros and NaNs" in lines
    assert "1 of 19 tensors changed" in lines[-1]
    facts = json.loads(run("diff", family["base"], tmp_path / "other", "--json").output)
    assert facts["values"] is None
    assert facts["shapes"] == {"lm_head.weight": [[300, 64], [200, 64]]}


def test_integers_and_nan(tmp_path):
    a = {"i": torch.arange(9000), "x": torch.tensor([1.0, math.nan, 2.0]), "same": torch.arange(4).bool()}
    b = {**a, "i": torch.arange(9000) + (torch.arange(9000) == 8000), "x": torch.tensor([1.0, 5.0, 3.0])}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", weights=True)
    assert [(n, v.same, v.differ, v.nonfinite, v.most) for n, v in sorted(found.values.items())] == [
        ("i", False, 1, 0, 0.0),
        ("same", True, 0, 0, 0.0),
        ("x", False, 2, 1, 1.0),
    ]
    assert "1 pairs with NaN or Inf" in str(found)
    assert "0.01%" in str(found), "of integers, how many differ"


def test_tensors_at_odd_places_of_a_file(tmp_path):
    """Headers of any length: elements need not be aligned in the file."""
    state = {"w": torch.randn(5000), "v": torch.randn(3000).double()}
    for name, pad in (("a", 0), ("b", 3)):
        save_file(state, tmp_path / f"{name}.safetensors")
        raw = (tmp_path / f"{name}.safetensors").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + size] + b" " * pad
        (tmp_path / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    assert diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", weights=True).equal


def test_configurations_by_meaning(tmp_path):
    state = tiny.state(0)
    old = {"rope_theta": 5e5, "hidden_act": "silu", "eos_token_id": 2, "transformers_version": "4.40"}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "hidden_act": "silu", "eos_token_id": 2}
    tiny.write(tmp_path / "old", state, config=old)
    tiny.write(tmp_path / "new", state, config=new)
    assert diff(tmp_path / "old", tmp_path / "new").equal, "two dialects of one meaning"
    tiny.write(tmp_path / "far", state, config={**old, "rope_theta": 1e4, "eos_token_id": 3})
    found = diff(tmp_path / "old", tmp_path / "far")
    assert (found.config, found.config_rest) == ([("rope_theta", 5e5, 1e4)], ["eos_token_id"])
    assert "config     rope_theta: 500000.0 in A, 10000.0 in B" in str(found)


def test_tokenizers(tmp_path):
    state = tiny.state(0)
    for name, words in (("a", "xyz"), ("b", "xzy"), ("c", "xyz")):
        path = tiny.write(tmp_path / name, state)
        vocabulary = {word: i for i, word in enumerate(words)}
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": []}, "n": name}))
    (tmp_path / "c" / "chat_template.jinja").write_text("{{ messages }}")
    assert diff(tmp_path / "a", tmp_path / "b").tokenizer == [
        "vocabulary: 2 of 3 tokens differ (1 is 'y' and 'z'; 2 is 'z' and 'y')"
    ]
    found = diff(tmp_path / "a", tmp_path / "c")
    assert found.tokenizer == [f"chat template: only {tmp_path / 'c'} has one"]
    assert found.files == ["chat_template.jinja", "tokenizer.json"]


def test_layers_are_bars_by_their_change(tmp_path):
    state = tiny.state(0, layers=4)
    tuned = {n: t * (1 + int(n.split(".")[2]) / 4) if "layers" in n else t for n, t in state.items()}
    tiny.write(tmp_path / "a", state, layers=4)
    tiny.write(tmp_path / "b", tuned, layers=4)
    lines = str(diff(tmp_path / "a", tmp_path / "b", weights=True)).splitlines()
    (line,) = [text for text in lines if text.startswith("model.layers") and "to 3" in text]
    assert line.startswith("model.layers 0 to 3: ·▃▆█  relative change 0.00e+00 to 7.5")


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        diff(tmp_path / "none", tmp_path / "none")
    assert run("diff", tmp_path / "x", tmp_path / "y").exit_code == 3


def test_a_file_that_shrinks_is_an_error(family, tmp_path):
    twin = tiny.write(tmp_path / "twin", tiny.state(0))
    a, b = Checkpoint.open(family["base"]), Checkpoint.open(twin)
    (twin / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="changed or replaced"):
        pairs.measure(a, b, [(i, b.tensors[n]) for n, i in a.tensors.items()])
