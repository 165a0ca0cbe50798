"""The in-memory API: mergekit's call, the caller's tensors."""

import threading

import numpy as np
import pytest
import torch
from mergekit.merge_methods import merge_state_dicts as peer_state_dicts
from mergekit.merge_methods import merge_tensors as peer

import fastmerge as fm
from fastmerge.api import tensors as memory
from fastmerge.methods import METHODS
from fastmerge.methods.matrices import Matrices
from tests import oracle


def tensors(n=3, shape=(33, 65), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(n)]


CALLS = [
    ("linear", dict(weight=[0.2, 0.3, 0.5]), None),
    ("slerp", dict(t=0.3), 0),
    ("task_arithmetic", dict(weight=[0.4, 0.6]), 0),
    ("ties", dict(weight=[0.5, 1.0], density=0.4), 0),
    ("model_stock", {}, 0),
    ("ties", dict(weight=0.5, density=[0.4, 0.5]), 2),
]


@pytest.mark.parametrize(("method", "parameters", "base"), CALLS)
def test_the_same_call_as_mergekit_gives_the_same_weights(method, parameters, base):
    inputs = tensors(2 if method == "slerp" else 3)
    before = [t.clone() for t in inputs]
    got = fm.merge_tensors(inputs, method, parameters=parameters, base_index=base)
    want = peer(inputs, method, parameters=parameters, base_index=base)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_out_is_filled_and_returned():
    inputs = tensors()
    out = torch.full((33, 65), float("nan"))
    got = fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0}, out=out)
    assert got is out
    assert torch.equal(out, fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0}))
    with pytest.raises(fm.ShapeError, match="out"):
        fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0}, out=torch.empty(3))


def test_out_may_be_an_input():
    inputs = tensors()
    want = fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0})
    fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0}, out=inputs[1])
    assert torch.equal(inputs[1], want)


@pytest.mark.parametrize("view", [lambda t: t.T, lambda t: t[::2], lambda t: t.reshape(-1)[1:], lambda t: t[0, 0]])
def test_views_and_scalars(view):
    inputs = tensors()
    got = fm.merge_tensors([view(t) for t in inputs], "linear", parameters={"weight": 1.0})
    assert torch.equal(got, view(fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0})))


def test_state_dicts_and_modules():
    models = {k: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16)) for k in "abc"}
    got = fm.merge_state_dicts(models, "ties", parameters={"weight": {"b": 0.5, "c": 1.0}, "density": 0.5}, base="a")
    want = peer_state_dicts(models, "ties", parameters={"weight": {"b": 0.5, "c": 1.0}, "density": 0.5}, base="a")
    assert list(got) == list(models["a"].state_dict())
    for name in ("0.weight", "0.bias"):
        assert (got[name] - want[name]).abs().max() <= 1e-5
    assert torch.equal(got["1.num_batches_tracked"], torch.tensor(0))


def test_differing_names_are_refused_or_left_out():
    a, b = {"x": torch.ones(3), "y": torch.ones(2)}, {"x": torch.zeros(3)}
    with pytest.raises(fm.ShapeError, match="y: not in"):
        fm.merge_state_dicts([a, b], "linear", parameters={"weight": 1.0})
    assert list(fm.merge_state_dicts([a, b], "linear", parameters={"weight": 1.0}, strict=False)) == ["x"]


@pytest.mark.parametrize(
    ("method", "parameters", "base", "words"),
    [
        ("tise", {}, None, ["tise", "ties"]),
        ("linear", {}, None, ["linear needs the parameter 'weight'"]),
        ("linear", {"wieght": 1}, None, ["wieght", "weight"]),
        ("ties", {"weight": 1.0}, None, ["base"]),
        ("ties", {"weight": [1.0], "density": -2.0}, 0, ["weight", "density", "2 problems"]),
        ("slerp", {"t": 0.5}, 0, ["slerp", "expected 1"]),
    ],
)
def test_wrong_calls_are_refused_with_every_problem(method, parameters, base, words):
    with pytest.raises(fm.RecipeError) as error:
        fm.merge_tensors(tensors(), method, parameters=parameters, base_index=base)
    assert all(w in str(error.value) for w in words), str(error.value)


def test_shapes_types_and_devices_are_checked():
    with pytest.raises(fm.ShapeError, match=r"\(2,\)"):
        fm.merge_tensors([torch.ones(3), torch.ones(2)], "linear", parameters={"weight": 1.0})
    with pytest.raises(fm.ShapeError, match="int64"):
        fm.merge_tensors([torch.ones(3).long()] * 2, "linear", parameters={"weight": 1.0}, ids=["a", "b"])
    with pytest.raises(fm.ShapeError, match="meta"):
        fm.merge_tensors([torch.ones(3, device="meta")] * 2, "linear", parameters={"weight": 1.0})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.ones(3, np.float32), "expected a torch tensor, got numpy.ndarray"),
        (3, "expected a torch tensor, got builtins.int"),
        (torch.eye(3)[0].to_sparse(), "expected a dense tensor, got one of layout torch.sparse_coo"),
    ],
)
def test_what_is_no_dense_tensor_is_named(wrong, words):
    with pytest.raises(fm.ShapeError, match=f"^w: input 1: {words}"):
        fm.merge_tensors([torch.ones(3), wrong], "linear", parameters={"weight": 1.0}, name="w")
    models = {"a": {"w": torch.ones(3)}, "b": {"w": wrong}}
    with pytest.raises(fm.ShapeError, match=f"^w: input 'b': {words}"):
        fm.merge_state_dicts(models, "linear", parameters={"weight": 1.0})
    with pytest.raises(fm.ShapeError, match=f"^out: {words}"):
        fm.merge_tensors([torch.ones(3)] * 2, "linear", parameters={"weight": 1.0}, out=wrong)
    for call in (
        lambda: fm.ties_merge({"w": wrong}, [{"w": wrong}]),
        lambda: fm.slerp_models({"w": wrong}, {"w": wrong}),
        lambda: fm.dare_sparsify({"w": wrong}),
    ):
        with pytest.raises(fm.ShapeError, match=f"^w: {words}"):
            call()


def test_what_is_no_model_is_named():
    with pytest.raises(fm.RecipeError, match="expected state dictionaries or modules, got int for 1"):
        fm.merge_state_dicts([{"w": torch.ones(3)}, 3], "linear", parameters={"weight": 1.0})


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([0.25, 0.75]),
        torch.tensor([0.25, 0.75], dtype=torch.bfloat16),
        np.array([0.25, 0.75]),
        [np.float32(0.25), torch.tensor(0.75)],
        {0: np.array(0.25), 1: torch.tensor(0.75)},
    ],
)
def test_parameters_may_be_arrays_and_tensors(weight):
    a, b = tensors(2)
    want = fm.merge_tensors([a, b], "linear", parameters={"weight": [0.25, 0.75]})
    assert torch.equal(fm.merge_tensors([a, b], "linear", parameters={"weight": weight}), want)
    flag = fm.merge_tensors([a, b], "linear", parameters={"weight": 0.5, "normalize": np.bool_(False)})
    assert torch.equal(flag, 0.5 * a + 0.5 * b)
    for wrong in ([torch.ones(2), 1.0], torch.ones(2, 2), np.array(["x", "y"]), torch.ones(2, 1, 1)):
        with pytest.raises(fm.RecipeError, match="weight"):
            fm.merge_tensors([a, b], "linear", parameters={"weight": wrong})
    with pytest.raises(fm.RecipeError, match="parameter 'weight': expected 2 values, got 3"):
        fm.merge_tensors([a, b], "linear", parameters={"weight": torch.ones(3)})


def test_dtypes_promote_and_out_dtype_rounds_once():
    a, b = tensors(2)
    mixed = fm.merge_tensors([a.bfloat16(), b], "linear", parameters={"weight": 1.0})
    assert mixed.dtype == torch.float32
    wide = fm.merge_tensors([a.double(), b], "linear", parameters={"weight": 1.0})
    assert wide.dtype == torch.float64
    half = fm.merge_tensors([a, b], "linear", parameters={"weight": 1.0}, out_dtype=torch.float16)
    assert torch.equal(half, ((a + b) / 2).half())


def test_the_seed_and_the_name_key_the_masks():
    inputs = tensors()
    call = dict(parameters={"weight": 1.0, "density": 0.5}, base_index=0)
    one = fm.merge_tensors(inputs, "dare_linear", **call, name="x")
    assert torch.equal(one, fm.merge_tensors(inputs, "dare_linear", **call, name="x"))
    assert not torch.equal(one, fm.merge_tensors(inputs, "dare_linear", **call, name="y"))
    assert not torch.equal(one, fm.merge_tensors(inputs, "dare_linear", **call, name="x", seed=1))


@pytest.mark.parametrize("backend", ["native", "reference", "triton"])
def test_named_backends_agree(backend):
    inputs = tensors(shape=(7, 30))
    got = fm.merge_tensors(inputs, "ties", parameters={"weight": 0.5, "density": 0.3}, base_index=0, backend=backend)
    assert torch.equal(got, fm.merge_tensors(inputs, "ties", parameters={"weight": 0.5, "density": 0.3}, base_index=0))


def test_unknown_backends_and_the_environment(monkeypatch):
    with pytest.raises(fm.BackendUnavailable, match="unknown backend"):
        fm.merge_tensors(tensors(), "linear", parameters={"weight": 1.0}, backend="abacus")
    monkeypatch.setenv("FASTMERGE_BACKEND", "abacus")
    with pytest.raises(fm.BackendUnavailable, match="abacus"):
        fm.merge_tensors(tensors(), "linear", parameters={"weight": 1.0})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(base_index=3), "base_index: expected a whole number from -3 to 2, got 3"),
        (dict(base_index="0"), "base_index: .* got '0'"),
        (dict(base_index=0.0), "base_index: .* got 0.0"),
        (dict(base_index=True), "base_index: .* got True"),
        (dict(parameters=[1.0]), "parameters: expected a mapping .* got list"),
        (dict(parameters=0.5), "parameters: expected a mapping .* got float"),
        (dict(tensors=[]), "tensors: expected at least one"),
        (dict(tensors=[], base_index=0), "tensors: expected at least one"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, words):
    call = dict(tensors=tensors(), method="linear", parameters={"weight": 1.0}) | change
    with pytest.raises(fm.RecipeError, match=words):
        fm.merge_tensors(**call)


def test_an_out_that_is_not_contiguous_is_named_so():
    with pytest.raises(fm.ShapeError, match=r"not contiguous \(strides \(1, 33\)\)"):
        fm.merge_tensors(tensors(), "linear", parameters={"weight": 1.0}, out=torch.empty(65, 33).T)


OVERLAPS = {
    "one element later": lambda flat: (flat[:2145], flat[1:2146]),
    "one element before": lambda flat: (flat[1:2146], flat[:2145]),
    "last element": lambda flat: (flat[:2145], flat[2144:4289]),
    "strided": lambda flat: (flat[:4290:2], flat[4288:6433]),
}


@pytest.mark.parametrize("case", [*OVERLAPS, "another type"])
def test_out_must_not_overlap_an_input(case):
    flat = tensors(shape=(9000,))[0]
    before = flat.clone()
    other = tensors(shape=(2145,))[1]
    if case == "another type":
        given = flat[:2145].half()
        out = given.view(torch.bfloat16)
    else:
        given, out = OVERLAPS[case](flat)
    call = dict(parameters={"weight": 1.0}, ids=["a", "b"], out_dtype=out.dtype)
    with pytest.raises(fm.ShapeError, match="out overlaps input 'b'"):
        fm.merge_tensors([other, given], "linear", out=out, **call)
    assert torch.equal(flat, before)
    beside = flat[2145:4290]
    want = fm.merge_tensors([other, flat[:2145]], "linear", parameters={"weight": 1.0})
    assert torch.equal(fm.merge_tensors([other, flat[:2145]], "linear", out=beside, parameters={"weight": 1.0}), want)


@pytest.mark.parametrize("method", METHODS)
def test_out_may_be_an_input_of_every_method(method):
    parameters, preset, count, has_base = oracle.case_parts(METHODS[method], METHODS[method].cases[0])
    shape = (60, 40) if issubclass(METHODS[method], Matrices) else (1100, 1000)  # minutes of decompositions
    inputs = [x.abs() for x in tensors(count, shape=shape)]  # a Fisher diagonal has no sign
    call = dict(parameters=parameters, preset=preset, base_index=0 if has_base else None, name="x")
    want = fm.merge_tensors(inputs, method, **call)
    for position in (0, -1):
        given = [x.clone() if i == position % count else x for i, x in enumerate(inputs)]
        fm.merge_tensors(given, method, **call, out=given[position])
        assert torch.equal(given[position], want), position


@pytest.fixture
def no_threads(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("a thread was started"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_one_unit_of_work_stays_on_the_callers_thread(method, backend, no_threads, monkeypatch):
    """However many cores there are, and whatever passes the method makes."""
    monkeypatch.setattr(memory, "cores", lambda: 8)
    parameters, preset, count, has_base = oracle.case_parts(METHODS[method], METHODS[method].cases[0])
    call = dict(parameters=parameters, preset=preset, backend=backend)
    for shape in ((64,), (3, 7), ()):
        fm.merge_tensors([x.abs() for x in tensors(count, shape)], method, base_index=0 if has_base else None, **call)
    states = [dict(zip("xyz", map(torch.abs, tensors(3, seed=i)), strict=True)) for i in range(count)]
    assert list(fm.merge_state_dicts(states, method, base=0 if has_base else None, **call)) == ["x", "y", "z"]


def test_functions_on_task_vectors_start_no_thread_either(no_threads, tmp_path):
    from safetensors.torch import save_file

    base, tau = ({"w": t} for t in tensors(2))
    assert list(fm.ties_merge(base, [tau])) == list(fm.dare_sparsify(tau)) == list(fm.slerp_models(base, tau)) == ["w"]
    save_file(base, tmp_path / "a.safetensors")
    got = fm.apply_task_vectors(tmp_path / "a.safetensors", [tau], [1.0])
    assert torch.equal(got["w"], base["w"] + tau["w"])


def test_many_units_are_spread_over_threads(monkeypatch):
    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self.name), start(self))[1])
    monkeypatch.setattr(memory, "cores", lambda: 3)
    inputs = tensors(2, (5, 1 << 20))
    got = fm.merge_tensors(inputs, "linear", parameters={"weight": 0.5})
    assert started == ["fastmerge-cpu"] * 3
    assert torch.equal(got, (inputs[0] * 0.5 + inputs[1] * 0.5) / 1.0)


def test_tied_tensors_are_merged_once_and_stay_tied():
    models = [dict(zip(("embed", "body"), tensors(2, seed=i), strict=True)) for i in range(3)]
    models = [{"embed": m["embed"] * (i + 1), "body": m["body"], "n": torch.tensor([7])} for i, m in enumerate(models)]
    call = dict(parameters={"weight": 1.0, "density": 0.3, "trim_scope": "model"}, base=0)
    want = fm.merge_state_dicts(models, "ties", **call)
    got = fm.merge_state_dicts([m | {"head": m["embed"], "m": m["n"]} for m in models], "ties", **call)
    assert list(got) == ["embed", "body", "n", "head", "m"]
    assert got["head"] is got["embed"]
    assert got["m"] is got["n"]
    assert all(torch.equal(got[name], want[name]) for name in want)
    # Tied in two of three models only, or the same memory read another way: tensors of their own.
    loose = [m | {"head": m["embed"].clone() if i == 1 else m["embed"]} for i, m in enumerate(models)]
    apart = fm.merge_state_dicts(loose, "ties", **call)
    assert apart["head"] is not apart["embed"]
    assert not torch.equal(apart["body"], want["body"])
    turned = fm.merge_state_dicts([m | {"turned": m["embed"].T} for m in models], "linear", parameters={"weight": 1.0})
    assert torch.equal(turned["turned"], turned["embed"].T)
    assert turned["turned"].data_ptr() != turned["embed"].data_ptr()


def test_empty_tensors_are_not_tied():
    state = {"a": torch.empty(0), "b": torch.empty(0)}
    got = fm.merge_state_dicts([state, dict(state)], "linear", parameters={"weight": 1.0})
    assert got["a"] is not got["b"]


def test_tensors_made_on_access_are_not_tied():
    class Made(dict):
        def __getitem__(self, name):
            return torch.full((4096,), super().__getitem__(name))

    state = Made({f"n{i}": i for i in range(50)})
    got = fm.merge_state_dicts([state], "linear", parameters={"weight": 1.0})
    assert all(torch.equal(t, state[name]) for name, t in got.items())


def test_mixed_devices_are_named():
    here, there = torch.zeros(3), torch.zeros(3, device="meta")
    with pytest.raises(fm.ShapeError, match="meta"):
        fm.merge_tensors([here, there], "linear", parameters={"weight": 0.5})
    with pytest.raises(fm.ShapeError, match="meta"):
        fm.merge_state_dicts([{"a": here}, {"a": there}], "linear", parameters={"weight": 0.5})
    with pytest.raises(fm.ShapeError, match="meta"):
        fm.merge_tensors([here, here], "linear", parameters={"weight": 0.5}, out=there)
    with pytest.raises(fm.ShapeError, match="meta"):
        fm.ties_merge({"a": here}, [{"a": there}])
