"""What fastmerge does not merge, recognised before any weight is read, and what to do instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint.header import listing
from fastmerge.dtypes import FLOATS

if TYPE_CHECKING:
    from fastmerge.checkpoint.header import TensorInfo
    from fastmerge.checkpoint.quantised import Found

_DTYPE = attrgetter("dtype")

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})

_QUANT_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "fp8": "FP8 with scales",
    "fbgemm_fp8": "FP8 with scales",
    "modelopt": "ModelOpt",
    "mlx": "MLX",
}
_SECTIONS = ("quantization_config", "compression_config", "quantization")
_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_NARROW = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2", *_FLOAT8})
"""Types that hold codes of quantised weights; plain float8 weights are weights all the same."""

_SCALES = re.compile(
    r"(weight_scale|_scale_inv|weight_scale_2|scale_weight|[._]scales|\.absmax|\.SCB|\.qzeros)$", re.MULTILINE
)
_LOST_BLOCKS = re.compile(r"^.*_proj_blocks$", re.MULTILINE)
_MAX_DEPTH = 100
_LOST = "get the model again; of weights that are plain float8 numbers, remove this section of config.json"
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
    return f"{path}: a LoRA adapter, not a model: 'model: BASE+ADAPTER' applies it to its base"


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
        ValueError: it is not JSON, or nested too deeply for those who copy and write it.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested too deeply: expected at most {_MAX_DEPTH} levels")
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    return content


_READ = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "modelopt", "None"})
"""Methods of which some layouts are read; see :mod:`fastmerge.checkpoint.quantised`."""


def settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a configuration says of its quantisation; empty where it says nothing."""
    return next((section.settings for section in _sections(config)), {})


def not_floats(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether any tensor is of a type for no arithmetic."""
    return not {*map(_DTYPE, tensors.values())} <= {*FLOATS}


def quantised(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], found: Found | None = None
) -> tuple[list[str], tuple[str, ...]]:
    """Looks for packed or scaled weights that cannot be read.

    Args:
        directory: of the model.
        config: of the model.
        tensors: of the model, by name.
        found: those that can, where somebody reads them; None refuses them with the others.

    Returns:
        One line per sign that weights are quantised, and the sections of the config, as dotted paths, that say so of
        weights that are not: scripts that dequantise a model often leave them in place.
    """
    sections = list(_sections(config))
    read = {i.name for w in found.weights.values() for i in (*w.parts, *w.rest)} if found else frozenset[str]()
    signs: dict[str, list[str]] = {}
    others = tensors.items() if not_floats(tensors) else ()
    odd = {name: info for name, info in others if info.dtype not in FLOATS and name not in read}
    for name, info in odd.items():
        if sign := _packed_kind(name, info, tensors):
            signs.setdefault(sign, []).append(name)
    problems = [f"{directory}: quantised with {kind}: {listing(names)}: {_INSTEAD}" for kind, names in signs.items()]
    text = "\n".join(tensors)
    problems += _damaged(directory, text, tensors)
    problems += [f"{directory}: {text}: {_INSTEAD}" for text in (found.problems if found else ())]
    where = directory / "config.json"
    if not sections or problems:
        problems += [f"{where}: {section.key}: quantised with {section.how}" for section in sections]
        return problems, ()
    codes = [n for n, i in odd.items() if i.dtype.tag in _NARROW and len(i.shape) > 1 and not n.endswith("bias")]
    scales = [name for name in tensors if _SCALES.search(name)] if not read and _SCALES.search(text) else []
    if codes or scales:
        what, names = (f"weights of type {odd[codes[0]].dtype.name}", codes) if codes else ("scales", scales)
        lost = bool(codes) and odd[codes[0]].dtype.tag in _FLOAT8
        advice = f"without scales, which turn such codes into weights: {_LOST}" if lost else _INSTEAD
        said = f"and there are {what}: {listing(names)}: {advice}"
        return [f"{where}: {section.key}: quantised with {section.how}, {said}" for section in sections], ()
    if read:
        return [f"{where}: {section.key}: {said}" for section in sections for said in _unread(section)], ()
    return [], tuple(section.key for section in sections)


def _unread(section: _Section) -> Iterator[str]:
    """What a section says of weights that codes and scales alone do not give."""
    if section.method not in _READ:
        yield f"quantised with {section.how}: {_INSTEAD}"
    sparsity = section.settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        yield f"sparsity_config: expected dense weights, got {str(sparsity.get('format'))!r}: {_INSTEAD}"
    if section.settings.get("transform_config"):
        yield f"transform_config: the weights are those of a rotated model: {_INSTEAD}"


def unsaid(directory: Path, config: Mapping[str, Any], found: Found) -> list[str]:
    """What to say about codes and scales of which the configuration says nothing."""
    if not found.weights or any(_sections(config)):
        return []
    names = listing([w.codes.name for w in found.weights.values()])
    said = (
        f"no quantization_config, and weights that are quantised: {names}: they are read with their scales; model "
        f"libraries load the codes as weights (transformers 5.23.0 saved such models)"
    )
    return [f"{directory / 'config.json'}: {said}"]


def stale(directory: Path, sections: Sequence[str]) -> list[str]:
    """What to say about sections of the config that speak of a quantisation that is not there."""
    files = [name for name in _QUANT_FILES if (directory / name).exists()]
    return [
        f"{directory / 'config.json'}: {where}: no weight is quantised: they are merged as they are, and the result's "
        f"config.json does not say so"
        for where in sections
    ] + [f"{directory / name}: no weight is quantised: the file is not used" for name in files]


class _Section(NamedTuple):
    """Where a config speaks of quantisation.

    Attributes:
        key: as a dotted path.
        how: the method, for people.
        method: as it is written.
        settings: all that it says.
    """

    key: str
    how: str
    method: str
    settings: Mapping[str, Any]


def _sections(config: Mapping[str, Any]) -> Iterator[_Section]:
    """Where a config speaks of quantisation, and of which."""
    parts = {"": config, **{k: v for k, v in config.items() if isinstance(v, Mapping) and k not in _SECTIONS}}
    for part, inside in parts.items():
        for key in _SECTIONS:
            said = inside.get(key)
            if not said:
                continue
            method = said.get("quant_method") if isinstance(said, Mapping) else None
            if method is None and isinstance(said, Mapping) and {"group_size", "bits"} <= said.keys():
                method = "mlx" if key == "quantization" or "quantization" in inside else None
            how = _METHODS.get(str(method), str(method or "an unnamed method"))
            yield _Section(
                f"{part}.{key}" if part else key, how, str(method), said if isinstance(said, Mapping) else {}
            )


def _packed_kind(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The packed format that a tensor of a type for no arithmetic belongs to, by its name and companions."""
    module, _, last = name.rpartition(".")
    tag = info.dtype.tag

    def beside(*names: str) -> bool:
        return any((f"{module}.{n}" if module else n) in tensors for n in names)

    if last == "qweight" and beside("scales", "qzeros"):
        return "GPTQ" if beside("g_idx") else "GPTQ or AWQ"
    if last.endswith("_packed") and beside(f"{last[:-7]}_scale"):
        four = tag == "U8"
        return f"compressed-tensors{' (NVFP4)' if four and beside(f'{last[:-7]}_global_scale') else ''}"
    if ".quant_state." in name or beside(f"{last}.absmax", f"{last}.quant_map"):
        return "bitsandbytes"
    if last.endswith("_blocks") and tag == "U8":
        return "MXFP4"
    if tag == "I8" and beside("SCB"):
        return "bitsandbytes"
    if tag == "U32" and beside("scales"):
        return "MLX"
    if tag in ("U8", "F4") and beside(f"{last}_scale_2"):
        return "ModelOpt (NVFP4)"
    if tag in _FLOAT8 and beside(
        f"{last}_scale", f"{last}_scale_inv", f"{last}.scale", "scale_weight", "scale", "scales", f"{last}_scales"
    ):
        return "FP8 with scales"
    if tag in _NARROW and beside(f"{last}_scale", f"{last}_scale_inv", f"{last}_scales"):
        return f"{info.dtype.name} and scales (compressed-tensors or the like)"
    if last in ("W_q", "q_weight", "Qidxs", "trellis") or (last == "codes" and beside("codebooks")):
        return {"W_q": "HQQ", "q_weight": "EXL2", "Qidxs": "QuIP#", "trellis": "EXL3"}.get(last, "AQLM")
    return None


def _damaged(directory: Path, text: str, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Full-precision tensors under the names of quantised ones: no program loads them for what they are."""
    problems = []
    lost = [n for n in _LOST_BLOCKS.findall(text) if tensors[n].dtype in FLOATS] if "_blocks" in text else []
    if lost:
        problems.append(
            f"{directory}: {tensors[lost[0]].dtype.name} weights under the names of MXFP4 blocks, as one release of "
            f"transformers saved them (5.23.0): {listing(lost)}: save the model again with a later one"
        )
    if "_scale_inv" in text:
        names = [n for n in tensors if n.endswith("_scale_inv")]
        plain = [n for n in names if (info := tensors.get(n.removesuffix("_scale_inv"))) and info.dtype in FLOATS]
        if plain:
            problems.append(
                f"{directory}: scales of FP8 weights beside weights that are not FP8: {listing(plain)}: whether they "
                f"are applied already is unclear: dequantise the model again, without leaving them"
            )
    return problems


def adapters(directory: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """LoRA factors among the tensors of what is given as a model."""
    found = [n for n in tensors if ".lora_" in n and (".lora_A." in n or ".lora_B." in n)]
    return [f"{adapter(directory)}: {listing(found)}"] if found else []
