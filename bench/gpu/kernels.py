"""Every kernel on resident tensors beside the copy bandwidth of the same run; working sets of 4 GiB in bf16.

Bytes are those that the operation cannot do without (b = 2 bytes): combine ``(N + 1) b`` per element, slerp ``2 b`` and
``3 b``, the merge passes ``(N + 2) b``, the counting read and the whole selection ``(N + 1) b``, replication
``(E + 1) b``, of which ``E b`` are written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from bench import calls
from bench.gpu import data, issue, layout, replicate
from bench.gpu.data import KINDS, family
from bench.gpu.plan import Context, Item, Row
from bench.gpu.timing import Bench, beside

MODELS = (2, 4, 8)


def items(context: Context) -> Sequence[Item]:
    """Probes first: what follows is judged by them."""
    bench = Bench.of(dry=context.dry)
    models = (2,) if context.dry else MODELS
    kinds = KINDS[-1:] if context.dry else KINDS

    def item(name: str, run: Callable[..., Row], *args: Any, needs: float = 5, limit: float = 90) -> Item:
        return Item(name, functools.partial(run, bench, *args), needs=needs, limit=limit)

    found = [item("issue", issue.rates, needs=12)]
    found += [item(f"combine N={n}", combine, n, False) for n in models]
    found += [item("combine delta N=2", combine, 2, True), item("slerp", slerp)]
    found += [item(f"ties N={n}", ties, n, "lattice") for n in models]
    found += [item("ties N=2 random", ties, 2, "random")]
    found += [item(f"select N=2 {kind}", select, 2, kind) for kind in kinds]
    found += [item(f"select N={n} lattice", select, n, "lattice") for n in models if n > 2]
    found += [item(f"selection N=2 {kind}", selection, 2, kind) for kind in kinds]
    found += [item(f"dare N={n}", dare, n) for n in models]
    found += [item(f"replicate E=8 {what}", replicate.rate, 8, what) for what in ("clean", "noise")]
    found += [item(f"batch {what}", layout.batch, what, needs=8, limit=60) for what in ("combine", "ties")]
    return found


def triton(bench: Bench) -> Any:
    """The kernels of the device."""
    from fastmerge.kernels import TritonKernels

    return TritonKernels(bench.device)


def combine(bench: Bench, models: int, delta: bool) -> Row:
    """Weighted sums."""
    arrays = models + 1 + delta
    f = family(bench.device, bench.elements(arrays), models)
    return beside(bench, {"combine": (calls.combine(triton(bench), f, delta=delta), 2.0 * arrays * f.n)})


def slerp(bench: Bench) -> Row:
    """Both passes, one after the other; the solve between them is the host's."""
    f = family(bench.device, bench.elements(3), 2)
    kernels = triton(bench)
    passes = {
        "gram": (calls.gram(kernels, f, diff=True), 4.0 * f.n),
        "apply": (calls.combine(kernels, f, delta=False), 6.0 * f.n),
    }
    return beside(bench, passes)


def ties(bench: Bench, models: int, kind: str) -> Row:
    """The merge pass, with thresholds and a tie cut in the middle of the tensor."""
    f = family(bench.device, bench.elements(models + 2), models, kind)
    work = data.ties(triton(bench), f)
    return beside(bench, {"merge": (work, 2.0 * (models + 2) * f.n)})


def select(bench: Bench, models: int, kind: str) -> Row:
    """The counting read with a bracket of six standard deviations, listing included."""
    f = family(bench.device, bench.elements(models + 1), models, kind)
    return beside(bench, {"count": (data.count(triton(bench), f), 2.0 * (models + 1) * f.n)})


def selection(bench: Bench, models: int, kind: str) -> Row:
    """The whole exact selection of one tensor: samples, brackets, the counting read, decisions, cuts."""
    f = family(bench.device, bench.elements(models + 1), models, kind)
    return beside(bench, {"select": (calls.select(triton(bench), f), 2.0 * (models + 1) * f.n)})


def dare(bench: Bench, models: int) -> Row:
    """Bernoulli drop and weighted sum, and the share that the rate of instructions allows."""
    f = family(bench.device, bench.elements(models + 2), models)
    work = calls.consensus(triton(bench), f, drop=True)
    moved = 2.0 * (models + 2)
    row = beside(bench, {"dare": (work, moved * f.n)})
    if bench.device == "cpu":
        return {**row, "instructions": None, "issue GB/s": None, "bound share": row["share"]}
    instructions = issue.per_element(work, "consensus")
    rate = issue.measure(bench)["instructions/s"] / instructions * moved
    bound = min(rate, 1e9 * row["copy GB/s"])
    share = round(1e9 * row["dare GB/s"] / bound, 4)
    return {**row, "instructions": round(instructions, 1), "issue GB/s": round(rate / 1e9, 1), "bound share": share}
