"""The launch table of the elementwise kernels: elements per program and warps, beside the copy of the same run.

Results do not depend on it. The shipped entry is named; ``best`` is the fastest of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from bench import calls
from bench.calls import Family, Work
from bench.gpu.data import family, ties
from bench.gpu.kernels import MODELS, triton
from bench.gpu.plan import Context, Item, Row
from bench.gpu.timing import Bench, Probes

CONFIGS = ((1024, 4), (2048, 4), (2048, 8), (4096, 8))

CASES: Mapping[str, tuple[str, Callable[[Any, Family], Work], int]] = {
    "combine": ("combine", lambda k, f: calls.combine(k, f, delta=False), 1),
    "ties": ("consensus", ties, 2),
    "dare": ("consensus", lambda k, f: calls.consensus(k, f, drop=True), 2),
}
"""By name: family of the kernel, its call, arrays besides the fine-tunes."""


def items(context: Context) -> Sequence[Item]:
    """Every case at every number of models."""
    bench = Bench.of(dry=context.dry)
    models = (2,) if context.dry else MODELS
    return [
        Item(f"{name} N={n}", functools.partial(compare, bench, name, n), needs=20, limit=120)
        for name in CASES
        for n in models
    ]


@contextmanager
def launched(family_name: str, block: int, warps: int) -> Iterator[None]:
    """The launch table with another entry for one family."""
    from fastmerge.kernels import _launch

    shipped = _launch.CONFIGS[family_name]
    _launch.CONFIGS[family_name] = {"BLOCK": block, "num_warps": warps}
    try:
        yield
    finally:
        _launch.CONFIGS[family_name] = shipped


def compare(bench: Bench, name: str, models: int) -> Row:
    """Share of the copy bandwidth under every configuration, alternated."""
    from fastmerge.kernels import _launch

    kind, make, more = CASES[name]
    f = family(bench.device, bench.elements(models + more), models)
    call = make(triton(bench), f)
    probes = Probes(bench)

    def under(block: int, warps: int) -> Work:
        def work() -> None:
            with launched(kind, block, warps):
                call()

        return work

    works = {f"{b}/{w}": under(b, w) for b, w in (CONFIGS if bench.warm else CONFIGS[:1])}
    found = bench.alternate({"copy": probes.copy, **works})
    copy = 2 * probes.nbytes / found["copy"].median
    moved = 2.0 * (models + more) * f.n
    shares = {key: round(moved / found[key].median / copy, 4) for key in works}
    shipped = _launch.CONFIGS[kind]
    best = max(shares, key=lambda key: shares[key])
    return {"shipped": f"{shipped['BLOCK']}/{shipped['num_warps']}", "best": best, **shares}
