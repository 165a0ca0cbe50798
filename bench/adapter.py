"""mergekit beside mergekit with the engine inside, in turn and in one run.

    python bench/adapter.py                      # both sections; 1.4 GB of disk, five minutes on two cores
    python bench/adapter.py --sections merges --methods ties linear
    python bench/adapter.py --sections karcher --rows 128 --columns 512

Sections: merges (``mergekit-yaml`` against ``python -m fastmerge.adapters.mergekit mergekit-yaml``, whole processes, on
a 768x12 family, inputs in the page cache; target for ties: 10 times), karcher (mergekit's ``merge_tensors`` of 8
fine-tunes, ``max_iter`` 20000 and ``tol`` 1e-9, in one process; target: 50 times).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import recipes
from merges import Bench
from process import Run, Spread, run, warm
from report import Row, provenance, save, table, unfit

HERE = Path(__file__).resolve().parents[1]
TIES_TARGET, KARCHER_TARGET = 10.0, 50.0
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
LAUNCH = [sys.executable, "-m", "fastmerge.adapters.mergekit", "mergekit-yaml"]


def merges(bench: Bench) -> list[Row]:
    """Whole merges, in turn."""
    family = bench.family("768x12", 3)
    rows: list[Row] = []
    for method in bench.chosen(recipes.METHODS):
        path, files = bench.recipe(method, family)
        warm(files)
        _with(bench, path)
        with_it, without = [], []
        for count in range(max(bench.runs, bench.peer_runs)):
            if count < bench.peer_runs:
                without.append(bench.peer(path))
            if count < bench.runs:
                with_it.append(_with(bench, path))
        slow, fast = (Spread.of([r.seconds for r in runs]) for runs in (without, with_it))
        times = slow.median / fast.median
        rows.append(
            {
                "what": f"mergekit-yaml, {method}",
                "without s": str(slow),
                "with s": str(fast),
                "times faster": round(times, 1),
                "peak MB without": max(r.rss for r in without) // 10**6,
                "with": max(r.rss for r in with_it) // 10**6,
                "met": bench.verdict(times >= TIES_TARGET) if method == "ties" else None,
            }
        )
        print(table(rows[-1:]), flush=True)
    return rows


def _with(bench: Bench, path: Path) -> Run:
    """One merge with the adapter, into a fresh directory."""
    out = bench.work / "with"
    tree = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    try:
        done = run([*LAUNCH, str(path), str(out), "--no-copy-tokenizer"], environment=QUIET | tree)
        if done.status or "merges this itself" in done.output or not (out / "merge_report.json").exists():
            raise SystemExit(f"not merged by the engine (status {done.status}):\n{done.output}")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    os.sync()
    return done


def karcher(rows: int, columns: int, runs: int) -> list[Row]:
    """One tensor of 8 fine-tunes; mergekit's loop goes over all weights, ours over 8 x 8 numbers."""
    import torch
    from mergekit.merge_methods import merge_tensors

    from fastmerge.adapters import mergekit as adapter

    g = torch.Generator().manual_seed(0)
    base = torch.randn(rows, columns, generator=g) * 0.02
    tuned = [base + 0.002 * torch.randn(rows, columns, generator=g) for _ in range(8)]
    call = {"method": "karcher", "parameters": {"max_iter": 20_000, "tol": 1e-9}}

    def timed() -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        merged = merge_tensors(tuned, **call)
        return time.perf_counter() - start, merged

    slow, theirs = timed()
    want = merge_tensors([t.double() for t in tuned], **call)
    adapter.install(merges=False)
    try:
        timed()
        fast, ours = zip(*[timed() for _ in range(runs)], strict=True)
    finally:
        adapter.uninstall()
    spread = Spread.of(fast)
    rms = [float((x.double() - want).square().mean().sqrt()) for x in (theirs, ours[0])]
    return [
        {
            "what": f"karcher of 8 x [{rows}, {columns}]",
            "without s": round(slow, 2),
            "with ms": f"{spread.median * 1e3:.2f} ({spread.least * 1e3:.2f}..{spread.most * 1e3:.2f})",
            "times faster": round(slow / spread.median),
            "RMS to fp64 without": f"{rms[0]:.1e}",
            "with": f"{rms[1]:.1e}",
            "met": "yes" if slow / spread.median >= KARCHER_TARGET else "NO",
        }
    ]


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("FASTMERGE_BENCH_DATA", HERE / ".cache/bench"))
    )
    parser.add_argument("--sections", nargs="+", choices=["merges", "karcher"], default=["merges", "karcher"])
    parser.add_argument("--methods", nargs="+", default=["ties"])
    parser.add_argument("--runs", type=int, default=5, help="with the adapter")
    parser.add_argument("--peer-runs", type=int, default=3, help="of mergekit alone")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    about = provenance(args.data if args.data.exists() else None)
    if not args.no_save and (reason := unfit(about)):
        raise SystemExit(reason)
    args.data.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Row]] = {}
    if "merges" in args.sections:
        with tempfile.TemporaryDirectory(dir=args.data) as work:
            bench = Bench(args.data, Path(work), args.runs, args.peer_runs, False, args.methods, ())
            found["merges"] = merges(bench)
    if "karcher" in args.sections:
        found["karcher"] = karcher(args.rows, args.columns, args.runs)
    print(f"\n{about['cpu']}, {about['cores']} cores, load {about['load_1min']}, {about['commit']}; inputs cached\n")
    for section, rows in found.items():
        print(f"{section}\n{table(rows)}\n")
    if not args.no_save:
        print(save("adapter", found, about))
    return int(any(row["met"] == "NO" for rows in found.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
