"""Quantised weights against the libraries of their formats, bit for bit, and codes and scales against theirs."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fastmerge.dtypes import BF16, BY_NAME, F32
from fastmerge.errors import OutputError
from fastmerge.ops import packing, quantised
from fastmerge.ops.joined import Transposed
from fastmerge.ops.made import rounded
from fastmerge.ops.packing import Packed, Packing, Range
from fastmerge.ops.quantised import Coding, Dequantised, values
from tests.ops.test_made import bring, memory, run

FP8 = torch.float8_e4m3fn
E8M0 = BY_NAME["float8_e8m0fnu"]


@pytest.fixture(params=["native", "numpy"])
def kernels(request, monkeypatch):
    """With the compiled kernels, and with those in numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(quantised, "extension", lambda: None)
        monkeypatch.setattr(packing, "extension", lambda: None)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def floats(source):
    """A whole source of fp32, and the same in runs of odd lengths."""
    n = int(np.prod(source.shape))
    whole = torch.from_numpy(run(source, 0, n).view(np.float32).copy())
    cuts = [0, 1, n // 3, n // 3 + 1, n // 2, n]
    parts = [run(source, a, b - a) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole.numpy().view(np.uint32)), "runs differ from the whole"
    return whole.reshape(source.shape)


def same(got, want):
    """Whether bits are equal, but for the payload of NaN; says where they are not."""
    assert got.shape == want.shape
    got, want = got.to(want.dtype).reshape(-1), want.reshape(-1)
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    kind = {2: torch.int16, 4: torch.int32}[want.element_size()]
    assert torch.equal(got.view(kind)[~nan], want.view(kind)[~nan])
    return True


def scheme(**args):
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))


# ---- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float8_is_the_number_that_torch_says(kernels, code):
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    one = memory(torch.ones(1))
    source = Dequantised(memory(codes.view(getattr(torch, code))), one, Coding(code, 1, 2, 128, (2, 128)), (2, 128))
    assert same(floats(source), codes.view(getattr(torch, code)).float())


@pytest.mark.parametrize(("shape", "block"), [((256, 384), (128, 128)), ((3, 256, 128), (128, 64)), ((6, 10), (6, 10))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_float8_as_transformers_reads_them(kernels, shape, block, dtype):
    q = (random(*shape) * 100).to(FP8)
    *lead, rows, columns = shape
    scale = random(*lead, rows // block[0], columns // block[1], seed=1).to(dtype)
    coding = Coding("float8_e4m3fn", int(np.prod(lead)), rows, columns, block)
    got = floats(Dequantised(memory(q), memory(scale), coding, shape))
    for out in (torch.float32, torch.bfloat16):
        assert same(got.to(out), Fp8Dequantize(None)._dequantize_one(q, scale, output_dtype=out))


def test_edges_of_blocks_have_scales_of_their_own(kernels):
    q, scale = (random(300, 200) * 100).to(FP8), random(3, 2, seed=1)
    want = q.float() * scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    assert same(
        floats(Dequantised(memory(q), memory(scale), Coding("float8_e4m3fn", 1, 300, 200, (128, 128)), (300, 200))),
        want,
    )


def test_scales_that_are_powers_of_two(kernels):
    q = (random(32, 64) * 100).to(FP8)
    scale = torch.arange(110, 142, dtype=torch.uint8).reshape(32, 1)
    coding = Coding("float8_e4m3fn", 1, 32, 64, (1, 64))
    want = Fp8Dequantize(None)._dequantize_one(q, scale, output_dtype=torch.float32)
    assert same(floats(Dequantised(memory(q), memory(scale), coding, (32, 64))), want)
    assert same(floats(Dequantised(memory(q), memory(scale.view(torch.float8_e8m0fnu)), coding, (32, 64))), want)


def test_blocks_of_gpt_oss_as_transformers_reads_them(kernels):
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), generator=g, dtype=torch.uint8)
    coding = Coding("float4_e2m1fn", 2, 6, 96, (1, 32))
    source = Dequantised(memory(blocks), memory(scales), coding, (2, 96, 6), transposed=True)
    want = convert_moe_packed_tensors(blocks, scales)
    assert same(floats(source).bfloat16(), want)
    straight = Dequantised(memory(blocks), memory(scales), coding, (2, 6, 96))
    assert same(floats(straight), want.transpose(1, 2).float().contiguous())
    assert same(floats(Transposed(straight)), want.float())


def test_mxfp4_as_compressed_tensors_reads_it(kernels):
    g = torch.Generator().manual_seed(0)
    state = {
        "weight_packed": torch.randint(0, 256, (40, 48), generator=g, dtype=torch.uint8),
        "weight_scale": torch.randint(90, 150, (40, 3), generator=g, dtype=torch.uint8),
    }
    how = scheme(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8)
    source = Dequantised(*map(memory, state.values()), Coding("float4_e2m1fn", 1, 40, 96, (1, 32)), (40, 96))
    assert same(floats(source).bfloat16(), MXFP4PackedCompressor.decompress(state, how)["weight"])


def test_nvfp4_as_compressed_tensors_reads_it(kernels):
    g = torch.Generator().manual_seed(0)
    state = {
        "weight_packed": torch.randint(0, 256, (40, 48), generator=g, dtype=torch.uint8),
        "weight_scale": (random(40, 6).abs() * 100).to(FP8),
        "weight_global_scale": torch.tensor([1234.5]),
    }
    how = scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, scale_dtype=FP8)
    packed, scale, divisor = map(memory, state.values())
    coding = Coding("float4_e2m1fn", 1, 40, 96, (1, 16))
    got = floats(Dequantised(packed, scale, coding, (40, 96), divisor=divisor))
    assert same(got.bfloat16(), NVFP4PackedCompressor.decompress(state, how)["weight"])


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
@pytest.mark.parametrize(("columns", "group"), [(128, 32), (44, 44), (44, 11)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_integers_as_compressed_tensors_reads_them(kernels, bits, symmetric, columns, group, dtype):
    w = random(20, columns).to(dtype)
    args = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=group, symmetric=symmetric)
    g = w.reshape(20, -1, group)
    scale, zero = calculate_qparams(g.amin(-1), g.amax(-1), args)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    how = QuantizationScheme(targets=["Linear"], weights=args)
    packed = PackedQuantizationCompressor.compress(state, how)
    want = PackedQuantizationCompressor.decompress(packed, how)["weight"]
    coding = Coding("int4" if bits == 4 else "int8", 1, 20, columns, (1, group))
    zero = None if symmetric else memory(packed["weight_zero_point"])
    source = Dequantised(memory(packed["weight_packed"]), memory(scale), coding, (20, columns), zero=zero)
    assert same(floats(source).to(dtype), want)


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_bytes_as_compressed_tensors_reads_them(kernels, kind, strategy):
    block = {"channel": (1, 96), "tensor": (64, 96), "block": (32, 48)}[strategy]
    q = (random(64, 96) * 50).to(FP8 if kind == "float" else torch.int8)
    coding = Coding("float8_e4m3fn" if kind == "float" else "int8", 1, 64, 96, block)
    scale = random(*coding.grid, seed=1).bfloat16() if strategy != "tensor" else torch.tensor([0.37]).bfloat16()
    how = scheme(
        num_bits=8,
        type=kind,
        strategy=strategy,
        symmetric=True,
        **({"block_structure": list(block)} if strategy == "block" else {}),
    )
    want = NaiveQuantizationCompressor.decompress({"weight": q, "weight_scale": scale}, how)["weight"]
    assert same(floats(Dequantised(memory(q), memory(scale), coding, (64, 96))).bfloat16(), want)


# ---- codes ---------------------------------------------------------------------------------------------


def packed(w, how, cuts=None):
    """The codes and the scales of a tensor, written in pieces, and what they lose."""
    w = w.float().contiguous().numpy().copy()
    coding = how.coding
    codes, scales, loss = [], [], packing.Loss()
    flat = w.reshape(-1)
    cuts = cuts or [*range(0, flat.size, how.cut), flat.size]
    for a, b in itertools.pairwise(cuts):
        part = flat[a:b].copy()
        raw, lost = how.encode("w", a, b - a, part.ctypes.data)
        codes.append(part.view(np.uint8)[: (b - a) // (2 if coding.four else 1)])
        scales.append(raw)
        loss = loss.and_(lost)
    return torch.from_numpy(np.concatenate(codes)), torch.from_numpy(np.concatenate(scales)), loss


WEIGHTS = random(256, 384) * 0.02 * torch.logspace(-3, 3, 256)[:, None]


def test_float8_blocks_are_those_of_transformers(kernels):
    config = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None))
    want = Fp8Quantize(config).convert({"l.weight": WEIGHTS})
    codes, scales, _ = packed(WEIGHTS, Packing(Coding("float8_e4m3fn", 1, 256, 384, (128, 128)), F32, "reciprocal"))
    assert torch.equal(codes, want["l.weight"].view(torch.uint8).reshape(-1))
    assert torch.equal(scales.view(torch.float32), want["l.weight_scale_inv"].reshape(-1))


def test_powers_of_two_are_those_of_transformers(kernels):
    config = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[128, 128], scale_fmt="ue8m0"))
    want = Fp8Quantize(config).convert({"l.weight": WEIGHTS})
    how = Packing(Coding("float8_e4m3fn", 1, 256, 384, (128, 128)), E8M0, "power")
    codes, scales, _ = packed(WEIGHTS, how)
    assert torch.equal(codes, want["l.weight"].view(torch.uint8).reshape(-1))
    assert torch.equal(scales, want["l.weight_scale_inv"].view(torch.uint8).reshape(-1))


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_float8_scales_are_those_of_compressed_tensors(kernels, strategy):
    block = {"channel": (1, 384), "tensor": (256, 384), "block": (128, 128)}[strategy]
    coding = Coding("float8_e4m3fn", 1, 256, 384, block)
    args = {"block_structure": [128, 128]} if strategy == "block" else {}
    how = scheme(num_bits=8, type="float", strategy=strategy, symmetric=True, **args)
    blocks = WEIGHTS.reshape(coding.grid[0], block[0], coding.grid[1], block[1])
    scale, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), how.weights)
    want = NaiveQuantizationCompressor.compress(
        {"weight": WEIGHTS, "weight_scale": scale.reshape(coding.grid) if strategy != "tensor" else scale.reshape(1)},
        how,
    )
    codes, scales, _ = packed(WEIGHTS, Packing(coding, F32, "divide"))
    assert torch.equal(scales.view(torch.float32), scale.reshape(-1))
    assert torch.equal(codes, want["weight"].view(torch.uint8).reshape(-1))


def test_mxfp4_is_that_of_compressed_tensors(kernels):
    w = WEIGHTS.clone()
    w[0, :32] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4)  # ties
    how = scheme(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8)
    g = w.reshape(256, -1, 32)
    scale, _ = calculate_qparams(g.amin(-1), g.amax(-1), how.weights)
    want = MXFP4PackedCompressor.compress({"weight": w, "weight_scale": scale}, how)
    codes, scales, _ = packed(w, Packing(Coding("float4_e2m1fn", 1, 256, 384, (1, 32)), F32, "mx"))
    assert torch.equal(scales, want["weight_scale"].reshape(-1))
    assert torch.equal(codes, want["weight_packed"].reshape(-1))


@pytest.mark.parametrize("scale", [F32, BF16])
@pytest.mark.parametrize("rule", ["reciprocal", "divide", "power", "mx"])
def test_any_cut_gives_the_same_bytes_and_the_error_is_measured(kernels, rule, scale):
    code, block = ("float4_e2m1fn", (1, 32)) if rule == "mx" else ("float8_e4m3fn", (96, 100))
    how = Packing(Coding(code, 1, 256, 384, block), scale, rule)
    codes, scales, loss = packed(WEIGHTS, how)
    whole = packed(WEIGHTS, how, [0, 256 * 384])
    assert torch.equal(codes, whole[0])
    assert torch.equal(scales, whole[1])
    dtype = {"mx": torch.uint8}.get(rule, torch.bfloat16 if scale is BF16 else torch.float32)
    back = floats(Dequantised(memory(codes), memory(scales.view(dtype)), how.coding, (256, 384)))
    wrong = (back - WEIGHTS).double()
    assert loss.relative == pytest.approx(float(wrong.norm() / WEIGHTS.double().norm()), rel=1e-4)
    assert loss.most == pytest.approx(float(wrong.abs().max()), rel=1e-6)
    assert loss.relative < (0.15 if rule == "mx" else 0.04)


def test_what_is_read_is_written_as_the_same_codes(kernels):
    """Values of MXFP4 have codes without any error, and float8 ones whose block has its largest code."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64, 48), generator=g, dtype=torch.uint8)
    scales = torch.randint(100, 140, (64, 3), generator=g, dtype=torch.uint8)
    coding = Coding("float4_e2m1fn", 1, 64, 96, (1, 32))
    back = floats(Dequantised(memory(codes), memory(scales), coding, (64, 96)))
    _, _, loss = packed(back, Packing(coding, F32, "mx"))
    assert loss.most == 0


def test_every_float32_near_a_tie_goes_to_the_even_code(kernels):
    known = values("float8_e4m3fn")[:127].astype(np.float64)
    middle = ((known[1:] + known[:-1]) / 2).astype(np.float32)
    x = np.concatenate([np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(1e9)), known])
    x = torch.from_numpy(np.concatenate([x, -x]).astype(np.float32))
    x = torch.cat([x, torch.full(((-len(x)) % 8,), 448.0)]).reshape(8, -1)  # each row has its largest code
    x[:, 0] = 448.0
    how = Packing(Coding("float8_e4m3fn", 1, *x.shape, (1, x.shape[1])), F32, "reciprocal")
    codes, scales, _ = packed(x, how)
    assert (scales.view(torch.float32) == 1).all()
    assert torch.equal(codes, x.to(FP8).view(torch.uint8).reshape(-1))


@pytest.mark.parametrize("rule", ["reciprocal", "divide", "power", "mx"])
def test_zeros_and_tiny_numbers(kernels, rule):
    code = "float4_e2m1fn" if rule == "mx" else "float8_e4m3fn"
    how = Packing(Coding(code, 1, 4, 64, (1, 32)), F32, rule)
    w = torch.zeros(4, 64)
    w[1, 0], w[2, 32], w[3, 5] = 1e-42, -1e-40, 1e-37
    codes, scales, loss = packed(w, how)
    back = floats(
        Dequantised(
            memory(codes), memory(scales.view(torch.uint8 if rule == "mx" else torch.float32)), how.coding, (4, 64)
        )
    )
    assert back.isfinite().all()
    assert back[0].count_nonzero() == 0
    assert loss.most <= 1e-38


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_no_code_can_hold_is_an_error(kernels, bad):
    w = torch.ones(4, 64)
    w[2, 40] = bad
    with pytest.raises(OutputError, match="w: NaN or Inf"):
        packed(w, Packing(Coding("float8_e4m3fn", 1, 4, 64, (2, 32)), F32, "divide"))


def test_where_pieces_go():
    how = Packing(Coding("float8_e4m3fn", 2, 300, 200, (128, 128)), F32, "reciprocal")
    assert how.cut == 300 * 200  # the last blocks of a matrix are smaller
    target = Packed(Range(1, 1000, 120000), Range(0, 64, 48))
    assert how.ranges(target, 60000, 60000) == (Range(1, 61000, 60000), Range(0, 88, 24))
    assert how.nbytes == 120000 + 48
    four = Packing(Coding("float4_e2m1fn", 2, 6, 64, (1, 32)), E8M0, "mx")
    assert four.cut == 64
    assert four.ranges(target, 128, 192) == (Range(1, 1064, 96), Range(0, 68, 6))


def test_one_is_rounded_as_sources_are():
    """The helpers of both modules agree on what bfloat16 is."""
    scale, raw = packing.stored(np.array([[1 / 3]], np.float32), BF16)
    assert raw.view(np.uint16)[0] == rounded(float(np.float32(1 / 3)), BF16)[0]
    assert scale[0, 0] == np.float32(0.333984375)


def test_bring_is_asked_for_the_codes_of_a_panel_only():
    """Of a run no more is read than its codes, and the scales of its blocks."""
    asked = []

    def counted(source, runs):
        asked.extend((source.dtype.name, n) for _, n, _ in runs.tolist())
        bring(source, runs)

    coding = Coding("float8_e4m3fn", 1, 1024, 512, (128, 128))
    source = Dequantised(
        memory(torch.zeros(1024, 512, dtype=torch.uint8).view(FP8)), memory(torch.ones(8, 4)), coding, (1024, 512)
    )
    out = np.empty(1 << 16, np.float32)
    source.fill(counted, 1 << 17, 1 << 16, out.ctypes.data)
    assert asked == [("float8_e4m3fn", 1 << 16), ("float32", 4)]
