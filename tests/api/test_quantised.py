"""Merges of quantised models, from disk to disk: into dense ones, and back into the base's own format."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import fastmerge as fm
from fastmerge.checkpoint import Checkpoint
from fastmerge.errors import CheckpointError, FastMergeError, OutputError, RecipeError
from fastmerge.recipe import Recipe
from tests import tiny

BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
FP8 = torch.float8_e4m3fn


def quantiser(block=(32, 32)):
    return Fp8Quantize(SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=None)))


def fp8(state, block=(32, 32)):
    """A state dict whose projections are quantised as transformers does it."""
    out = {}
    for name, w in state.items():
        out |= quantiser(block).convert({name: w}) if name.endswith("_proj.weight") else {name: w}
    return out


def plain(state):
    """The same as fp32 weights, read by transformers."""
    out = {}
    for name, w in state.items():
        scale = state.get(f"{name}_scale_inv")
        if scale is not None:
            out[name] = Fp8Dequantize(None)._dequantize_one(w, scale, output_dtype=torch.float32)
        elif not name.endswith("_scale_inv"):
            out[name] = w
    return out


def write(directory, state, said=BLOCKS, config=None):
    config = {**(config or {}), **({"quantization_config": said} if said else {})}
    return tiny.write(directory, {n: t.contiguous().clone() for n, t in state.items()}, config=config)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and fine-tunes: in float8, and as the fp32 weights that those are."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.state(0)
    for name, state in {"base": base, "a": tiny.state(1, base=base), "b": tiny.state(2, base=base)}.items():
        small = fp8(state)
        write(root / f"{name}-fp8", small)
        write(root / f"{name}-plain", plain(small), None)
    return root


def recipe(method, base, *others, **more):
    """A recipe of models by their directories."""
    weights = {"parameters": {"weight": 0.5}} if method not in ("slerp", "passthrough") else {}
    listed = [{"model": str(m), **weights} for m in others]
    document = {"merge_method": method, "models": listed, **more}
    if base is not None:
        document["base_model"] = str(base)
    return document


def merged(document, out, **how):
    report = fm.merge(document, out, device="cpu", **how)
    return load_file(out / "model.safetensors"), report


def equal(a, b):
    """Whether two state dicts hold the same bytes; says where they do not."""
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == b[name].dtype, name
        assert t.shape == b[name].shape, name
        assert torch.equal(t.view(torch.uint8), b[name].view(torch.uint8)), name
    return True


METHODS = [
    ("linear", {}),
    ("task_arithmetic", {}),
    ("ties", {"parameters": {"density": 0.5}}),
    ("dare_ties", {"parameters": {"density": 0.5}}),
    ("della", {"parameters": {"density": 0.5, "epsilon": 0.2}}),
    ("model_stock", {}),
    ("karcher", {}),
]


@pytest.mark.parametrize("kinds", [("fp8", "fp8", "fp8"), ("fp8", "plain", "plain"), ("plain", "fp8", "plain")])
@pytest.mark.parametrize(("method", "more"), METHODS)
def test_a_merge_is_that_of_the_weights(models, tmp_path, method, more, kinds):
    """Whichever of the models are quantised: the bits are those of a merge of their fp32 weights."""
    out = []
    for kind in (kinds, ("plain",) * 3):
        base, a, b = (models / f"{n}-{k}" for n, k in zip(("base", "a", "b"), kind, strict=True))
        first = () if method not in ("linear", "karcher") else (base,)
        document = recipe(method, base if not first else None, *first, a, b, dtype="bfloat16", **more)
        out.append(merged(document, tmp_path / f"{len(out)}")[0])
    assert equal(*out)


def test_one_model_becomes_the_weights_that_transformers_reads(models, tmp_path):
    got, report = merged(recipe("passthrough", None, models / "a-fp8"), tmp_path / "out")
    state = load_file(models / "a-fp8" / "model.safetensors")
    for name, t in got.items():
        scale = state.get(f"{name}_scale_inv")
        want = state[name]
        if scale is not None:
            want = Fp8Dequantize(None)._dequantize_one(want, scale, output_dtype=torch.bfloat16)
        assert torch.equal(t, want), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.bytes_written == sum(t.nbytes for t in got.values())


def test_a_dense_merge_needs_no_type(models, tmp_path):
    """Of an fp8 base and a bf16 fine-tune: bf16, as their model computes with."""
    write(tmp_path / "dense", tiny.state(1, base=tiny.state(0)), None)
    got, _ = merged(recipe("task_arithmetic", models / "base-fp8", tmp_path / "dense"), tmp_path / "out")
    assert {t.dtype for t in got.values()} == {torch.bfloat16}


def near(found, wanted):
    """Codes of sums in fp32 beside those of sums in fp64: one in a thousand may be the next one."""
    for name, want in wanted.items():
        got = found[name]
        if got.dtype.itemsize == 1:
            steps = (got.view(torch.uint8).int() - want.view(torch.uint8).int()).abs()
            assert steps.max() <= 1, name
            assert steps.sum() <= got.numel() // 1000, name
        else:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    return True


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
@pytest.mark.parametrize("kind", ["fp8", "plain"])
def test_back_into_float8_as_transformers_quantises(models, tmp_path, method, kind):
    more = {"parameters": {"density": 0.5}} if method != "linear" else {}
    models_of = [models / "base-fp8", models / f"a-{kind}", models / f"b-{kind}"]
    first = models_of[:1] if method == "linear" else []
    document = recipe(method, models_of[0], *first, *models_of[1:], **more)
    got, report = merged({**document, "out_dtype": "as-base"}, tmp_path / "out")
    if method == "linear":  # in fp32: a dense result would be that of fp64
        states = [plain(load_file(m / "model.safetensors")) for m in models_of]
        dense = {n: sum([0.5 * s[n].float() for s in states]) / torch.tensor(1.5) for n in states[0]}
    else:
        dense, _ = merged({**document, "out_dtype": "float32"}, tmp_path / "dense")
    original = load_file(models / "base-fp8" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in got.items()} == {n: (t.dtype, t.shape) for n, t in original.items()}
    norm, wrong = 0.0, 0.0
    for name, want in dense.items():
        if name.endswith("_proj.weight"):
            pair = quantiser().convert({name: want})
            assert (equal if method == "linear" else near)({n: got[n] for n in pair}, pair)
            back = plain({n: got[n] for n in pair})[name].double()
            norm, wrong = norm + want.double().square().sum(), wrong + (back - want.double()).square().sum()
        else:
            assert torch.equal(got[name], want.bfloat16()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == BLOCKS
    lost = json.loads((tmp_path / "out" / "merge_report.json").read_text())["details"]["quantised"]
    assert lost["tensors"] == 14
    assert lost["relative_error"] == pytest.approx(float((wrong / norm).sqrt()), rel=1e-3)
    assert report.bytes_written == sum(t.nbytes for t in got.values())
    assert fm.plan({**document, "out_dtype": "as-base"}).summary()["bytes_out"] == report.bytes_written


def test_parts_have_the_bytes_of_the_whole_and_report_what_all_of_them_lose(models, tmp_path):
    document = recipe("linear", None, models / "base-fp8", models / "a-fp8", out_dtype="as-base")
    got, _ = merged(document, tmp_path / "whole")
    for part in ("1/3", "2/3", "3/3"):
        fm.merge(document, tmp_path / "parts", part=part, device="cpu")
    assert equal(load_file(tmp_path / "parts" / "model.safetensors"), got)
    lost, whole = (
        json.loads((tmp_path / name / "merge_report.json").read_text())["details"]["quantised"]
        for name in ("parts", "whole")
    )
    assert lost.pop("worst") == whole.pop("worst")
    assert lost == pytest.approx(whole)


def test_one_model_as_base_is_copied_byte_for_byte(models, tmp_path):
    got, _ = merged(recipe("passthrough", None, models / "a-fp8", out_dtype="as-base"), tmp_path / "out")
    assert equal(got, load_file(models / "a-fp8" / "model.safetensors"))


def test_layers_of_one_quantised_model_are_stacked(models, tmp_path):
    ranges = [(0, 2), (1, 2)]
    slices = [{"sources": [{"model": str(models / "a-fp8"), "layer_range": list(r)}]} for r in ranges]
    got, _ = merged({"merge_method": "passthrough", "slices": slices, "out_dtype": "as-base"}, tmp_path / "out")
    original = load_file(models / "a-fp8" / "model.safetensors")
    for name, t in got.items():
        source = name.replace("layers.2.", "layers.1.")
        assert torch.equal(t.view(torch.uint8), original[source].view(torch.uint8)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3


def test_as_base_of_a_dense_base_is_its_types(models, tmp_path):
    state = tiny.state(0)
    state["model.norm.weight"] = state["model.norm.weight"].float()
    write(tmp_path / "base", state, None)
    got, _ = merged(
        recipe("linear", tmp_path / "base", tmp_path / "base", models / "a-fp8", out_dtype="as-base"), tmp_path / "out"
    )
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in state.items()}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Models whose tensors go through in several units."""
    root = tmp_path_factory.mktemp("large")
    g = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        state = {"x.up_proj.weight": torch.randn(2560, 1024, generator=g), "norm.weight": torch.ones(4).bfloat16()}
        write(root / name, quantiser((128, 128)).convert(state), {**BLOCKS, "weight_block_size": [128, 128]})
    return root


@pytest.mark.parametrize("method", ["linear", "ties", "nuslerp"])
@pytest.mark.parametrize("how", [{"memory": "60MB"}, {"backend": "reference"}])
def test_any_memory_and_backend_give_the_same_codes(large, tmp_path, method, how):
    more = {"parameters": {"density": 0.4}} if method == "ties" else {}
    document = recipe(
        method, large / "base" if method != "linear" else None, large / "a", large / "b", out_dtype="as-base", **more
    )
    want, _ = merged(document, tmp_path / "want")
    got, _ = merged(document, tmp_path / "got", **how)
    assert equal(got, want)


def test_an_interrupted_merge_goes_on(large, tmp_path, monkeypatch):
    from fastmerge.ops.packing import Packing

    document = recipe("linear", None, large / "a", large / "b", out_dtype="as-base")
    want, _ = merged(document, tmp_path / "want")
    encode, left = Packing.encode, [2]

    def failing(self, *args):
        left[0] -= 1
        if not left[0]:
            raise OutputError("power cut")
        return encode(self, *args)

    with monkeypatch.context() as m:
        m.setattr(Packing, "encode", failing)
        with pytest.raises(OutputError, match="power cut"):
            merged(document, tmp_path / "out", memory="60MB")
    got, _ = merged(document, tmp_path / "out", memory="60MB", resume=True)
    assert equal(got, want)


# ---- other formats -------------------------------------------------------------------------------------


def experts(seed, *, experts=3, rows=64, columns=96):
    """Dense experts of GPT-OSS's kind: stored the other way round than their blocks."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(experts, columns, rows, generator=g) * 0.05).bfloat16()


def mxfp4(w):
    """Blocks and scales of matrices ``[E, C, R]``, as compressed-tensors chooses them."""
    e, c, r = w.shape
    group = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    how = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="float", **group))
    flat = w.float().transpose(1, 2).reshape(e * r, c)
    g = flat.reshape(e * r, -1, 32)
    scale, _ = calculate_qparams(g.amin(-1), g.amax(-1), how.weights)
    found = MXFP4PackedCompressor.compress({"weight": flat, "weight_scale": scale}, how)
    return found["weight_packed"].reshape(e, r, c // 32, 16), found["weight_scale"].reshape(e, r, c // 32)


def gpt_oss(w):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = mxfp4(w)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.zeros(3, 64).bfloat16()}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("tuned", ["quantised", "dense"])
def test_mxfp4_of_gpt_oss(tmp_path, method, tuned):
    said, name = {"quant_method": "mxfp4"}, "model.layers.0.mlp.experts.gate_up_proj"
    a, b = gpt_oss(experts(1)), gpt_oss(experts(2))
    write(tmp_path / "base", gpt_oss(experts(0)), said)
    write(tmp_path / "a", a, said)
    weight = convert_moe_packed_tensors(b[f"{name}_blocks"], b[f"{name}_scales"])
    dense = {name: weight, f"{name}_bias": b[f"{name}_bias"]}
    write(tmp_path / "b", b if tuned == "quantised" else dense, said if tuned == "quantised" else None)
    document = recipe(method, tmp_path / "base" if method != "linear" else None, tmp_path / "a", tmp_path / "b")
    wide, _ = merged({**document, "out_dtype": "float32"}, tmp_path / "wide")
    assert wide[name].shape == (3, 96, 64)
    if method == "linear":
        values = [convert_moe_packed_tensors(m[f"{name}_blocks"], m[f"{name}_scales"]).float() for m in (a, b)]
        assert torch.equal(wide[name], (values[0] * 0.5 + values[1] * 0.5))
    got, _ = merged({**document, "out_dtype": "as-base"}, tmp_path / "out")
    blocks, scales = mxfp4(wide[name])
    assert torch.equal(got[f"{name}_blocks"], blocks)
    assert torch.equal(got[f"{name}_scales"], scales)
    assert got[f"{name}_bias"].dtype == torch.bfloat16
    small, _ = merged(document, tmp_path / "small")
    assert torch.equal(small[name], wide[name].bfloat16())


def ct(kind, **weights):
    """The configuration's section of a model of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_float8_of_compressed_tensors(tmp_path, strategy):
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
    how = QuantizationScheme(targets=["Linear"], weights=args)

    def small(w):
        w = w.float()
        low, high = (w.amin(1, keepdim=True), w.amax(1, keepdim=True)) if strategy == "channel" else (w.min(), w.max())
        scale, _ = calculate_qparams(low, high, args)
        scale = scale.bfloat16()
        found = NaiveQuantizationCompressor.compress({"weight": w, "weight_scale": scale.float()}, how)
        return found["weight"], scale

    def model(seed):
        w, scale = small(torch.randn(48, 64, generator=torch.Generator().manual_seed(seed)))
        q = "model.layers.0.self_attn.q_proj"
        return {f"{q}.weight": w, f"{q}.weight_scale": scale, f"{q}.input_scale": torch.ones(1)}

    said = ct("float-quantized", num_bits=8, type="float", strategy=strategy)
    for i, name in enumerate("ab"):
        write(tmp_path / name, model(i), said)
    document = recipe("linear", None, tmp_path / "a", tmp_path / "b")
    wide, report = merged({**document, "out_dtype": "float32"}, tmp_path / "wide")
    assert list(wide) == ["model.layers.0.self_attn.q_proj.weight"]
    assert report.account["dropped"][str(tmp_path / "a")] == {
        "dropped: says nothing of the values of weights": ["model.layers.0.self_attn.q_proj.input_scale"]
    }
    got, report = merged({**document, "out_dtype": "as-base"}, tmp_path / "out")
    codes, scale = small(wide["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(got["model.layers.0.self_attn.q_proj.weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(got["model.layers.0.self_attn.q_proj.weight_scale"], scale)
    assert torch.equal(got["model.layers.0.self_attn.q_proj.input_scale"], torch.ones(1))
    assert any("scales of activations are taken over from the base" in text for text in report.warnings)


@pytest.mark.parametrize(("columns", "group"), [(64, 16), (44, 44)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers(tmp_path, columns, group, symmetric):
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group, symmetric=symmetric)
    how = QuantizationScheme(targets=["Linear"], weights=args)
    state, want = {}, []
    for i, name in enumerate("ab"):
        w = torch.randn(20, columns, generator=torch.Generator().manual_seed(i)).bfloat16()
        g = w.reshape(20, -1, group)
        scale, zero = calculate_qparams(g.amin(-1), g.amax(-1), args)
        state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        state = PackedQuantizationCompressor.compress(state, how)
        want.append(PackedQuantizationCompressor.decompress(state, how)["weight"].double())
        said = ct("pack-quantized", num_bits=4, type="int", group_size=group)
        write(tmp_path / name, {f"l.q_proj.{n}": t for n, t in state.items()}, said)
    document = recipe("passthrough", None, tmp_path / "b")
    got, _ = merged(document, tmp_path / "one")
    assert torch.equal(got["l.q_proj.weight"].double(), want[1])
    got, _ = merged({**document, "out_dtype": "as-base"}, tmp_path / "copied")
    assert equal(got, load_file(tmp_path / "b" / "model.safetensors"))
    with pytest.raises(RecipeError, match=r"float8_e4m3fn and MXFP4 only, and the base's are int4"):
        fm.plan(recipe("linear", None, tmp_path / "a", tmp_path / "b", out_dtype="as-base"))


# ---- what is refused, and what is said -----------------------------------------------------------------


def test_nan_has_no_code(models, tmp_path):
    state = tiny.state(3)
    state["model.layers.1.self_attn.q_proj.weight"][3, 5] = float("nan")
    write(tmp_path / "bad", state, None)
    document = recipe("linear", None, models / "base-fp8", tmp_path / "bad", out_dtype="as-base")
    with pytest.raises(OutputError, match=re.escape("model.layers.1.self_attn.q_proj.weight: NaN or Inf")):
        merged(document, tmp_path / "out")
    got, _ = merged(document, tmp_path / "zero", nan="zero")
    assert got["model.layers.1.self_attn.q_proj.weight"][3, 5].float() == 0


def test_no_library_could_read_a_result_of_which_the_configuration_says_nothing(models, tmp_path):
    write(tmp_path / "unsaid", load_file(models / "a-fp8" / "model.safetensors"), None)
    document = recipe("passthrough", None, tmp_path / "unsaid")
    got, report = merged(document, tmp_path / "out")
    assert equal(got, merged(recipe("passthrough", None, models / "a-fp8"), tmp_path / "a")[0])
    assert any("no quantization_config, and weights that are quantised" in text for text in report.warnings)
    with pytest.raises(RecipeError, match=r"as-base: its config\.json does not say"):
        fm.plan({**document, "out_dtype": "as-base"})


def test_modules_that_are_named_by_their_layers_cannot_move(models, tmp_path):
    said = {**BLOCKS, "modules_to_not_convert": ["model.layers.0.mlp.gate"]}
    write(tmp_path / "named", load_file(models / "a-fp8" / "model.safetensors"), said)
    slices = [{"sources": [{"model": str(tmp_path / "named"), "layer_range": [1, 2]}]}]
    with pytest.raises(RecipeError, match=r"names modules by their layers: 'model\.layers\.0\.mlp\.gate'"):
        fm.plan({"merge_method": "passthrough", "slices": slices, "out_dtype": "as-base"})


def test_float8_without_scales_is_not_written(tmp_path):
    state = {n: w.to(FP8) if w.dim() == 2 else w for n, w in tiny.state(0).items()}
    write(tmp_path / "plain8", state, None)
    write(tmp_path / "dense", tiny.state(1), None)
    document = recipe("linear", None, tmp_path / "plain8", tmp_path / "dense", out_dtype="as-base")
    with pytest.raises(RecipeError, match=r"float8 weights without scales are copied only: 'lm_head\.weight'"):
        fm.plan(document)
    got, _ = merged(recipe("passthrough", None, tmp_path / "plain8", out_dtype="as-base"), tmp_path / "out")
    assert equal(got, state)


def test_a_stage_is_not_written(models):
    text = Recipe.load(recipe("linear", None, models / "a-fp8", models / "b-fp8", out_dtype="as-base")).to_yaml()
    stages = f"name: first\n{text}---\nmerge_method: passthrough\nmodels:\n- model: first\n"
    with pytest.raises(RecipeError, match="first: out_dtype: as-base: what a stage makes is not written"):
        fm.plan(stages)
    planned = fm.plan(stages.replace("out_dtype: as-base", "out_dtype: bfloat16"))
    assert planned.summary()["tensors"]["merged"] == 21


def test_out_dtype_is_spelled_as_base(models):
    assert Recipe.load(recipe("linear", None, models / "a-fp8", out_dtype="as_base")).out_dtype == "as-base"
    with pytest.raises(RecipeError, match="as-base"):
        Recipe.load(recipe("linear", None, models / "a-fp8", out_dtype="asbase"))
    with pytest.raises(RecipeError, match="float32"):
        Recipe.load(recipe("linear", None, models / "a-fp8", dtype="as-base"))


def test_shapes_that_differ_are_named_by_those_of_the_weights(models, tmp_path):
    state = tiny.state(0)
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 192).bfloat16()
    write(tmp_path / "odd", state, None)
    with pytest.raises(FastMergeError, match=r"\[192, 64\].*\[64, 192\]|\[64, 192\].*\[192, 64\]"):
        fm.plan(recipe("linear", None, models / "a-fp8", tmp_path / "odd"))


def test_plan_and_merge_import_no_torch(models, tmp_path):
    document = recipe("linear", None, models / "a-fp8", models / "b-fp8", out_dtype="as-base")
    code = (
        "import sys, json, fastmerge as fm\n"
        f"d = json.loads({json.dumps(json.dumps(document))})\n"
        "fm.plan(d)\n"
        f"fm.merge(d, {str(tmp_path / 'out')!r}, device='cpu')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_other_commands_read_unquantised_weights_only(models):
    with pytest.raises(CheckpointError, match="quantised with FP8 with scales"):
        Checkpoint.open(models / "a-fp8")


def test_a_lora_of_a_quantised_base(models, tmp_path):
    """The update is added to the fp32 weight, and rounded once."""
    name, g = "model.layers.0.self_attn.q_proj", torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 64, generator=g), torch.randn(64, 4, generator=g)
    adapter = tmp_path / "lora"
    adapter.mkdir()
    long = f"base_model.model.{name}"
    save_file({f"{long}.lora_A.weight": a, f"{long}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    got = []
    for kind in ("fp8", "plain"):
        document = recipe("passthrough", None, f"{models / f'base-{kind}'}+{adapter}", dtype="bfloat16")
        got.append(merged(document, tmp_path / kind)[0])
    assert equal(*got)
    base = load_file(models / "base-plain" / "model.safetensors")[f"{name}.weight"]
    assert (got[0][f"{name}.weight"].float() - base - 2 * b @ a).abs().max() < 0.1
