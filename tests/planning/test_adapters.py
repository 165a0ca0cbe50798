"""``model: base+adapter``: what is applied to which tensor, and that the merge has it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.ops import low_rank
from fastmerge.planning import plan
from fastmerge.recipe import Recipe
from tests.tiny import state, write

PREFIX = "base_model.model."
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SHAPE = {"hidden": 16, "vocab": 40}


def model(path, seed=0, *, tie=False, config=None, **shape):
    """A model, its head left out where it is tied."""
    tensors = state(seed, **{**SHAPE, **shape})
    if tie:
        del tensors[HEAD]
    return write(path, tensors, config={"tie_word_embeddings": tie, **(config or {})})


def factors(module, base, rank=2, *, embedding=False, transposed=False):
    """Random factors for a weight of a model, as peft names them."""
    rows, columns = tensors(base)[f"{module}.weight"].shape
    if embedding or transposed:
        rows, columns = columns, rows
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    g = torch.Generator().manual_seed(len(module))
    a, b = torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)
    return dict(zip([f"{PREFIX}{module}.{n}" for n in names], (a, b), strict=True))


def adapter(path, found, **config):
    path.mkdir()
    save_file(found, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}))
    return path


def tensors(path):
    return load_file(path / "model.safetensors")


def merge(tmp_path, text, name="out", **options):
    fastmerge.merge(text, tmp_path / name, device="cpu", **options)
    return tensors(tmp_path / name)


def passed(*refs, dtype=None):
    lines = "".join(f"  - model: {r}\n" for r in refs)
    return f"merge_method: passthrough\nmodels:\n{lines}" + (f"dtype: {dtype}\n" if dtype else "")


def update(found, scale=1.5):
    a, b = (next(t for n, t in found.items() if n.removesuffix(".weight").endswith(f"_{side}")) for side in "AB")
    out = torch.zeros(len(b), a.shape[1])
    for k in range(len(a)):
        out = out + b[:, k, None] * a[k]
    return out * scale


def problems(text):
    with pytest.raises(CheckpointError) as e:
        plan(Recipe.load(text))
    return e.value.problems


def tied(path):
    return json.loads((path / "config.json").read_text())["tie_word_embeddings"]


@pytest.fixture
def base(tmp_path):
    return model(tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_update_is_rounded_once(tmp_path, dtype):
    base = model(tmp_path / "base", dtype=dtype)
    found = factors(Q, base)
    got = merge(tmp_path, passed(f"{base}+{adapter(tmp_path / 'a', found)}"))
    want = tensors(base)
    want[f"{Q}.weight"] = (want[f"{Q}.weight"].float() + update(found)).to(dtype)
    assert got.keys() == want.keys()
    assert [n for n in want if not torch.equal(got[n], want[n]) or got[n].dtype != dtype] == []


def test_whole_tensors_take_the_place_of_those_of_the_base(tmp_path, base):
    more = {HEAD: torch.randn(40, 16), NORM: torch.randn(16)}
    text = passed(f"{base}+{adapter(tmp_path / 'a', {PREFIX + n: t for n, t in more.items()})}")
    got = merge(tmp_path, text)
    want = tensors(base) | {n: t.bfloat16() for n, t in more.items()}
    assert [n for n in want if not torch.equal(got[n], want[n])] == []
    dropped = plan(Recipe.load(text)).account.names()
    assert dropped == {f"{base}+{tmp_path / 'a'}": {"dropped: replaced by the adapter": [HEAD, NORM]}}


def test_an_embedding_with_the_copy_that_peft_saves(tmp_path, base):
    module, copy = EMBED.removesuffix(".weight"), torch.randn(40, 16)
    found = factors(module, base, embedding=True)
    text = passed(f"{base}+{adapter(tmp_path / 'a', {**found, f'{PREFIX}{module}.base_layer.weight': copy})}")
    assert torch.equal(merge(tmp_path, text)[EMBED], (copy + update(found).T).bfloat16())


@pytest.mark.parametrize(
    ("kind", "flag", "transposed"),
    [("gpt2", False, True), ("gpt2", True, True), ("llama", True, False), (None, True, True), (None, False, False)],
)
@pytest.mark.parametrize("columns", [16, 48])
def test_layers_that_are_stored_the_other_way_round(tmp_path, kind, flag, transposed, columns):
    name = "h.0.attn.c_proj"
    base = tmp_path / "base"
    write(base, {f"{name}.weight": torch.randn(16, columns)}, config={"model_type": kind})
    transposed |= columns != 16  # shapes that fit one way only say which
    found = factors(name, base, transposed=transposed)
    got = merge(tmp_path, passed(f"{base}+{adapter(tmp_path / 'a', found, fan_in_fan_out=flag)}"))
    delta = update(found).T if transposed else update(found)
    assert torch.equal(got[f"{name}.weight"], tensors(base)[f"{name}.weight"] + delta)


def test_two_models_two_adapters_and_a_base(tmp_path, base):
    found = {n: factors(m, base) for n, m in (("a", Q), ("b", DOWN))}
    paths = {n: adapter(tmp_path / n, t) for n, t in found.items()}
    other = model(tmp_path / "other", 1)
    refs = [f"{base}+{paths['a']}", f"{other}+{paths['a']}", f"{base}+{paths['b']}"]
    lines = "".join(
        f"  - {{model: {r}, parameters: {{weight: {w}}}}}\n" for r, w in zip(refs, (1, 2, 0.5), strict=True)
    )
    text = f"merge_method: task_arithmetic\nmodels:\n{lines}base_model: {refs[0]}\nparameters: {{normalize: false}}\n"
    got = merge(tmp_path, text + "dtype: float32\n")
    x = tensors(base)
    for name, mine in ((f"{Q}.weight", ("a", "a", None)), (f"{DOWN}.weight", (None, None, "b"))):
        own = [x[name].float(), tensors(other)[name].float(), x[name].float()]
        first, second, third = (t if n is None else t + update(found[n]) for t, n in zip(own, mine, strict=True))
        assert torch.allclose(got[name], first + 2 * (second - first) + 0.5 * (third - first), atol=1e-5)


def test_layers_of_slices_are_those_of_the_source(tmp_path, base):
    found = factors(Q, base)
    ref = f"{base}+{adapter(tmp_path / 'a', found)}"
    part = "  - sources: [{{model: {}, layer_range: [{}, {}]}}]\n"
    text = (
        f"merge_method: passthrough\nslices:\n{part.format(ref, 1, 2)}{part.format(base, 0, 2)}{part.format(ref, 0, 2)}"
    )
    got, x = merge(tmp_path, text), tensors(base)
    changed = (x[f"{Q}.weight"].float() + update(found)).bfloat16()
    want = [changed, x[f"{Q}.weight".replace("1", "0")], x[f"{Q}.weight"], x[f"{Q}.weight".replace("1", "0")], changed]
    assert [torch.equal(got[f"{Q}.weight".replace("1", str(i))], w) for i, w in enumerate(want)] == [True] * 5


def test_bytes_do_not_depend_on_how_the_work_is_cut(tmp_path, monkeypatch):
    base = model(tmp_path / "base", hidden=96, vocab=700)
    embed = factors(EMBED.removesuffix(".weight"), base, 3, embedding=True)
    found = factors(Q, base, 3) | factors(DOWN, base, 3) | embed
    text = passed(f"{base}+{adapter(tmp_path / 'a', found, r=3)}", dtype="float32")
    want = merge(tmp_path, text, "whole")
    monkeypatch.setattr(low_rank, "PANEL", 7)
    monkeypatch.setattr("fastmerge.runtime.placement.UNIT_ELEMENTS", 65_536)
    monkeypatch.setattr("fastmerge.runtime.placement.cores", lambda: 3)
    got = merge(tmp_path, text, "cut")
    assert [n for n in want if not torch.equal(got[n], want[n])] == []
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "cut/model.safetensors").read_bytes()


def test_the_fingerprint_covers_the_adapter(tmp_path, base):
    path = adapter(tmp_path / "a", factors(Q, base))
    recipe = Recipe.load(passed(f"{base}+{path}"))
    prints = [plan(recipe).fingerprint]
    prints.append(plan(recipe).fingerprint)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4}))
    prints.append(plan(recipe).fingerprint)
    save_file(factors(DOWN, base), path / "adapter_model.safetensors")
    prints.append(plan(recipe).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(
    ("tensor", "shape", "said"),
    [
        ("model.layers.9.mlp.down_proj", None, "has no such tensors: 'model.layers.9.mlp.down_proj.weight'"),
        (f"{DOWN}.linear", None, f"has no such tensors: '{DOWN}.linear.weight'"),
        ("score.weight", (2, 16), "has no such tensors: 'score.weight'"),
        (DOWN, ((2, 9), (16, 2)), "lora_B [16, 2] x lora_A [2, 9] does not fit bfloat16 [16, 48]"),
        ("model.norm", ((2, 16), (16, 2)), "lora_B [16, 2] x lora_A [2, 16] does not fit bfloat16 [16]"),
        (EMBED, (41, 16), "float32 [41, 16] does not fit bfloat16 [40, 16]"),
        (EMBED, torch.zeros(40, 16, dtype=torch.int32), "int32 [40, 16] does not fit bfloat16 [40, 16]"),
    ],
)
def test_what_fits_nothing_is_refused_by_name(tmp_path, base, tensor, shape, said):
    if tensor.endswith(".weight"):
        found = {PREFIX + tensor: shape if isinstance(shape, torch.Tensor) else torch.zeros(shape)}
    else:
        sides = zip(("A", "B"), shape or ((2, 48), (16, 2)), strict=True)
        found = {f"{PREFIX}{tensor}.lora_{side}.weight": torch.ones(s) for side, s in sides}
    lines = problems(passed(f"{base}+{adapter(tmp_path / 'a', found)}"))
    assert len(lines) == 1
    assert said in lines[0]


def test_a_model_is_no_adapter(base):
    assert problems(passed(f"{base}+{base}")) == [
        f"{base}: expected a LoRA adapter, a directory with adapter_config.json"
    ]


# ---- tied ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", [True, None])
@pytest.mark.parametrize("both", [False, True])
def test_a_trained_head_unties_it(tmp_path, says, both):
    base = model(tmp_path / "base", tie=True, config={"tie_word_embeddings": says})
    more = {HEAD: torch.randn(40, 16)} | ({EMBED: torch.randn(40, 16)} if both else {})
    got = merge(tmp_path, passed(f"{base}+{adapter(tmp_path / 'a', {PREFIX + n: t for n, t in more.items()})}"))
    want = tensors(base) | {n: t.bfloat16() for n, t in more.items()}
    assert got.keys() == want.keys()
    assert [n for n in want if not torch.equal(got[n], want[n])] == []
    assert tied(tmp_path / "out") is False


def test_one_trained_tensor_for_both_ends_stays_tied(tmp_path):
    base, own = model(tmp_path / "base", tie=True), torch.randn(40, 16)
    got = merge(
        tmp_path, passed(f"{base}+{adapter(tmp_path / 'a', {PREFIX + EMBED: own, PREFIX + HEAD: own.clone()})}")
    )
    assert HEAD not in got
    assert torch.equal(got[EMBED], own.bfloat16())
    assert tied(tmp_path / "out") is True


@pytest.mark.parametrize("end", [EMBED, HEAD])
def test_an_update_of_one_tied_end_is_one_of_both(tmp_path, end):
    base = model(tmp_path / "base", tie=True)
    found = factors("model.embed_tokens", base, embedding=end == EMBED)
    found = {n.replace("model.embed_tokens", end.removesuffix(".weight")): t for n, t in found.items()}
    text = passed(f"{base}+{adapter(tmp_path / 'a', found)}")
    got = merge(tmp_path, text)
    delta = update(found).T if end == EMBED else update(found)
    assert HEAD not in got
    assert [w for w in plan(Recipe.load(text)).warnings if f"{end} is one of two tied ends" in w]
    assert torch.equal(got[EMBED], (tensors(base)[EMBED].float() + delta).bfloat16())
    assert tied(tmp_path / "out") is True


def test_a_trained_head_beside_an_updated_embedding(tmp_path):
    base, own = model(tmp_path / "base", tie=True), torch.randn(40, 16)
    found = factors("model.embed_tokens", base, embedding=True)
    got = merge(tmp_path, passed(f"{base}+{adapter(tmp_path / 'a', {**found, PREFIX + HEAD: own})}"))
    assert torch.equal(got[EMBED], (tensors(base)[EMBED].float() + update(found).T).bfloat16())
    assert torch.equal(got[HEAD], own.bfloat16())
    assert tied(tmp_path / "out") is False


@pytest.mark.parametrize("method", ["linear", "dare_linear"])
def test_a_trained_head_is_merged_with_tied_ones(tmp_path, method):
    base = model(tmp_path / "base", tie=True)
    other = write(
        tmp_path / "other", tensors(base) | {HEAD: tensors(base)[EMBED]}, config={"tie_word_embeddings": True}
    )
    own = torch.randn(40, 16).bfloat16()
    path = adapter(tmp_path / "a", {PREFIX + HEAD: own})
    refs = [f"{base}+{path}", f"{other}+{path}"]
    lines = "".join(f"  - {{model: {r}, parameters: {{weight: 0.5, density: 1}}}}\n" for r in refs)
    text = f"merge_method: {method}\nmodels:\n{lines}" + (f"base_model: {base}\n" if method == "dare_linear" else "")
    got = merge(tmp_path, text)
    assert torch.allclose(got[HEAD].float(), own.float(), atol=0.02)
    assert torch.allclose(got[EMBED].float(), tensors(base)[EMBED].float(), atol=1e-3)
    assert tied(tmp_path / "out") is False


@pytest.mark.parametrize("stored", [False, True])
def test_updates_of_tied_ends_that_mean_no_one_thing_are_refused(tmp_path, stored):
    base = model(tmp_path / "base", tie=True)
    embed = factors("model.embed_tokens", base, embedding=True)
    head = {n.replace("model.embed_tokens", "lm_head"): t for n, t in factors("model.embed_tokens", base).items()}
    found = {**embed, **head}
    if stored:
        whole = tensors(base) | {HEAD: tensors(base)[EMBED]}
        base, found = write(tmp_path / "both", whole, config={"tie_word_embeddings": True}), head
    lines = problems(passed(f"{base}+{adapter(tmp_path / 'a', found)}"))
    assert len(lines) == 1
    assert "low-rank updates of" in lines[0]


def test_a_trained_embedding_alone_leaves_a_head_without_a_name(tmp_path):
    base = model(tmp_path / "base", tie=True)
    ref = f"{base}+{adapter(tmp_path / 'a', {PREFIX + EMBED: torch.zeros(40, 16)})}"
    assert [f"{EMBED} is the adapter's own" in line for line in problems(passed(ref))] == [True]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    assert merge(tmp_path, passed(ref))[EMBED].count_nonzero() == 0


# ---- several adapters, other names, rows of tokens -------------------------------------------------------


def loaded(base, *adapters):
    """A recipe of a model with adapters (a path, or a path and a weight)."""
    lora = [{"path": str(a)} if not isinstance(a, tuple) else {"path": str(a[0]), "weight": a[1]} for a in adapters]
    return Recipe.load({"merge_method": "passthrough", "models": [{"model": {"model": str(base), "lora": lora}}]})


def one_by_one(x, *updates):
    for delta in updates:
        x = x + delta
    return x


def test_the_updates_of_several_adapters_are_added_and_rounded_once(tmp_path, base):
    found = [factors(Q, base), factors(Q, base, 3) | factors(DOWN, base, 3)]
    a, b = (adapter(tmp_path / n, f, r=r) for n, f, r in zip("ab", found, (2, 3), strict=True))
    got, x = merge(tmp_path, loaded(base, (a, 0.7), (b, -2))), tensors(base)
    one, two = (update(found[0], 1.5 * 0.7), update({n: t for n, t in found[1].items() if Q in n}, -2.0))
    assert torch.equal(got[f"{Q}.weight"], one_by_one(x[f"{Q}.weight"].float(), one, two).bfloat16())
    down = update({n: t for n, t in found[1].items() if DOWN in n}, -2.0)
    assert torch.equal(got[f"{DOWN}.weight"], (x[f"{DOWN}.weight"].float() + down).bfloat16())
    assert [n for n in x if n not in (f"{Q}.weight", f"{DOWN}.weight") and not torch.equal(got[n], x[n])] == []
    account = plan(loaded(base, (a, 0.7), (b, -2))).account.counts()
    assert [account[str(p)] for p in (a, b)] == [{"merged": 2}, {"merged": 4}]
    text = loaded(base, (a, 0.7), b).to_yaml()
    assert Recipe.load(text) == loaded(base, (a, 0.7), b) != loaded(base, a, b)
    assert loaded(base, (a, 1)) == Recipe.load(passed(f"{base}+{a}"))


def test_a_weight_of_an_adapter_is_a_part_of_the_recipe(tmp_path, base):
    a = adapter(tmp_path / "a", factors(Q, base))
    prints = {plan(loaded(base, *one)).fingerprint for one in ((a,), ((a, 1),), ((a, 2),), ((a, -2),))}
    assert len(prints) == 3


@pytest.mark.parametrize("weight", [0, "1", None, True, float("nan"), float("inf"), [1]])
def test_odd_weights_of_adapters(base, weight):
    with pytest.raises(
        RecipeError, match=r"weight of an adapter: expected a finite number other than 0|expected a model"
    ):
        loaded(base, ("a", weight))


def test_an_adapter_is_listed_once(tmp_path, base):
    a = adapter(tmp_path / "a", factors(Q, base))
    with pytest.raises(RecipeError, match="adapters are listed twice"):
        loaded(base, (a, 2), a)


def test_a_copy_of_the_base_takes_a_weight_and_a_trained_one_does_not(tmp_path, base):
    found = factors(EMBED.removesuffix(".weight"), base, embedding=True)
    copy = PREFIX + EMBED.replace(".weight", ".base_layer.weight")
    same, own = (
        adapter(tmp_path / n, {**found, copy: t}) for n, t in (("a", tensors(base)[EMBED]), ("b", torch.ones(40, 16)))
    )
    got = merge(tmp_path, loaded(base, (same, 0.5)))
    assert torch.equal(got[EMBED], (tensors(base)[EMBED].float() + update(found, 0.75).T).bfloat16())
    for text, said in (
        (loaded(base, (own, 0.5)), f"weight 0.5 of '{EMBED}': only low-rank updates take a weight"),
        (loaded(base, own, adapter(tmp_path / "c", {PREFIX + EMBED: torch.ones(40, 16)})), "several adapters have"),
    ):
        with pytest.raises(CheckpointError, match=said):
            plan(text)


def test_lengths_are_of_one_update_alone(tmp_path, base):
    dora = factors(Q, base) | {f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(16)}
    a, b = adapter(tmp_path / "a", dora, use_dora=True), adapter(tmp_path / "b", factors(Q, base))
    with pytest.raises(CheckpointError, match="DoRA, which no other update can be added to"):
        plan(loaded(base, a, b))
    with pytest.raises(CheckpointError, match=f"weight 2 of '{Q}.weight': only low-rank updates take a weight"):
        plan(loaded(base, (a, 2)))


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_", ""])
def test_names_that_differ_by_a_prefix(tmp_path, base, prefix):
    names = [Q, DOWN] if prefix else [Q.removeprefix("model."), DOWN.removeprefix("model.")]
    found = factors(Q, base) | factors(DOWN, base)
    renamed = {}
    for name, tensor in found.items():
        for old, new in zip((Q, DOWN), names, strict=True):
            if old in name:
                renamed[name.replace(old, prefix + new)] = tensor
    text = passed(f"{base}+{adapter(tmp_path / 'a', renamed)}")
    got = merge(tmp_path, text)
    want = merge(tmp_path, passed(f"{base}+{adapter(tmp_path / 'b', found)}"), "plain")
    assert [n for n in want if not torch.equal(got[n], want[n])] == []
    assert [w for w in plan(Recipe.load(text)).warnings if "is taken for 'model.layers." in w]


def test_adapters_that_name_layers_each_in_its_own_way(tmp_path, base):
    found = factors(Q, base)
    renamed = {n.replace(PREFIX, f"{PREFIX}language_model."): t for n, t in found.items()}
    a, b = adapter(tmp_path / "a", found), adapter(tmp_path / "b", renamed)
    got = merge(tmp_path, loaded(base, a, b))[f"{Q}.weight"]
    want = one_by_one(tensors(base)[f"{Q}.weight"].float(), update(found), update(found))
    assert torch.equal(got, want.bfloat16())


def tokens(path, rows, delta, name="model.embed_tokens", **more):
    return adapter(
        path, {f"{PREFIX}{name}.token_adapter.trainable_tokens_delta": delta}, trainable_token_indices=rows, **more
    )


@pytest.mark.parametrize("stored", [False, True])
def test_rows_of_tokens_of_tied_ends(tmp_path, stored):
    base, own = model(tmp_path / "base", tie=True), torch.randn(2, 16)
    if stored:
        whole = tensors(base) | {HEAD: tensors(base)[EMBED]}
        base = write(tmp_path / "both", whole, config={"tie_word_embeddings": True})
    got, want = merge(tmp_path, passed(f"{base}+{tokens(tmp_path / 'a', [7, 3], own)}")), tensors(base)
    for name in (EMBED, HEAD)[: 1 + stored]:
        want[name] = want[name].clone()
        want[name][[7, 3]] = own.bfloat16()
    assert got.keys() == want.keys()
    assert [n for n in want if not torch.equal(got[n], want[n])] == []
    assert tied(tmp_path / "out") is True


@pytest.mark.parametrize(
    ("rows", "shape", "said"),
    [
        ([40], (1, 16), "rows up to 40 of float32 [1, 16] do not fit bfloat16 [40, 16]"),
        ([3], (1, 15), "rows up to 3 of float32 [1, 15] do not fit bfloat16 [40, 16]"),
        ([3, 3], (2, 16), "trainable_token_indices in adapter_config.json names tokens twice"),
        ([3], (2, 16), "does not fit 1 tokens of adapter_config.json"),
        ([-1], (1, 16), "rows of tokens, and trainable_token_indices is [-1]"),
        ({"lm_head": [1]}, (1, 16), "rows of tokens, and trainable_token_indices is {'lm_head': [1]}"),
    ],
)
def test_rows_of_tokens_that_fit_nothing(tmp_path, base, rows, shape, said):
    lines = problems(passed(f"{base}+{tokens(tmp_path / 'a', rows, torch.zeros(shape))}"))
    assert len(lines) == 1
    assert said in lines[0]


def test_rows_of_tokens_beside_an_update_are_refused(tmp_path, base):
    path = tokens(tmp_path / "a", [3], torch.zeros(1, 16))
    more = load_file(path / "adapter_model.safetensors")
    more |= factors(EMBED.removesuffix(".weight"), base, embedding=True)
    save_file(more, path / "adapter_model.safetensors")
    assert ["of a tensor that is changed otherwise too" in line for line in problems(passed(f"{base}+{path}"))] == [
        True
    ]


# ---- fused experts ---------------------------------------------------------------------------------------

MOE = "model.layers.0.mlp.experts"


def moe(path, gate_up, down, model_type="toy"):
    """A model of two fused experts; shapes of one expert."""
    g = torch.Generator().manual_seed(1)
    shapes = {f"{MOE}.gate_up_proj": gate_up, f"{MOE}.down_proj": down, "model.norm.weight": ()}
    found = {n: torch.randn(2, *s, generator=g).bfloat16() for n, s in shapes.items()}
    return write(path, found, layers=1, config={"model_type": model_type})


def expert_factors(columns, rows, level="", rank=2):
    g = torch.Generator().manual_seed(columns)
    module = f"{PREFIX}{MOE}{level}"
    a, b = torch.randn(2 * rank, columns, generator=g), torch.randn(rows, 2 * rank, generator=g)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


@pytest.mark.parametrize(
    ("gate_up", "model_type", "turned"),
    [((8, 4), "toy", False), ((4, 8), "gpt_oss", True), ((8, 4), "gpt_oss", True)],
)
def test_square_experts_alone_go_by_what_is_known(tmp_path, gate_up, model_type, turned):
    base, found = moe(tmp_path / "base", gate_up, (4, 4), model_type), expert_factors(4, 4)
    text = passed(f"{base}+{adapter(tmp_path / 'a', found, target_parameters=['experts.down_proj'])}")
    a, b = found.values()
    delta = torch.einsum("ore,eri->eoi", b.reshape(4, 2, 2), a.reshape(2, 2, 4)) * 1.5
    want = tensors(base)[f"{MOE}.down_proj"].float() + (delta.mT if turned else delta)
    got = merge(tmp_path, text)[f"{MOE}.down_proj"]
    assert torch.allclose(got.float(), want, rtol=2**-7, atol=1e-6)


def test_square_experts_of_which_nothing_tells_are_refused(tmp_path):
    base, found = moe(tmp_path / "base", (4, 8), (4, 4)), expert_factors(4, 4)
    lines = problems(passed(f"{base}+{adapter(tmp_path / 'a', found, target_parameters=['experts.down_proj'])}"))
    assert len(lines) == 1
    assert "lora_B [4, 4] x lora_A [4, 4] does not fit bfloat16 [2, 4, 4]" in lines[0]


@pytest.mark.parametrize("turned", [False, True])
def test_square_experts_go_by_their_sibling(tmp_path, turned):
    base = moe(tmp_path / "base", (4, 8) if turned else (8, 4), (4, 4))
    both = expert_factors(4, 8, ".base_layer") | expert_factors(4, 4)
    path = adapter(tmp_path / "a", both, target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    got = merge(tmp_path, passed(f"{base}+{path}"))
    for name, (a, b) in zip(("gate_up_proj", "down_proj"), zip(*[iter(both.values())] * 2, strict=True), strict=True):
        delta = torch.einsum("ore,eri->eoi", b.reshape(len(b), 2, 2), a.reshape(2, 2, -1)) * 1.5
        want = tensors(base)[f"{MOE}.{name}"].float() + (delta.mT if turned else delta)
        assert torch.allclose(got[f"{MOE}.{name}"].float(), want, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("found", "targets", "said"),
    [
        (expert_factors(4, 8), ["experts.down_proj"], "lora_B [8, 4] x lora_A [4, 4] does not fit bfloat16 [2, 4, 6]"),
        (expert_factors(4, 12, rank=1), ["experts.gate_up_proj"], "does not fit bfloat16 [2, 12, 4]"),
        (expert_factors(4, 12, rank=3), ["experts.gate_up_proj"], "does not fit bfloat16 [2, 12, 4]"),
        (expert_factors(4, 12, rank=4), ["experts.gate_up_proj"], "does not fit bfloat16 [2, 12, 4]"),
        (
            expert_factors(4, 12),
            ["experts.gate_up_proj", "experts.down_proj"],
            "wrapped 1 times, and target_parameters",
        ),
        (
            expert_factors(4, 12) | expert_factors(4, 12, ".base_layer"),
            ["experts.gate_up_proj", "experts.other"],
            "which of ['gate_up_proj', 'other'] each update belongs to is not known",
        ),
        (expert_factors(4, 12), ["experts.odd"], f"has no such tensors: '{MOE}.odd'"),
    ],
)
def test_updates_of_experts_that_fit_nothing(tmp_path, found, targets, said):
    base = moe(tmp_path / "base", (12, 4), (4, 6))
    lines = problems(passed(f"{base}+{adapter(tmp_path / 'a', found, target_parameters=targets)}"))
    assert len(lines) == 1
    assert said in lines[0]
