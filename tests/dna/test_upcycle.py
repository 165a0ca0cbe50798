"""A dense model as a mixture of experts: the same function, whatever it is made from and whatever makes it."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import fastmerge as fm
from fastmerge.checkpoint import Checkpoint
from fastmerge.dna import UpcyclingConfig, attach_moe_aux_loss, plan_upcycle, upcycle_dense_to_moe
from fastmerge.dna.parent import Parent
from fastmerge.dna.results import module, state_dict, write
from fastmerge.errors import CheckpointError, RecipeError, ShapeError
from fastmerge.keys import tensor_key
from fastmerge.ops.redraw import chosen
from tests.dna import zoo

PAIRS = [
    ("llama", "mixtral"),
    ("llama tied", "mixtral"),
    ("mistral", "mixtral"),
    ("phi3", "mixtral"),
    ("qwen2", "qwen2_moe"),
    ("llama", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
    ("qwen3 tied", "qwen3_moe"),
    ("olmo2", "flex_olmo"),
    ("granite", "granitemoe"),
    ("llama", "glm4_moe"),
    ("qwen3", "glm4_moe"),
    ("qwen3", "dots1"),
    ("llama", "solar_open"),
]
FINE = {"granularity": 2, "num_experts": 8, "num_experts_per_token": 4}
EXACT = 1e-5
HAVE_SHARED = {"qwen2_moe", "glm4_moe", "dots1", "solar_open"}


def config(**given):
    return UpcyclingConfig(**{"num_experts": 4, "expert_init_noise": 0.0, "router_init_std": 1.0, **given})


def tensors(path):
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


# ---- the same function -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "target"), [("llama tied", "mixtral"), ("qwen2", "qwen2_moe"), ("olmo2", "flex_olmo")]
)
def test_a_mixture_on_disk_is_the_dense_model(tmp_path, kind, target):
    dense = zoo.saved(kind, tmp_path / "dense")
    report = upcycle_dense_to_moe(tmp_path / "dense", config(), out=tmp_path / "out")
    assert report.out == str(tmp_path / "out")
    new = zoo.load(tmp_path / "out")
    assert new.config.model_type == target
    assert zoo.difference(dense, new) <= EXACT
    assert torch.equal(zoo.generated(dense), zoo.generated(new))
    new.save_pretrained(tmp_path / "again")
    written = tensors(tmp_path / "out")
    assert equal(written, tensors(tmp_path / "again"))
    draft = plan_upcycle(Parent.open(zoo.load(tmp_path / "dense")), config())
    assert equal(state_dict(draft), written)
    facts = json.loads((tmp_path / "out" / "fastmerge_report.json").read_text())
    assert facts["matched"] == {"layers": [0, 1, 2], "mlp_tensors": 9}
    assert facts["exact"]


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("llama", {"granularity": 4, "num_experts": 16, "num_experts_per_token": 8, "fused": True}),
        ("llama", {"target_arch": "glm4_moe", "shared": "half", "router_init": "uniform", **FINE}),
        ("qwen2", {"shared": "half", "router_init": "zero", **FINE}),
        ("qwen2", {"shared": "dense", "expert_init_noise": 0.5}),
    ],
)
def test_every_exact_layout(kind, given):
    dense = zoo.model(kind)
    draft = plan_upcycle(Parent.open(dense), config(**given))
    assert zoo.difference(dense, module(draft)) <= EXACT
    assert draft.facts["exact"]


@pytest.mark.parametrize(
    ("kind", "given", "wrong"),
    [
        ("qwen2", {}, {"norm_topk_prob": False}),
        ("llama", {"granularity": 2, "weight_scale": "none"}, {}),
        ("llama", {"granularity": 2, "weight_scale": "megatron"}, {}),
        ("llama", {"copy_all_ffn_weights": False}, {}),
        ("llama", {"target_arch": "glm4_moe"}, {"partial_rotary_factor": 0.5}),
    ],
)
def test_what_is_not_exact_fails_the_gate(kind, given, wrong):
    dense = zoo.model(kind)
    draft = plan_upcycle(Parent.open(dense), config(**given))
    assert draft.facts["exact"] == bool(wrong)
    draft.config.update(wrong)
    draft.config["rope_parameters"].update({k: v for k, v in wrong.items() if "rotary" in k})
    assert zoo.difference(dense, module(draft)) > 1e-3


def test_a_shared_expert_that_is_the_dense_one_as_are_the_others_fails_the_gate():
    """mergekit-moe's layout."""
    dense = zoo.model("qwen2")
    draft = plan_upcycle(Parent.open(dense), config())
    state = state_dict(draft)
    for layer in range(3):
        down = state[f"model.layers.{layer}.mlp.experts.0.down_proj.weight"]
        state[f"model.layers.{layer}.mlp.shared_expert.down_proj.weight"] = down.clone()
    from fastmerge.dna.modules import build

    assert zoo.difference(dense, build(draft.config, state)) > 1e-2


def test_in_bfloat16_copies_are_bit_identical(tmp_path):
    zoo.saved("llama", tmp_path, dtype=torch.bfloat16)
    dense = zoo.load(tmp_path, torch.bfloat16)  # with rotary frequencies in float32, as every loaded model has
    for given in ({}, {"num_experts_per_token": 3}, {"target_arch": "qwen2_moe", "shared": "dense"}):
        new = upcycle_dense_to_moe(dense, config(**given))
        assert new.dtype == torch.bfloat16
        assert torch.equal(zoo.logits(dense), zoo.logits(new))


@pytest.mark.conformance
@pytest.mark.parametrize(("kind", "target"), PAIRS)
def test_every_twin(tmp_path, kind, target):
    dense = zoo.saved(kind, tmp_path / "dense")
    fine = {"granularity": 4, "num_experts": 16, "num_experts_per_token": 8}
    layouts = [{"shared": s} for s in ("zero", "half", "dense")] if target in HAVE_SHARED else [{}]
    for i, given in enumerate([*layouts, fine, {"fused": True}, {**fine, **layouts[-1], "fused": True}]):
        asked = config(target_arch=target, **given)
        out = tmp_path / f"out{i}"
        write(plan_upcycle(Parent.open(tmp_path / "dense"), asked), out)
        new = zoo.load(out)
        assert zoo.difference(dense, new) <= EXACT
        if i:
            continue
        assert torch.equal(zoo.generated(dense), zoo.generated(new))
        assert torch.equal(zoo.generated(dense, cache=False), zoo.generated(new))
        new.save_pretrained(tmp_path / "again")
        assert equal(tensors(out), tensors(tmp_path / "again"))
        assert equal(tensors(out), state_dict(plan_upcycle(Parent.open(dense), asked)))
        assert {"num_experts", "n_routed_experts"} & Checkpoint.open(out).config.keys() or target in (
            "mixtral",
            "granitemoe",
        )


@pytest.mark.conformance
@pytest.mark.parametrize(("kind", "target"), [p for p in PAIRS if p[0] != "llama tied"])
def test_every_twin_in_bfloat16(tmp_path, kind, target):
    """Within three times what bfloat16 itself costs the dense model."""
    zoo.saved(kind, tmp_path, dtype=torch.bfloat16)
    dense, exact = zoo.load(tmp_path, torch.bfloat16), zoo.load(tmp_path)
    new = upcycle_dense_to_moe(dense, config(target_arch=target))
    assert zoo.difference(dense, new) <= 3 * zoo.difference(exact, dense)


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("kind", "target", "settings"),
    [
        ("qwen2", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", "dots1", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("phi3", "mixtral", {"sliding_window": 8}),
        ("llama", "mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4}}),
        ("llama", "glm4_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
        ("olmo2", "flex_olmo", {"attention_bias": True}),
        ("qwen3", "qwen3_moe", {"attention_bias": True}),
        ("granite", "granitemoe", {"attention_bias": True}),
    ],
)
def test_windows_positions_and_biases_come_along(tmp_path, kind, target, settings):
    dense = zoo.saved(kind, tmp_path / "dense", **settings)
    upcycle_dense_to_moe(tmp_path / "dense", config(target_arch=target), out=tmp_path / "out")
    assert zoo.difference(dense, zoo.load(tmp_path / "out")) <= EXACT


def test_the_dialect_of_transformers_4_means_the_same(tmp_path):
    dense = zoo.saved(
        "llama", tmp_path / "dense", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4}
    )
    path = tmp_path / "dense" / "config.json"
    said = json.loads(path.read_text())
    rope = said.pop("rope_parameters")
    said |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": "linear", "factor": 4.0}}
    for key in ("rms_norm_eps", "head_dim", "bos_token_id", "pad_token_id"):
        said.pop(key)
    path.write_text(json.dumps(said))
    upcycle_dense_to_moe(tmp_path / "dense", config(), out=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 2e4
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert zoo.difference(dense, zoo.load(tmp_path / "out")) <= EXACT


# ---- which layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "target", "layers", "sparse"),
    [
        ("qwen2", "qwen2_moe", "every_2", [1]),
        ("qwen2", "qwen2_moe", [2, 0], [0, 2]),
        ("qwen2", "qwen2_moe", 3, [2]),
        ("llama", "glm4_moe", [1, 2], [1, 2]),
    ],
)
def test_some_layers_stay_dense(tmp_path, kind, target, layers, sparse):
    dense = zoo.saved(kind, tmp_path / "dense")
    upcycle_dense_to_moe(tmp_path / "dense", config(target_arch=target, layers=layers), out=tmp_path / "out")
    new = zoo.load(tmp_path / "out")
    assert [i for i, layer in enumerate(new.model.layers) if hasattr(layer.mlp, "experts")] == sparse
    assert zoo.difference(dense, new) <= EXACT


# ---- noise and new units -----------------------------------------------------------------------------------


def test_noise_is_in_units_of_each_tensor_and_spares_the_first_expert():
    dense = zoo.model("llama", dtype=torch.bfloat16)
    before = dense.state_dict()
    state = state_dict(plan_upcycle(Parent.open(dense), config(expert_init_noise=0.1, seed=5)))
    for role, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        source = before[f"model.layers.1.mlp.{role}_proj.weight"]
        want = fm.replicate_experts(source, 4, noise=0.1, name=f"model.layers.1.{role}", seed=5)
        got = [state[f"model.layers.1.block_sparse_moe.experts.{e}.{w}.weight"] for e in range(4)]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(got[0], source)
    absolute = plan_upcycle(Parent.open(dense), config(expert_init_noise=0.1, noise_mode="absolute", first_clean=False))
    name = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    apart = state_dict(absolute)[name].float() - before["model.layers.1.mlp.gate_proj.weight"].float()
    assert 0.09 < apart.std() < 0.11


@pytest.mark.parametrize("given", [{"expert_init_noise": 0.1}, {"drop_ratio": 0.5}])
def test_disk_memory_and_definition_give_the_same_bytes(tmp_path, given):
    dense = zoo.saved("qwen2", tmp_path / "dense", dtype=torch.bfloat16)
    given |= {"granularity": 4, "num_experts": 8, "num_experts_per_token": 4, "shared": "half"}
    asked = config(router_init="uniform", **given)
    draft = plan_upcycle(Parent.open(tmp_path / "dense"), asked)
    write(draft, tmp_path / "out")
    write(draft, tmp_path / "small", memory="20MB", backend="reference")
    found = tensors(tmp_path / "out")
    assert equal(found, tensors(tmp_path / "small"))
    assert equal(found, state_dict(plan_upcycle(Parent.open(dense), asked)))
    other = state_dict(plan_upcycle(Parent.open(dense), config(router_init="uniform", seed=1, **given)))
    clean = [f"model.layers.0.mlp.experts.{e}.gate_proj.weight" for e in (0, 3, 4)]
    assert [torch.equal(found[n], other[n]) for n in clean] == [True, True, False]
    assert not torch.equal(found["model.layers.0.mlp.gate.weight"], other["model.layers.0.mlp.gate.weight"])


@pytest.mark.parametrize("independent", [False, True])
def test_gate_up_and_down_lose_the_same_units(independent):
    dense = zoo.model("llama")
    before = dense.state_dict()
    state = state_dict(plan_upcycle(Parent.open(dense), config(drop_ratio=0.5, independent=independent, seed=2)))
    for e in range(1, 4):
        kept = []
        for role, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            old = before[f"model.layers.2.mlp.{role}_proj.weight"]
            new = state[f"model.layers.2.block_sparse_moe.experts.{e}.{w}.weight"]
            kept.append((old == new).all(dim=0 if role == "down" else 1))
        assert [int(k.sum()) for k in kept] == [40, 40, 40]
        assert (torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])) != independent
        if not independent:
            want = ~torch.from_numpy(chosen(tensor_key(2, "model.layers.2"), e, 80, 0.5))
            assert torch.equal(kept[0], want)


# ---- the loss that balances --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given"), [("llama", {"expert_init_noise": 0.1}), ("llama", {"target_arch": "glm4_moe"})]
)
def test_the_mixture_trains(kind, given):
    dense = zoo.model(kind)
    untouched = dense.config.to_dict()
    new = upcycle_dense_to_moe(dense, config(**given)).train()
    assert dense.config.to_dict() == untouched
    assert not {p.data_ptr() for p in new.parameters()} & {p.data_ptr() for p in dense.parameters()}
    ids = zoo.tokens(1, 12)
    optimizer = torch.optim.Adam(new.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        outputs = new(ids, labels=ids)
        total = outputs.loss + new.get_moe_aux_loss()
        optimizer.zero_grad()
        total.backward()
        router = new.model.layers[0].mlp.gate.weight
        assert router.grad.abs().max() > 0
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0]


def test_the_balancing_loss_is_that_of_transformers_and_counts_once(tmp_path):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    dense = zoo.model("llama")
    new = upcycle_dense_to_moe(dense, config(auxiliary_loss_weight=0.03))
    ids = zoo.tokens()
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    plain = new(ids, attention_mask=mask, labels=ids)
    mine = new.get_moe_aux_loss()
    said = new(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    theirs = load_balancing_loss_func(said.router_logits, 4, 2, mask)
    torch.testing.assert_close(mine, 0.03 * theirs)
    torch.testing.assert_close(plain.loss + mine, said.loss)
    assert new.config.router_aux_loss_coef == 0.03
    twin = copy.deepcopy(new)
    twin(ids[:1])
    torch.testing.assert_close(new.get_moe_aux_loss(), twin.get_moe_aux_loss(), rtol=0.5, atol=0)
    assert twin.get_moe_aux_loss.routers[0] is not new.get_moe_aux_loss.routers[0]
    new.save_pretrained(tmp_path / "out")
    again = attach_moe_aux_loss(zoo.load(tmp_path / "out"))
    again(ids, attention_mask=mask)
    torch.testing.assert_close(again.get_moe_aux_loss(), mine)
    attach_moe_aux_loss(again, 0.06)
    torch.testing.assert_close(again.get_moe_aux_loss(), 2 * mine)
    with pytest.raises(ShapeError, match="expected a mixture of experts"):
        attach_moe_aux_loss(dense)


def test_the_loss_of_a_sigmoid_router_is_the_weight_times_k_where_all_are_used_alike():
    new = upcycle_dense_to_moe(zoo.model("llama"), config(target_arch="glm4_moe", router_init_std=1e-4))
    with pytest.raises(ShapeError, match="a forward pass"):
        new.get_moe_aux_loss()
    new(zoo.tokens())
    assert abs(new.get_moe_aux_loss().item() - 0.02) < 1e-4


# ---- requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_experts_per_token": 5}, r"num_experts_per_token: expected at most num_experts \(4\), got 5"),
        ({"num_experts": 1}, "num_experts: expected a whole number from 2 to 65536, got 1"),
        ({"num_experts": 6, "granularity": 4}, r"num_experts: expected a multiple of granularity \(4\), got 6"),
        ({"expert_init_noise": -1.0}, "expert_init_noise: expected a number from 0"),
        ({"drop_ratio": 1.5}, "drop_ratio: expected a number from 0 to 1, got 1.5"),
        ({"noise_mode": "relativ"}, "did you mean 'relative'"),
        ({"independent": True}, "independent: has no effect without drop_ratio"),
        ({"router_scale": 1.0}, "router_scale: has no effect with router_init: normal"),
        ({"seed": 2**63}, "seed: expected a 64-bit"),
    ],
)
def test_a_wrong_configuration_is_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        plan_upcycle(Parent.open(zoo.model("llama")), config(**given))


@pytest.mark.parametrize(
    ("kind", "given", "error", "message"),
    [
        (
            "llama",
            {"granularity": 3, "num_experts": 6, "num_experts_per_token": 3},
            RecipeError,
            "divisor of the MLP's",
        ),
        ("llama", {"shared": "zero"}, RecipeError, "shared: mixtral has none"),
        ("llama", {"layers": [0]}, RecipeError, r"mixtral can have no dense layers; got \(0,\), which leaves \[1, 2\]"),
        ("llama", {"layers": [0, 3]}, RecipeError, "different numbers from 0 to 2"),
        ("llama", {"target_arch": "glm4_moe", "layers": [0, 1]}, RecipeError, "before all others only"),
        ("llama", {"target_arch": "mixtal"}, RecipeError, "did you mean 'mixtral'"),
        ("llama biased", {}, CheckpointError, "attention has biases of qkvo; mixtral takes none"),
        ("llama biased", {"target_arch": "glm4_moe"}, CheckpointError, r"the MLP has biases \(mlp_bias\)"),
    ],
)
def test_what_a_twin_cannot_be_is_refused_before_anything_is_written(tmp_path, kind, given, error, message):
    zoo.saved(kind, tmp_path / "dense")
    with pytest.raises(error, match=message):
        upcycle_dense_to_moe(tmp_path / "dense", config(**given), out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_types_without_a_twin_are_refused():
    for kind, target, message in (
        ("mistral", "qwen2_moe", "mistral becomes auto or mixtral"),
        ("mixtral", "auto", "mixtral has experts already"),
        ("gemma2", "auto", "model_type 'gemma2' has no twin"),
    ):
        with pytest.raises(RecipeError, match=message):
            plan_upcycle(Parent.open(zoo.model(kind)), config(target_arch=target))


def test_questionable_requests_are_done_with_a_warning():
    dense = Parent.open(zoo.model("qwen2", dtype=torch.bfloat16))
    for given, message in (
        ({"num_experts_per_token": 1}, "does not train the router"),
        ({"jitter_noise": 0.1}, "jitter_noise has no effect"),
        ({"copy_all_ffn_weights": False}, "skills are lost"),
        ({"granularity": 2, "weight_scale": "none"}, "does not compute"),
        ({"granularity": 2}, "may tie"),
        ({"router_init": "zero"}, "all experts tie"),
    ):
        assert message in plan_upcycle(dense, config(**given)).warnings[0]
    assert plan_upcycle(dense, config()).warnings == []


def test_from_disk_to_disk_nothing_imports_torch(tmp_path):
    zoo.saved("llama", tmp_path / "dense", dtype=torch.bfloat16)
    code = (
        "import sys; from fastmerge.dna import UpcyclingConfig, upcycle_dense_to_moe as u; "
        "u(sys.argv[1], UpcyclingConfig(num_experts=4, drop_ratio=0.5, granularity=2), out=sys.argv[2]); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    paths = str(tmp_path / "dense"), str(tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_state_dictionary_gives_one():
    dense = zoo.model("llama")
    found = upcycle_dense_to_moe(dict(dense.state_dict()), config(), model_config=dense.config.to_dict())
    assert found.config["architectures"] == ["MixtralForCausalLM"]
    assert equal(found.state_dict, state_dict(plan_upcycle(Parent.open(dense), config())))
