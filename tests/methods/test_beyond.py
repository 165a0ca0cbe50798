"""Methods that mergekit does not have, against numpy in fp64 written from the papers."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

import fastmerge as fm
from fastmerge.dtypes import BF16
from fastmerge.methods import get
from fastmerge.ops.matrix import polar
from fastmerge.ops.spec import Op, Spec
from tests import oracle, tiny
from tests.compare import differences

G = torch.Generator().manual_seed(11)
SHAPE = (37, 53)
BASE = torch.randn(SHAPE, generator=G)
TUNED = [BASE + 0.1 * torch.randn(SHAPE, generator=G) for _ in range(4)]


def merge(method, inputs, *, base=0, **parameters):
    """By the default backend and by the definition, which must agree."""
    call = dict(parameters=parameters, base_index=base, name="w")
    got, want = (fm.merge_tensors(list(inputs), method, backend=b, **call) for b in (None, "reference"))
    assert differences([got], [want]) == []
    return got


def close(got, want, tol=1e-6):
    return np.allclose(got.double().numpy(), want, rtol=0, atol=tol)


def wide(inputs):
    return [x.double().numpy() for x in inputs]


# ---- checkpoint averaging --------------------------------------------------------------------------------

DECAYS = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "inverse_sqrt": lambda t: 1 - math.sqrt(t),
}


@pytest.mark.parametrize("schedule", DECAYS)
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_an_average_is_the_run_with_that_decay(schedule, count):
    """Steps taken at the full rate, averaged, are the same steps taken at the decayed rate."""
    g = torch.Generator().manual_seed(count)
    steps = [0.1 * torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(count - 1)]
    points = [BASE.double()]
    for step in steps:
        points.append(points[-1] + step)
    want = BASE.double().numpy() + sum(
        (DECAYS[schedule]((i + 1) / count) * s.numpy() for i, s in enumerate(steps)), np.zeros(SHAPE)
    )
    got = merge("checkpoint_average", points, base=None, schedule=schedule)
    assert close(got, want, 1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_ema_is_the_recursion(decay):
    want = TUNED[0].double()
    for x in TUNED[1:]:
        want = decay * want + (1 - decay) * x.double()
    assert close(merge("checkpoint_average", TUNED, base=None, schedule="ema", decay=decay), want.numpy())


def test_uniform_is_the_soup_and_linear_is_uniform():
    soup = merge("linear", TUNED, base=None, weight=1.0)
    for schedule in ("uniform", "linear"):
        assert torch.equal(merge("checkpoint_average", TUNED, base=None, schedule=schedule), soup)


def test_sixty_four_checkpoints_of_one_model_are_the_model():
    for schedule in ("uniform", "cosine", "inverse_sqrt"):
        got = merge("checkpoint_average", [BASE.bfloat16()] * 64, base=None, schedule=schedule)
        assert torch.equal(got, BASE.bfloat16())


def test_ema_wants_a_decay():
    with pytest.raises(fm.RecipeError, match="schedule: ema needs 'decay'"):
        merge("checkpoint_average", TUNED, base=None, schedule="ema")


# ---- LiNeS: a gradient of lambda -------------------------------------------------------------------------


def test_lines_is_a_gradient_of_lambda(tmp_path):
    """alpha + beta l / (L - 1) in layer l, alpha outside the layers: what the authors' code does."""
    layers, alpha, beta = 4, 0.2, 0.7
    base = tiny.state(0, layers=layers)
    states = [tiny.state(i, layers=layers, base=base) for i in (1, 2)]
    paths = [tiny.write(tmp_path / str(i), s, layers=layers) for i, s in enumerate((base, *states))]
    recipe = (
        f"merge_method: task_arithmetic\nbase_model: {paths[0]}\n"
        f"models: [{{model: {paths[1]}}}, {{model: {paths[2]}}}]\n"
        f"parameters: {{weight: 1.0, lambda: [{alpha}, {alpha + beta}]}}\ndtype: float32\n"
    )
    fm.merge(recipe, tmp_path / "out", device="cpu")
    from safetensors.torch import load_file

    got = load_file(tmp_path / "out" / "model.safetensors")
    seen = set()
    for name, b in base.items():
        layer = next((i for i in range(layers) if f".{i}." in name), None)
        factor = alpha if layer is None else alpha + beta * layer / (layers - 1)
        seen.add(layer)
        want = b.double() + factor * sum(s[name].double() - b.double() for s in states)
        assert close(got[name], want.numpy(), 1e-6), name
    assert seen == {None, *range(layers)}


# ---- element by element ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.2, 0.4, 1.0])
@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_consensus(k, rho):
    b, *xs = wide([BASE, *TUNED])
    d = [x - b for x in xs]
    total = sum(d)
    masks = sum(np.abs(x) >= rho * np.abs(total - x) for x in d)
    want = b + 0.3 * total * (masks >= k)
    got = merge("consensus_ta", [BASE, *TUNED], k=k, mask_lambda=rho, **{"lambda": 0.3}).double().numpy()
    assert (np.abs(got - want) > 1e-6).mean() < 1e-3, "but for elements at a mask's very edge"


def test_consensus_of_none_is_task_arithmetic():
    got = merge("consensus_ta", [BASE, *TUNED], k=0, weight=[0.5, 1.0, -0.3, 0.1])
    assert close(got, merge("task_arithmetic", [BASE, *TUNED], weight=[0.5, 1.0, -0.3, 0.1]).double().numpy())
    assert torch.equal(merge("consensus_ta", [BASE, *TUNED], k=5), BASE)


def test_magmax():
    b, *xs = wide([BASE, *TUNED])
    d = np.stack([x - b for x in xs])
    want = b + 0.5 * np.take_along_axis(d, np.abs(d).argmax(axis=0)[None], axis=0)[0]
    assert close(merge("magmax", [BASE, *TUNED], **{"lambda": 0.5}), want)
    even = merge("magmax", [torch.zeros(1), torch.ones(1), -torch.ones(1)])
    assert even.item() == -1, "the later one of two"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_nothing_elementwise_loses_a_nan(at):
    for method in ("magmax", "consensus_ta", "ram"):
        inputs = [x.clone() for x in (BASE, *TUNED)]
        inputs[at][0, 0] = float("nan")
        got = merge(method, inputs)
        assert got[0, 0].isnan()
        assert int(got.isnan().sum()) == 1, method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fisher(dtype):
    g = torch.Generator().manual_seed(5)
    models = [x.to(dtype) for x in TUNED[:3]]
    fishers = [torch.rand(SHAPE, generator=g) * 1e-4 for _ in models]
    w = [0.5, 1.0, 0.25]
    f = [np.maximum(x, 1e-6) for x in wide(fishers)]
    want = sum(c * a * x for c, a, x in zip(w, f, wide(models), strict=True)) / sum(
        c * a for c, a in zip(w, f, strict=True)
    )
    pairs = [x for pair in zip(models, fishers, strict=True) for x in pair]
    got = merge("fisher", pairs, base=None, weight=[0.5, 1, 1.0, 1, 0.25, 1])
    assert got.dtype == torch.float32
    assert close(got, want, 3e-7)


def test_fisher_without_information_is_the_mean():
    zero = torch.zeros(SHAPE)
    some = zero.clone()
    some[0] = 1.0
    got = merge("fisher", [TUNED[0], zero, TUNED[1], some], base=None, floor=0.0)
    assert torch.equal(got[0], TUNED[1][0])
    assert close(got[1:], ((TUNED[0].double() + TUNED[1].double()) / 2)[1:].numpy(), 3e-7)


def test_fisher_refuses_what_are_no_pairs():
    with pytest.raises(fm.RecipeError, match="fisher: expected pairs of inputs, got 3"):
        merge("fisher", TUNED[:3], base=None)
    with pytest.raises(fm.OutputError, match="w: a Fisher diagonal holds a negative number"):
        fm.merge_tensors(TUNED[:2], "fisher", name="w")
    with pytest.raises(fm.RecipeError, match="all weights are 0"):
        merge("fisher", TUNED[:2], base=None, weight=0.0)


# ---- mean direction --------------------------------------------------------------------------------------


def test_mean_direction():
    b, *xs = wide([BASE, *TUNED])
    d = [x - b for x in xs]
    m = sum(x / np.linalg.norm(x) for x in d)
    for alpha, far in ((None, np.mean([np.linalg.norm(x) for x in d])), (0.7, 0.7)):
        got = merge("mean_direction", [BASE, *TUNED], **({} if alpha is None else {"alpha": alpha}))
        assert close(got, b + far * m / np.linalg.norm(m))
    multi = merge("multislerp", [BASE, *TUNED], weight=1.0)
    assert close(merge("mean_direction", [BASE, *TUNED]), multi.double().numpy())


def test_mean_direction_without_one():
    x = torch.randn(SHAPE, generator=G)
    assert torch.equal(merge("mean_direction", [BASE, BASE, BASE], alpha=2.0), BASE)
    assert close(merge("mean_direction", [BASE, BASE, BASE + x]), (BASE + x / 2).double().numpy(), 1e-5)
    with pytest.raises(fm.OutputError, match="w: the directions of its task vectors cancel"):
        fm.merge_tensors([torch.zeros(SHAPE), x, -x], "mean_direction", base_index=0, name="w")


# ---- matrices --------------------------------------------------------------------------------------------


def iso(b, xs, lam):
    u, s, vt = np.linalg.svd(sum(x - b for x in xs), full_matrices=False)
    return b + lam * s.mean() * u @ vt


def tsv(b, xs, lam):
    parts, k = [np.linalg.svd(x - b, full_matrices=False) for x in xs], min(b.shape) // len(xs)
    us, vs = np.hstack([u[:, :k] for u, _, _ in parts]), np.hstack([vt[:k].T for _, _, vt in parts])

    def turned(w):
        u, _, vt = np.linalg.svd(w, full_matrices=False)
        return u @ vt

    return b + lam * turned(us) @ np.diag(np.concatenate([s[:k] for _, s, _ in parts])) @ turned(vs).T


@pytest.mark.parametrize(("method", "want"), [("iso_c", iso), ("tsv_m", tsv)])
@pytest.mark.parametrize("shape", [(40, 40), (64, 17), (9, 120)])
def test_matrices(method, want, shape):
    g = torch.Generator().manual_seed(2)
    base, *tuned = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4))
    got = merge(method, [base, *tuned], **{"lambda": 0.7})
    assert close(got, want(*((x := wide([base, *tuned]))[0], x[1:]), 0.7), 1e-11)
    low = [x.bfloat16() for x in (base, *tuned)]
    assert (
        differences([merge(method, low)], [torch.from_numpy(want(*((x := wide(low))[0], x[1:]), 1.0)).bfloat16()]) == []
    )


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
def test_what_is_no_matrix_is_averaged(method):
    for x, more in (
        (TUNED, {"average": True}),
        ([t[0] for t in TUNED], {}),
        ([t.reshape(1, *SHAPE) for t in TUNED], {}),
    ):
        base = BASE.reshape(1, *SHAPE)[0, 0] if x[0].dim() == 1 else BASE.reshape(x[0].shape)
        want = base.double() + 0.5 * sum(t.double() - base.double() for t in x) / 4
        assert close(merge(method, [base, *x], **{"lambda": 0.5}, **more), want.numpy(), 3e-7)


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
def test_matrices_without_an_answer(method):
    assert torch.equal(merge(method, [BASE, BASE, BASE]), BASE)
    for bad in (float("nan"), float("inf")):
        broken = TUNED[0].clone()
        broken[1, 1] = bad
        with pytest.raises(fm.OutputError, match="w: a task vector is not finite"):
            fm.merge_tensors([BASE, TUNED[1], broken], method, base_index=0, name="w")
    huge = merge(method, [torch.zeros(8, 8), 1e30 * torch.eye(8), 2e30 * torch.eye(8)])
    assert torch.isfinite(huge).all()


def test_directions_of_rank_one_stay_where_they_are():
    """Nothing is made up for what the task vectors do not move; the mean is over all directions, as in the paper."""
    u, v = torch.randn(30, 1, generator=G), torch.randn(1, 20, generator=G)
    got = merge("iso_c", [torch.zeros(30, 20), u @ v])
    assert close(got, (u @ v / 20).double().numpy())
    got = merge("tsv_m", [torch.zeros(30, 20), u @ v, u @ v])
    assert close(got, (u @ v).double().numpy(), 1e-5), "twice the same task is one of them"


@pytest.mark.parametrize("spread", [0, 3, 5])
@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (1, 7)])
def test_polar_factors_are_orthonormal(shape, spread):
    """To 1e-12, over singular values from 1 to 10^-spread; and they are those of the SVD."""
    rng = np.random.default_rng(1)
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    got = polar(u @ np.diag(np.logspace(0, -spread, min(shape))) @ vt)
    short = got @ got.T if shape[0] < shape[1] else got.T @ got
    assert np.abs(short - np.eye(min(shape))).max() < 1e-12
    assert np.abs(got - u @ vt).max() < 1e-14 * 10 ** (2 * spread) + 1e-12


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
@pytest.mark.parametrize("shape", [(400, 300), (200, 900), (300, 300), (50_000,)])
def test_they_take_what_they_say(method, shape):
    dtypes = (BF16,) * 4
    spec = Spec(get(method)(lam=1.0, average=False), shape, dtypes, BF16, has_base=True)
    inputs = [torch.randn(shape).bfloat16() for _ in dtypes]
    out = torch.empty(shape, dtype=torch.bfloat16)
    (s,) = oracle.segments([Op("w", spec)], [inputs], [out], np.array([[0, 0, spec.numel]]))
    program = get(method).program([Op("w", spec)], oracle.FAST)
    tracemalloc.start()
    program.apply(s)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.4 * spec.workspace <= peak <= spec.workspace + 50_000  # what LAPACK takes is not traced
