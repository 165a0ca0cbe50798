"""On a real GPU (``TRITON_INTERPRET=0 pytest -m gpu``): the bits of the CPU, and the same run."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from fastmerge.adamerging import AdaMerging, AdaMergingConfig, MergedModule, Task
from fastmerge.adamerging.streams import Streams
from fastmerge.kernels import _call
from tests.adamerging.near import unlike
from tests.adamerging.test_pair import DTYPES, family
from tests.adamerging.test_training import models, tasks

pytestmark = pytest.mark.gpu
if _call.INTERPRETED or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and TRITON_INTERPRET=0", allow_module_level=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "n"), [((3, 5), 1), ((300, 401), 4), ((70_001,), 9), ((0, 4), 2)])
def test_the_pair_gives_the_bits_of_the_cpu(shape, n, dtype):
    base, experts, c = family(shape, dtype, n)
    lam, found = np.linspace(-0.2, 0.9, n)[None], []
    for device in ("cpu", "cuda"):
        bound = Streams([[x.to(device) for x in (base, *experts)]])
        out = bound.outputs()
        bound.render(lam, out)
        found.append((out[0].cpu(), bound.slopes({0: c.to(device, dtype)})))
    assert torch.equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("together", [True, False])
def test_a_run_is_that_of_the_cpu(together):
    found = []
    for device in ("cpu", "cuda"):
        base, experts = models()
        given = [Task(t.name, t.data) for t in tasks()]
        config = AdaMergingConfig(steps=8, learning_rate=0.05, together=together)
        run = AdaMerging(base.to(device), [e.to(device) for e in experts], given, config)
        found.append(torch.tensor(list(run.run().coefficients.values())))
    assert unlike(*found, rtol=1e-3, atol=1e-4) == []


def test_a_module_holds_one_gradient():
    width, layers = 2048, 6
    base = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(layers)]).cuda()
    merged = MergedModule(base, [base.state_dict()] * 2)
    x = torch.randn(4, width, device="cuda")
    merged(x).sum().backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    merged(x).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2.5 * 4 * width**2
