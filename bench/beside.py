"""This build beside another one, in turn and in one run: is anything slower, does anything need more memory?

    python bench/beside.py ../before                            # everything; an hour, 20 GB of disk
    python bench/beside.py ../before --sections merges --methods ties --runs 9
    python bench/beside.py ../before --quick                    # small models, one run each: does it work?

``../before`` is a work tree that has its own extension. Sections: merges (whole processes: every method on a 768x12
family; linear, slerp and ties of 1.5b; linear and ties of 18,867 tensors), cold (linear, slerp and ties of 1.5b, or of
--cold-size, that are on the disk only, beside cat and dd), start (--help and plan), kernels (each tree by its own
suite, kernel by kernel), calls (in memory; this tree's suite over either package). Figures are medians of alternated
runs; a row is met where the new build is at most 3 % slower and needs no more memory than 3 % above; of cold merges,
where it takes a third of the system time and ties is 1.4 times as fast, the others 0.95 of the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import floor
import recipes
from merges import Bench, MergeFailed, output_bytes
from process import Run, Spread, cold, fastmerge, run, warm, within
from report import Row, commit, provenance, save, table, unfit

HERE = Path(__file__).resolve().parents[1]
SLOWER = 1.03
MERGES = {"768x12": (3, recipes.METHODS), "1.5b": (3, ("linear", "slerp", "ties")), "moe18k": (2, ("linear", "ties"))}
"""Family to its fine-tunes and methods."""

COLD = {"linear": 3, "slerp": 2, "ties": 3}
"""Methods of the cold section and how many fine-tunes their family has; of 8b two, as four models are 64 GB."""

TIES_COLD, FLOOR_COLD = 1.4, 0.95
"""How many times faster a cold TIES has to be; the share of the floor that the others may take."""

KERNELS = ("combine", "gram", "delta_keys", "count", "l1", "votes", "consensus", "replicate")
TYPED = ("combine", "gram", "replicate")
"""Kernels that are measured by type as well."""

WHERE = {"hot": "hot", "cold": "cold", "types": "by type"}
"""Section of a suite that came before pytest-benchmark, to the end of the group that it is now."""

Rates = dict[str, float]


def in_turn(bench: Bench, work: Callable[[Path], Run], trees: Sequence[Path]) -> list[list[Run]]:
    """Runs of each tree, alternated, the first of each not counted."""
    done: list[list[Run]] = [[] for _ in trees]
    for count in range(bench.runs + 1):
        for runs, tree in zip(done, trees, strict=True):
            one = work(tree)
            if count:
                runs.append(one)
    return done


def compared(bench: Bench, name: str, old: Sequence[Run], new: Sequence[Run]) -> Row:
    """One row of processes."""
    before, after = (Spread.of([r.seconds for r in runs]) for runs in (old, new))
    low, high = (statistics.median(r.rss for r in runs) / 1e6 for runs in (old, new))
    times = after.median / before.median
    return {
        "what": name,
        "before s": str(before),
        "now s": str(after),
        "times": round(times, 3),
        "before cpu s": round(statistics.median(r.cpu for r in old), 2),
        "now cpu s": round(statistics.median(r.cpu for r in new), 2),
        "before MB": round(low),
        "now MB": round(high),
        "met": bench.verdict(times <= SLOWER and high <= SLOWER * low),
    }


def merges(bench: Bench, trees: Sequence[Path]) -> Iterator[Row]:
    """Whole merges, as processes."""
    for size, (models, methods) in MERGES.items():
        family = bench.family(size, models)
        for method in bench.chosen(methods):
            path, files = bench.recipe(method, family)
            warm(files)
            old, new = in_turn(bench, lambda tree, path=path: bench.merge(path, tree=tree), trees)  # type: ignore[misc]
            yield compared(bench, f"{method} {size}", old, new)


def cold_merges(bench: Bench, trees: Sequence[Path]) -> Iterator[Row]:
    """Merges whose inputs are on the disk only, beside ``cat`` and ``dd`` of the same bytes in the same state."""
    for method, models in COLD.items():
        if method not in bench.chosen(list(COLD)):
            continue
        path, files = bench.recipe(method, bench.family(bench.peer_size, 2 if bench.peer_size == "8b" else models))

        def work(tree: Path, path: Path = path, files: list[Path] = files) -> Run:
            cold(files)
            return bench.merge(path, tree=tree)

        floors = []
        done: list[list[Run]] = [[], []]
        for _ in range(bench.runs):
            for runs, tree in zip(done, trees, strict=True):
                runs.append(work(tree))
            cold(files)
            floors.append(floor.probe(files, output_bytes(files), bench.work).seconds)
        row = compared(bench, f"{method} {bench.peer_size} cold", *done)
        old, new = (statistics.median(r.system for r in runs) for runs in done)
        ratio = statistics.median(r.seconds for r in done[1]) / statistics.median(floors)
        met = new <= old / 3 and (1 / row["times"] >= TIES_COLD if method == "ties" else ratio <= FLOOR_COLD)
        yield {
            **{name: value for name, value in row.items() if name != "met"},
            "before system s": round(old, 2),
            "now system s": round(new, 2),
            "floor s": str(Spread.of(floors)),
            "times floor": round(ratio, 2),
            "met": bench.verdict(met),
        }


def start(bench: Bench, trees: Sequence[Path]) -> Iterator[Row]:
    """How long ``--help`` and ``plan`` take to answer."""
    commands = {"--help": ["--help"]}
    for size in ("1.5b", "moe18k"):
        path, _ = bench.recipe("ties", bench.family(size, MERGES[size][0]))
        commands[f"plan {size}"] = ["plan", str(path)]
    for label, words in commands.items():

        def work(tree: Path, label: str = label, words: Sequence[str] = words) -> Run:
            done = run([*fastmerge(tree), *words])
            if done.status:
                raise MergeFailed(f"{tree}: fastmerge {label}: {done.output}")
            return done

        old, new = in_turn(bench, work, trees)
        yield compared(bench, label, old, new)


def ran(command: Sequence[str], tree: Path) -> str:
    """What a suite printed."""
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MergeFailed(f"{tree}: {' '.join(command[3:])}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def benchmarks(suite: Path, tree: Path, *words: str) -> list[dict[str, Any]]:
    """What pytest-benchmark measured in a tree's suite, over the package of a tree."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        options = ["-q", "-p", "no:cacheprovider", "--build", str(tree), "--benchmark-only"]
        ran([*within(tree, "pytest"), *options, f"--benchmark-json={file.name}", *words], suite)
        found: list[dict[str, Any]] = json.loads(Path(file.name).read_text())["benchmarks"]
    return found


def rates(tree: Path, kernel: str, section: str) -> Rates:
    """GB/s of a tree's kernel, case by case, by its own suite."""
    script = tree / "bench" / "kernels.py"
    if script.exists():
        words = ["--no-save", "--sections", section, "--kernels", kernel]
        lines = ran([*within(tree, str(script)), *words], tree).splitlines()
        rows = [re.split(r"\s{2,}", line) for line in lines if line.startswith(kernel)]
        return {" ".join((*row[:3], section)): float(row[5]) for row in rows}
    words = ["bench/test_kernels.py", "-k", f"{kernel} and {'test_' + section if section != 'types' else 'type'}"]
    found: Rates = {}
    for entry in benchmarks(tree, tree, *words):
        about = entry["extra_info"]
        if entry["group"] == f"{kernel} {WHERE[section]}":
            found[f"{about['kernel']} {about['type']} {about['models']} {section}"] = about["GB/s"]
    return found


def kernels(bench: Bench, trees: Sequence[Path]) -> Iterator[Row]:
    """Every kernel, case by case: GB/s of the thread's own time."""
    for section in ("hot", "types") if bench.quick else WHERE:
        for kernel in TYPED if section == "types" else KERNELS:
            yield from fastest([[rates(tree, kernel, section) for tree in trees] for _ in range(bench.runs)], bench)


def calls(bench: Bench, trees: Sequence[Path]) -> Iterator[Row]:
    """Calls in memory, by this tree's suite: calls per second."""
    words = ["bench/test_calls.py", "-m", "hot"] if bench.quick else ["bench/test_calls.py"]

    def measured(tree: Path) -> Rates:
        return {entry["name"]: 1 / entry["stats"]["median"] for entry in benchmarks(HERE, tree, *words)}

    yield from fastest([[measured(tree) for tree in trees] for _ in range(bench.runs)], bench)


def fastest(rounds: Sequence[Sequence[Rates]], bench: Bench) -> Iterator[Row]:
    """Rows of rates: the median of the rounds of either tree."""
    for name in rounds[0][1]:
        old = [before[name] for before, _ in rounds if name in before]
        new = [after[name] for _, after in rounds]
        if not old:
            continue
        times = statistics.median(old) / statistics.median(new)
        row = {"what": name, "before": spread(old), "now": spread(new), "times": round(times, 3)}
        yield {**row, "met": bench.verdict(times <= SLOWER)}


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g}..{max(values):.4g})"


SECTIONS: dict[str, Callable[[Bench, Sequence[Path]], Iterator[Row]]] = {
    "start": start, "merges": merges, "cold": cold_merges, "kernels": kernels, "calls": calls,
}  # fmt: skip


def main() -> int:
    """Compares the chosen sections, prints and saves; the status is 1 where anything is slower or larger."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="work tree of the other build")
    parser.add_argument("--data", type=Path, help="generated models [$FASTMERGE_BENCH_DATA or .cache/bench]")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--methods", nargs="+", choices=recipes.METHODS, default=[], help="merges: only these")
    parser.add_argument("--cold-size", choices=("1.5b", "8b"), default="1.5b", help="the cold section's family")
    parser.add_argument("--runs", type=int, help="counted runs of each build [5]")
    parser.add_argument("--quick", action="store_true", help="small models, one run each; judges nothing")
    parser.add_argument("--no-save", action="store_true", help="print only; no file in results/")
    args = parser.parse_args()
    data = (args.data or Path(os.environ.get("FASTMERGE_BENCH_DATA", ".cache/bench"))).resolve()
    data.mkdir(parents=True, exist_ok=True)
    trees = [args.tree.resolve(), HERE]
    about = provenance(data) | {"beside": commit(trees[0])}
    print(json.dumps(about, indent=1))
    kept = not (args.no_save or args.quick)
    if kept and (reason := unfit(about)):
        parser.error(reason)
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=data, prefix=".work-") as work:
        bench = Bench(
            data, Path(work), args.runs or (1 if args.quick else 5), 0, args.quick, args.methods, (), args.cold_size
        )
        for name in args.sections:
            print(f"\n== {name}", flush=True)
            rows = results.setdefault(name, [])
            for row in SECTIONS[name](bench, trees):
                rows.append(row)
                print(f"  {row['what']}: {row['times']}", flush=True)
            print(table(rows))
    if kept:
        print(f"\nsaved {save('beside', results, about)}")
    return int(any(row["met"] == "NO" for rows in results.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
