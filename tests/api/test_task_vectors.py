"""The functions over state dictionaries against the short torch programs that they replace."""

import pytest
import torch
from safetensors.torch import save_file

from fastmerge import (
    apply_task_vectors,
    compute_task_vector,
    dare_sparsify,
    dare_ties_merge,
    slerp_models,
    ties_merge,
)
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.keys import tensor_key, threshold
from fastmerge.philox import u16
from tests.compare import differences

torch.set_num_threads(1)

SHAPES = {"embed": (50, 16), "layer.weight": (33, 65), "norm": (64,), "scalar": (), "big": (300, 250)}


def state(seed, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(s, generator=g) * scale).to(dtype) for n, s in SHAPES.items()}


# ---- the programs, as they are usually written -----------------------------------------------------------


def plain_slerp(t, v0, v1, limit=0.9995):
    u0, u1 = v0 / torch.norm(v0, dim=-1, keepdim=True), v1 / torch.norm(v1, dim=-1, keepdim=True)
    dot = (u0 * u1).sum(dim=-1, keepdim=True).clamp(-1, 1)
    if (dot.abs() > limit).all():
        return (1 - t) * v0 + t * v1
    theta = torch.acos(dot)
    sine = torch.sin(theta)
    return torch.sin((1 - t) * theta) / sine * v0 + torch.sin(t * theta) / sine * v1


def plain_ties(base_weights, task_vectors, density=0.2, weights=None):
    if weights is None:
        weights = [1.0 / len(task_vectors)] * len(task_vectors)
    merged = {}
    for key in base_weights:
        base = base_weights[key].float()
        vectors = [tv[key].float() for tv in task_vectors if key in tv]
        if not vectors:
            merged[key] = base
            continue
        trimmed = []
        for v in vectors:
            flat = v.abs().flatten()
            limit = flat.kthvalue(int(len(flat) * (1 - density))).values.item()
            trimmed.append(v * (v.abs() >= limit).float())
        elected = torch.sign(sum(w * t for w, t in zip(weights, trimmed, strict=False)))
        aligned = [w * (t * (torch.sign(t) == elected).float()) for t, w in zip(trimmed, weights, strict=False)]
        count = sum((torch.sign(t) == elected).float() for t in trimmed).clamp(min=1)
        merged[key] = base + sum(aligned) / count
    return merged


def without_scalar(d):
    """The plain program cannot trim a single element."""
    return {k: v for k, v in d.items() if k != "scalar"}


# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    base, tuned = state(0, 0.02, torch.bfloat16), state(1, 0.02, torch.bfloat16)
    base["only.base"] = torch.ones(3)
    base["ids"] = torch.arange(4)
    tuned["ids"] = torch.arange(4) * 2
    tuned["only.tuned"] = torch.ones(2)
    paths = []
    for name, tensors in (("base", base), ("tuned", tuned)):
        directory = tmp_path / name
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
        paths.append(directory)
    return paths, base, tuned


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_task_vectors(files, kind):
    paths, base, tuned = files
    a, b = (str(p / "model.safetensors") if kind == "file" else p for p in paths)
    tau = compute_task_vector(a, b)
    assert set(tau) == {*SHAPES, "ids"}
    assert all(torch.equal(tau[n], tuned[n].float() - base[n].float()) for n in tau)
    assert all(t.dtype == torch.float32 for t in tau.values())
    other = {n: t * 0.1 for n, t in tau.items() if n != "norm"}
    merged = apply_task_vectors(a, [tau, other], [0.6, -0.3])
    for n, b0 in base.items():
        want = b0.double()
        for t, lam in ((tau, 0.6), (other, -0.3)):
            if n in t:
                want += lam * t[n].double()
        assert torch.equal(merged[n], want.float()), n
    with pytest.raises(RecipeError, match="lambdas: expected 1 values"):
        apply_task_vectors(a, [tau], [1.0, 2.0])


@pytest.mark.parametrize("other", [torch.bool, torch.int64, torch.float64, torch.uint8])
def test_tensors_of_types_that_are_converted_lie_beside_others_of_their_shape(tmp_path, other):
    """Some are read in the stream, some are converted in memory first."""
    g = torch.Generator().manual_seed(0)
    models = []
    for i in range(2):
        some = {n: torch.randn(300, 400, generator=g) for n in ("a", "c")}
        some |= {n: (torch.randn(300, 400, generator=g) * 3).to(other) for n in ("b", "d")}
        save_file(some, tmp_path / f"{i}.safetensors")
        models.append(some)
    base, tuned = models
    tau = compute_task_vector(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    assert differences(tau, {n: tuned[n].float() - base[n].float() for n in base}) == []
    merged = apply_task_vectors(tmp_path / "0.safetensors", [tau], [0.5])
    assert differences(merged, {n: base[n].float() + 0.5 * tau[n] for n in base}) == []


def test_shapes_must_agree(files):
    (a, _), _, _ = files
    with pytest.raises(ShapeError, match="norm: expected shape"):
        apply_task_vectors(a, [{"norm": torch.ones(3)}], [1.0])
    with pytest.raises(ShapeError, match="no such tensor"):
        slerp_models({"x": torch.ones(2)}, {})


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01], ids=["apart", "between", "parallel"])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t, scale):
    a = state(0)
    b = {n: a[n] + d for n, d in state(1, scale).items()}
    a["ids"], b["ids"] = torch.arange(3), torch.arange(3) + 1
    got = slerp_models(a, b, t)
    assert list(got) == list(a)
    assert torch.equal(got["ids"], a["ids"])
    for n in SHAPES:
        # a scalar is always parallel
        want = (1 - t) * a[n] + t * b[n] if n == "scalar" else plain_slerp(t, a[n], b[n])
        assert torch.allclose(got[n], want, rtol=2e-5, atol=2e-5), n
        assert got[n].dtype == torch.float32


def test_slerp_of_zero_and_equal_rows_is_finite():
    a, b = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.ones(4, 8)
    a[1] = 0
    a[2] = b[2]
    out = slerp_models({"w": a}, {"w": b})["w"]
    assert torch.isfinite(out).all()
    assert torch.allclose(out[2], b[2])


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.9], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties(density, weights):
    base, vectors = without_scalar(state(0)), [without_scalar(state(i, 0.01)) for i in (1, 2, 3)]
    base["alone"] = torch.ones(3, dtype=torch.bfloat16)
    got, want = ties_merge(base, vectors, density, weights), plain_ties(base, vectors, density, weights)
    assert list(got) == list(base)
    for n in base:
        assert torch.allclose(got[n], want[n], rtol=1e-6, atol=2e-8), n
        # an element is touched by both or by neither
        assert torch.equal(got[n] != base[n].float(), want[n] != base[n].float()), n


def test_ties_shrinks_by_the_number_of_models():
    base, tau = without_scalar(state(0)), without_scalar(state(1))
    one, three = ties_merge(base, [tau], 1.0), ties_merge(base, [tau] * 3, 1.0)
    for n in base:
        assert torch.allclose((three[n] - base[n]) * 3, one[n] - base[n], atol=1e-5)


def test_ties_where_the_plain_program_crashes():
    base, tau = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, -2.0, 3.0])}
    for density in (1.0, 0.9):
        assert torch.equal(ties_merge(base, [tau], density)["w"], tau["w"])


def test_weights_stay_with_their_models():
    base = {"w": torch.zeros(4)}
    got = ties_merge(base, [{}, {"w": torch.ones(4)}], 1.0, [5.0, 0.5])
    assert torch.equal(got["w"], torch.full((4,), 0.5))


def test_dare():
    tau = state(3)
    out = dare_sparsify(tau, p=0.9, seed=42)
    t = threshold(1 - 0.9)
    for n, v in tau.items():
        mask = u16(tensor_key(42, n), 0, 0, 0, v.numel()).astype("int64") < t
        want = torch.where(torch.from_numpy(mask).reshape(v.shape), v * (65536 / t), torch.zeros(()))
        assert torch.allclose(out[n], want, rtol=1e-6, atol=0)
        assert torch.equal(out[n] != 0, want != 0)
    big, before = out["big"], tau["big"]
    assert abs((big != 0).double().mean().item() - 0.1) < 4 * (0.09 / big.numel()) ** 0.5
    assert torch.equal(dare_sparsify(tau)["big"], big)
    assert not torch.equal(dare_sparsify(tau, seed=43)["big"], big)
    assert not torch.equal(dare_sparsify(tau, model_index=1)["big"] != 0, big != 0)
    assert torch.equal(dare_sparsify(tau, p=0.0)["big"], before)
    assert not dare_sparsify(tau, p=1.0)["big"].any()
    with pytest.raises(RecipeError, match="^p: expected a number in 0 .. 1; got 1.5"):
        dare_sparsify(tau, p=1.5)


@pytest.mark.parametrize("shared", [False, True])
def test_dare_ties_is_dare_then_ties(shared):
    base, vectors = without_scalar(state(0)), [without_scalar(state(i, 0.01)) for i in (1, 2)]
    got = dare_ties_merge(base, vectors, drop_rate=0.5, density=0.3, shared_mask=shared)
    sparse = [dare_sparsify(v, p=0.5, seed=42, model_index=0 if shared else i) for i, v in enumerate(vectors)]
    want = plain_ties(base, sparse, 0.3)
    for n in base:
        assert torch.allclose(got[n], want[n], rtol=1e-6, atol=2e-8)
        assert torch.equal(got[n] != base[n], want[n] != base[n])


def test_inputs_are_borrowed():
    base, tau = without_scalar(state(0)), without_scalar(state(1))
    copies = {n: v.clone() for n, v in tau.items()}
    strided = {n: v.T.contiguous().T if v.ndim == 2 else v for n, v in tau.items()}
    a, b = ties_merge(base, [tau]), ties_merge(base, [strided])
    assert all(torch.equal(a[n], b[n]) for n in base)
    assert all(torch.equal(tau[n], copies[n]) for n in tau)
