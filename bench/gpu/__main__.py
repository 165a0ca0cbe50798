"""Everything that needs a GPU, in one command that can be cut short.

    make gpu BUDGET=240                            # tests, whole calls, kernels; what fits of merges, tune, sanitize
    make gpu                                       # all parts, at most 540 seconds
    make gpu                                       # the same again continues where that stopped or was killed
    make gpu PARTS="build kernels" BUDGET=3000 WHEELS=dir      # parts are gathered in one table
    python -m bench.gpu --dry                      # toy sizes on the CPU: does the code run?

Nothing comes from a network: the machine's own Python and packages are used, and WHEELS may supply what is missing.
Results go to bench/results/gpu-TIME.json after every item, with a page of Markdown beside it. What is not on the
machine (a peer, the sanitizer) is reported as absent, and the rest runs.

Exit status: 0 all ran and every bar that was measured is met, 1 something failed or missed its bar, 2 no GPU or wrong
usage, 3 the budget is spent: run the same command again.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from bench.gpu import runner, table
from bench.gpu.bars import judge
from bench.gpu.machine import facts
from bench.gpu.plan import PARTS, ROOT, Context, items
from bench.gpu.state import State


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = ROOT / ".cache" / "gpu"
    parser.add_argument("--parts", default="", help=f"some of: {' '.join(PARTS)} [all, in this order]")
    parser.add_argument("--budget", type=float, default=540, help="seconds from start to exit [540]")
    parser.add_argument("--wheels", help="folder of wheels for packages that are missing")
    parser.add_argument("--cache", type=Path, default=cache, help="packages, build, models, outputs [.cache/gpu]")
    parser.add_argument("--results", type=Path, help="[bench/results; of a dry run the cache]")
    parser.add_argument("--commit", help="what the tree is, where it is a copy without history")
    parser.add_argument("--fresh", action="store_true", help="begin a new run, whatever is unfinished")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU, in Triton's interpreter")
    args = parser.parse_args(words)
    args.results = args.results or (args.cache if args.dry else ROOT / "bench" / "results")
    args.parts = args.parts.split() or list(PARTS)
    wrong = [p for p in args.parts if p not in PARTS]
    if wrong:
        parser.error(f"unknown parts: {' '.join(wrong)}; there are {' '.join(PARTS)}")
    args.parts = [p for p in PARTS if p in args.parts]
    return args


def unknown(context: Context, state: State) -> str:
    """What the run has no result of, part by part; a run without any is finished."""
    missing = {p: sum(not state.known(p, i.name) for i in items(p, context)) for p in PARTS}
    return ", ".join(f"{part} ({count})" for part, count in missing.items() if count)


def main(words: list[str] | None = None) -> int:
    """Runs what is left, writes the table, says what comes next."""
    begin = time.monotonic()
    args = arguments(words)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    wheels = str(Path(args.wheels).resolve()) if args.wheels else None
    context = Context(args.dry, wheels, str(args.cache.resolve()))
    bare = not context.site.exists()
    context.site.mkdir(parents=True, exist_ok=True)
    sys.path.append(str(context.site))
    about = facts(context, commit=args.commit)
    if "no_gpu" in about:
        print(f"make gpu: no usable GPU here: {about['no_gpu']}")
        return 2
    state = State.open(args.results, about, fresh=args.fresh)
    if bare:  # the results of another machine may have come along, what it built has not
        state.results.pop("build", None)
    print(f"{state.path}: {about.get('gpu')}, driver {about.get('driver')}, torch {about['torch']}")
    left = runner.Run(args.parts, context, state, retry=args.retry).work(begin, args.budget)
    rest = unknown(context, state)
    table.write(state, rest)
    verdicts = judge(state)
    for row in verdicts:
        print(f"{row['verdict']:8} {row['bar']}: {table.cell(row['measured'])}, required {row['required']}")
    print(f"table: {state.path.with_suffix('.md')}")
    if rest:
        print(
            f"not run yet: {rest}; " + ("the same command continues" if left else "PARTS chooses, FRESH=1 begins anew")
        )
    if left:
        return 3
    failed = any(e["status"] == "failed" for part in state.results.values() for e in part.values())
    return int(failed or any(row["verdict"] == "fail" for row in verdicts))


if __name__ == "__main__":
    sys.exit(main())
