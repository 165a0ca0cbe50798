"""Sums of low-rank updates against whole matrices in fp64."""

import numpy as np
import pytest

from fastmerge.ops.factored import qr, stacked, truncated


def drawn(sizes, seed=0):
    g = np.random.default_rng(seed)
    return [
        (g.standard_normal((r, 40)).astype(np.float32), g.standard_normal((30, r)).astype(np.float32)) for r in sizes
    ]


def whole(parts, weights):
    return sum(w * b.astype(np.float64) @ a.astype(np.float64) for (a, b), w in zip(parts, weights, strict=True))


@pytest.mark.parametrize("sizes", [(4,), (4, 7), (20, 25)])
def test_the_sum_and_its_best_approximation(sizes):
    parts, weights = drawn(sizes), [0.3, -2.0][: len(sizes)]
    want = whole(parts, weights)
    a, b = stacked(parts, weights)
    assert a.shape[0] == b.shape[1] == sum(sizes)
    assert np.allclose(b @ a, want, rtol=0, atol=1e-13 * np.abs(want).max())
    u, s, vt = np.linalg.svd(want)
    for rank in (1, 3, 30, 50):
        a, b = truncated(parts, weights, rank)
        assert (a.shape, b.shape) == ((rank, 40), (30, rank))
        best = (u[:, :rank] * s[:rank]) @ vt[: min(rank, 30)]
        assert np.allclose(b @ a, best, rtol=0, atol=1e-12 * s[0])
        assert np.allclose(np.linalg.norm(b, axis=0)[:30], s[:rank], rtol=0, atol=1e-12 * s[0])


def test_nearly_equal_updates_that_cancel():
    """What is left is a millionth of either: no decomposition may lose it."""
    (a, b), (da, db) = drawn((5, 5), 3)
    near = (a + np.float32(1e-6) * da, b + np.float32(1e-6) * db)
    want = whole([(a, b), near], [1.0, -1.0])
    a, b = truncated([(a, b), near], [1.0, -1.0], 10)
    assert np.linalg.norm(b @ a - want) < 1e-8 * np.linalg.norm(want)


@pytest.mark.parametrize("kind", ["fine", "scaled", "dependent", "nearly", "zero", "wide"])
def test_qr_of_columns_of_any_condition(kind):
    x = np.random.default_rng(1).standard_normal((8, 12) if kind == "wide" else (50, 6))
    if kind == "scaled":
        x *= 10.0 ** np.arange(-9, 9, 3)
    elif kind in ("dependent", "nearly"):
        x[:, 1] = x[:, 0] + (1e-9 if kind == "nearly" else 0) * x[:, 2]
    elif kind == "zero":
        x[:] = 0
    q, r = qr(x)
    assert np.allclose(q @ r, x, rtol=1e-13, atol=1e-14 * (np.abs(x).max() or 1))
    assert np.allclose(q.T @ q, np.eye(q.shape[1]), atol=1e-13)


def test_what_is_not_finite_is_said():
    (a, b), other = drawn((2, 2))
    b[3, 1] = np.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        truncated([(a, b), other], [1.0, 1.0], 2)
