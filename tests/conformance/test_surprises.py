"""Fifteen things that checkpoints, adapters and tools of 2026 do, and that a merge by name gets wrong without a word.

Each test states the naive behaviour, and would fail if that were what happens.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge as fm
from fastmerge.errors import CheckpointError, RecipeError

H, V, E, WIDE = 16, 48, 2, 24
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": H, "num_hidden_layers": 2,
          "num_attention_heads": 2, "vocab_size": V}  # fmt: skip
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(seed, *, layers=2, head=True, dtype=torch.float32):
    out = {"model.embed_tokens.weight": noise(seed, V, H), "model.norm.weight": noise(seed + 1, H)}
    for i in range(layers):
        for j, (name, shape) in enumerate((("self_attn.q_proj", (H, H)), ("mlp.up_proj", (WIDE, H)))):
            out[f"model.layers.{i}.{name}.weight"] = noise(seed + 10 * i + j + 2, *shape)
    out |= {"lm_head.weight": noise(seed + 5, V, H)} if head else {}
    return {n: t.to(dtype) for n, t in out.items()}


def experts(seed, *, fused):
    """A layer of experts in one of two layouts."""
    gate, up, down = noise(seed, E, WIDE, H), noise(seed + 1, E, WIDE, H), noise(seed + 2, E, H, WIDE)
    if fused:
        return {"model.layers.0.mlp.experts.gate_up_proj": torch.cat([gate, up], 1),
                "model.layers.0.mlp.experts.down_proj": down}  # fmt: skip
    each = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {f"model.layers.0.mlp.experts.{e}.{n}.weight": t[e] for e in range(E) for n, t in each.items()}


@pytest.fixture
def save(tmp_path):
    """Writes a model, or an adapter."""
    count = iter(range(100))

    def write(tensors, config=None, *, file=SINGLE, name="config.json"):
        path = tmp_path / f"m{next(count)}"
        path.mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / file, metadata={"format": "pt"})
        (path / name).write_text(json.dumps(CONFIG | (config or {}) if name == "config.json" else config))
        return path

    return write


@pytest.fixture
def merge(tmp_path):
    """Merges; returns the tensors and the configuration of the output."""
    count = iter(range(100))

    def run(method, *models, base=None, **keys):
        text = {"merge_method": method, **({"base_model": str(base)} if base else {})}
        if models:
            text["models"] = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]
        out = tmp_path / f"out{next(count)}"
        fm.merge(text | keys, out, device="cpu")
        return load_file(out / SINGLE), json.loads((out / "config.json").read_text())

    return run


def warnings(method, *models, base=None, **keys):
    listed = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]
    text = {"merge_method": method, "models": listed, **({"base_model": str(base)} if base else {}), **keys}
    return "\n".join(fm.plan(text).warnings)


def test_01_one_model_has_two_layouts(save, merge):
    """Naive: experts find no partner, and the output is a union of both models."""
    models = [save(dense(0) | experts(0, fused=False)), save(dense(9) | experts(9, fused=True))]
    got, _ = merge("linear", *models)
    want = {n: (t + dense(9)[n]) / 2 for n, t in dense(0).items()}
    want |= {n: (t + experts(9, fused=False)[n]) / 2 for n, t in experts(0, fused=False).items()}
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[n], t, atol=1e-6) for n, t in want.items())


def test_02_lost_tensors_are_silent_downstream(save):
    """Naive: the other model's tensor alone, or none; transformers fills it with random values."""
    whole, part = dense(0), {n: t for n, t in dense(9).items() if "layers.1.self_attn" not in n}
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight \(missing from"):
        fm.plan({"merge_method": "linear", "parameters": {"weight": 1},
                 "models": [{"model": str(save(t))} for t in (whole, part)]})  # fmt: skip
    buffers = {"model.rotary_emb.inv_freq": noise(1, 4), "v_head.summary.weight": noise(2, 1, H)}
    model, plain = save(whole | buffers), save(whole)
    plan = fm.plan({"merge_method": "linear", "models": [{"model": str(m)} for m in (plain, model)],
                    "parameters": {"weight": 1}})  # fmt: skip
    account = plan.account.models[str(model)]
    assert account.keys() == (whole | buffers).keys()
    dropped = {n: what for n, what in account.items() if what.startswith("dropped")}
    assert dropped.keys() == buffers.keys()
    assert "a buffer" in dropped["model.rotary_emb.inv_freq"]
    assert "a value head" in dropped["v_head.summary.weight"]


def test_03_lists_by_layer(save, merge):
    """Naive: a stale list, which transformers 5 refuses, or none, with other kinds of attention."""
    kinds = ["sliding_attention", "full_attention", "linear_attention", "full_attention"]
    config = {"num_hidden_layers": 4, "layer_types": kinds, "mlp_only_layers": [0, 3], "first_k_dense_replace": 2,
              "model_type": "moe"}  # fmt: skip
    model = str(save(dense(0, layers=4), config))

    def cut(*ranges):
        return merge("passthrough", slices=[{"sources": [{"model": model, "layer_range": r}]} for r in ranges])

    with pytest.raises(RecipeError, match="first_k_dense_replace"):
        cut([0, 3], [0, 2])
    _, said = cut([0, 2], [1, 3], [3, 4])
    assert said["first_k_dense_replace"] == 3
    assert said["num_hidden_layers"] == 5
    assert said["layer_types"] == [kinds[i] for i in (0, 1, 1, 2, 3)]
    assert said["mlp_only_layers"] == [0, 4]


def test_04_pissa_changed_the_base(save, merge):
    """Naive: W + s B A, where the base that was trained is no longer W."""
    base = save(dense(0))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): noise(1, 2, H), name.format("B"): noise(2, H, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    file = {"file": "adapter_model.safetensors", "name": "adapter_config.json"}
    naive = dense(0)["model.layers.0.self_attn.q_proj.weight"] + noise(2, H, 2) @ noise(1, 2, H)
    plain = save(tensors, config, **file)
    got, _ = merge("linear", f"{base}+{plain}")
    assert torch.allclose(got["model.layers.0.self_attn.q_proj.weight"], naive, atol=1e-5)
    for init in ("pissa", "olora"):
        trained = save(tensors, config | {"init_lora_weights": init}, **file)
        try:
            got, _ = merge("linear", f"{base}+{trained}")
        except CheckpointError as e:
            assert init in str(e)
        else:
            assert not torch.allclose(got["model.layers.0.self_attn.q_proj.weight"], naive, atol=1e-3)


def test_05_adapters_of_fused_experts_do_not_name_their_parameter(save, merge):
    """Naive: ``experts.lora_A`` matches nothing, and the base is written unchanged."""
    there = experts(0, fused=True)
    there |= {n.replace("layers.0", "layers.1"): t + 1 for n, t in there.items()}
    base = save(dense(0) | there, {"model_type": "mixtral"})
    at = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    a, b = noise(1, 2 * E, WIDE), noise(2, H, 2 * E)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.down_proj"]}
    adapter = save(
        {at.format("A"): a, at.format("B"): b}, config, file="adapter_model.safetensors", name="adapter_config.json"
    )
    got, _ = merge("linear", f"{base}+{adapter}")
    name = "model.layers.0.mlp.experts.down_proj"
    # The expert is the slowest index of A, and the fastest of B.
    update = torch.einsum("hre,erw->ehw", b.view(H, 2, E), a.view(E, 2, WIDE))
    assert torch.allclose(got[name], there[name] + update, atol=1e-5)
    assert all(torch.equal(got[n], t) for n, t in there.items() if n != name)


def test_06_vision_towers_have_two_names(save, merge):
    """Naive: 39 tensors of the tower are in the output twice, or missing."""

    def seeing(seed, tower):
        vision = {f"{tower}.encoder.layers.{i}.fc1.weight": noise(seed + i, H, H) for i in range(3)}
        return {f"language_model.{n}": t for n, t in dense(seed).items()} | vision

    text = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 3}}
    new, old = (save(seeing(s, t), text) for s, t in ((0, "vision_tower"), (9, "vision_tower.vision_model")))
    for models in ((new, old), (old, new)):
        got, _ = merge("linear", *models)
        first, other = (load_file(m / SINGLE) for m in models)
        assert got.keys() == first.keys()
        name = next(n for n in first if "layers.2.fc1" in n)
        theirs = next(n for n in other if "layers.2.fc1" in n)
        assert torch.allclose(got[name], (first[name] + other[theirs]) / 2, atol=1e-6)


def test_07_configurations_have_two_dialects(save, merge):
    """Naive: a conflict where there is none, or a configuration written anew in one dialect."""
    old = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    new = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}, "pad_token_id": None}
    a, b = save(dense(0), old), save(dense(9), new)
    assert "rope" not in warnings("linear", a, b)
    for first, dialect in ((a, old), (b, new)):
        _, said = merge("linear", first, b if first is a else a)
        assert {k: said.get(k, "") for k in dialect} == dialect
        assert "rope_parameters" in said or "rope_theta" in said
        assert ("rope_parameters" in said) == (dialect is new)
    other = save(dense(9), new | {"rope_parameters": {**new["rope_parameters"], "rope_theta": 10000.0}})
    assert "rope_theta: 500000.0" in warnings("linear", a, other)
    assert "10000.0" in warnings("linear", a, other)


def test_08_the_configuration_s_type_rules(save, merge):
    """Naive: ``dtype`` stays the base's, and transformers rounds to it; tensors that must be float32 are rounded."""
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    config = {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "vision_config": {"torch_dtype": "bfloat16"}}
    models = [save(dense(s, dtype=torch.bfloat16) | {name: noise(s, 4)}, config) for s in (0, 9)]
    got, said = merge("linear", *models, dtype="float32")
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert said["dtype"] == said["text_config"]["dtype"] == said["vision_config"]["torch_dtype"] == "float32"
    got, said = merge("linear", *models, dtype="bfloat16")
    assert got.pop(name).dtype is torch.float32
    assert {t.dtype for t in got.values()} == {torch.bfloat16}
    assert said["dtype"] == "bfloat16"
    whole = [save(dense(s), {"dtype": "float32"}) for s in (0, 9)]
    got, said = merge("linear", *whole, dtype="bfloat16")
    assert {t.dtype for t in got.values()} == {torch.bfloat16}, "nothing of a float32 model asks to stay so"


def test_09_codes_look_like_tensors(save, merge):
    """Naive: the mean of codes, which loads; or scales that are merged as tensors of their own."""
    at = "model.layers.0.self_attn.q_proj.weight"

    def coded(seed, scale):
        codes = (dense(seed)[at] / scale).to(torch.float8_e4m3fn)
        tensors = dense(seed) | {at: codes, f"{at}_scale_inv": torch.full((1, 1), scale)}
        return tensors, codes.float() * torch.tensor(scale)

    (one, first), (two, second), plain = coded(0, 0.01), coded(9, 0.25), dense(9)[at]
    for config in ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, {}):
        for other, value in ((two, second), (dense(9), plain)):
            models = [save(one, config), save(other, config if other is two else None)]
            for order in (models, models[::-1]):
                got, said = merge("linear", *order, dtype="float32")
                assert torch.allclose(got[at], (first + value) / 2, rtol=1e-5, atol=1e-6)
                assert got.keys() == dense(0).keys()
                assert "quantization_config" not in said
    blocks = {f"model.layers.0.mlp.experts.gate_up_proj_{n}": torch.zeros(s, dtype=torch.uint8)
              for n, s in (("blocks", (E, 2 * WIDE, 1, 16)), ("scales", (E, 2 * WIDE, 1)))}  # fmt: skip
    lost = dense(0) | {"model.layers.0.mlp.experts.gate_up_proj_blocks": noise(3, E, H, 2 * WIDE)}
    for other in (dense(0) | blocks, lost):
        with pytest.raises(CheckpointError, match="under the names of MXFP4 blocks"):
            merge("linear", save(other), save(lost))


def test_10_ties_are_what_the_files_say(save, merge):
    """Naive: a random head, or one that no longer is the embedding; the default of a model type decides."""
    tied, untied = save(dense(0, head=False), {"tie_word_embeddings": True}), save(dense(9))
    got, said = merge("linear", tied, untied)
    embedding = dense(0)["model.embed_tokens.weight"]
    assert torch.allclose(got["lm_head.weight"], (embedding + dense(9)["lm_head.weight"]) / 2, atol=1e-6)
    assert said["tie_word_embeddings"] is False
    _, said = merge("linear", save(dense(0, head=False)), save(dense(9, head=False)))
    assert said["tie_word_embeddings"] is True, "written, though neither says it"
    _, said = merge("linear", save(dense(0)), untied)
    assert said["tie_word_embeddings"] is False
    text = {"text_config": {"tie_word_embeddings": True}}
    _, said = merge("linear", save(dense(0), text), save(dense(9), text))
    assert said["tie_word_embeddings"] is False, "the key at the top decides"
    lost = save(dense(9, head=False), {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match="head is not tied"):
        merge("linear", untied, lost)


def test_11_adapters_bring_whole_tensors(save, merge):
    """Naive: ``base_layer`` and ``modules_to_save`` are unknown keys, and left out."""
    base = save(dense(0, head=False), {"tie_word_embeddings": True})
    head, at = noise(7, V, H), "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {at.format("A"): noise(1, 2, H), at.format("B"): noise(2, H, 2), "base_model.model.lm_head.weight": head}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"],
              "modules_to_save": ["lm_head"]}  # fmt: skip
    adapter = save(tensors, config, file="adapter_model.safetensors", name="adapter_config.json")
    got, said = merge("linear", f"{base}+{adapter}")
    assert torch.equal(got["lm_head.weight"], head)
    assert torch.equal(got["model.embed_tokens.weight"], dense(0)["model.embed_tokens.weight"])
    assert said["tie_word_embeddings"] is False


def test_12_divisors_of_zero_are_refused(save, merge):
    """Naive: a model of NaN or infinities, with exit 0."""
    models = [save(dense(s)) for s in (0, 9)]
    for weights in ((1, -1), (0, 0)):
        listed = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
        with pytest.raises(RecipeError, match="sum"):
            merge("linear", models=listed)
    merged, _ = merge("linear", models=listed[:1] + [{"model": str(models[1]), "parameters": {"weight": 1e-9}}])
    assert all(t.isfinite().all() for t in merged.values())


def test_13_conventions_are_named():
    """Naive: one of several rescales, without a word which."""
    base, tuned = torch.zeros(4096), noise(0, 4096)
    parameters = {"weight": [1.0], "density": 0.3}
    call = {"base_index": 0, "seed": 3}
    theirs, papers = (
        fm.merge_tensors([base, tuned], "dare_linear", parameters=parameters, **call, preset=p) for p in (None, "paper")
    )
    kept = papers != 0
    assert torch.equal(kept, theirs != 0)
    drawn = max(1, int(0.3 * 65536 + 0.5)) / 65536
    assert torch.allclose(papers[kept], tuned[kept] / drawn, rtol=1e-5)
    ratio = tuned.abs().sum() / tuned[kept].abs().sum()
    assert torch.allclose(theirs[kept], tuned[kept] * ratio, rtol=1e-4)
    assert abs(ratio - 1 / drawn) > 1e-3


def test_14_extra_layers_and_stale_files(save, merge, tmp_path):
    """Naive: layers that predict further tokens are an error, or lost while the configuration still counts them."""
    extra = {"model.layers.2.eh_proj.weight": noise(4, H, 2 * H)}
    counted = {"num_nextn_predict_layers": 1}
    base, tuned = save(dense(0) | extra, counted), save(dense(9), counted)
    got, said = merge("task_arithmetic", tuned, base=base)
    assert torch.equal(got["model.layers.2.eh_proj.weight"], extra["model.layers.2.eh_proj.weight"])
    assert said["num_nextn_predict_layers"] == 1
    got, said = merge("task_arithmetic", base, base=tuned)
    assert got.keys() == dense(9).keys()
    assert said["num_nextn_predict_layers"] == 0
    text = {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": str(m)} for m in (base, tuned)]}
    out = tmp_path / "again"
    fm.merge(text, out, device="cpu")
    assert (out / SINGLE).exists()
    (out / "stale.bin").write_text("x")
    fm.merge(text, out, device="cpu", shard_size=4000, overwrite=True)
    assert not (out / SINGLE).exists(), "a single file wins over shards"
    assert not (out / "stale.bin").exists()
    index = json.loads((out / INDEX).read_text())
    shards = [load_file(f) for f in out.glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in shard.values())
    assert set(index["weight_map"].values()) == {f.name for f in out.glob("*.safetensors")}


def test_15_the_same_bytes_and_rows_of_padding(save, merge, tmp_path):
    """Naive: metadata in an order of chance; 64 rows beside 128 of one tokenizer stop the merge."""
    models = [save(dense(s)) for s in (0, 9)]
    text = {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": str(m)} for m in models]}
    for i in range(3):
        fm.merge(text, tmp_path / f"same{i}", device="cpu")
    files = {(tmp_path / f"same{i}" / SINGLE).read_bytes() for i in range(3)}
    assert len(files) == 1
    padded = dense(9)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padded[name] = torch.cat([padded[name], torch.zeros(16, H)])
    tokens = {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(V)}, "merges": []}, "added_tokens": []}
    models[1] = save(padded, {"vocab_size": V + 16})
    for model in models:
        (model / "tokenizer.json").write_text(json.dumps(tokens))
    got, said = merge("linear", *models)
    assert got["lm_head.weight"].shape[0] == said["vocab_size"] >= V
    want = (dense(0)["lm_head.weight"] + dense(9)["lm_head.weight"]) / 2
    assert torch.allclose(got["lm_head.weight"][:V], want, atol=1e-6)
