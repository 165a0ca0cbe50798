"""How ``pytest bench`` measures: what every benchmark stands beside, its clock, its table, and where runs are kept.

pytest-benchmark calls, times and saves. What is compared in the same run (memcpy, another call) is alternated with it
in its setup, so that a change of clocks meets both, and its share goes into ``extra_info``.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import clock
from bench.report import RESULTS, Row, provenance, table, unfit

MARKS = {
    "hot": "half a million elements per tensor, in the caches",
    "cold": "256 MiB per tensor, beyond the caches",
    "large": "models of 3 GB in memory",
    "host": "in host memory whatever the device is: left out on others",
    "cores": "uses all cores, so that wall time is what counts",
}

TABLES: dict[str, list[Row]] = {}
"""Rows by group, in the order of the run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("benchmark").addoption(
        "--device",
        choices=("cpu", "cuda", "interpreted"),
        default="cpu",
        help="where tensors are and kernels run; interpreted: Triton's interpreter, toy sizes, measures nothing",
    )
    parser.getgroup("benchmark").addoption("--build", help="measure calls of the build in another work tree")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark opens its storage."""
    if config.getoption("build"):
        _use(Path(config.getoption("build")).resolve())
    for name, what in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {what}")
    warnings.simplefilter("default", pytest.PytestWarning)  # nothing saved yet, another machine: said, not fatal
    option = config.option
    if option.benchmark_storage == "file://./.benchmarks":
        option.benchmark_storage = f"file://{RESULTS / 'benchmarks'}"
    option.benchmark_columns = option.benchmark_columns or ["median", "min", "max", "rounds"]
    if (option.benchmark_save or option.benchmark_autosave) and (reason := unfit(provenance())):
        raise pytest.UsageError(reason)


def _use(tree: Path) -> None:
    """Imports the package from a work tree, whatever is installed; these benches stay our own."""
    sys.meta_path[:] = [f for f in sys.meta_path if "_editable" not in type(f).__module__]
    sys.path.insert(0, str(tree))
    package = importlib.import_module("fastmerge")
    sys.path.remove(str(tree))
    if not Path(str(package.__file__)).is_relative_to(tree):
        raise pytest.UsageError(f"--build {tree}: fastmerge was imported from {package.__file__}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Kernels are timed by the thread's own time or by events, calls by the wall."""
    on_device = config.getoption("device") == "cuda"
    elsewhere = config.getoption("device") != "cpu"
    gone = [i for i in items if elsewhere and i.get_closest_marker("host")]
    config.hook.pytest_deselected(items=gone)
    items[:] = [i for i in items if i not in gone]
    for item in items:
        if item.get_closest_marker("cores"):
            timer: Callable[[], Any] = clock.finished if on_device else time.perf_counter
        else:
            timer = clock.Mark if on_device else time.thread_time
        item.add_marker(pytest.mark.benchmark(timer=timer))


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json["provenance"] = provenance()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for group, rows in TABLES.items():
        terminalreporter.write_line(f"\n== {group}\n{table(rows)}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The option."""
    return str(request.config.getoption("device"))


@pytest.fixture(scope="session")
def toy(request: pytest.FixtureRequest, device: str) -> bool:
    """Whether nothing is measured, so that sizes are small: what runs is all that such a run shows."""
    return device == "interpreted" or bool(request.config.getoption("benchmark_disable"))


@pytest.fixture(scope="session")
def kernels(device: str) -> Any:
    """The kernels that are measured."""
    if device == "cpu":
        from fastmerge.backends.native import NativeKernels

        return NativeKernels()
    from fastmerge.kernels import TritonKernels

    return TritonKernels("cuda" if device == "cuda" else "cpu")


@pytest.fixture
def measure(benchmark: Any, device: str, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Measures a call, alternated with what it stands beside."""
    timer = request.node.get_closest_marker("benchmark").kwargs["timer"]
    on_events = timer is clock.Mark

    def timed(work: Callable[[], Any]) -> float:
        if on_events:
            return clock.once(work, clock.SHORT)[0]
        start = timer()
        work()
        return float(timer() - start)

    def run(
        work: Callable[[], Any],
        *,
        group: str,
        runs: int,
        nbytes: int = 0,
        beside: Callable[[], Any] | None = None,
        beside_bytes: int = 0,
        times: str | None = None,
        unit: float = 1e-3,
        **about: Any,
    ) -> None:
        """Measures.

        Args:
            work: the call.
            group: what it is compared with in tables.
            runs: counted calls.
            nbytes: what it must move: every input once, and every output; 0 where that says nothing.
            beside: what is called before each of them, and timed.
            beside_bytes: what that moves.
            times: name of what it stands beside, where the ratio of times is wanted; None for a share of memcpy.
            unit: of times in the table, in seconds.
            about: further columns.
        """
        others: list[float] = []
        issued = [clock.SHORT]

        def setup() -> None:
            if beside is not None:
                others.append(timed(beside))
            if on_events:
                clock.busy(issued[-1])

        def call() -> None:
            start = time.perf_counter()
            work()
            issued.append(time.perf_counter() - start)

        benchmark.group = group
        benchmark.extra_info.update({"bytes": nbytes, "device": device, **about})
        warm = 2 if on_events else 1
        benchmark.pedantic(call if on_events else work, setup=setup, rounds=runs, warmup_rounds=warm)
        if benchmark.stats is None:
            return
        took, word = benchmark.stats.stats.median, {1e-3: "ms", 1e-6: "us", 1.0: "s"}[unit]
        other = statistics.median(others[warm:]) if others else 0.0
        figures = {"GB/s": round(nbytes / took / 1e9, 2)} if nbytes else {}
        if times is not None:
            per_byte = beside_bytes / nbytes if nbytes else 1.0
            figures |= {f"{times} {word}": round(other / unit, 3), f"times {times}": round(took / other * per_byte, 3)}
        elif others:
            rate = beside_bytes / other
            figures |= {"memcpy GB/s": round(rate / 1e9, 2), "share of memcpy": round(nbytes / took / rate, 3)}
        benchmark.extra_info.update(figures)
        TABLES.setdefault(group, []).append({**about, word: round(took / unit, 3), **figures})

    return run
