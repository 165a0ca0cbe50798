"""What ``bytes.py`` merges: tensors of every shape and type, and every method and preset over them.

Inputs are made of integers and exact arithmetic alone, so they are the same with every numpy and on every machine.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import fastmerge as fm

Array = npt.NDArray[Any]

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
FAMILIES = {
    **{t: (t,) * 4 for t in TORCH},
    "mixed": ("bf16", "fp32", "fp16", "bf16"),
    "mixed64": ("fp32", "fp64", "bf16", "fp16"),
}
"""Types of the base and of three fine-tunes."""

RESULTS: tuple[dict[str, str], ...] = (
    {},
    {"dtype": "float16"},
    {"out_dtype": "bfloat16"},
    {"dtype": "bfloat16", "out_dtype": "float32"},
    {"out_dtype": "float64"},
)
"""How a recipe asks for the type of the result."""

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (300, 64),
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(4)
        for name, shape in {
            "input_layernorm.weight": (64,),
            "self_attn.q_proj.weight": (64, 64),
            "mlp.down_proj.weight": (33, 257),
            "mlp.up_proj.bias": (70_000,),
        }.items()
    },
    "model.norm.weight": (64,),
    "lm_head.weight": (3, 66_667),
}
ODD: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "one": (1,),
    "empty": (0,),
    "no_rows": (0, 5),
    "row": (1, 17),
    "column": (17, 1),
    "cube": (3, 5, 7),
    "tile": (65_536,),
    "long": (200_001,),
    "rows": (23, 3_001),
}
"""A vector of no or one element, and of several tiles; rows that cross tiles."""

Variant = tuple[str, str | None, int, Mapping[str, Any]]
VARIANTS: dict[str, Sequence[Variant]] = {
    "linear": (
        ("mergekit", None, 3, {"weight": [0.6, 0.3, 0.9]}),
        ("soup", "soup", 3, {}),
        ("signed", None, 2, {"weight": [1.5, -0.5], "normalize": False}),
        ("alone", None, 1, {"weight": 1.0}),
    ),
    "passthrough": (("mergekit", None, 1, {}), ("scaled", None, 1, {"scale": -1.7}), ("zero", None, 1, {"scale": 0.0})),
    "slerp": (
        ("mergekit", None, 1, {"t": 0.3}),
        ("task_vectors", "task_vectors", 1, {}),
        ("beyond", None, 1, {"t": 1.25, "threshold": 1.0}),
        ("linear", None, 1, {"t": 0.5, "threshold": 0.0}),
        ("row", None, 1, {"t": 0.35, "scope": "row", "threshold": 1.0}),
        ("all_rows", None, 1, {"t": 0.35, "scope": "row", "fallback": "all_rows"}),
    ),
    "task_arithmetic": (
        ("mergekit", None, 3, {"weight": [0.6, 0.8, 0.5]}),
        ("paper", "paper", 3, {}),
        ("fusionbench", "fusionbench", 3, {}),
        ("analogy", None, 3, {"weight": [1.0, 1.0, -1.0]}),
        ("normal", None, 2, {"weight": [0.7, 0.6], "normalize": True, "lambda": 0.4}),
        ("rounded", None, 2, {"weight": [0.7, 0.6], "normalize": True, "delta_dtype": "base"}),
        ("equal", None, 3, {"weight": 1.0 / 3}),
    ),
    "dare_linear": (
        ("mergekit", None, 3, {"weight": [1.0, 0.5, 0.8], "density": [0.1, 0.5, 1.0]}),
        ("paper", "paper", 3, {}),
        ("task_vectors", "task_vectors", 2, {}),
        ("normal", None, 2, {"weight": [0.6, 0.4], "density": 0.66, "normalize": True, "lambda": 1.3}),
        ("none", None, 2, {"weight": [1.0, -1.0], "density": [0.0, 0.3], "rescale": False, "delta_dtype": "base"}),
    ),
    "dare_ties": (
        ("mergekit", None, 3, {"weight": [1.0, 0.5, 0.8], "density": [0.1, 0.5, 1.0]}),
        ("paper", "paper", 3, {"density": 0.6}),
        ("task_vectors", "task_vectors", 3, {}),
        ("normal", None, 2, {"weight": [0.6, 0.4], "density": 0.66, "normalize": True, "lambda": 1.3}),
        (
            "spread",
            None,
            3,
            {"weight": 1.0, "density": 0.5, "trim_density": 0.3, "ties": "spread", "elect": "count"},
        ),
    ),
    "ties": (
        ("mergekit", None, 3, {"weight": [1.0, 0.5, 0.8], "density": [0.2, 0.5, 0.8]}),
        ("paper", "paper", 3, {}),
        ("fusionbench", "fusionbench", 3, {}),
        ("peft", "peft", 2, {"weight": [0.9, 1.1], "density": 0.35}),
        ("task_vectors", "task_vectors", 3, {}),
        ("sdmecha", "sdmecha", 3, {}),
        ("sum", None, 2, {"weight": [1.0, 0.7], "density": 0.4, "normalize": False, "rescale": True, "lambda": 0.9}),
        ("spread", None, 3, {"weight": 1.0, "density": 0.3, "ties": "spread", "delta_dtype": "base"}),
        ("max", None, 3, {"weight": [1.0, -0.6, 0.4], "density": [0.0, 1.0, 0.5], "merge": "max"}),
        ("whole", None, 3, {"weight": 1.0, "density": 0.2, "trim_scope": "model"}),
        ("paper_by_tensor", "paper", 3, {"trim_scope": "tensor", "ties": "index"}),
    ),
    "model_stock": (
        ("mergekit", None, 2, {}),
        ("paper", "paper", 3, {}),
        ("fusionbench", "fusionbench", 3, {}),
        ("row", None, 3, {"filter_wise": True}),
        ("unit", "paper", 3, {"clamp_t": "unit", "filter_wise": True}),
    ),
}
"""Method to (label, preset, fine-tunes, parameters); a list has one value per fine-tune."""

WITHOUT_BASE = ("linear", "passthrough")


def mixed(seed: int, n: int) -> npt.NDArray[np.float64]:
    """N numbers near the normal distribution, in -4 .. 4: sums of sixteen-bit integers, exact in fp32."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed << 20)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    parts = z.view(np.uint16).reshape(n, 4).astype(np.int64).sum(axis=1)
    return (parts - 2 * 65_535).astype(np.float64) / 32_768


@functools.cache
def weights(name: str, model: int, n: int) -> npt.NDArray[np.float64]:
    """A tensor of the base (0) or of a fine-tune: heavy-tailed deltas, of which bf16 rounds many to equals."""
    seed = zlib.crc32(name.encode())
    base = mixed(seed, n) / 64 + (1.0 if "norm" in name else 0.0)
    if not model:
        return base
    return base + mixed(seed + model, n) * mixed(seed + 16 + model, n) / 4096


def stored(values: npt.NDArray[np.float64], kind: str) -> Array:
    """Numbers in a type; the bits of bf16."""
    if kind == "fp64":
        return values
    single = values.astype(np.float32)
    if kind == "bf16":
        bits = single.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
            np.uint16
        )
    return single if kind == "fp32" else single.astype(np.float16)


def tensor(name: str, model: int, shape: tuple[int, ...], kind: str) -> torch.Tensor:
    """A tensor of the base (0) or of a fine-tune, in a type."""
    n = math.prod(shape)
    if not n:
        return torch.empty(shape, dtype=TORCH[kind])
    raw = stored(weights(name, model, n), kind)
    return torch.from_numpy(raw.view(np.uint8).copy()).view(TORCH[kind]).reshape(shape)


def state(model: int, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: tensor(name, model, shape, kind) for name, shape in shapes.items()}


@functools.cache
def preset_name(method: str, preset: str | None) -> str | None:
    """The preset's name in the build that runs: ``task_vectors`` was once called ``seed``."""
    if preset == "task_vectors":
        x = torch.ones(1)
        try:
            fm.merge_tensors([x, x], method, base_index=0, preset=preset)
        except fm.RecipeError:
            return "seed"
    return preset


def recipe(method: str, variant: Variant, models: Sequence[str], **more: Any) -> dict[str, Any]:
    """A recipe over models, base first."""
    _, preset, count, values = variant
    each = [{k: v[i] for k, v in values.items() if isinstance(v, list)} for i in range(count)]
    out: dict[str, Any] = {"merge_method": method}
    if preset is not None:
        out["preset"] = preset_name(method, preset)
    if method not in WITHOUT_BASE:
        out["base_model"] = models[0]
    out["models"] = [{"model": m, **({"parameters": p} if p else {})} for m, p in zip(models[1:], each, strict=False)]
    out["parameters"] = {k: v for k, v in values.items() if not isinstance(v, list)}
    return {**out, **more}


def every_variant() -> Iterator[tuple[str, Variant]]:
    for method, variants in VARIANTS.items():
        for variant in variants:
            yield method, variant


def layers(source: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": source, "layer_range": [first, end], **({"parameters": parameters} if parameters else {})}


def recipes(base: str, a: str, b: str, c: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Recipes that differ from tensor to tensor."""
    gradient = [0.0, 0.5, 0.3, 1.0]
    by_name = [
        {"filter": "self_attn", "value": gradient},
        {"filter": "mlp", "value": [1.0, 0.2]},
        {"value": 0.5},
    ]
    yield (
        "gradient",
        {
            "merge_method": "slerp",
            "base_model": base,
            "slices": [{"sources": [layers(base, 0, 4), layers(a, 0, 4)]}],
            "parameters": {"t": gradient},
        },
    )
    yield (
        "filters",
        {"merge_method": "slerp", "base_model": base, "models": [{"model": a}], "parameters": {"t": by_name}},
    )
    yield (
        "filters_of_slices",
        {
            "merge_method": "slerp",
            "base_model": base,
            "slices": [
                {"sources": [layers(base, 0, 3), layers(a, 0, 3)], "parameters": {"t": by_name}},
                {"sources": [layers(base, 3, 4), layers(a, 3, 4)], "parameters": {"t": 0.25}},
            ],
            "parameters": {"t": 0.75},
        },
    )
    for method in ("ties", "dare_ties", "dare_linear", "task_arithmetic"):
        yield (
            f"{method}_by_name",
            {
                "merge_method": method,
                "base_model": base,
                "models": [
                    {"model": a, "parameters": {"weight": [{"filter": "mlp", "value": [0.5, 1.5]}, {"value": 1.0}]}},
                    {"model": b, "parameters": {"weight": 0.5, "density": [{"filter": "self_attn", "value": 0.9}]}},
                    {"model": c, "parameters": {"weight": [0.25, 0.75, 0.5]}},
                ],
                "parameters": {"density": 0.4, "normalize": True},
            },
        )
        yield (
            f"{method}_of_slices",
            {
                "merge_method": method,
                "base_model": base,
                "seed": 7,
                "slices": [
                    {
                        "sources": [
                            layers(base, 0, 2),
                            layers(a, 0, 2, weight=0.7),
                            layers(b, 2, 4, weight=[0.2, 0.9]),
                        ],
                        "parameters": {"density": 0.3},
                    },
                    {"sources": [layers(base, 1, 4), layers(a, 1, 4, weight=1.0), layers(c, 0, 3, weight=0.4)]},
                ],
                "parameters": {"density": 0.6},
            },
        )
    yield (
        "linear_by_name",
        {
            "merge_method": "linear",
            "models": [
                {"model": m, "parameters": {"weight": [{"filter": "mlp", "value": w}, {"value": 1.0 - w}]}}
                for m, w in ((a, 0.25), (b, 0.75))
            ],
        },
    )
    yield (
        "stack",
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [layers(a, 0, 3)]},
                {"sources": [layers(b, 1, 4, scale=[{"filter": "down_proj", "value": 0.0}, {"value": 0.5}])]},
            ],
        },
    )
    yield (
        "stock_by_name",
        {
            "merge_method": "model_stock",
            "base_model": base,
            "models": [{"model": m} for m in (a, b, c)],
            "parameters": {"filter_wise": [{"filter": "mlp", "value": True}, {"value": False}]},
        },
    )
