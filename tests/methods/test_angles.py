"""Trigonometry from arithmetic alone: accurate, and the same on every machine."""

import math

import numpy as np
import pytest

import fastmerge
from fastmerge.methods import angles, exponentials

UNIT = np.concatenate([np.linspace(-1, 1, 4001), [0.9995, -0.9995, 1 - 1e-12, -1 + 1e-12, 1e-300, 0.5, -0.5]])


def test_sine_and_cosine():
    x = np.concatenate([np.linspace(-20, 20, 9001), np.linspace(-1e4, 1e4, 999), [1e-300, 0.0, math.pi, -math.pi]])
    assert np.abs(angles.sin(x) - [math.sin(v) for v in x]).max() < 5e-16
    assert np.abs(angles.cos(x[np.abs(x) < 30]) - [math.cos(v) for v in x if abs(v) < 30]).max() < 4e-15
    small = np.logspace(-300, -1, 500)
    assert np.abs(angles.sin(small) / [math.sin(v) for v in small] - 1).max() < 4e-16


def test_arc_cosine():
    assert np.abs(angles.acos(UNIT) - [math.acos(v) for v in UNIT]).max() < 1e-15
    near = 1 - np.logspace(-15, -1, 200)
    assert np.abs(angles.acos(near) / [math.acos(v) for v in near] - 1).max() < 1e-15
    assert angles.acos(np.array([1.0, -1.0, 2.0, -2.0])).tolist() == [0.0, math.pi, 0.0, math.pi]


def test_angle_of_a_chord():
    theta = np.concatenate([np.logspace(-12, 0, 300), np.linspace(1, math.pi, 300)])
    chord2 = np.array([(2 * math.sin(v / 2)) ** 2 for v in theta])
    found = angles.chord_angle(chord2)
    assert np.abs(found[:500] / theta[:500] - 1).max() < 2e-14
    assert np.abs(found - theta).max() < 3e-8  # the square of the chord is flat at its largest


def test_nan_stays_nan():
    nan = np.array([math.nan])
    with np.errstate(invalid="ignore"):
        for f in (angles.sin, angles.cos, angles.acos, angles.chord_angle):
            assert np.isnan(f(nan)).all()


@pytest.mark.parametrize("f", [angles.sin, angles.acos, angles.chord_angle])
def test_values_do_not_depend_on_their_neighbours(f):
    x = np.random.default_rng(0).uniform(0, 1, 1003)
    whole = f(x)
    assert all(f(x[i : i + n]).tolist() == whole[i : i + n].tolist() for i in range(0, 1000, 37) for n in (1, 2, 3))


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_equal_tensors_have_no_arc_whatever_the_threshold(backend, scope):
    """A cosine of 1 is not above a threshold of 1, and 0 / 0 was a NaN."""
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for fallback in ("per_vector", "all_rows"):
        given = {"t": 0.25, "threshold": 1.0, "scope": scope, "fallback": fallback}
        got = fastmerge.merge_tensors([x, x.clone()], "slerp", base_index=0, parameters=given, backend=backend)
        assert torch.allclose(got, x, rtol=1e-6)


def test_exponential_and_logarithm():
    x = np.concatenate([np.linspace(-700, 700, 9001), np.logspace(-300, 0, 300), [0.0]])
    assert np.abs(exponentials.exp(x) / [math.exp(v) for v in x] - 1).max() < 1e-15
    y = np.concatenate([np.logspace(-300, 300, 9001), 1 + np.linspace(-0.3, 0.3, 999), [1.0]])
    assert np.abs(exponentials.log(y) - [math.log(v) for v in y]).max() < 2e-13
    near = 1 + np.linspace(-0.3, 0.3, 999)
    assert np.abs(exponentials.log(near) - [math.log(v) for v in near]).max() < 2e-16
    assert exponentials.exp(np.array([-math.inf, -800.0])).max() < 1e-300
    assert np.isnan(exponentials.exp(np.array([math.nan]))).all()
    assert np.isnan(exponentials.log(np.array([math.nan]))).all()
