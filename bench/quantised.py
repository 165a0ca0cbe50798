"""Quantised models merged and written back in their own format, against the floor of their bytes.

    python bench/quantised.py                                  # 14 layers of 4096x4096 and 4096x12288: 3.3 GB of disk
    python bench/quantised.py --layers 2 --size 1024 --runs 1  # small
    python bench/quantised.py --methods linear ties --formats fp8 mxfp4

Whole processes on the CPU (``fastmerge merge``, ``out_dtype: as-base``): a base and two fine-tunes with float8 codes
and fp32 scales of 128x128 blocks (``fp8``), or MXFP4 blocks and scales of GPT-OSS's kind (``mxfp4``); inputs in the
page cache. The floor is ``cat`` of the inputs and ``dd conv=fdatasync`` of the output's bytes. Target: 1.3 times.
``cpu s`` is what the process takes of all cores, start-up included: the least of all runs, which a busy machine
changes least.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from floor import alternate, probe
from process import run, warm, weights
from report import Row, provenance, save, table, unfit
from safetensors.torch import save_file

TARGET = 1.3


def fp8(rng: np.random.Generator, rows: int, columns: int, name: str) -> dict[str, torch.Tensor]:
    """A weight with a normal distribution: codes of float8, and the scale of every block."""
    codes = torch.from_numpy(rng.standard_normal((rows, columns), np.float32) * 100).to(torch.float8_e4m3fn)
    scales = 1e-4 + 1e-5 * rng.random((-(-rows // 128), -(-columns // 128)), np.float32)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": torch.from_numpy(scales)}


def mxfp4(rng: np.random.Generator, rows: int, columns: int, name: str) -> dict[str, torch.Tensor]:
    """A weight as blocks of 16 bytes, with one scale each."""
    blocks = rng.integers(0, 256, (1, rows, columns // 32, 16), np.uint8)
    scales = rng.integers(118, 122, (1, rows, columns // 32), np.uint8)
    return {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}


FORMATS = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
}


def write(directory: Path, form: str, *, layers: int, size: int, seed: int) -> Path:
    """A model of square and of wide weights."""
    make, said = FORMATS[form]
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(size, dtype=torch.bfloat16)}
    for layer in range(layers):
        tensors |= make(rng, size, size, f"model.layers.{layer}.self_attn.o_proj")
        tensors |= make(rng, size, 3 * size, f"model.layers.{layer}.mlp.down_proj")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "torch_dtype": "bfloat16",
        "quantization_config": said,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def measure(root: Path, form: str, method: str, args: argparse.Namespace) -> Row:
    """One method over models of one format, in turn with its floor."""
    models = [root / form / name for name in ("base", "a", "b")]
    for seed, model in enumerate(models):
        if not model.exists():
            write(model, form, layers=args.layers, size=args.size, seed=seed)
    files = [file for model in models for file in weights(model)]
    inputs = models if method == "linear" else models[1:]
    recipe = {
        "merge_method": method,
        "base_model": str(models[0]),
        "models": [{"model": str(m), "parameters": {"weight": 0.4}} for m in inputs],
        "out_dtype": "as-base",
        "parameters": {"density": 0.5} if method == "ties" else {},
    }
    if method == "linear":
        del recipe["base_model"]
    path, out = root / "recipe.yml", root / "out"
    path.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "fastmerge", "merge", str(path), str(out), "--device", "cpu", "--quiet"]
    nbytes = sum(file.stat().st_size for file in weights(models[0]))
    warm(files)
    peak: list[int] = []
    cpu: list[float] = []

    def work() -> float:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        done = run(command)
        if done.status:
            raise SystemExit(done.output)
        peak.append(done.rss)
        cpu.append(done.cpu)
        return done.seconds

    merges, floors, _ = alternate(work, lambda: probe(files, nbytes, root), args.runs)
    lost = json.loads((out / "merge_report.json").read_text())["details"]["quantised"]
    times = merges.median / floors.median
    return {
        "what": f"{form}, {method}",
        "merge s": str(merges),
        "floor s": str(floors),
        "times the floor": round(times, 2),
        "cpu s": round(min(cpu), 2),
        "input GB": round(sum(file.stat().st_size for file in files) / 1e9, 2),
        "peak MB": max(peak) // 10**6,
        "relative error": round(lost["relative_error"], 4),
        "met": times <= TARGET,
    }


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--methods", nargs="+", default=["linear", "ties"])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where models and outputs go; a temporary one by default")
    parser.add_argument("--save", action="store_true", help="keeps the result, if the machine was fit for it")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="fastmerge-bench-", dir=args.directory))
    try:
        rows = []
        for form in args.formats:
            for method in args.methods:
                rows.append(measure(root, form, method, args))
                print(table(rows[-1:]), flush=True)
        about = provenance(root)
        if args.save:
            print(unfit(about) or save("quantised", {"quantised": rows}, about))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
