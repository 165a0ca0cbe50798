"""Tensors of more than 2^31 elements, on sparse files: every index, offset and random number is 64 bits wide."""

import json
import os
import shutil

import numpy as np
import pytest

import fastmerge
from fastmerge.keys import rescale, tensor_key, threshold
from fastmerge.philox import DROP, u16
from tests import tiny

pytestmark = pytest.mark.big

N = (1 << 31) + 69_637  # not a multiple of anything
WIDTH = 4099
PLACES = (0, (1 << 30) - WIDTH // 2, (1 << 31) - WIDTH // 2, N - WIDTH)
"""Where the weights are not zero: the ends, and astride the indices at which 32 bits overflow."""


def bf16(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def fp32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a base and two fine-tunes, and their weights at the places."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("big")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [N], "data_offsets": [0, 2 * N]}}).encode()
    held = {}
    for name in ("base", "a", "b"):
        (root / name).mkdir()
        held[name] = [bf16(rng.standard_normal(WIDTH)) for _ in PLACES]
        with (root / name / "model.safetensors").open("wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            f.truncate(8 + len(header) + 2 * N)
            for place, bits in zip(PLACES, held[name], strict=True):
                os.pwrite(f.fileno(), bits.tobytes(), 8 + len(header) + 2 * place)
    return root, held


def merged(root, tmp_path, method, parameters, **how):
    """Merges; returns the weights at the places, and how many others are not zero."""
    out = tmp_path / "out"
    paths = {name: root / name for name in ("base", "a", "b")}
    text = tiny.recipe(paths, method, extra=f"parameters: {{{parameters}}}", **{"names": ("a", "b"), **how})
    fastmerge.merge(text, out, memory="1GB")
    data = np.memmap(out / "model.safetensors", np.uint16, "r")[-N:]
    found = [np.array(data[p : p + WIDTH]) for p in PLACES]
    total = sum(int(np.count_nonzero(data[at : at + (1 << 26)])) for at in range(0, N, 1 << 26))
    shutil.rmtree(out)
    return found, total - sum(int(np.count_nonzero(f)) for f in found)


def test_linear(models, tmp_path):
    root, held = models
    found, others = merged(root, tmp_path, "linear", "weight: 0.5, normalize: false", base=None)
    assert others == 0
    for f, a, b in zip(found, held["a"], held["b"], strict=True):
        assert np.array_equal(f, bf16(np.float32(0.5) * fp32(a) + np.float32(0.5) * fp32(b)))


def test_slerp_needs_sums_over_all_of_it(models, tmp_path):
    root, held = models
    found, others = merged(root, tmp_path, "slerp", "t: 0.25", names=("a",))
    assert others == 0
    x, y = (np.concatenate([fp32(p).astype(np.float64) for p in held[n]]) for n in ("base", "a"))
    theta = np.arccos(x @ y / np.sqrt((x @ x) * (y @ y)))
    want = np.sin(0.75 * theta) / np.sin(theta) * x + np.sin(0.25 * theta) / np.sin(theta) * y
    assert np.allclose(np.concatenate([fp32(f) for f in found]), want, rtol=1 / 128, atol=1e-6)


def test_ties_finds_the_threshold_of_all_of_it(models, tmp_path):
    root, held = models
    keep = 9_001
    found, others = merged(root, tmp_path, "ties", f"weight: 0.5, density: {keep / N!r}, normalize: false")
    assert others == 0
    base = np.concatenate([fp32(p) for p in held["base"]])
    deltas = []
    for name in ("a", "b"):
        d = np.concatenate([fp32(p) for p in held[name]]) - base
        order = np.argsort(-np.abs(d), kind="stable")[: int(keep / N * N)]
        deltas.append(np.where(np.isin(np.arange(len(d)), order), d, np.float32(0)) * np.float32(0.5))
    total = deltas[0] + deltas[1]
    up = total >= 0
    mix = sum(np.where((d > 0) == up, d, np.float32(0)) for d in deltas)
    got = np.concatenate([fp32(f) for f in found])
    assert np.allclose(got, base + mix, rtol=1 / 128, atol=1e-6)
    assert int((got != base).sum()) > keep // 2


def test_dare_draws_for_the_index_in_the_whole_tensor(models, tmp_path):
    root, held = models
    found, others = merged(root, tmp_path, "dare_linear", "weight: 0.5, density: 0.5, rescale: false")
    assert others == 0
    key, t = tensor_key(0, "w"), threshold(0.5)
    assert rescale(t) == 2.0
    for place, f, *bits in zip(PLACES, found, held["base"], held["a"], held["b"], strict=True):
        base, *tuned = map(fp32, bits)
        mix = np.zeros(WIDTH, np.float32)
        for i, x in enumerate(tuned):
            kept = u16(key, i, DROP, place, WIDTH) < t
            mix = mix + np.float32(0.5) * np.where(kept, x - base, np.float32(0))
        assert np.allclose(fp32(f), base + mix, rtol=1 / 128, atol=1e-6)
