"""``fastmerge lora bake`` beside the floor of its bytes and beside peft's ``merge_and_unload``, as whole processes.

    python bench/bake.py                              # 7b at rank 16, one adapter on every linear layer; 45 GB of disk
    python bench/bake.py --rank 64 --adapters 2       # more work for each weight
    python bench/bake.py --size 256x4 --runs 1        # a minute: does it work? judges nothing

The floor is ``cat`` of the base and the adapters to /dev/null, and ``dd conv=fdatasync`` of the output's bytes on the
same filesystem, alternated with the bakes. peft loads the base in bf16, merges the adapters one after the other and
saves; its process is run in turn with ours, and its output is left to the system to write. Targets: 1.25 times the
floor, the budget and 300 MB, five times peft.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import floor
import generate
from process import Run, Spread, fastmerge, run, warm, weights
from report import Row, provenance, save, table, unfit, version

FLOOR_TARGET, PEER_TARGET, ALLOWANCE = 1.25, 5.0, 300 * 10**6
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
JUDGED = ("7b", "8b")
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": ""}


def adapter(directory: Path, size: str, rank: int, seed: int) -> Path:
    """Writes an adapter of every linear layer, in fp32 as peft does; what exists is not written again."""
    import numpy as np
    from safetensors.numpy import save_file

    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}
    settings |= {"target_modules": list(TARGETS), "bias": "none", "init_lora_weights": True}
    config = directory / "adapter_config.json"
    if config.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    draw, found = np.random.default_rng(seed), {}
    for name, shape in generate.shapes(generate.size_of(size)).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            for side, sizes in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                factor = draw.standard_normal(sizes, np.float32) * np.float32(0.01)
                found[f"base_model.model.{module}.lora_{side}.weight"] = factor
    save_file(found, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.write_text(json.dumps(settings))
    return directory


def peers(base: str, out: str, *adapters: str) -> None:
    """What a process of peft does."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [place for place in sys.path if place != here]  # one of the scripts here is called peft
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for path in adapters:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    model.save_pretrained(out)


def into(work: Path, command: Sequence[str], *words: str, environment: dict[str, str] | None = None) -> tuple[Run, int]:
    """Runs a command that writes a directory, and says how many bytes of weights that held."""
    out = work / "out"
    try:
        done = run([word if word != "OUT" else str(out) for word in (*command, *words)], environment=environment)
        written = sum(f.stat().st_size for f in weights(out)) if out.exists() else 0
    finally:
        shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if done.status:
        raise SystemExit(f"exit status {done.status}: {' '.join(command)}\n{done.output}")
    return done, written


def measured(args: argparse.Namespace, work: Path) -> Row:
    """All runs of one size: ours and the floor alternated, then peft in turn with ours."""
    (base,) = generate.generate(args.data, args.size, 0)
    root = args.data / "adapters"
    adapters = [adapter(root / f"{args.size}-{args.rank}-{i}", args.size, args.rank, i) for i in range(args.adapters)]
    files = [f for model in (base, *adapters) for f in weights(model)]
    ours = [*fastmerge(), "lora", "bake", str(base), *map(str, adapters), "OUT"]
    ours += ["--device", "cpu", "--quiet", "--memory", args.memory]
    theirs = [sys.executable, str(Path(__file__).resolve()), "--peft", str(base), "OUT", *map(str, adapters)]
    made: list[Run] = []
    sizes: list[int] = []

    def bake() -> float:
        done, written = into(work, ours)
        made.append(done)
        sizes.append(written)
        return done.seconds

    warm(files)
    whole, below, _ = floor.alternate(bake, lambda: floor.probe(files, sizes[-1], work), args.runs)
    from fastmerge.sizes import parse_bytes

    allowed, peak, times = parse_bytes(args.memory) + ALLOWANCE, max(r.rss for r in made), whole.median / below.median
    row = {
        "what": f"{args.size}, rank {args.rank}, {args.adapters} adapter{'s' * (args.adapters > 1)}",
        "GB out": round(sizes[-1] / 1e9, 2),
        "fastmerge s": str(whole),
        "floor s": str(below),
        "times floor": round(times, 2),
        "cpu s": round(Spread.of([r.cpu for r in made[1:]]).median, 2),
        "peak MB": peak // 10**6,
        "allowed MB": allowed // 10**6,
    }
    met = times <= FLOOR_TARGET and peak <= allowed
    if args.peer_runs and version("peft"):
        beside: list[tuple[Run, Run]] = []
        for _ in range(args.peer_runs):
            peer = into(work, theirs, environment=QUIET)[0]
            beside.append((peer, into(work, ours)[0]))
        slow, fast = (Spread.of([pair[i].seconds for pair in beside]) for i in (0, 1))
        faster = slow.median / fast.median
        row |= {"peft s": str(slow), "peft peak MB": max(p.rss for p, _ in beside) // 10**6}
        row |= {"beside it s": str(fast), "times faster": round(faster, 1)}
        met = met and faster >= PEER_TARGET
    return row | {"met": "not judged" if args.size not in JUDGED else "yes" if met else "NO"}


def main() -> int:
    """Runs, prints and saves; the status is 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="generated models [$FASTMERGE_BENCH_DATA or .cache/bench]")
    parser.add_argument("--size", default="7b", help=f"HIDDENxLAYERS, {', '.join(generate.SIZES)} [7b]")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=1, help="how many are baked at once [1]")
    parser.add_argument("--memory", default="1GB", help="our budget [1GB]")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of fastmerge and of the floor [5]")
    parser.add_argument("--peer-runs", type=int, default=3, help="runs of peft; 0 for none [3]")
    parser.add_argument("--no-save", action="store_true", help="print only; no file in results/")
    parser.add_argument("--peft", nargs="+", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peft:
        peers(*args.peft)
        return 0
    args.data = (args.data or Path(os.environ.get("FASTMERGE_BENCH_DATA", ".cache/bench"))).resolve()
    args.data.mkdir(parents=True, exist_ok=True)
    about = provenance(args.data) | {"peft": version("peft")}
    print(json.dumps(about, indent=1), flush=True)
    kept = not args.no_save and args.size in JUDGED
    if kept and (reason := unfit(about)):
        parser.error(reason)
    with tempfile.TemporaryDirectory(dir=args.data, prefix=".work-") as work:
        row = measured(args, Path(work))
    print(table([row]))
    if kept:
        print(f"\nsaved {save('bake', {'bake': [row]}, about)}")
    return int(row["met"] == "NO")


if __name__ == "__main__":
    sys.exit(main())
