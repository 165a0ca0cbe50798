"""Numbers at the ends of what fp32 holds: weights that are only ratios, and sums that overflow."""

import math

import pytest
import torch

import fastmerge as fm
from fastmerge.ops.combine import deltas_in_range, weights_in_range
from tests import tiny

BACKENDS = ["native", "reference"]


def tensors(n=4, dtype=torch.float32, scale=0.02):
    g = torch.Generator().manual_seed(7)
    return [(torch.randn(40, 70, generator=g) * scale).to(dtype) for _ in range(n)]


def merged(method, inputs=None, *, base=0, backend="native", **parameters):
    inputs = tensors() if inputs is None else inputs
    return fm.merge_tensors(inputs, method, parameters=parameters, base_index=base, name="w", backend=backend)


def test_usual_numbers_stay_as_they_are():
    for weights, div in [([0.6, 0.3], 0.9), ([1e-9, 3.0], 1.0), ([0.0, 0.0], 1.0), ([-2e4], 1e9)]:
        assert weights_in_range(weights, div, double=False) == (tuple(weights), div)
        assert deltas_in_range(weights, 0.3, div, double=False) == (tuple(weights), 0.3, div)


def test_the_shift_is_a_power_of_two_and_keeps_the_quotient():
    for weights, div in [([3e-44, -5e-45], 2.5e-44), ([1e39, 7e38], 1.0), ([1e-30], 1.0), ([0.0, 1e-320], 1e-320)]:
        some, other = weights_in_range(weights, div, double=False)
        by = math.frexp(other)[1] - math.frexp(div)[1]
        assert [math.ldexp(w, by) for w in (*weights, div)] == [*some, other]
        assert 2.0**-126 <= abs(other) < 2.0**128
    for weights, lam, div in [([1e40, 2e39], 1e-40, 1.0), ([0.5], 1e45, 1e30), ([1e-44], 2.0, 3e-44)]:
        some, factor, other = deltas_in_range(weights, lam, div, double=False)
        want = [w * lam / div for w in weights]
        assert [w * factor / other for w in some] == pytest.approx(want, rel=1e-14)
        assert all(2.0**-60 < abs(x) < 2.0**60 for x in (*some, factor, other))


def test_numbers_beyond_everything_raise_nothing():
    assert deltas_in_range([1e300], 1e300, 1e-300, double=False)[1] == math.inf
    assert weights_in_range([1e-320], 1.0, double=True)[1] == 2.0**1022


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", [-146, -130, 100, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_weights_are_only_ratios(backend, by, dtype):
    weights = [0.25, 0.5, 0.125, 0.375]  # exact beside 2**-1074 as well
    inputs = tensors(dtype=dtype)
    want = merged("linear", inputs, base=None, weight=weights, backend=backend)
    got = merged("linear", inputs, base=None, weight=[math.ldexp(w, by) for w in weights], backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_has_ends_as_well(backend):
    inputs = tensors(dtype=torch.float64)
    want = merged("linear", inputs, base=None, weight=[0.25, 0.5, 0.125, 0.375], backend=backend)
    tiny_weights = [math.ldexp(w, -1070) for w in (0.25, 0.5, 0.125, 0.375)]
    assert torch.equal(merged("linear", inputs, base=None, weight=tiny_weights, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_weight_without_normalisation(backend):
    inputs = tensors(2, scale=1e-6)
    got = merged("linear", inputs, base=None, weight=[1e39, -5e38], normalize=False, backend=backend)
    want = (1e39 * inputs[0].double() - 5e38 * inputs[1].double()).float()
    assert torch.allclose(got, want, rtol=1e-5, atol=1e27)
    scaled = merged("passthrough", inputs[:1], base=None, scale=1e39, backend=backend)
    assert torch.allclose(scaled, (1e39 * inputs[0].double()).float(), rtol=1e-6)


METHODS = {
    "task_arithmetic": {},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5, "merge": "mean_count", "normalize": True},
    "ties": {"density": 0.4, "merge": "max"},
    "ties sum": {"density": 0.4, "normalize": False, "elect": "count"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", [-140, 140])
@pytest.mark.parametrize("method", METHODS)
def test_weights_and_lambda_make_up_for_each_other(backend, by, method):
    given = {**METHODS[method], "backend": backend}
    method = method.split()[0]
    want = merged(method, weight=[0.5, 0.25, 0.75], **given, **{"lambda": 0.5})
    weights = [math.ldexp(w, by) for w in (0.5, 0.25, 0.75)]
    assert torch.equal(merged(method, weight=weights, **given, **{"lambda": math.ldexp(0.5, -by)}), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", [-140, 140])
def test_a_disjoint_mean_takes_ratios(backend, by):
    want = merged("ties", weight=[0.5, 0.25, 0.75], density=0.4, backend=backend)
    weights = [math.ldexp(w, by) for w in (0.5, 0.25, 0.75)]
    assert torch.equal(merged("ties", weight=weights, density=0.4, backend=backend), want)


# ---- sums that are not finite -----------------------------------------------------------------------------

LARGE = 1e25  # finite, and its square is not


def spoilt(value, count, row=3):
    inputs = tensors(count)
    inputs[1][row, 5] = value
    return inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [LARGE, math.inf, math.nan])
@pytest.mark.parametrize(
    ("method", "count", "parameters", "where"),
    [
        ("slerp", 2, {"t": 0.5}, "w: the angle"),
        ("slerp", 2, {"t": 0.5, "scope": "row"}, r"w \(row 3\): the angle"),
        ("model_stock", 3, {}, "w: the angle"),
        ("model_stock", 3, {"filter_wise": True}, r"w \(row 3\): the angle"),
    ],
)
def test_an_angle_needs_finite_sums(backend, value, method, count, parameters, where):
    with pytest.raises(fm.OutputError, match=where):
        merged(method, spoilt(value, count), backend=backend, **parameters)


def test_fp64_sums_hold_more():
    inputs = [t.double() for t in spoilt(LARGE, 2)]
    assert merged("slerp", inputs, t=0.5).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "key"), [("dare_linear", "density"), ("ties", "density")])
@pytest.mark.parametrize(
    ("value", "dtype"), [(3e38, torch.bfloat16), (math.inf, torch.float32), (math.nan, torch.float32)]
)
def test_a_rescale_needs_finite_sums(backend, method, key, value, dtype):
    inputs = [t.to(dtype) for t in tensors(2)]
    inputs[1][3] = value
    with pytest.raises(fm.OutputError, match="w: rescale needs finite sums"):
        merged(method, inputs, backend=backend, **{key: 0.5, "weight": 1.0, "rescale": True})


@pytest.mark.parametrize("backend", BACKENDS)
def test_rescales_of_fp32_results_hold_more(backend):
    inputs = tensors(2)
    inputs[1][3] = 3e38
    found = merged("ties", inputs, backend=backend, density=0.5, weight=1.0, rescale=True)
    assert torch.equal(found[3], inputs[1][3])  # beside which all that is trimmed is nothing


def test_on_disk_the_tensor_is_named(tmp_path):
    base = tiny.state(0, layers=1, dtype=torch.float32)
    tuned = tiny.state(1, layers=1, dtype=torch.float32, base=base)
    name = "model.layers.0.mlp.up_proj.weight"
    tuned[name][2, 2] = LARGE
    paths = {"base": tiny.write(tmp_path / "base", base, layers=1), "a": tiny.write(tmp_path / "a", tuned, layers=1)}
    text = tiny.recipe(paths, "slerp", names=("a",), dtype="float32", extra="parameters: {t: 0.5}")
    with pytest.raises(fm.OutputError, match=f"{name}: the angle between its inputs is unknown"):
        fm.merge(text, tmp_path / "out")
    assert not (tmp_path / "out").exists()
