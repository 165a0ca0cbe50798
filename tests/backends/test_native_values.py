"""Conversions, random lanes, counts, transfers and the choice of kernels of the extension, on every instruction set."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastmerge import _native
from tests.backends.isas import ISAS, using
from tests.backends.test_native import TORCH, values
from tests.kernels_numpy import STORED, store, widen


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with using(request.param):
        yield request.param


def converted(x, code, out_code):
    x = np.ascontiguousarray(x)
    out = np.zeros(len(x), STORED[out_code])
    table = np.array([[out.ctypes.data, len(x), 0, len(x), 0, 0, 0, x.ctypes.data]], np.int64)
    bad = np.zeros(1, np.int64)
    _native.combine(table, np.array([code], np.int32), out_code, np.ones((1, 1)), np.ones((1, 2)), False, False, bad)
    return out


@pytest.mark.parametrize("code", [2, 3])
def test_all_16_bit_patterns_round_trip(code):
    every = np.arange(65_536, dtype=np.uint16)
    exact = torch.from_numpy(every).view(TORCH[code])
    nan = torch.isnan(exact).numpy()
    canonical = np.where(nan, {2: 0x7E00, 3: 0x7FC0}[code], every)
    for wide in (1, 0):
        widened = converted(every, code, wide)
        assert np.array_equal(widened[~nan], exact.to(TORCH[wide]).numpy()[~nan])
        assert np.array_equal(np.isnan(widened), nan)
        assert np.array_equal(converted(widened, wide, code), canonical)
    assert np.array_equal(converted(every, code, code), canonical)


@pytest.mark.parametrize("code", [2, 3])
def test_rounding_equals_torch(code):
    rng = np.random.default_rng(4)
    every = torch.from_numpy(np.arange(65_536, dtype=np.uint16)).view(TORCH[code]).float().numpy()
    near = every.view(np.uint32)
    half = np.uint32(1 << (15 if code == 3 else 12))
    raw = np.concatenate(
        [near + d for d in (half, half - np.uint32(1), half + np.uint32(1), np.uint32(1))]
        + [near - np.uint32(1), rng.integers(0, 2**32, 300_000, np.uint32)]
    )
    tiny = rng.standard_normal(200_000).astype(np.float32) * np.float32(2.0**-20)
    x = np.concatenate([raw.view(np.float32), tiny, np.float32([65519.99, 65520.0, 65536.0, 2.0**-25, 3.4e38])])
    want = torch.from_numpy(x).to(TORCH[code])
    nan = torch.isnan(want).numpy()
    got = converted(x, 1, code)
    assert np.array_equal(got[~nan], want.view(torch.uint16).numpy()[~nan])
    assert (got[nan] == {2: 0x7E00, 3: 0x7FC0}[code]).all()


@pytest.mark.parametrize("code", [2, 3])
def test_fp64_is_rounded_once(code):
    half = 1 + 2.0 ** (-11 if code == 2 else -8)  # half-way between two results; fp32 would lose what lies beyond
    x = np.array([half, half + 2.0**-40, half - 2.0**-40, -half - 2.0**-40, 1e300, 2.0**-26 + 2.0**-60, 5e-324])
    assert np.array_equal(converted(x, 0, code), store(x, code))
    up, down = converted(x[1:3], 0, code)
    assert up == down + 1
    rng = np.random.default_rng(6)
    many = rng.standard_normal(100_000) * 2.0 ** rng.integers(-160, 140, 100_000)
    assert np.array_equal(converted(many, 0, code), store(many, code))


def test_philox_blocks_equal_the_plain_function():
    known = _native.philox4x32(
        np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], np.uint32),
        np.array([0xA4093822, 0x299F31D0], np.uint32),
    )
    assert known.tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    key, model, op = 0x0123456789ABCDEF, 3, 1
    for e0, n in [(0, 5000), (1, 3), (7, 1), (2**35 - 9, 1030), (5, 0)]:
        got = _native.philox_u16(key, model, op, e0, n)
        e = np.arange(e0, e0 + n)
        words = [
            _native.philox4x32(
                np.array([(v >> 3) & 0xFFFFFFFF, v >> 35, model, op], np.uint32),
                np.array([key & 0xFFFFFFFF, key >> 32], np.uint32),
            )
            for v in e.tolist()
        ]
        want = [int(w[(v >> 1) & 3]) >> (16 * (v & 1)) & 0xFFFF for w, v in zip(words, e.tolist(), strict=True)]
        assert got.tolist() == want


@pytest.mark.parametrize("code", range(4))
def test_count_nonfinite(code):
    x = values(code, 50_000, np.random.default_rng(code))
    for n in (0, 1, 17, 50_000):
        want = int((~np.isfinite(widen(x[:n], code, np.float64))).sum())
        assert _native.count_nonfinite(x.ctypes.data, n, code) == want
    full = store(np.full(40_000, np.inf), code)
    assert _native.count_nonfinite(full.ctypes.data, 40_000, code) == 40_000


def test_other_libraries_float_settings_do_not_matter():
    tiny = np.full(100, 1e-40, np.float32)
    try:
        torch.set_flush_denormal(True)
        flushed = converted(tiny, 1, 1)
        left = torch.tensor([1e-40]).mul(1.0).item()
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(flushed, tiny)
    if torch.set_flush_denormal(False):
        assert left == 0.0  # and the thread has its setting back


def test_rows_are_moved():
    data = np.random.default_rng(1).integers(0, 256, 30_000, np.uint8)
    out = np.zeros_like(data)
    order = np.random.default_rng(2).permutation(60)
    lengths = np.arange(60) * 7 % 491  # of every alignment, and none
    table = np.stack([data.ctypes.data + 500 * order, out.ctypes.data + 500 * np.arange(60) + 3, lengths], axis=1)
    assert _native.move_some(table, 0, 0) == (60, 0, 0)
    want = np.zeros_like(data)
    for i, (row, length) in enumerate(zip(order.tolist(), lengths.tolist(), strict=True)):
        want[500 * i + 3 : 500 * i + 3 + length] = data[500 * row : 500 * row + length]
    assert np.array_equal(out, want)
    with pytest.raises(ValueError, match="table row 1: nbytes must not be negative"):
        _native.move_some(np.array([[0, 0, 0], [0, 0, -1]]), 0, 0)


def test_transfers(tmp_path):
    source, copy = tmp_path / "a", tmp_path / "b"
    data = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    source.write_bytes(data.tobytes())
    fd, to = os.open(source, os.O_RDONLY), os.open(copy, os.O_RDWR | os.O_CREAT)
    try:
        got = np.zeros(100_000, np.uint8)
        table = np.array([[fd, 50_000, got.ctypes.data, 30_000], [fd, 0, 0, 0], [fd, 10, got.ctypes.data + 30_000, 9]])
        assert _native.read_some(table, 0, 0) == (3, 0, 0)
        assert np.array_equal(got[:30_009], np.r_[data[50_000:80_000], data[10:19]])
        got[:] = 0
        assert _native.read_some(table, 0, 29_000) == (3, 0, 0)
        assert not got[:29_000].any()
        assert np.array_equal(got[29_000:30_000], data[79_000:80_000])
        short = np.array([[fd, 99_990, got.ctypes.data, 100], [fd, 0, got.ctypes.data, 5]])
        assert _native.read_some(short, 0, 0) == (0, 10, 0)
        assert _native.read_some(np.array([[-1, 0, got.ctypes.data, 5]]), 0, 0) == (0, 0, errno.EBADF)
        rows = np.array([[to, 5, data.ctypes.data, 1000], [to, 2000, data.ctypes.data + 7, 10]])
        assert _native.write_some(rows, 0, 0) == (2, 0, 0)
        assert copy.read_bytes()[5:1005] == data[:1000].tobytes()
        assert _native.write_some(np.array([[fd, 0, data.ctypes.data, 5]]), 0, 0)[2] == errno.EBADF
        assert _native.copy_some(np.array([[fd, 100, to, 3000, 70_000]]), 0, 0) in [(1, 0, 0), (0, 0, errno.EXDEV)]
        assert copy.read_bytes()[3000:] == data[100:70_100].tobytes()
        for bad in [(4, 0), (-1, 0), (0, -1)]:
            with pytest.raises(ValueError, match="outside"):
                _native.read_some(table, *bad)
    finally:
        os.close(fd)
        os.close(to)


def test_isa_is_chosen_by_the_environment(isa):
    code = "from fastmerge import _native; print(_native.isa())"
    got = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTMERGE_ISA": isa},
        check=True,
        capture_output=True,
        text=True,
    )
    assert got.stdout.strip() == isa
    wrong = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTMERGE_ISA": "v9"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode != 0
    assert "FASTMERGE_ISA=v9" in wrong.stderr
    with pytest.raises(ValueError, match="v9"):
        _native.set_isa("v9")


@pytest.mark.parametrize(("x_code", "y_code"), [(0, 0), (1, 2), (2, 1), (3, 0), (3, 3)])
def test_apart(x_code, y_code):
    rng = np.random.default_rng(x_code)
    for n in (0, 1, 15, 256, 1000, 70_001):
        special = 0 not in (x_code, y_code)  # squares of the largest doubles are infinite
        x, y = (values(code, n + 1, rng, special)[1:] for code in (x_code, y_code))
        y[: n // 3] = x[: n // 3] if x_code == y_code else y[: n // 3]
        a, b = widen(x, x_code, np.float64), widen(y, y_code, np.float64)
        got = _native.apart(x.ctypes.data if n else 0, x_code, y.ctypes.data if n else 0, y_code, n)
        with np.errstate(all="ignore"):
            finite = np.isfinite(a - b)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        sums = []
        for product in (a * a, a * b, b * b, (a - b) * (a - b)):
            lanes = np.zeros(256)
            for row in np.append(product, np.zeros(-n % 256)).reshape(-1, 256):
                lanes += row
            sums.append(float(np.add.accumulate(lanes)[-1]))
        assert got == ((~same).sum(), (~finite).sum(), np.abs(a - b).max(initial=0), *sums)


def low_rank(rows, columns, rank, code, *, beside=3, scale=-0.7, special=True):
    """The kernel's result where its rows of A are a part of wider ones, and numpy's, operation by operation."""
    rng = np.random.default_rng(rank)
    stored = values(code, rows * columns, rng, special)
    left = values(1, rows * rank, rng, special).reshape(rows, rank)
    right = values(1, rank * (columns + beside), rng, special).reshape(rank, -1)[:, beside:]
    out = np.full((rows, columns), 7, np.float32)
    addresses = [a.ctypes.data for a in (out, left, right, stored)]
    _native.low_rank(*addresses, scale, rows, columns, rank, columns + beside, code)
    with np.errstate(all="ignore"):
        want = left[:, :1] * right[:1]
        for k in range(1, rank):
            want = want + left[:, k : k + 1] * right[k : k + 1]
        return out, widen(stored, code, np.float32).reshape(rows, columns) + np.float32(scale) * want


@pytest.mark.parametrize("code", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 16), (4, 63), (5, 64), (9, 65), (2, 300), (0, 5)])
@pytest.mark.parametrize("rank", [1, 2, 17])
def test_low_rank(code, rows, columns, rank):
    got, want = low_rank(rows, columns, rank, code)
    nan = np.isnan(want)
    assert np.array_equal(nan, np.isnan(got))
    assert np.array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


def test_low_rank_refuses_sizes_that_mean_nothing():
    for sizes in (
        (1, 1, 0, 1, 1),
        (-1, 1, 1, 1, 1),
        (1, -1, 1, 1, 1),
        (1, 4, 1, 3, 1),
        (1, 1, 1, 1, 0),
        (1, 1, 1, 1, 9),
    ):
        with pytest.raises(ValueError, match="code|sizes"):
            _native.low_rank(0, 0, 0, 0, 1.0, *sizes)
