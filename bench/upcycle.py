"""Expert replication: whole upcyclings beside the floor of their bytes and beside mergekit-moe, and normals per second.

    python bench/upcycle.py                                # all sections; 35 GB of disk, half an hour on two cores
    python bench/upcycle.py --quick                        # small models, one run each: does it work?
    python bench/upcycle.py --sections floor --kinds noise --runs 3

Sections: normals (one core, in its caches, beside torch), floor (the 1.5b base with 8 experts against ``cat`` of it and
``dd`` of the output's bytes, alternated), memory (the same with a budget of 1 GB), peer (768x12 with 8 experts beside
mergekit-moe with random gates, in turn). Kinds: copies, noise (relative, the default), absolute noise, drop.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import floor
from merges import ALLOWANCE, BUDGET, Bench, MergeFailed
from process import Run, Spread, run, warm, weights, within
from report import Row, provenance, save, table, unfit, version

TREE = Path(__file__).resolve().parents[1]
EXPERTS = 8
KINDS: dict[str, dict[str, Any]] = {
    "copies": {"expert_init_noise": 0.0},
    "noise": {},
    "absolute": {"noise_mode": "absolute"},
    "drop": {"expert_init_noise": 0.0, "drop_ratio": 0.5},
}
FLOOR_TARGET, NORMALS_TARGET = 1.25, 0.5e9
CALLS = 300
"""Of a few milliseconds each; the quickest is the core's own, whatever else the machine does."""
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<s>": 1, "</s>": 2, "<unk>": 0}, "unk_token": "<unk>"},
}
"""mergekit-moe loads a tokenizer whatever the gates are; generated models have none."""


def upcycle(dense: str, out: str, options: str) -> None:
    """What a measured process does."""
    from fastmerge.dna import UpcyclingConfig, upcycle_dense_to_moe

    asked = json.loads(options)
    memory = asked.pop("memory", None)
    upcycle_dense_to_moe(dense, UpcyclingConfig(num_experts=EXPERTS, **asked), out=out, memory=memory)


def ours(bench: Bench, dense: Path, **options: Any) -> tuple[Run, int]:
    """One process of it, and the bytes that it wrote."""
    found = 0

    def command(out: str) -> list[str]:
        return [*within(TREE, str(Path(__file__).resolve())), "--upcycle", str(dense), out, json.dumps(options)]

    out = bench.work / "out"
    try:
        done = run(command(str(out)))
        found = sum(f.stat().st_size for f in weights(out))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if done.status:
        raise MergeFailed(f"exit status {done.status}: {done.output}")
    return done, found


def theirs(bench: Bench, dense: Path, noise: float) -> Run:
    """mergekit-moe with random gates and the same experts."""
    model = bench.work / "dense"
    if not model.exists():
        model.mkdir()
        for file in dense.iterdir():
            (model / file.name).symlink_to(file)
        (model / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (model / "tokenizer_config.json").write_text(json.dumps(words))
    expert = {"source_model": str(model), "positive_prompts": ["x"], **({"noise_scale": noise} if noise else {})}
    config = {"base_model": str(model), "gate_mode": "random", "dtype": "bfloat16", "experts": [expert] * EXPERTS}
    path, out = bench.work / "moe.yml", bench.work / "out"
    path.write_text(json.dumps(config))
    flags = ["--i-understand-this-is-not-useful-without-training", "--no-copy-tokenizer"]
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": ""}
    try:
        done = run(
            [str(Path(sys.executable).with_name("mergekit-moe")), str(path), str(out), *flags], environment=environment
        )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if done.status:
        raise MergeFailed(f"exit status {done.status}: {done.output}")
    return done


def normals(bench: Bench, _: list[str]) -> list[Row]:
    """Normal numbers per second on one core, as noise on 8 experts of bf16 weights, and torch's own numbers."""
    import numpy as np

    from fastmerge.backends.native import NativeKernels
    from fastmerge.dtypes import BF16
    from fastmerge.ops.segments import Segments

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    piece = 1 << 18  # half a megabyte of input and each output: what a core's caches hold
    x = np.zeros(piece, np.uint16)
    outs = np.zeros((EXPERTS, piece), np.uint16)
    rows = [outs[0].ctypes.data, piece, 0, piece, 7, 0, 0, x.ctypes.data, *[o.ctypes.data for o in outs[1:]]]
    segments = Segments(np.array([rows], np.int64), (BF16,), BF16)
    numbers, sigma = np.arange(EXPERTS), np.full((1, EXPERTS), 0.01)
    kernels = NativeKernels()
    found: list[Row] = []

    def rate(label: str, work: Callable[[], object], count: int) -> None:
        times = []
        for _ in range(1 if bench.quick else CALLS):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        rates = count / min(times)
        met = {"target": NORMALS_TARGET / 1e9, "met": bench.verdict(rates >= NORMALS_TARGET)}
        found.append({"what": label, "G normals/s": round(rates / 1e9, 3), **(met if label == "fastmerge" else {})})

    rate("fastmerge", lambda: kernels.replicate(segments, sigma, numbers), EXPERTS * piece)
    if version("torch"):
        import torch

        torch.set_num_threads(1)
        room = torch.empty(piece, dtype=torch.bfloat16)
        rate("torch normal_", room.normal_, piece)
    return found


def against_floor(bench: Bench, kinds: list[str]) -> list[Row]:
    """The 1.5b base with 8 experts against the floor of reading it and writing the mixture, alternated."""
    dense = bench.family("1.5b", 3)[0]
    files = weights(dense)
    rows: list[Row] = []
    for kind in kinds:
        made: list[Run] = []
        sizes: list[int] = []

        def work(kind: str = kind, made: list[Run] = made, sizes: list[int] = sizes) -> float:
            done, size = ours(bench, dense, **KINDS[kind])
            made.append(done)
            sizes.append(size)
            return done.seconds

        def probe(sizes: list[int] = sizes) -> floor.Floor:
            return floor.probe(files, sizes[-1], bench.work)

        warm(files)
        whole, below, floors = floor.alternate(work, probe, bench.runs)
        write = Spread.of([f.write for f in floors])
        ratio = whole.median / write.median
        rows.append(
            {
                "kind": kind,
                "GB out": round(sizes[-1] / 1e9, 2),
                "fastmerge s": str(whole),
                "floor of writing s": str(write),
                "and of reading s": round(below.median - write.median, 2),
                "GB/s": round(sizes[-1] / whole.median / 1e9, 2),
                "times floor": round(ratio, 2),
                "cpu s": round(Spread.of([r.cpu for r in made[1:]]).median, 2),
                "peak MB": max(r.rss for r in made) // 10**6,
                "target": FLOOR_TARGET,
                "met": bench.verdict(ratio <= FLOOR_TARGET),
            }
        )
        print(f"  {kind}: done", flush=True)
    return rows


def memory(bench: Bench, kinds: list[str]) -> list[Row]:
    """Peak resident bytes under a budget of 1 GB."""
    dense = bench.family("1.5b", 3)[0]
    rows: list[Row] = []
    for kind in kinds:
        done, _ = ours(bench, dense, **KINDS[kind], memory=BUDGET)
        rows.append(
            {
                "kind": kind,
                "seconds": round(done.seconds, 2),
                "budget MB": BUDGET // 10**6,
                "peak MB": done.rss // 10**6,
                "allowed MB": (BUDGET + ALLOWANCE) // 10**6,
                "met": bench.verdict(done.rss <= BUDGET + ALLOWANCE),
            }
        )
    return rows


def peer(bench: Bench, kinds: list[str]) -> list[Row]:
    """8 experts of the 768x12 base beside mergekit-moe, in turn; noise of standard deviation 0.01."""
    found = version("mergekit")
    dense = bench.family(bench.peer_size, 3)[0]
    warm(weights(dense))
    rows: list[Row] = []
    for kind in [k for k in kinds if k in ("copies", "absolute")]:
        mine, other = [], []
        for count in range(max(bench.runs, bench.peer_runs if found else 0) + 1):
            if count <= bench.runs:
                mine.append(ours(bench, dense, **KINDS[kind])[0])
            if found and count < bench.peer_runs:
                other.append(theirs(bench, dense, 0.0 if kind == "copies" else 0.01))
        own = Spread.of([r.seconds for r in mine[1:]])
        row = {"kind": kind, "fastmerge s": str(own), "peak MB": max(r.rss for r in mine) // 10**6}
        if other:
            beside = Spread.of([r.seconds for r in other])
            row |= {
                f"mergekit-moe {found} s": str(beside),
                "mergekit-moe peak MB": max(r.rss for r in other) // 10**6,
                "times faster": round(beside.median / own.median, 1),
            }
        rows.append(row)
        print(f"  {kind}: done", flush=True)
    return rows


SECTIONS: dict[str, Callable[[Bench, list[str]], list[Row]]] = {
    "peer": peer,
    "memory": memory,
    "floor": against_floor,
    "normals": normals,
}


def main() -> int:
    """Runs the chosen sections, prints their tables and saves them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="generated models [$FASTMERGE_BENCH_DATA or .cache/bench]")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["copies", "noise", "absolute"])
    parser.add_argument("--runs", type=int, help="counted runs of fastmerge and of the floor [5]")
    parser.add_argument("--peer-runs", type=int, help="counted runs of mergekit-moe [3]")
    parser.add_argument("--peer-size", choices=("768x12", "1.5b"), default="768x12")
    parser.add_argument("--quick", action="store_true", help="small models, one run each; judges nothing")
    parser.add_argument("--no-save", action="store_true", help="print only; no file in results/")
    parser.add_argument("--upcycle", nargs=3, metavar=("DENSE", "OUT", "OPTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.upcycle:
        upcycle(*args.upcycle)
        return 0
    data = (args.data or Path(os.environ.get("FASTMERGE_BENCH_DATA", ".cache/bench"))).resolve()
    data.mkdir(parents=True, exist_ok=True)
    about = provenance(data)
    print(json.dumps(about, indent=1))
    judged = not (args.no_save or args.quick)
    if judged and (reason := unfit(about)):
        parser.error(reason)
    results: dict[str, list[Row]] = {}
    failed = False
    with tempfile.TemporaryDirectory(dir=data, prefix=".work-") as work:
        few = 1 if args.quick else None
        bench = Bench(
            data, Path(work), args.runs or few or 5, args.peer_runs or few or 3, args.quick, (), (), args.peer_size
        )
        for name in args.sections:
            print(f"\n== {name}: {(SECTIONS[name].__doc__ or '').strip()}", flush=True)
            try:
                results[name] = SECTIONS[name](bench, args.kinds)
            except MergeFailed as error:
                failed = True
                results[name] = [{"failed": str(error)}]
                print(error)
                continue
            print(table(results[name]))
    if judged:
        print(f"\nsaved {save('upcycle', results, about)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
