"""Models as transformers 4.57 wrote them: names, types, shapes and configuration, without weights.

Written in an environment of its own, as transformers 5 would write other files:

    python -m venv v4 && v4/bin/pip install transformers==4.57.6 torch==2.13.0
    v4/bin/python -m tests.conformance.architectures.transformers4

Every model is a random one of :mod:`tests.conformance.architectures.models`, saved by ``save_pretrained`` in bfloat16.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path

import torch

from tests.conformance.architectures.models import COMMON, MODELS

HOME = Path(__file__).parent / "headers4"
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
OWN = {"llama": {"rope_theta": 500000.0, "rope_scaling": LLAMA3}, "gpt_oss": {"rope_theta": 10000.0},
       "phi3": {"partial_rotary_factor": 0.5}}  # fmt: skip
"""Values in the dialect of transformers 4, beside those of the table of models."""

NAMES = ("llama", "phi3", "gemma3", "mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe", "jamba", "gpt_oss",
         "granitemoe", "llava", "gemma3_vision", "mistral3", "qwen2_vl", "qwen3_vl", "modernbert")  # fmt: skip


def values(name):
    """What a model's configuration is made of in transformers 4."""
    model = MODELS[name]
    said = {**({} if model.plain else COMMON), **model.values, **OWN.get(name, {})}
    said.pop("rope_parameters", None)
    if "rope_parameters" in said.get("text_config", {}):
        said["text_config"] = {k: v for k, v in said["text_config"].items() if k != "rope_parameters"} | MROPE
    return said


def read(name):
    """The header of one model: ``config``, and type and shape of each tensor by its name."""
    return json.loads((HOME / f"{name}.json").read_text())


def write(path, name, seed):
    """A model with the names, shapes and configuration of transformers 4, and weights of a seed."""
    from safetensors.torch import save_file

    path.mkdir()
    said = read(name)
    tensors = {}
    for i, (tensor, (kind, shape)) in enumerate(said["tensors"].items()):
        g = torch.Generator().manual_seed(1000 * seed + i)
        x = 0.1 * torch.randn(shape, generator=g)
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[kind]
        tensors[tensor] = (x + ("norm" in tensor and len(shape) == 1)).to(dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(said["config"], indent=2))
    return path


def main():
    """Writes the files."""
    import transformers
    from safetensors import safe_open

    versions = {n: importlib.metadata.version(n).partition("+")[0] for n in ("transformers", "torch", "safetensors")}
    if not versions["transformers"].startswith("4.57."):
        raise SystemExit(f"expected transformers 4.57, got {versions['transformers']}")
    HOME.mkdir(exist_ok=True)
    for name in NAMES:
        model = MODELS[name]
        torch.manual_seed(0)
        config = getattr(transformers, model.config)(**values(name))
        made = getattr(transformers, model.kind)(config)
        with tempfile.TemporaryDirectory() as home:
            made.save_pretrained(home)  # and loaded, as some tensors stay in float32 then
            type(made).from_pretrained(home, dtype=torch.bfloat16).save_pretrained(home)
            text = json.loads((Path(home) / "config.json").read_text())
            with safe_open(Path(home) / "model.safetensors", "pt") as file:
                parts = {n: file.get_slice(n) for n in file.keys()}  # noqa: SIM118  it is no mapping
                tensors = {n: [s.get_dtype(), s.get_shape()] for n, s in parts.items()}
        lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(t)}" for n, t in tensors.items())
        head = f'{{"made_with": {json.dumps(versions)},\n"config": {json.dumps(text, sort_keys=True)},\n"tensors": {{\n'
        (HOME / f"{name}.json").write_text(f"{head}{lines}\n}}}}\n")
        print(f"{name}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
