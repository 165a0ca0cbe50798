"""What counts: scores against plain torch on the model itself, and what they are used for."""

import numpy as np
import pytest
import torch

from fastmerge.dna import importance
from fastmerge.dna.activations import batches, covariance, energies, grams, measure
from fastmerge.dna.anatomy import anatomy
from fastmerge.dna.importance import mlps
from fastmerge.dna.kept import choose, sizes
from fastmerge.dna.parent import Parent
from fastmerge.dna.refit import components, refit_down
from fastmerge.dna.results import module
from fastmerge.dna.slicing import ModelSlicingConfig, Study, draft_slice, slice_model
from fastmerge.errors import CheckpointError
from tests.dna import zoo


@pytest.fixture(scope="module")
def llama():
    return zoo.model("llama")


def close(found, expected):
    wanted = expected.double().detach().numpy()
    return np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@torch.no_grad()
def test_scores_by_weights_are_products_of_lengths(llama):
    found = importance.weight_scores(anatomy(Parent.open(llama)))
    layer = llama.model.layers[1]
    gate, up, down = (getattr(layer.mlp, f"{n}_proj").weight for n in ("gate", "up", "down"))
    assert close(found.inner["ffn", 1, None], gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0))
    o, v = layer.self_attn.o_proj.weight, layer.self_attn.v_proj.weight
    heads = torch.stack([o[:, 8 * h : 8 * h + 8].norm() * v[8 * (h // 2) : 8 * (h // 2) + 8].norm() for h in range(4)])
    assert close(found.heads[1], heads)
    assert close(found.groups[1], heads.reshape(2, 2).sum(1))
    matrices = [p for n, p in layer.named_parameters() if p.ndim == 2]
    assert close(found.layers[1], sum(p.square().sum() for p in matrices).sqrt())
    channels = llama.model.embed_tokens.weight.square().sum(0)
    channels = channels + (llama.lm_head.weight * llama.model.norm.weight).square().sum(0)
    for block in llama.model.layers:
        for name, p in block.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                channels = channels + p.square().sum(1)
            elif p.ndim == 2:
                norm = block.input_layernorm if "attn" in name else block.post_attention_layernorm
                channels = channels + (p * norm.weight).square().sum(0)
    assert close(found.hidden, channels)


@torch.no_grad()
def test_scores_by_activations_are_those_of_minitron(llama):
    """Mean magnitude over the tokens that are no padding, length over sequences, squares summed over places."""
    ids = zoo.tokens()
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    seen = {}

    def watch(name):
        def hook(_module, given, out):
            seen[name] = (given[0] if given else None, out)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in llama.named_modules()]
    states = llama(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for h in handles:
        h.remove()
    parent = anatomy(Parent.open(llama))
    found = measure(
        parent, llama, batches([{"input_ids": i[None], "attention_mask": m[None]} for i, m in zip(ids, mask)])
    )

    def squares(x):
        return torch.stack([x[b, : mask[b].sum()].abs().mean(0) ** 2 for b in range(len(x))]).sum(0)

    places = [f"model.layers.{i}.{n}layernorm" for i in range(3) for n in ("input_", "post_attention_")]
    assert close(found.hidden, sum(squares(seen[p][1]) for p in places).sqrt())
    assert close(found.inner["ffn", 2, None], squares(seen["model.layers.2.mlp.down_proj"][0]).sqrt())
    assert close(found.groups[0], squares(seen["model.layers.0.self_attn.o_proj"][0]).reshape(2, -1).sum(1).sqrt())
    cosine = torch.nn.functional.cosine_similarity(states[1], states[2], dim=-1)
    assert close(found.layers[1], 1 - cosine[mask.bool()].mean())
    x = seen["model.layers.1.input_layernorm"][0][mask.bool()]
    assert close(found.energy["model.layers.1.input_layernorm.weight"], x.square().mean(0))


@torch.no_grad()
def routed(kind):
    """Shares of tokens by expert of each layer as scored, and as the model routes them."""
    made, ids = zoo.model(kind), zoo.tokens()
    found = measure(anatomy(Parent.open(made)), made, batches(ids)).experts
    logits = made(input_ids=ids, output_router_logits=True).router_logits
    shares = [x.topk(2, dim=-1).indices.flatten().bincount(minlength=4) / ids.numel() for x in logits]
    return found, shares


@pytest.mark.parametrize("kind", ["qwen3_moe"])
def test_experts_have_the_share_of_tokens_that_go_to_them(kind):
    found, shares = routed(kind)
    assert all(close(found[i], share) for i, share in enumerate(shares))
    assert np.isclose(found[0].sum(), 2)


@pytest.mark.conformance
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "olmoe", "flex_olmo", "granitemoe"])
def test_experts_have_the_share_of_tokens_that_go_to_them_everywhere(kind):
    found, shares = routed(kind)
    assert all(close(found[i], share) for i, share in enumerate(shares))
    assert np.isclose(found[0].sum(), 2)


def test_scores_by_gradients_are_those_of_the_loss(llama):
    ids = zoo.tokens()
    llama.zero_grad()
    loss = llama(input_ids=ids, labels=ids).loss + llama(input_ids=ids[:1], labels=ids[:1]).loss
    loss.backward()
    data = batches([ids, ids[0]])
    parent = anatomy(Parent.open(llama))
    grads = {n: p.grad.clone() for n, p in llama.named_parameters()}
    for metric in ("gradient", "taylor"):
        found = importance.gradient_scores(parent, llama, data, metric)
        weight = {
            n: (g * p if metric == "taylor" else g).abs() for (n, p), g in zip(llama.named_parameters(), grads.values())
        }
        prefix = "model.layers.0.mlp."
        gate, up, down = (weight[f"{prefix}{n}_proj.weight"] for n in ("gate", "up", "down"))
        assert close(found.inner["ffn", 0, None], gate.sum(1) + up.sum(1) + down.sum(0))
        assert close(found.layers[2], sum(w.sum() for n, w in weight.items() if ".layers.2." in n and w.ndim == 2))
    assert all(torch.equal(p.grad, grads[n]) for n, p in llama.named_parameters())
    llama.zero_grad()


@pytest.mark.conformance
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_every_metric_scores_every_architecture(kind):
    made = zoo.model(kind)
    for metric in ("weight_norm", "activation", "gradient", "taylor", "random"):
        config = ModelSlicingConfig(target_layers=2, calibration_data=zoo.tokens(), importance_metric=metric)
        study = Study(Parent.open(made), made, config)
        found = study.scores()
        sizes = study.anatomy.sizes
        assert len(found.layers) == study.anatomy.layers
        assert len(found.hidden) == sizes["hidden"]
        assert found.inner.keys() == {mlp.key for mlp in mlps(study.anatomy)}
        every = [found.layers, found.hidden, *found.inner.values(), *found.heads.values(), *found.experts.values()]
        assert all(np.isfinite(s).all() and len(set(s.tolist())) > 1 for s in every)


def test_the_best_are_kept_and_ties_go_to_the_first(llama):
    parent = anatomy(Parent.open(llama))
    scores = importance.weight_scores(parent)
    scores.hidden = np.ones(32)
    scores.hidden[[31, 5]] = 2.0
    wanted = sizes(parent, hidden=4)
    assert choose(parent, wanted, scores, selection="first").hidden.tolist() == [0, 1, 5, 31]
    ranked = choose(parent, wanted, scores, selection="first", ranked=frozenset({"hidden"}))
    assert ranked.hidden.tolist() == [5, 31, 0, 1]


def test_weights_that_are_no_numbers_are_refused():
    made = zoo.model("llama")
    with torch.no_grad():
        made.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj.weight: NaN or infinity"):
        slice_model(made, ModelSlicingConfig(target_hidden_size=24))


def test_a_refit_is_the_best_there_is():
    """Of all weights on the kept neurons none is nearer to what all neurons gave; with all of them it is the weight."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((400, 12)) @ rng.standard_normal((12, 12))
    w, kept = rng.standard_normal((5, 12)), np.array([7, 1, 2, 9, 4])
    fitted = refit_down(w, h.T @ h, kept, damping=1e-12)
    best = np.linalg.lstsq(h[:, kept], h @ w.T, rcond=None)[0].T
    assert np.allclose(fitted, best, rtol=1e-6)
    order = rng.permutation(12)
    assert np.array_equal(refit_down(w, h.T @ h, order), w[:, order])
    assert np.array_equal(refit_down(w, np.zeros((12, 12)), kept), w[:, kept])


@torch.no_grad()
def test_gram_matrices_and_energies_are_sums_over_tokens(llama, monkeypatch):
    parent, ids = anatomy(Parent.open(llama)), zoo.tokens()
    seen = []
    handle = llama.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, out: seen.append(a[0]))
    llama(input_ids=ids)
    handle.remove()
    x = seen[0].reshape(-1, 80).double()
    monkeypatch.setattr("fastmerge.dna.activations.GRAM_BYTES", 1)  # one layer at a time
    for data in ([ids], [i[None] for i in ids]):
        found = dict(grams(parent, llama, batches(data), [0, 1]))
        assert found.keys() == {0, 1}
        assert close(found[1], x.T @ x)
    total = covariance(parent, llama, batches(ids))
    assert np.isclose(np.trace(total), 7 * ids.numel() * 32)  # seven norms of a mean square of one
    basis = components(total)
    assert np.allclose(basis.T @ basis, np.eye(32), atol=1e-10)
    along = np.diag(basis.T @ total @ basis)
    assert (np.diff(along) <= 1e-6).all()
    energy = energies(parent, llama, batches(ids), basis)
    assert len(energy) == 7


@pytest.mark.parametrize("kind", ["llama biased"])
def test_a_rotation_of_all_channels_changes_nothing(kind):
    same, wrong = rotated(kind)
    assert same < 1e-5
    assert wrong > 1e-3


ROTATED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "glm4_moe",
    "dots1",
]


@pytest.mark.conformance
@pytest.mark.parametrize("kind", ROTATED)
def test_a_rotation_of_all_channels_changes_nothing_anywhere(kind):
    same, wrong = rotated(kind)
    assert same < 1e-5
    assert wrong > 1e-3


def rotated(kind):
    """How far a model in other coordinates is from itself, and with gains that are folded twice."""
    made = zoo.model(kind)
    config = ModelSlicingConfig(target_hidden_size=32, calibration_data=zoo.tokens(), rotate=True)
    turned = slice_model(made, config)
    assert not torch.equal(turned.model.embed_tokens.weight, made.model.embed_tokens.weight)
    same = zoo.difference(made, turned)
    with torch.no_grad():
        turned.lm_head.weight.mul_(made.model.norm.weight)
    return same, zoo.difference(made, turned)


def test_norms_make_up_for_what_is_left_out(llama):
    """Each gain has sqrt(f D / D'), f the share of the energy of the channels that stay, at that norm."""
    data = zoo.tokens()
    options = {"target_hidden_size": 24, "target_intermediate_size": 80, "calibration_data": data}
    drafts = {}
    for corrected in (True, False):
        config = ModelSlicingConfig(norm_correction=corrected, **options)
        drafts[corrected] = draft_slice(Study(Parent.open(llama), llama, config), config)
    with_, without = (module(drafts[c]).state_dict() for c in (True, False))
    scores = measure(anatomy(Parent.open(llama)), llama, batches(data))
    kept = np.sort(np.argsort(-scores.hidden, kind="stable")[:24])
    assert len(drafts[True].facts["norm_gains"]) == 7
    for name, energy in scores.energy.items():
        factor = (energy[kept].sum() / energy.sum() * 32 / 24) ** 0.5
        assert np.isclose(drafts[True].facts["norm_gains"][name], factor)
        assert close((with_[name] / without[name]).numpy(), torch.full((24,), factor))
    assert "norm_gains" not in drafts[False].facts
    by_weights = ModelSlicingConfig(importance_metric="weight_norm", **options)
    assert len(draft_slice(Study(Parent.open(llama), llama, by_weights), by_weights).facts["norm_gains"]) == 7
