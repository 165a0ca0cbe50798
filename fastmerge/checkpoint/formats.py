"""What fastmerge does not merge, recognised before any weight is read, and what to do instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.header import listing
from fastmerge.dtypes import FLOATS

if TYPE_CHECKING:
    from fastmerge.checkpoint.header import TensorInfo

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})

_QUANT_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_PACKED = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "fp8": "FP8 with scales",
    "fbgemm_fp8": "FP8 with scales",
}
_INSTEAD = "merge the unquantised weights (or dequantise first), and quantise the result"


def other(path: Path) -> str:
    """What to say about a file that is not safetensors."""
    if path.suffix in PICKLES:
        return pickled(path)
    if path.suffix == ".gguf":
        return f"{path}: GGUF is not read: merge the safetensors model, then convert the result with llama.cpp"
    return f"{path}: expected a *.safetensors file, an index of such files, or a model directory"


def pickled(path: Path) -> str:
    """Pickle is refused: loading it can run code."""
    return (
        f"{path}: pickled weights are not read, since unpickling can run code. Convert them once, on a machine that "
        f'may: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('DIR', dtype='auto').save_pretrained('DIR-safetensors')\""
    )


def adapter(path: Path) -> str:
    """A LoRA adapter where a model is expected."""
    return f"{path}: a LoRA adapter, not a model: merge it into its base first (peft: merge_and_unload)"


def nothing(path: Path, names: Sequence[str]) -> str:
    """What to say about a directory without safetensors files."""
    if "adapter_config.json" in names or "adapter_model.safetensors" in names:
        return adapter(path)
    for name in names:
        if Path(name).suffix in PICKLES and not name.startswith(("training_args", "optimizer", "scheduler", "rng")):
            return pickled(path / name)
    for name in names:
        if name.endswith(".gguf"):
            return other(path / name)
    return f"{path}: no *.safetensors file in this directory"


def parse_config(text: str) -> Any:
    """JSON as the model libraries read it: NaN, infinities and repeated keys are let through.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def quantised(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Signs of packed or scaled weights; one line per sign."""
    problems = []
    for part in ("", "text_config", "language_config", "llm_config"):
        section = config.get(part) if part else config
        if not isinstance(section, Mapping):
            continue
        for key in ("quantization_config", "compression_config"):
            settings = section.get(key)
            if settings:
                method = settings.get("quant_method") if isinstance(settings, Mapping) else None
                kind = _PACKED.get(str(method), str(method or "an unnamed method"))
                where = f"{part}.{key}" if part else key
                problems.append(f"{directory / 'config.json'}: {where}: quantised with {kind}: {_INSTEAD}")
    problems += [
        f"{directory / name}: the model is quantised: {_INSTEAD}"
        for name in _QUANT_FILES
        if not problems and (directory / name).exists()
    ]
    signs: dict[str, list[str]] = {}
    odd = {name: info for name, info in tensors.items() if info.dtype not in FLOATS}
    for name, info in odd.items():
        if sign := _packed_kind(name, info, tensors):
            signs.setdefault(sign, []).append(name)
    problems += [f"{directory}: {kind} tensors: {listing(names)}: {_INSTEAD}" for kind, names in signs.items()]
    return problems


def _packed_kind(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The packed format that a tensor of a type for no arithmetic belongs to, by its name and companions."""
    if name.endswith(".qweight") and name[:-7] + "scales" in tensors:
        return "GPTQ or AWQ"
    if name.endswith("_packed") and name[:-7] + "_scale" in tensors:
        return "compressed-tensors"
    if ".quant_state." in name or (name + ".absmax") in tensors or (name + ".quant_map") in tensors:
        return "bitsandbytes"
    if name.endswith("_blocks") and name[:-7] + "_scales" in tensors:
        return "MXFP4"
    if info.dtype.tag.startswith("F8_") and (name + "_scale" in tensors or name + "_scale_inv" in tensors):
        return "FP8 with scales"
    if info.dtype.tag == "I8" and (name[: -len("weight")] + "SCB") in tensors:
        return "bitsandbytes"
    return None


def adapters(directory: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """LoRA factors among the tensors of what is given as a model."""
    found = [n for n in tensors if ".lora_" in n and (".lora_A." in n or ".lora_B." in n)]
    return [f"{adapter(directory)}: {listing(found)}"] if found else []
