"""The numpy Philox against published vectors, a plain integer version, and the lane layout of design law L3."""

from __future__ import annotations

import hashlib
import math
import statistics
import struct

import numpy as np
import pytest

from fastmerge import philox
from fastmerge.errors import RecipeError
from fastmerge.keys import rescale, tensor_key, threshold
from fastmerge.philox import NOISE, normal, normal_lines, normal_of, philox4x32, u16

KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def plain(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, from the paper."""
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


@pytest.mark.parametrize(("counter", "key", "out"), KNOWN)
def test_known_answers(counter: str, key: str, out: str) -> None:
    assert philox4x32(words(counter), words(key)).tolist() == words(out)
    assert plain(words(counter), words(key)) == words(out)


def test_known_answers_in_one_batch() -> None:
    counters = np.array([words(c) for c, _, _ in KNOWN], np.uint32)
    keys = np.array([words(k) for _, k, _ in KNOWN], np.uint32)
    assert philox4x32(counters, keys).tolist() == [words(o) for _, _, o in KNOWN]
    assert philox4x32(counters, keys).dtype == np.uint32


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="counter"):
        philox4x32([0, 0, 0], [0, 0])
    with pytest.raises(ValueError, match="key"):
        philox4x32([0, 0, 0, 0], [0])


@pytest.mark.parametrize("e0", [0, 1, 7, 8, 65_535, 2**31 - 3, 2**32 + 5, 2**35 - 1, 2**40 + 3])
def test_lanes_follow_the_element(e0: int) -> None:
    key, model, op, n = 0x8123456789ABCDEF, 3, 1, 45
    want = []
    for e in range(e0, e0 + n):
        counter = [(e >> 3) & 0xFFFFFFFF, (e >> 35) & 0xFFFFFFFF, model, op]
        word = plain(counter, [key & 0xFFFFFFFF, key >> 32])[(e >> 1) & 3]
        want.append((word >> 16) if e & 1 else word & 0xFFFF)
    got = u16(key, model, op, e0, n)
    assert got.dtype == np.uint16
    assert got.tolist() == want
    assert u16(key - 2**64, model, op, e0, n).tolist() == want


def test_pieces_are_slices() -> None:
    whole = u16(99, 0, 0, 0, 1000)
    for lo, hi in [(0, 0), (0, 1), (5, 6), (7, 9), (3, 999), (999, 1000)]:
        assert u16(99, 0, 0, lo, hi - lo).tolist() == whole[lo:hi].tolist()
    assert u16(99, 0, 0, 0, 0).shape == (0,)


def test_models_ops_and_keys_are_independent() -> None:
    draws = [u16(k, m, o, 0, 4096) for k in (1, 1 << 32) for m in (0, 1) for o in (0, 1, 2)]
    for i, a in enumerate(draws):
        assert abs(a.mean() - 32767.5) < 1500
        for b in draws[:i]:
            assert (a == b).sum() < 20


def test_tensor_key() -> None:
    name = "model.layers.0.mlp.düwn_proj.weight"
    want = hashlib.blake2b(struct.pack("<q", -5) + name.encode("utf-8"), digest_size=8).digest()
    assert tensor_key(-5, name) == struct.unpack("<Q", want)[0]
    assert len({tensor_key(s, n) for s in (0, 1, -1) for n in ("a", "b", "")}) == 9
    assert tensor_key(0, "lm_head.weight") == tensor_key(0, "lm_head.weight")
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(RecipeError, match="seed"):
            tensor_key(seed, "a")


@pytest.mark.parametrize(
    ("density", "t"),
    [(0.0, 0), (1e-12, 1), (0.5 / 65536, 1), (1.5 / 65536, 2), (0.2, 13107), (0.5, 32768), (0.9, 58982), (1.0, 65536)],
)
def test_threshold(density: float, t: int) -> None:
    assert threshold(density) == t


def test_threshold_bounds_and_rescale() -> None:
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(RecipeError, match="density"):
            threshold(bad)
    assert rescale(32768) == 2.0
    assert rescale(13107) == 65536 / 13107
    assert rescale(0) == 1.0
    kept = u16(tensor_key(0, "w"), 0, 0, 0, 1 << 18) < threshold(0.2)
    assert abs(kept.mean() - 0.2) < 0.004


def test_the_table_of_normals_is_frozen() -> None:
    lines, exact = normal_lines(), philox._lines()
    assert lines.shape == (177, 2)
    assert hashlib.blake2b(lines.tobytes(), digest_size=8).hexdigest() == "57e90be19920b3fb"
    # No value is so near to the middle between two fp32 numbers that another libm could change a bit: fp64 sums of
    # 1,024 terms are good to about 1e-12 of the value, 1e-5 of fp32's last place.
    away = 0.5 - np.abs(exact - lines) / np.spacing(np.abs(lines)).astype(float)
    assert away[exact != 0].min() > 1e-3


def test_normals_follow_the_normal_distribution() -> None:
    every = np.arange(65_536, dtype=np.uint16)
    n = normal_of(every).astype(np.float64)
    assert n.mean() == 0
    assert abs(n.var() - 1) < 1e-8
    assert abs((n**4).mean() - 3) < 1e-3
    assert np.array_equal(n[:32_768], -n[32_768:])  # the top bit is the sign
    assert (np.diff(n[:32_768]) < 0).all()  # and the rest a rank, from the end of the tail
    inverse = statistics.NormalDist().inv_cdf
    exact = np.array([-inverse((t + 0.5) / 65_536) for t in range(32_768)])
    assert np.abs(n[:32_768] - exact).max() < 1.3e-4
    assert np.sqrt(((n[:32_768] - exact) ** 2).mean()) < 3.3e-5
    # Kolmogorov-Smirnov over all values: the distribution's own steps are 1.5e-5.
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in np.sort(n)])
    assert np.abs(cdf - (np.arange(65_536) + 0.5) / 65_536).max() < 4e-5


def test_normals_of_elements() -> None:
    got = normal(5, 2, NOISE, 2**35 - 3, 100)
    assert got.dtype == np.float32
    assert np.array_equal(got, normal_of(u16(5, 2, NOISE, 2**35 - 3, 100)))
    assert normal(5, 2, NOISE, 0, 0).shape == (0,)
    many = normal(tensor_key(0, "w"), 1, NOISE, 0, 1 << 18)
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01
