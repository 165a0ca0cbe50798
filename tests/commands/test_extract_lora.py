"""Adapters that are extracted: what peft makes of them, and how near they come to the exact truncated SVD."""

import json
import warnings

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.cli import main
from fastmerge.commands.mergekit import svd
from fastmerge.commands.mergekit.extract import Options, extract
from fastmerge.commands.mergekit.single import SingleFile, room
from fastmerge.dtypes import F32
from fastmerge.errors import CheckpointError, OutputError, RecipeError
from tests import tiny


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of torch that wait for each other on busy cores take longer than these matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spectrum(kind, m, n):
    """A matrix whose singular values fall as named; ``flat`` is noise, the hardest: the values hardly differ."""
    g = torch.Generator().manual_seed(m * n)
    if kind == "flat":
        return torch.randn(m, n, generator=g)
    u, _ = torch.linalg.qr(torch.randn(m, 200, generator=g))
    v, _ = torch.linalg.qr(torch.randn(n, 200, generator=g))
    s = {
        "power": torch.arange(1, 201.0) ** -0.5,
        "steep": 0.8 ** torch.arange(200.0),
        "low": (torch.arange(200) < 5) * 3.0,
    }
    return (u * s[kind]) @ v.T + 1e-5 * torch.randn(m, n, generator=g)


def error(matrix, u, s, vh):
    return float((matrix - (u * s) @ vh).norm())


@pytest.mark.parametrize("kind", ["flat", "power", "steep", "low"])
@pytest.mark.parametrize("shape", [(384, 512), (512, 384)])
def test_the_error_is_that_of_the_exact_truncation(kind, shape):
    matrix = spectrum(kind, *shape)
    u, s, vh = svd.truncated(matrix, 8, name="w")
    exact = torch.linalg.svd(matrix, full_matrices=False)
    best = error(matrix, exact[0][:, :8], exact[1][:8], exact[2][:8])
    assert error(matrix, u, s, vh) <= 1.001 * best + 1e-6 * float(matrix.norm())
    assert torch.all(s <= exact[1][:8] * (1 + 1e-5)), "a subspace holds no more than the matrix"
    torch.testing.assert_close(s, exact[1][:8], rtol=0.03 if kind == "flat" else 2e-3, atol=1e-4)
    torch.testing.assert_close(u.T @ u, torch.eye(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(vh @ vh.T, torch.eye(8), rtol=0, atol=1e-4)


def test_the_same_at_every_run_and_another_start_by_name_and_seed():
    matrix = spectrum("flat", 384, 512)
    first, again = (svd.truncated(matrix, 4, name="w") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in (svd.truncated(matrix, 4, name="v"), svd.truncated(matrix, 4, name="w", seed=1)):
        assert not torch.equal(first[1], other[1])


def test_small_matrices_and_exact_ones_are_decomposed_whole():
    for matrix, more in ((torch.randn(20, 30), {}), (spectrum("flat", 384, 512), {"exact": True})):
        u, s, vh = svd.truncated(matrix, 8, name="w", **more)
        want = torch.linalg.svd(matrix, full_matrices=False)
        assert all(torch.equal(a, b) for a, b in zip((u, s, vh), (want[0][:, :8], want[1][:8], want[2][:8])))


def test_ranks_are_at_most_those_of_the_matrix():
    matrix = torch.randn(3, 40)
    u, s, vh = svd.truncated(matrix, 64, name="w")
    assert (u.shape, s.shape, vh.shape) == ((3, 3), (3,), (3, 40))
    assert error(matrix, u, s, vh) < 1e-4


def test_a_file_written_tensor_by_tensor_loads(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    names = [("x", 2), ('q"é', 2), ("empty", 1)]
    with SingleFile(tmp_path / "f.safetensors", room(names)) as file:
        for name, t in zip(names, (x, x + 1, torch.zeros(0))):
            file.add(name[0], F32, t.shape, memoryview(t.numpy().tobytes()))
    found = load_file(tmp_path / "f.safetensors")
    assert torch.equal(found["x"], x)
    assert torch.equal(found['q"é'], x + 1)
    assert found["empty"].shape == (0,)


def qwen(**more):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **more))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16, **ids))


@pytest.fixture(scope="module", params=["qwen", "gpt2"])
def models(request, tmp_path_factory):
    """A base and a fine-tune whose matrices changed by rank 4, all else as it happened."""
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = {"qwen": qwen, "gpt2": gpt2}[request.param]()
        model.save_pretrained(root / "base")
        with torch.no_grad():
            for p in model.parameters():
                change = (
                    torch.randn(p.shape[0], 4) @ torch.randn(4, p.shape[1]) if p.dim() == 2 else torch.randn_like(p)
                )
                p.add_(0.02 * change)
        model.save_pretrained(root / "tuned")
    return root


def applied(root, adapter):
    """The base with the adapter, as peft merges them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        return PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("flags", [(), ("--no-distribute-scale",), ("--exact", "--save-module", "o_proj")], ids=str)
def test_peft_makes_the_fine_tune_of_it(models, tmp_path, flags):
    names = ("--model", models / "tuned", "--base-model", models / "base", "--out-path", tmp_path / "lora")
    done = CliRunner().invoke(main, ["mergekit-extract-lora", *map(str, names), "--max-rank", "8", *flags])
    assert done.exit_code == 0, done.output
    assert "100.0 % of their squared change" in done.output
    got = applied(models, tmp_path / "lora")
    want = load_file(models / "tuned" / "model.safetensors")
    assert {
        n: float((got[n] - t).abs().max()) for n, t in want.items() if not torch.allclose(got[n], t, atol=2e-6)
    } == {}
    if "lm_head.weight" not in want:
        assert torch.equal(got["lm_head.weight"], want["transformer.wte.weight"]), "the head is tied"
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert sorted(f.name for f in (tmp_path / "lora").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_this_engine_merges_it_too(models, tmp_path):
    extract(Options(str(models / "tuned"), str(models / "base"), str(tmp_path / "lora"), max_rank=8), card=False)
    assert not (tmp_path / "lora" / "README.md").exists()
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{models / 'base'}+{tmp_path / 'lora'}"}]}
    fastmerge.merge(recipe, tmp_path / "out", device="cpu")
    got, want = (load_file(p / "model.safetensors") for p in (tmp_path / "out", models / "tuned"))
    assert {
        n: float((got[n] - t).abs().max()) for n, t in want.items() if not torch.allclose(got[n], t, atol=2e-6)
    } == {}


def family(root, change):
    """tiny's base, and a fine-tune that ``change`` makes of its tensors."""
    base = tiny.state(0, dtype=torch.float32)
    tuned = {n: t.clone() for n, t in base.items()}
    change(tuned)
    return tiny.write(root / "base", base), tiny.write(root / "tuned", tuned)


def lora(root, change, **options):
    """What is extracted, and its tensors."""
    base, tuned = family(root, change)
    found = extract(Options(str(tuned), str(base), str(root / "lora"), **options))
    return found, load_file(root / "lora" / "adapter_model.safetensors")


Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def one_matrix(state):
    state[f"{Q}.weight"] += torch.outer(torch.ones(64), torch.arange(64.0))


def test_what_is_unchanged_is_left_out(tmp_path):
    found, tensors = lora(tmp_path, one_matrix, max_rank=4)
    assert found.ranks == {Q: 4}
    assert (found.unchanged, found.whole) == (20, ())
    assert set(tensors) == {f"base_model.model.{Q}.lora_{s}.weight" for s in "AB"}
    assert found.kept == pytest.approx(1)


def test_small_singular_values_are_left_out(tmp_path):
    def change(state):
        one_matrix(state)
        state[f"{UP}.weight"] += 1e-3 * torch.eye(192, 64)

    found, tensors = lora(tmp_path, change, max_rank=4, sv_epsilon=0.01)
    assert found.ranks == {Q: 1}, "and a module that has none is left out"
    assert tensors[f"base_model.model.{Q}.lora_A.weight"].shape == (1, 64)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["target_modules"]) == (1, {}, ["q_proj"])


def everything(state):
    g = torch.Generator().manual_seed(1)
    for tensor in state.values():
        tensor.add_(0.01 * torch.randn(tensor.shape, generator=g))


@pytest.mark.parametrize(
    ("options", "low", "whole"),
    [
        ({}, 14, {"embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"}),
        ({"embed_lora": True}, 16, {"norm", "input_layernorm", "post_attention_layernorm"}),
        ({"skip_undecomposable": True}, 14, {"embed_tokens", "lm_head"}),
        ({"exclude_regex": ("norm", "embed", "head")}, 14, set()),
        ({"include_regex": ("q_proj", "k_proj"), "exclude_regex": ("lm_head",)}, 4, {"embed_tokens"}),
        ({"modules_to_save": ("v_proj",), "exclude_regex": ("norm", "proj")}, 0, {"v_proj", "embed_tokens", "lm_head"}),
    ],
    ids=("usual", "embeddings", "low rank only", "excluded", "included", "saved"),
)
def test_which_modules_become_what(tmp_path, options, low, whole):
    found, tensors = lora(tmp_path, everything, max_rank=4, **options)
    assert len(found.ranks) == low
    assert set(found.whole) == whole
    assert sum(".lora_" in n for n in tensors) == 2 * low


def test_an_embedding_that_grew_is_kept_whole(tmp_path):
    def change(state):
        one_matrix(state)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.cat([state[name], torch.zeros(8, 64)])

    found, tensors = lora(tmp_path, change, embed_lora=True)
    assert set(found.whole) == {"embed_tokens", "lm_head"}
    assert tensors["base_model.model.lm_head.weight"].shape == (308, 64)


def strange(state):
    del state["model.norm.weight"]
    state["odd.weight"] = torch.ones(3)
    state[f"{UP}.weight"] = torch.ones(5, 64)


def test_models_that_do_not_belong_together(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        lora(tmp_path, strange)
    said = "\n".join(caught.value.problems)
    assert "lacks tensors" in said
    assert "'model.norm.weight'" in said
    assert "'odd.weight'" in said
    assert f"{UP}.weight [5, 64], [192, 64] in the base" in said
    assert not (tmp_path / "lora").exists()


def test_changes_that_no_adapter_can_hold(tmp_path):
    base, tuned = family(tmp_path, one_matrix)
    for path, value in ((base, 0.0), (tuned, 1.0)):
        save_file(
            {**load_file(path / "model.safetensors"), "experts.stack": torch.full((2, 3, 4), value)},
            path / "model.safetensors",
        )
    options = Options(str(tuned), str(base), str(tmp_path / "lora"))
    with pytest.raises(CheckpointError, match="no adapter can hold them: 'experts.stack'; --skip-undecomposable"):
        extract(options)
    assert extract(options._replace(skip_undecomposable=True)).ranks.keys() == {Q}
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (CheckpointError, "nothing to extract", {}),
        (RecipeError, "no regular expression", {"exclude_regex": ("(",)}),
        (RecipeError, "leave no module", {"exclude_regex": (".",)}),
    ],
)
def test_nothing_to_do(tmp_path, kind, message, options):
    base, tuned = family(tmp_path, lambda state: None)
    with pytest.raises(kind, match=message):
        extract(Options(str(tuned), str(base), str(tmp_path / "lora"), **options))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base", "tuned"]


def test_outputs_and_values_that_are_refused(tmp_path):
    base, tuned = family(tmp_path, one_matrix)
    options = Options(str(tuned), str(base), str(tmp_path / "lora"), max_rank=4)
    extract(options)
    with pytest.raises(OutputError, match="exists; --overwrite replaces it"):
        extract(options)
    assert extract(options._replace(max_rank=2), overwrite=True).ranks == {Q: 2}
    with pytest.raises(OutputError, match="holds the input"):
        extract(options._replace(out_path=str(base)), overwrite=True)
    state = load_file(tuned / "model.safetensors")
    state[f"{Q}.weight"][0, 0] = torch.inf
    save_file(state, tuned / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{Q}.weight: NaN or Inf"):
        extract(options._replace(out_path=str(tmp_path / "more")))
