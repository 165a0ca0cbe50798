"""The bytes of a set of merges, as hashes: a change that should not move them shows that it does not.

    python bench/bytes.py [--only PART] [--every N] [--against FILE...] > FILE

Every method and preset over every type, with and without ``dtype`` and ``out_dtype``; slices, gradients, filters,
parameters per slice, ranks over the whole model, angles per row; shapes from no element to several tiles; from disk
(:func:`fastmerge.merge` and the command) and in memory. One line per case: ``case sha256``, of the data, types and
shapes of all results by name. Only public calls are used, so that one file runs on builds that lie far apart::

    PYTHONPATH=OLD python bench/bytes.py >old.txt && python bench/bytes.py --against old.txt
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_cases import (
    FAMILIES,
    ODD,
    RESULTS,
    SHAPES,
    TORCH,
    VARIANTS,
    WITHOUT_BASE,
    Variant,
    every_variant,
    preset_name,
    recipe,
    recipes,
    state,
    stored,
    tensor,
)
from safetensors.torch import load_file, save_file

import fastmerge as fm

Case = tuple[str, Callable[[], str]]


def digest(results: Mapping[str, torch.Tensor]) -> str:
    """sha256 of results in the order of their names: name, type, shape, data."""
    total = hashlib.sha256()
    for name, t in sorted(results.items()):
        total.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        total.update(t.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def write(directory: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1) -> Path:
    """Writes a checkpoint with safetensors itself."""
    directory.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4}
    (directory / "config.json").write_text(json.dumps(config))
    names, weight_map = list(tensors), {}
    for s in range(shards):
        part = names[s::shards]
        file = "model.safetensors" if shards == 1 else f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        weight_map.update(dict.fromkeys(part, file))
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def read(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whatever its shards."""
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


class Disk:
    """Families on disk, each written when a case first asks for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = itertools.count()

    @functools.cached_property
    def odd(self) -> list[str]:
        """Tensors of odd shapes, and integers that all models share."""
        steps = torch.arange(5)
        return [str(write(self.root / f"odd{m}", {**state(m, "bf16", ODD), "steps": steps})) for m in range(4)]

    @functools.cache  # noqa: B019  one instance per run
    def family(self, kind: str, shards: int) -> list[str]:
        """Directories of the base and three fine-tunes."""
        return [
            str(write(self.root / f"{kind}-{shards}-{m}", state(m, t, SHAPES), shards=shards if m else 1))
            for m, t in enumerate(FAMILIES[kind])
        ]

    def merge(self, recipe: Mapping[str, Any], *, command: bool = False, **options: Any) -> str:
        """Merges a recipe and hashes the result."""
        out = self.root / f"out{next(self.count)}"
        if command:
            file = self.root / f"{out.name}.json"
            file.write_text(json.dumps(recipe))
            words = [sys.executable, "-m", "fastmerge", "merge", str(file), str(out), "--device", "cpu", "--quiet"]
            subprocess.run([*words, *(w for k, v in options.items() for w in (f"--{k}", v))], check=True)
        else:
            fm.merge(recipe, out, device="cpu", **options)
        return digest(read(out))


def from_disk(disk: Disk) -> Iterator[Case]:
    """Whole models by every variant and type."""

    def one(method: str, variant: Variant, kind: str, asked: Mapping[str, str]) -> str:
        return disk.merge(recipe(method, variant, disk.family(kind, 1), **asked))

    for kind in FAMILIES:
        for method, variant in every_variant():
            work = functools.partial(one, method, variant, kind)
            yield f"disk/{method}/{variant[0]}/{kind}", functools.partial(work, {})
            if variant is VARIANTS[method][0]:
                for asked in RESULTS[1:]:
                    label = ",".join(f"{k}={v}" for k, v in asked.items())
                    yield f"disk/{method}/{variant[0]}/{kind}/{label}", functools.partial(work, asked)


def by_tensor(disk: Disk) -> Iterator[Case]:
    """Slices, gradients and filters; shards, budgets and the command."""

    def one(kind: str, name: str, shards: int, options: Mapping[str, Any]) -> str:
        found = dict(recipes(*disk.family(kind, shards)))[name]
        return disk.merge(found, **options)

    for kind in ("bf16", "fp32", "mixed"):
        for name, _ in recipes("", "", "", ""):
            yield f"recipe/{name}/{kind}", functools.partial(one, kind, name, 1, {})
    small = {"memory": "32MB", "shard_size": 300_000}
    for name, shards, options in (
        ("ties_of_slices", 3, small),
        ("filters", 2, small),
        ("stack", 2, small),
        ("ties_by_name", 1, {"command": True}),
        ("dare_linear_of_slices", 2, {"command": True, "seed": "3"}),
    ):
        label = ",".join(f"{k}={v}" for k, v in options.items())
        yield f"recipe/{name}/bf16/{shards}/{label}", functools.partial(one, "bf16", name, shards, options)


def of_odd_shapes(disk: Disk) -> Iterator[Case]:
    """A model of odd shapes and integers."""
    for method in VARIANTS:
        variant = VARIANTS[method][0]
        yield f"odd/{method}", lambda m=method, v=variant: disk.merge(recipe(m, v, disk.odd))


def in_memory() -> Iterator[Case]:
    """Tensor by tensor, in every type and shape."""

    def one(method: str, variant: Variant, kind: str, asked: Mapping[str, str]) -> str:
        _, preset, count, values = variant
        first = 1 if method in WITHOUT_BASE else 0
        types = FAMILIES[kind][first : 1 + count]
        results = {}
        for name, shape in ODD.items():
            results[name] = fm.merge_tensors(
                [tensor(name, first + i, shape, t) for i, t in enumerate(types)],
                method,
                parameters=values,
                base_index=None if first else 0,
                name=name,
                preset=preset_name(method, preset),
                seed=5,
                **{k: getattr(torch, v) for k, v in asked.items()},
            )
        return digest(results)

    for kind in FAMILIES:
        for method, variant in every_variant():
            for asked in RESULTS if variant is VARIANTS[method][0] else RESULTS[:1]:
                label = ",".join(f"{k}={v}" for k, v in asked.items()) or "as it is"
                label = label.replace(" ", "_")
                yield (
                    f"tensors/{method}/{variant[0]}/{kind}/{label}",
                    functools.partial(one, method, variant, kind, asked),
                )


def of_state_dicts() -> Iterator[Case]:
    """Models in memory, with integers and one tensor under two names."""

    def one(method: str, variant: Variant, kind: str) -> str:
        _, preset, count, values = variant
        first = 1 if method in WITHOUT_BASE else 0
        models = {}
        for i, t in enumerate(FAMILIES[kind][first : 1 + count]):
            found = state(first + i, t, {**SHAPES, **ODD})
            found["model.tied.weight"] = found["model.embed_tokens.weight"]
            found["model.steps"] = torch.arange(5)
            models[f"m{i}"] = found
        base = None if first else "m0"
        merged = fm.merge_state_dicts(
            models, method, parameters=values, base=base, preset=preset_name(method, preset), seed=5
        )
        return digest(merged)

    for kind in ("bf16", "fp32", "mixed"):
        for method, variant in every_variant():
            yield f"state_dicts/{method}/{variant[0]}/{kind}", functools.partial(one, method, variant, kind)


def task_vectors(disk: Disk) -> Iterator[Case]:
    """The six functions over state dictionaries."""

    def vectors(kind: str) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        base = state(0, kind, {**SHAPES, **ODD})
        tuned = [state(m, kind, base_shapes) for m in (1, 2, 3)]
        return base, [{n: (t.float() - base[n].float()).to(t.dtype) for n, t in m.items()} for m in tuned]

    base_shapes = {**SHAPES, **ODD}

    def ties(kind: str, **options: Any) -> str:
        base, tau = vectors(kind)
        del tau[1]["lm_head.weight"]
        return digest(fm.ties_merge(base, tau, **options))

    def dare_ties(kind: str, **options: Any) -> str:
        return digest(fm.dare_ties_merge(*vectors(kind), **options))

    def dare(kind: str, **options: Any) -> str:
        return digest(fm.dare_sparsify(vectors(kind)[1][0], **options))

    def slerp(kind: str, t: float) -> str:
        return digest(fm.slerp_models(state(0, kind, base_shapes), state(1, kind, base_shapes), t))

    def compute(kind: str) -> str:
        base, a, *_ = disk.family(kind, 1)
        return digest(fm.compute_task_vector(base, Path(a) / "model.safetensors"))

    def apply(kind: str) -> str:
        base, *tuned = disk.family(kind, 1)
        tau = [fm.compute_task_vector(base, t) for t in tuned]
        del tau[0]["model.norm.weight"]
        return digest(fm.apply_task_vectors(base, tau, [0.5, -0.25, 1.0]))

    for kind in ("bf16", "fp16", "fp32", "fp64", "mixed"):
        yield f"functions/compute_task_vector/{kind}", functools.partial(compute, kind)
        yield f"functions/apply_task_vectors/{kind}", functools.partial(apply, kind)
    for kind in TORCH:
        yield f"functions/slerp_models/{kind}", functools.partial(slerp, kind, 0.5)
        yield f"functions/slerp_models/{kind}/t=0.2", functools.partial(slerp, kind, 0.2)
        yield f"functions/ties_merge/{kind}", functools.partial(ties, kind)
        yield f"functions/ties_merge/{kind}/weights", functools.partial(ties, kind, density=0.5, weights=[1.0, 0.5, 2])
        yield f"functions/dare_sparsify/{kind}", functools.partial(dare, kind)
        yield f"functions/dare_sparsify/{kind}/p=0.3", functools.partial(dare, kind, p=0.3, seed=1, model_index=2)
        yield f"functions/dare_ties_merge/{kind}", functools.partial(dare_ties, kind)
        yield (
            f"functions/dare_ties_merge/{kind}/trim",
            functools.partial(dare_ties, kind, drop_rate=0.4, density=0.3, shared_mask=True),
        )


def replicas() -> Iterator[Case]:
    """Expert replication."""
    options: dict[str, dict[str, Any]] = {
        "clean": {"experts": 3},
        "relative": {"experts": 4, "noise": 0.01},
        "absolute": {"experts": [7, 0, 2], "noise": 0.003, "mode": "absolute", "seed": 9},
        "all_noisy": {"experts": 2, "noise": 0.02, "first_clean": False},
        "to_fp32": {"experts": 2, "noise": 0.01, "out_dtype": torch.float32},
        "to_bf16": {"experts": 2, "out_dtype": torch.bfloat16},
    }

    def one(kind: str, option: Mapping[str, Any]) -> str:
        results = {}
        for name, shape in ODD.items():
            copies = fm.replicate_experts(tensor(name, 0, shape, kind), name=name, **option)
            results |= {f"{name}.{i:03d}": t for i, t in enumerate(copies)}
        return digest(results)

    for kind in TORCH:
        for label, option in options.items():
            yield f"experts/{label}/{kind}", functools.partial(one, kind, option)


def special() -> Iterator[Case]:
    """Numbers that are none, infinite, of either sign of zero, and subnormal."""
    odd = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -3e-39, 6e-8, 1.0, -2.5, 3e38, 65504.0, 1e-30]
    count = len(odd)

    def one(method: str, variant: Variant, kind: str) -> str:
        _, preset, models, values = variant
        first = 1 if method in WITHOUT_BASE else 0
        inputs = []
        with np.errstate(over="ignore"):
            for i in range(models + 1 - first):
                raw = stored(np.array([odd[(j * (i + 1) + i) % count] for j in range(count * count)]), kind)
                inputs.append(torch.from_numpy(raw.view(np.uint8)).view(TORCH[kind]))
        merged = fm.merge_tensors(
            inputs,
            method,
            parameters=values,
            base_index=None if first else 0,
            name="special",
            preset=preset_name(method, preset),
        )
        return digest({"special": merged})

    for method, variant in every_variant():
        for kind in TORCH:
            yield f"special/{method}/{variant[0]}/{kind}", functools.partial(one, method, variant, kind)


def cases(root: Path) -> Iterator[Case]:
    """Every case: its name, and what computes its hash.

    Args:
        root: an empty directory for models and results.
    """
    disk = Disk(root)
    yield from from_disk(disk)
    yield from by_tensor(disk)
    yield from of_odd_shapes(disk)
    yield from in_memory()
    yield from of_state_dicts()
    yield from task_vectors(disk)
    yield from replicas()
    yield from special()


def recorded(*files: Path) -> dict[str, str]:
    """Lists that were written before: case to hash. A later list says what is meant to differ from an earlier one."""
    return dict(line.split() for file in files for line in file.read_text().splitlines())


def result(name: str, work: Callable[[], str]) -> str:
    """The hash of a case, or how it is refused."""
    try:
        return work()
    except (fm.FastMergeError, subprocess.CalledProcessError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return f"refused:{type(error).__name__}"


def main() -> None:
    """Prints the hashes, or what differs from a list of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PART", help="cases whose name holds this")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every n-th case")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=(), metavar="FILE", help="print what differs, and fail"
    )
    parser.add_argument("--slow", type=float, metavar="SECONDS", help="name cases that take longer")
    args = parser.parse_args()
    known = recorded(*args.against)
    moved = count = 0
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108  a random name; nothing need last
    with tempfile.TemporaryDirectory(prefix="fastmerge-bytes-", dir=memory) as root:
        for name, work in itertools.islice(cases(Path(root)), 0, None, args.every):
            if args.only not in name:
                continue
            start = time.perf_counter()
            found = result(name, work)
            if args.slow is not None and time.perf_counter() - start > args.slow:
                print(f"{name}: {time.perf_counter() - start:.2f} s", file=sys.stderr)
            count += 1
            if not args.against:
                print(name, found)
            elif known.get(name) != found:
                moved += 1
                print(name, found, "not", known.get(name))
    if args.against:
        print(f"{count} cases, {moved} differ")
        sys.exit(bool(moved))


if __name__ == "__main__":
    main()
