"""The generator of benchmark families: valid checkpoints, the same bytes every time, realistic deltas."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

BENCH = Path(__file__).resolve().parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

import generate as g


def fp32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return g.generate(tmp_path_factory.mktemp("family"), "tiny", 2)


def test_checkpoints_are_what_safetensors_and_transformers_expect(family, monkeypatch):
    # transformers asks for a package of that name, and finds our folder where the root is on the path.
    monkeypatch.setitem(sys.modules, "kernels", None)
    from transformers import AutoConfig, AutoModelForCausalLM

    for directory in family:
        tensors = load_file(directory / "model.safetensors")
        assert {n: tuple(t.shape) for n, t in tensors.items()} == g.shapes(g.SIZES["tiny"])
        assert {str(t.dtype) for t in tensors.values()} == {"torch.bfloat16"}
        assert all(bool(t.isfinite().all()) for t in tensors.values())
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(family[0]))
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == g.shapes(g.SIZES["tiny"])


def test_tensors_lie_in_the_file_as_safetensors_orders_them(family, tmp_path):
    from safetensors.torch import save_file

    path = family[0] / "model.safetensors"
    save_file(load_file(path), tmp_path / "again.safetensors", metadata={"format": "pt"})
    size = int.from_bytes(path.read_bytes()[:8], "little")
    again = (tmp_path / "again.safetensors").read_bytes()
    ours = json.loads(path.read_bytes()[8 : 8 + size])
    assert ours == json.loads(again[8 : 8 + int.from_bytes(again[:8], "little")])


def test_same_seed_same_bytes_and_what_exists_is_kept(family, tmp_path):
    again = g.generate(tmp_path, "tiny", 2)
    for a, b in zip(family, again, strict=True):
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    before = (again[1] / "model.safetensors").stat().st_mtime_ns
    g.generate(tmp_path, "tiny", 2)
    assert (again[1] / "model.safetensors").stat().st_mtime_ns == before
    other = g.generate(tmp_path / "other", "tiny", 0, seed=1)
    assert (other[0] / "model.safetensors").read_bytes() != (family[0] / "model.safetensors").read_bytes()


def test_shards_carry_an_index_in_module_order(family, tmp_path):
    base = g.generate(tmp_path, "tiny", 0, limit=60_000)[0]
    index = json.loads((base / "model.safetensors.index.json").read_text())
    files = sorted(base.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert {f.name for f in files} == set(index["weight_map"].values())
    whole = load_file(family[0] / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in whole.values())
    for path in files:
        with safe_open(path, "pt") as part:
            for name in part.keys():  # noqa: SIM118  safe_open is no mapping
                assert index["weight_map"][name] == path.name
                assert bool((part.get_tensor(name) == whole[name]).all())


@pytest.mark.parametrize("kind", range(len(g.DELTAS)))
def test_many_deltas_are_zero_and_many_tie_at_the_threshold(kind):
    count = 1 << 18
    base, tuned = (g.pools(0, model, count)[kind][:count] for model in (0, 1))
    delta = np.abs(fp32(tuned) - fp32(base))
    assert 0.10 <= (delta == 0).mean() <= 0.60
    threshold = np.partition(delta, int(0.8 * count))[int(0.8 * count)]
    assert 0.05 <= (delta == threshold).mean() <= 0.20
    assert abs(float(fp32(base).std()) - 0.02) < 1e-3


def test_bf16_rounds_to_nearest_even():
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, 0.0, -0.0], np.float32)
    assert fp32(g.to_bf16(x)).tolist() == [1.0, 1.0, 1 + 2**-6, -1 - 2**-7, 0.0, -0.0]


def test_sizes_are_what_their_names_promise():
    def nbytes(name):
        return sum(2 * int(np.prod(s)) for s in g.shapes(g.size_of(name)).values())

    assert g.size_of("768x12") == g.SIZES["160m"]
    assert 0.24e9 < nbytes("768x12") < 0.28e9
    assert 2.9e9 < nbytes("1.5b") < 3.1e9
    assert 15.5e9 < nbytes("8b") < 16.5e9
    assert len(g.shapes(g.SIZES["moe18k"])) == 18_867
    assert abs(nbytes("moe18k") / nbytes("dense3g") - 1) < 0.01


@pytest.mark.parametrize("name", ["", "9b", "100x2", "0x2", "64x0", "64x2x3"])
def test_unknown_sizes_are_refused(name):
    with pytest.raises(ValueError, match="expected"):
        g.size_of(name)


def test_the_generator_does_not_import_torch(tmp_path):
    code = "import sys, generate; generate.generate(sys.argv[1], 'tiny', 0); print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    loaded = subprocess.run(command, check=True, cwd=BENCH, capture_output=True, text=True).stdout.split()
    assert list(tmp_path.rglob("model.safetensors")) != []
    assert "generate" in loaded
    assert "torch" not in loaded
