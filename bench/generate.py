"""Model families for benchmarks: a base and its fine-tunes, in Hugging Face's layout, at the speed of the disk.

    python bench/generate.py DIR --size 768x12 --models 3 [--seed 0]

Weights are bf16: normal with standard deviation 0.02, norms around one. A fine-tune is the base plus a
heavy-tailed delta (a product of two normals), rounded to bf16, which is what real fine-tunes look like to a
merge: many deltas are exactly zero, and many others are exactly equal. How large deltas are differs from
tensor to tensor. Nothing here imports torch, and what exists is not written again.

Drawing billions of normals would take minutes, so a few pools of four million weights are drawn per model,
and each block of each tensor is a window into a pool; windows lie at offsets hashed from the tensor's name,
the same for every model, so that a fine-tune's block always meets the base's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

VERSION = 1
"""Part of what identifies a written model; raise it when the bytes change."""

POOL = 1 << 22
"""Elements of a pool, and of the largest window; models without large tensors have smaller pools."""

DELTAS = (7e-5, 1e-4, 2e-4, 2.5e-4)
"""Standard deviations of the deltas of matrices; every tensor has one. From 29 to 57 % of its deltas are zero."""

SHARD = 5_000_000_000
"""Largest file, in bytes, as transformers writes it."""

Bits = npt.NDArray[np.uint16]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a model; ``experts`` 0 is a dense Llama, else Qwen3-MoE's layout with that many per layer."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int
    kv_heads: int
    head: int
    experts: int = 0


SIZES = {
    "tiny": Size(2, 64, 192, 300, 4, 2, 16),
    "tiny-moe": Size(2, 32, 16, 300, 4, 2, 8, experts=16),
    "160m": Size(12, 768, 2048, 32_000, 12, 12, 64),
    "1.5b": Size(16, 2048, 8192, 128_256, 32, 8, 64),
    "7b": Size(32, 4096, 11_008, 32_000, 32, 32, 128),
    "8b": Size(32, 4096, 14_336, 128_256, 32, 8, 128),
    "moe18k": Size(48, 512, 160, 32_000, 8, 2, 64, experts=128),
    "dense3g": Size(24, 2048, 8128, 32_000, 32, 8, 64),
    "tiny50k": Size(64, 8, 1, 16, 2, 1, 4, experts=258),
}
"""Sizes by name; ``HIDDENxLAYERS`` (``768x12``) is a Llama with 32,000 words."""


def size_of(name: str) -> Size:
    """The size of that name.

    Raises:
        ValueError: neither a known name nor ``HIDDENxLAYERS`` with a hidden size in multiples of 64.
    """
    if name in SIZES:
        return SIZES[name]
    match = re.fullmatch(r"(\d+)x(\d+)", name)
    if not match or int(match[1]) % 64 or not int(match[1]) or not int(match[2]):
        raise ValueError(f"--size: expected {', '.join(SIZES)} or HIDDENxLAYERS, got {name!r}")
    hidden, heads = int(match[1]), int(match[1]) // 64
    return Size(int(match[2]), hidden, -(-hidden * 8 // 3 // 256) * 256, 32_000, heads, heads, 64)


def shapes(size: Size) -> Shapes:
    """Tensor names and shapes in the order of the modules, as transformers splits them into shards."""
    h, q, kv = size.hidden, size.heads * size.head, size.kv_heads * size.head
    out: Shapes = {"model.embed_tokens.weight": (size.vocabulary, h)}

    def feed_forward(prefix: str) -> Shapes:
        i = size.inner
        parts = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
        return {f"{prefix}.{part}.weight": shape for part, shape in parts.items()}

    for layer in range(size.layers):
        p = f"model.layers.{layer}"
        for part, shape in {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}.items():
            out[f"{p}.self_attn.{part}.weight"] = shape
        if size.experts:
            out |= {f"{p}.self_attn.{part}.weight": (size.head,) for part in ("q_norm", "k_norm")}
            out[f"{p}.mlp.gate.weight"] = (size.experts, h)
            for expert in range(size.experts):
                out |= feed_forward(f"{p}.mlp.experts.{expert}")
        else:
            out |= feed_forward(f"{p}.mlp")
        out |= {f"{p}.{part}.weight": (h,) for part in ("input_layernorm", "post_attention_layernorm")}
    return out | {"model.norm.weight": (h,), "lm_head.weight": (size.vocabulary, h)}


def config(size: Size) -> dict[str, Any]:
    """The model's ``config.json``."""
    common = {
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if not size.experts:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common}
    moe = {
        "num_experts": size.experts,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": size.inner,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **common, **moe}


def to_bf16(x: npt.NDArray[np.float32]) -> Bits:
    """Rounds finite fp32 to bf16, to nearest even; the bits as uint16."""
    bits = x.view(np.uint32)
    out: Bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return out


def pool_size(size: Size) -> int:
    """Elements of the pools of models of this size: a power of two, at most :data:`POOL`."""
    largest = max(int(np.prod(shape)) for shape in shapes(size).values())
    return min(POOL, 1 << max(16, (largest - 1).bit_length()))


def pools(seed: int, model: int, count: int = POOL) -> list[Bits]:
    """The pools of one model: one per entry of :data:`DELTAS`, then the one of the norms.

    Args:
        seed: of the family.
        model: 0 the base, 1.. the fine-tunes.
        count: elements; each array holds them twice, so that every window is contiguous.
    """
    return [np.tile(drawn(seed, model, kind, count), 2) for kind in range(len(DELTAS) + 1)]


def drawn(seed: int, model: int, kind: int, count: int = POOL) -> Bits:
    """One of the :func:`pools`, once."""

    def normal(*key: int) -> npt.NDArray[np.float32]:
        return np.random.default_rng([seed, *key]).standard_normal(count, np.float32)

    norms = kind == len(DELTAS)
    weights = normal(0, kind)
    weights = np.float32(1) + np.float32(0.1) * weights if norms else np.float32(0.02) * weights
    bits = to_bf16(weights)
    if model:
        base = (bits.astype(np.uint32) << 16).view(np.float32)
        deviation = (*DELTAS, 4e-3)[kind]
        bits = to_bf16(base + np.float32(deviation) * normal(model, kind, 1) * normal(model, kind, 2))
    return bits


def windows(name: str, shape: tuple[int, ...], seed: int, pool: int = POOL) -> Iterator[tuple[int, int, int]]:
    """What a tensor is made of: (pool, offset, length) of its blocks, in order; the same for every model."""
    kind = len(DELTAS) if len(shape) == 1 else zlib.crc32(name.encode(), seed & 0xFFFFFFFF) % len(DELTAS)
    length = int(np.prod(shape))
    for block, start in enumerate(range(0, length, pool)):
        digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=4).digest()
        yield kind, int.from_bytes(digest, "little") % pool, min(pool, length - start)


def shard(tensors: Shapes, limit: int) -> list[Shapes]:
    """Fills files in module order up to ``limit`` bytes; inside a file names are sorted, as safetensors does it."""
    files: list[Shapes] = [{}]
    used = 0
    for name, shape in tensors.items():
        nbytes = 2 * int(np.prod(shape))
        if files[-1] and used + nbytes > limit:
            files.append({})
            used = 0
        files[-1][name] = shape
        used += nbytes
    return [dict(sorted(file.items())) for file in files]


def header(tensors: Shapes) -> bytes:
    """The safetensors header of one file, padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        end = at + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_model(directory: Path, size: Size, seed: int, model: int, *, limit: int = SHARD) -> int:
    """Writes one checkpoint; ``directory`` appears complete or not at all.

    Returns:
        Bytes of weights.
    """
    staging = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    pool = pool_size(size)
    source = pools(seed, model, pool)
    files = shard(shapes(size), limit)
    where, total = {}, 0
    for number, tensors in enumerate(files, start=1):
        last = "" if len(files) == 1 else f"-{number:05d}-of-{len(files):05d}"
        path = staging / f"model{last}.safetensors"
        with path.open("wb", buffering=1 << 20) as out:
            out.write(header(tensors))
            for name, shape in tensors.items():
                where[name] = path.name
                for kind, offset, length in windows(name, shape, seed, pool):
                    out.write(source[kind][offset : offset + length].data)
                    total += 2 * length
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (staging / "config.json").write_text(json.dumps(config(size), indent=2))
    (staging / "generated.json").write_text(_label(size, seed, model, limit))
    shutil.rmtree(directory, ignore_errors=True)
    staging.rename(directory)
    return total


def write_header(path: Path, tensors: int) -> None:
    """Writes a file of so many tensors of one element under long names: 500,000 have a header of 90 MB."""
    middle = "mixture_of_experts." * 4 + "projections."
    names = [f"model.layers.{i // 5000}.{middle}{i % 5000:06d}.weight" for i in range(tensors)]
    path.write_bytes(header(dict.fromkeys(names, (1,))) + bytes(2 * tensors))


def _label(size: Size, seed: int, model: int, limit: int) -> str:
    return json.dumps({"version": VERSION, "size": repr(size), "seed": seed, "model": model, "shard": limit})


def paths(root: Path, size: str, models: int) -> list[Path]:
    """Where a family lies below ``root``: the base, then the fine-tunes."""
    return [root / size / ("base" if m == 0 else f"tuned-{m}") for m in range(models + 1)]


def generate(root: str | Path, size: str, models: int, *, seed: int = 0, limit: int = SHARD) -> list[Path]:
    """Writes what is missing of a family.

    Args:
        root: directory of all families.
        size: a key of :data:`SIZES` or ``HIDDENxLAYERS``.
        models: fine-tunes besides the base.
        seed: same seed, same bytes.
        limit: largest file in bytes.

    Returns:
        The checkpoints: base, then fine-tunes.
    """
    made = paths(Path(root), size, models)
    for model, directory in enumerate(made):
        label = directory / "generated.json"
        if not label.exists() or label.read_text() != _label(size_of(size), seed, model, limit):
            start = time.perf_counter()
            total = write_model(directory, size_of(size), seed, model, limit=limit)
            seconds = time.perf_counter() - start
            print(f"{directory}: {total / 1e9:.2f} GB in {seconds:.1f} s", file=sys.stderr)
    return made


def main() -> None:
    """Writes a family and prints its directories, the base first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR", help="directory of all families")
    parser.add_argument("--size", default="768x12", help=f"HIDDENxLAYERS, {', '.join(SIZES)} [768x12]")
    parser.add_argument("--models", type=int, default=3, help="fine-tunes besides the base [3]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=int, default=SHARD, help="largest file in bytes [5e9]")
    parser.add_argument("--header", type=int, metavar="N", help="no family: one file DIR of N tensors of one element")
    args = parser.parse_args()
    if args.header:
        write_header(args.root, args.header)
        return
    try:
        made = generate(args.root, args.size, args.models, seed=args.seed, limit=args.shard_size)
    except ValueError as error:
        parser.error(str(error))
    print(*made, sep="\n")


if __name__ == "__main__":
    main()
