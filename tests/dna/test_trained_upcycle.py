"""Upcycling trained models: nothing is lost, and the experts and the router learn."""

import os
from pathlib import Path

import pytest
import torch

from fastmerge.dna import UpcyclingConfig, upcycle_dense_to_moe
from tests.demo_fixture import fixture
from tests.dna import zoo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models():
    return fixture(Path(os.environ.get("FASTMERGE_DEMO_CACHE") or ROOT / ".cache" / "demo"))


def answers(model, skill, seed=99, n=200):
    """Loss and right digits of the answers to unseen questions of a skill."""
    from skills import DIGITS, lines

    text = lines(skill, n, torch.Generator().manual_seed(seed))
    logits = model(text[:, :-1]).logits[:, DIGITS + 1 :]
    wanted = text[:, DIGITS + 2 :]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return loss, (logits.argmax(-1) == wanted).all(1).sum().item()


def test_a_mixture_keeps_its_skill_exactly_and_trains_on(models, tmp_path):
    dense = zoo.load(models["sort"])
    upcycle_dense_to_moe(models["sort"], UpcyclingConfig(num_experts=4, expert_init_noise=0.0), out=tmp_path / "moe")
    moe = zoo.load(tmp_path / "moe")
    with torch.no_grad():
        loss, right = answers(dense, "sort")
        same, also = answers(moe, "sort")
    assert right > 150
    assert also == right
    assert same.item() == pytest.approx(loss.item(), rel=1e-4)

    model = upcycle_dense_to_moe(dense, UpcyclingConfig(num_experts=4, expert_init_noise=0.01, seed=1)).train()
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        loss = answers(model, "reverse", seed=step, n=64)[0] + model.get_moe_aux_loss()
        optimizer.zero_grad()
        loss.backward()
        gates = [p.grad for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
        assert gates
        assert all(g.abs().max() > 0 for g in gates)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
