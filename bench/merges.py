"""Whole merges, as processes: beside mergekit, beside the floor of their bytes, within a budget, and how they start.

    python bench/merges.py                         # everything; about 35 GB of disk, half an hour on two cores
    python bench/merges.py --quick                 # small models, one run each: does it work?
    python bench/merges.py --sections peer --methods ties slerp
    python bench/merges.py --sections peer --methods ties --peer-size 1.5b --peer-runs 1

Sections: peer (mergekit on a 768x12 family), karcher (of 8 fine-tunes beside mergekit: ten minutes), floor (1.5b
against cat and dd), checkpoints (16 of 250 MB against cat and dd), memory (peak resident bytes with --memory 1GB), moe
(18,867 small tensors against a dense model of equal bytes), tiny (50,115 tensors, nearly all of 8 elements, and a
header of 90 MB), start (--help and plan). What is measured is a whole process from start to exit, with its inputs in
the page cache. See README.md in this directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import floor
import recipes
from process import Run, Spread, fastmerge, run, warm, weights
from report import Row, provenance, save, table, unfit, version

PEER_TARGETS = {
    "linear": 7.0, "slerp": 12.0, "dare_linear": 8.0, "dare_ties": 12.0, "ties": 20.0, "model_stock": 10.0,
    "passthrough": 8.0,
}  # fmt: skip
"""How many times faster than mergekit each method has to be."""

KARCHER_TARGET = 50.0

FLOOR_TARGET, MOE_TARGET, START_TARGET, MOE_START_TARGET = 1.25, 1.2, 0.5, 2.5
MOE_RUNS = 3
"""Times as many runs as elsewhere: a ratio of two like times shows smaller differences than the other targets."""
FLOOR_METHODS = ("linear", "slerp", "ties")
BUDGET, ALLOWANCE = 10**9, 300 * 10**6
"""The memory section's budget, and what a process may use beyond it."""

TINY_TARGETS, TINY_BUDGET = {"linear": 1.5, "ties": 3.0}, 10**8
HEADER_TARGET, HEADER_MEMORY, HEADER_TENSORS = 3.0, 600 * 10**6, 500_000
PARSE = (
    "import sys, pathlib; from fastmerge.checkpoint.header import read_header; read_header(pathlib.Path(sys.argv[1]))"
)


class MergeFailed(Exception):
    """A process that was to be measured did not succeed."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all sections share: options and directories.

    Attributes:
        data: where generated families are kept.
        work: temporary directory on the same filesystem, for outputs.
        runs: counted runs of fastmerge; ``peer_runs`` of mergekit.
        quick: small models instead of the real sizes.
        methods: which methods, or empty for those that the section has.
        options: further arguments for ``fastmerge merge``.
        peer_size: family of the peer section.
    """

    data: Path
    work: Path
    runs: int
    peer_runs: int
    quick: bool
    methods: Sequence[str]
    options: Sequence[str]
    peer_size: str = "768x12"

    def family(self, size: str, models: int) -> list[Path]:
        """Directories of a generated family, base first."""
        small = {"8b": "256x4", "1.5b": "256x4", "768x12": "256x4", "dense3g": "tiny"}
        small |= {"moe18k": "tiny-moe", "tiny50k": "tiny-moe"}
        script = str(Path(__file__).with_name("generate.py"))
        command = [sys.executable, script, str(self.data), "--size", small[size] if self.quick else size]
        made = subprocess.run([*command, "--models", str(models)], stdout=subprocess.PIPE, text=True, check=True)
        return [Path(line) for line in made.stdout.splitlines()]

    def recipe(self, method: str, family: Sequence[Path]) -> tuple[Path, list[Path]]:
        """A written recipe and the weight files that it reads."""
        body = recipes.recipe(method, family)
        path = recipes.write(body, self.work / f"{method}-{family[0].parent.name}.yml")
        return path, [f for model in recipes.inputs(body) for f in weights(model)]

    def chosen(self, methods: Sequence[str]) -> list[str]:
        """Those of a section's methods that the command line asks for."""
        return [m for m in methods if not self.methods or m in self.methods]

    def merge(self, path: Path, *options: str, tree: Path | None = None) -> Run:
        """``fastmerge merge`` of a recipe into a fresh directory, which is removed outside of the measured time."""
        command = [*fastmerge(tree), "merge", str(path)]
        return self._into(lambda out: [*command, out, "--device", "cpu", "--quiet", *self.options, *options])

    def peer(self, path: Path) -> Run:
        """The same by mergekit with its default flags; no tokenizer is copied, because none is there."""
        command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(path)]
        # transformers asks for a package named kernels: it must not find ours because somebody set PYTHONPATH.
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": ""}
        return self._into(lambda out: [*command, out, "--no-copy-tokenizer"], offline)

    def _into(self, command: Callable[[str], list[str]], environment: dict[str, str] | None = None) -> Run:
        out = self.work / "out"
        try:
            done = run(command(str(out)), environment=environment)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        # mergekit leaves its output unwritten in the page cache: it is not to slow down the next run.
        os.sync()
        if done.status:
            raise MergeFailed(f"exit status {done.status}: {' '.join(command(str(out)))}\n{done.output}")
        return done

    def verdict(self, met: bool) -> str:
        """Whether a target was met; small models say nothing about it."""
        return "not judged" if self.quick else "yes" if met else "NO"


def peer(bench: Bench) -> list[Row]:
    """Every method on one family (768x12), fastmerge and mergekit in turn."""
    methods = bench.chosen(recipes.METHODS)
    family = bench.family(bench.peer_size, 3 if {*methods} - {"slerp", "passthrough"} else 2)
    return _beside(bench, family, methods, PEER_TARGETS)


def karcher(bench: Bench) -> list[Row]:
    """Eight fine-tunes, max_iter 20000 and tol 1e-9: mergekit's loop touches the weights, so they are small ones."""
    patient = replace(bench, peer_runs=0) if bench.quick else bench
    return _beside(patient, bench.family("tiny", 8), ["karcher"], {"karcher": KARCHER_TARGET})


def _beside(bench: Bench, family: Sequence[Path], methods: Sequence[str], targets: Mapping[str, float]) -> list[Row]:
    found = version("mergekit")
    if not found:
        print("mergekit is not installed here: fastmerge alone is measured")
    rows: list[Row] = []
    for method in methods:
        path, files = bench.recipe(method, family)
        warm(files)
        bench.merge(path)
        ours, theirs = [], []
        for count in range(max(bench.runs, bench.peer_runs if found else 0)):
            if count < bench.runs:
                ours.append(bench.merge(path))
            if found and count < bench.peer_runs:
                theirs.append(bench.peer(path))
        own = Spread.of([r.seconds for r in ours])
        row = {
            "method": method,
            "fastmerge s": str(own),
            "cpu s": round(Spread.of([r.cpu for r in ours]).median, 2),
            "peak MB": max(r.rss for r in ours) // 10**6,
        }
        if theirs:
            other = Spread.of([r.seconds for r in theirs])
            ratio = other.median / own.median
            row |= {
                f"mergekit {found} s": str(other),
                "mergekit peak MB": max(r.rss for r in theirs) // 10**6,
                "times faster": round(ratio, 1),
                "target": targets[method],
                "met": bench.verdict(ratio >= targets[method]),
            }
        rows.append(row)
        print(f"  {method}: done", flush=True)
    return rows


def against_floor(bench: Bench) -> list[Row]:
    """The 1.5b family against ``cat`` and ``dd`` of the same bytes, alternated."""
    return _against_floor(bench, bench.family("1.5b", 3), bench.chosen(FLOOR_METHODS))


def checkpoints(bench: Bench) -> list[Row]:
    """Sixteen checkpoints of 250 MB averaged, against the floor of their bytes."""
    return _against_floor(bench, bench.family("768x12", 15), ["checkpoint_average"])


def _against_floor(bench: Bench, family: Sequence[Path], methods: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for method in methods:
        path, files = bench.recipe(method, family)
        merged: list[Run] = []

        def work(path: Path = path, merged: list[Run] = merged) -> float:
            merged.append(bench.merge(path))
            return merged[-1].seconds

        def probe(files: list[Path] = files) -> floor.Floor:
            return floor.probe(files, output_bytes(files), bench.work)

        ours, theirs, floors = floor.alternate(work, probe, bench.runs)
        moved = _moved(files)
        ratio = ours.median / theirs.median
        rows.append(
            {
                "merge": method,
                "GB": round(moved / 1e9, 2),
                "fastmerge s": str(ours),
                "floor s": str(theirs),
                "of it read": round(Spread.of([f.read for f in floors]).median, 2),
                "GB/s": round(moved / ours.median / 1e9, 2),
                "times floor": round(ratio, 2),
                "cpu s": round(Spread.of([r.cpu for r in merged]).median, 2),
                "peak MB": max(r.rss for r in merged) // 10**6,
                "target": FLOOR_TARGET,
                "met": bench.verdict(ratio <= FLOOR_TARGET),
            }
        )
        print(f"  {method}: done", flush=True)
    return rows


def output_bytes(files: Sequence[Path]) -> int:
    """Bytes of one model of the family: of the files in the first file's directory."""
    return sum(f.stat().st_size for f in files if f.parent == files[0].parent)


def _moved(files: Sequence[Path]) -> int:
    """Bytes of every input once and of the output."""
    return sum(f.stat().st_size for f in files) + output_bytes(files)


def memory(bench: Bench) -> list[Row]:
    """Peak resident bytes of 1.5b merges under a budget of 1 GB."""
    family = bench.family("1.5b", 3)
    rows: list[Row] = []
    for method in bench.chosen(FLOOR_METHODS):
        path, files = bench.recipe(method, family)
        warm(files)
        done = bench.merge(path, "--memory", "1GB")
        rows.append(
            {
                "method": method,
                "seconds": round(done.seconds, 2),
                "cpu s": round(done.cpu, 2),
                "budget MB": BUDGET // 10**6,
                "peak MB": done.rss // 10**6,
                "allowed MB": (BUDGET + ALLOWANCE) // 10**6,
                "met": bench.verdict(done.rss <= BUDGET + ALLOWANCE),
            }
        )
    return rows


def moe(bench: Bench) -> list[Row]:
    """A mixture of experts with 18,867 tensors and a dense model of equal bytes in turn: seconds per byte."""
    rows: list[Row] = []
    for method in bench.chosen(("linear", "ties")):
        recipe = {size: bench.recipe(method, bench.family(size, 2)) for size in ("dense3g", "moe18k")}
        merged: dict[str, list[Run]] = {size: [] for size in recipe}
        for _, files in recipe.values():
            warm(files)
        for count in range(MOE_RUNS * bench.runs + 1):
            for size, (path, _) in recipe.items():
                done = bench.merge(path)
                if count:
                    merged[size].append(done)
        dense = 0.0
        for size, (_, files) in recipe.items():
            seconds = Spread.of([r.seconds for r in merged[size]])
            cost = seconds.median / _moved(files)
            dense = dense or cost
            row = {
                "merge": f"{method} {size}",
                "GB": round(_moved(files) / 1e9, 2),
                "fastmerge s": str(seconds),
                "GB/s": round(1e-9 / cost, 2),
                "cpu s": round(Spread.of([r.cpu for r in merged[size]]).median, 2),
                "peak MB": max(r.rss for r in merged[size]) // 10**6,
                "times dense": round(cost / dense, 2),
            }
            judged = {"target": MOE_TARGET, "met": bench.verdict(cost <= MOE_TARGET * dense)}
            rows.append(row | (judged if size == "moe18k" else {"target": None, "met": None}))
        print(f"  {method}: done", flush=True)
    return rows


def tiny(bench: Bench) -> list[Row]:
    """Three models of 50,115 tensors, nearly all of 8 elements, with --memory 100MB; and a header of 90 MB."""
    family = bench.family("tiny50k", 3)
    rows: list[Row] = []
    for method in bench.chosen(tuple(TINY_TARGETS)):
        path, files = bench.recipe(method, family if method == "linear" else family[:3])
        warm(files)
        runs = [bench.merge(path, "--memory", str(TINY_BUDGET)) for _ in range(bench.runs + 1)][1:]
        seconds, allowed = TINY_TARGETS[method], TINY_BUDGET + ALLOWANCE
        rows.append(_within(bench, f"{method} tiny50k", runs, seconds, allowed))
    tensors = HEADER_TENSORS // (1000 if bench.quick else 1)
    path = bench.work / "header.safetensors"
    script = str(Path(__file__).with_name("generate.py"))
    subprocess.run([sys.executable, script, str(path), "--header", str(tensors)], check=True)
    command = [sys.executable, "-c", PARSE, str(path)]
    runs = [run(command) for _ in range(bench.runs + 1)][1:]
    if any(r.status for r in runs):
        raise MergeFailed(f"parsing {path}: {runs[-1].output}")
    label = f"header of {(path.stat().st_size - 2 * tensors) / 1e6:.0f} MB"
    return [*rows, _within(bench, label, runs, HEADER_TARGET, HEADER_MEMORY)]


def _within(bench: Bench, label: str, runs: Sequence[Run], seconds: float, allowed: int) -> Row:
    """Runs beside what they may take of time and memory."""
    took, peak = Spread.of([r.seconds for r in runs]), max(r.rss for r in runs)
    return {
        "what": label,
        "fastmerge s": str(took),
        "cpu s": round(Spread.of([r.cpu for r in runs]).median, 2),
        "peak MB": peak // 10**6,
        "allowed MB": allowed // 10**6,
        "target": seconds,
        "met": bench.verdict(took.median <= seconds and peak <= allowed),
    }


def start(bench: Bench) -> list[Row]:
    """How long ``--help`` and ``plan`` take to answer."""
    rows: list[Row] = []
    commands = {"--help": ["--help"]}
    for size, models in {"1.5b": 3, "moe18k": 2}.items():
        path, _ = bench.recipe("ties", bench.family(size, models))
        commands[f"plan {size}"] = ["plan", str(path)]
    for label, words in commands.items():
        target = MOE_START_TARGET if "moe" in label else START_TARGET
        runs = [run([*fastmerge(), *words]) for _ in range(bench.runs + 1)][1:]
        if any(r.status for r in runs):
            raise MergeFailed(f"fastmerge {label}: {runs[-1].output}")
        answered = Spread.of([r.seconds for r in runs])
        rows.append(
            {
                "command": label,
                "seconds": str(answered),
                "peak MB": max(r.rss for r in runs) // 10**6,
                "target": target,
                "met": bench.verdict(answered.median <= target),
            }
        )
    return rows


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "start": start, "peer": peer, "floor": against_floor, "memory": memory, "moe": moe,
    "tiny": tiny, "checkpoints": checkpoints, "karcher": karcher,
}  # fmt: skip


def main() -> int:
    """Runs the chosen sections, prints their tables and saves them; the status says whether all could run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="generated models [$FASTMERGE_BENCH_DATA or .cache/bench]")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--methods", nargs="+", choices=recipes.METHODS, default=[], help="only these")
    parser.add_argument("--runs", type=int, help="counted runs of fastmerge and of the floor [5]")
    parser.add_argument("--peer-runs", type=int, help="counted runs of mergekit [3]")
    parser.add_argument(
        "--peer-size", choices=("768x12", "1.5b", "8b"), default="768x12", help="the peer section's family"
    )
    parser.add_argument("--quick", action="store_true", help="small models, one run each; judges nothing")
    parser.add_argument("--no-save", action="store_true", help="print only; no file in results/")
    parser.add_argument("--option", action="append", default=[], help="a further argument for fastmerge merge")
    args = parser.parse_args()
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
        runs, peer_runs = args.runs or few or 5, args.peer_runs or few or 3
        bench = Bench(data, Path(work), runs, peer_runs, args.quick, args.methods, args.option, args.peer_size)
        for name in args.sections:
            print(f"\n== {name}: {(SECTIONS[name].__doc__ or '').strip()}", flush=True)
            try:
                results[name] = SECTIONS[name](bench)
            except MergeFailed as error:
                failed = True
                results[name] = [{"failed": str(error)}]
                print(error)
                continue
            print(table(results[name]))
    if judged:
        print(f"\nsaved {save('merges', results, about)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
