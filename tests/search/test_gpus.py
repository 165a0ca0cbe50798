"""A search on a GPU, without one: the candidates and the best merge of the CPU."""

import pytest
import torch

from fastmerge.kernels import _call
from fastmerge.search import search
from tests import tiny
from tests.session import logical
from tests.session.family import different

if not _call.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


def test_a_search_on_a_gpu_is_that_of_the_cpu(tmp_path, monkeypatch):
    made = logical.pretend(monkeypatch, 1)
    rng = torch.Generator().manual_seed(0)
    states = {n: {"x": torch.randn(3, 50, generator=rng), "y": torch.randn(9, generator=rng)} for n in "ab"}
    paths = {n: str(tiny.write(tmp_path / n, state)) for n, state in states.items()}
    models = [{"model": path, "parameters": {"weight": {"low": 0.0, "high": 1.5}}} for path in paths.values()]
    space = {"merge_method": "linear", "models": models, "dtype": "float32"}
    found, targets = {}, {}
    for device in ("cpu", "cuda"):
        targets[device] = {n: torch.empty_like(t) for n, t in states["a"].items()}
        found[device] = search(
            space,
            lambda model, _: -sum(float(t.square().sum()) for t in model.values()),
            model=targets[device],
            device=device,
            sampler="random",
            budget=4,
        )
    assert len(made) == 1
    gpu, cpu = ([(e.genes, e.scores) for e in found[device].evaluations] for device in ("cuda", "cpu"))
    assert gpu == cpu
    assert different(targets["cuda"], targets["cpu"]) == []
