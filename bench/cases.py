"""What ``test_kernels.py`` measures: every kernel on a base and fine-tunes with realistic deltas.

A case is one call on one segment, and the bytes that it cannot do without: every input once, and every output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import calls
from bench.calls import DENSITY, Family, Work
from bench.generate import drawn, to_bf16
from fastmerge.ops.segments import Segments

MODELS = 3
BF16 = 3
TYPES = {BF16: ("bf16", np.uint16), 2: ("fp16", np.uint16), 1: ("fp32", np.uint32)}
"""Type code to its name and the integers of its bits."""

TOY, HOT, COLD = 1 << 16, 1 << 19, 1 << 27
"""Elements: where nothing is measured; 1 MiB of bf16; and 256 MiB.

At less, memcpy may still read what it overwrites, and is no bound then.
"""

RUNS = {TOY: 1, HOT: 60, COLD: 7}
POOL = 1 << 20
EXPERTS = 4

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a kernel.

    Attributes:
        kernel: name of the kernel, then of the variant.
        type: of all inputs and outputs.
        models: fine-tunes; for replicate, experts.
        elements: of each input; for replicate, of each output.
        nbytes: moved.
        runs: counted calls.
        out, source: memory that memcpy writes and reads beside it.
        work: the call.
    """

    kernel: str
    type: str
    models: int
    elements: int
    nbytes: int
    runs: int
    out: Any
    source: Any
    work: Work


@functools.cache
def pool(model: int) -> npt.NDArray[np.uint16]:
    """Bits of a million weights in bf16."""
    return drawn(0, model, 2, POOL)


@functools.cache
def weights(model: int) -> npt.NDArray[np.float32]:
    """A million weights of the base (0) or a fine-tune, as bf16 holds them."""
    return (pool(model).astype(np.uint32) << 16).view(np.float32)


def stored(model: int, code: int, n: int, device: str) -> Any:
    """Those weights in a type, repeated: in numpy on the CPU, else in torch."""
    x = weights(model)
    bits = to_bf16(x) if code == BF16 else x.astype(np.float16 if code == 2 else np.float32)
    bits = bits.view(TYPES[code][1])
    if device == "cpu":
        return np.resize(bits, n)
    import torch

    some = torch.from_numpy(bits.view(f"int{8 * bits.itemsize}")).to("cuda" if device == "cuda" else "cpu")
    return some.repeat(-(-n // POOL))[:n]


@functools.lru_cache(maxsize=1)
def family(n: int, code: int = BF16, models: int = MODELS, device: str = "cpu") -> Family:
    """A base and fine-tunes of one type and size; the last one is kept for the next case."""
    base, *tuned = (stored(i, code, n, device) for i in range(models + 1))
    out = np.zeros_like(base) if device == "cpu" else base.clone()
    return Family(base, tuned, out, code)


@functools.cache
def thresholds() -> npt.NDArray[np.uint64]:
    """Key of the last kept delta of each fine-tune at a density of 0.2."""
    keys = [np.abs(weights(i + 1) - weights(0)).view(np.uint32) for i in range(MODELS)]
    at = int((1 - DENSITY) * POOL)
    return np.array([[np.partition(k, at)[at] for k in keys]], np.uint64)


def count(kernels: Any, f: Family, *, drop: bool) -> Work:
    """A bracket around the threshold, as the sample of a selection leaves it."""
    thr = thresholds()
    low = (thr * np.uint64(999) // np.uint64(1000)).astype(np.uint64)
    return calls.count(kernels, f, low, thr + (thr - low), drop=drop)


ALL: dict[str, tuple[int, int, Callable[[Any, Family], Work]]] = {
    "combine": (3, 1, lambda k, f: calls.combine(k, f, delta=False)),
    "combine delta": (3, 2, lambda k, f: calls.combine(k, f, delta=True)),
    "gram": (3, 0, calls.gram),
    "gram delta": (3, 1, lambda k, f: calls.gram(k, f, delta=True)),
    "gram diff": (2, 0, lambda k, f: calls.gram(k, f, diff=True)),
    "dot": (3, 2, calls.dot),
    "delta_keys": (3, 1, lambda k, f: calls.delta_keys(k, f, HOT)),
    "count": (3, 1, lambda k, f: count(k, f, drop=False)),
    "count dropped": (3, 1, lambda k, f: count(k, f, drop=True)),
    "l1 dropped": (3, 1, lambda k, f: calls.l1(k, f, drop=True)),
    "l1 trimmed": (3, 1, lambda k, f: calls.l1(k, f, thresholds())),
    "votes": (3, 1, lambda k, f: calls.votes(k, f, thresholds())),
    "consensus ties": (3, 2, lambda k, f: calls.consensus(k, f, thresholds(), elect=True)),
    "consensus dare": (3, 2, lambda k, f: calls.consensus(k, f, drop=True)),
    "consensus dare_ties": (3, 2, lambda k, f: calls.consensus(k, f, drop=True, elect=True)),
}
"""Case to its fine-tunes, the tensors that it moves beside them (base, output, gradient), and how it is called."""

BY_TYPE: dict[str, Sequence[int]] = {
    "combine": (1, 2, 3, 4, 8),
    "combine delta": (1, 2, 3, 4, 8),
    "gram": (4, 8),
    "gram delta": (2,),
    "gram diff": (2,),
    "dot": (4,),
}
"""Cases that are measured for every type, with these numbers of fine-tunes."""

MOST = max(max(counts) for counts in BY_TYPE.values())


def case(kernels: Any, name: str, f: Family, models: int | None = None) -> Case:
    """A case of :data:`ALL`, on as many of the fine-tunes as it takes."""
    usual, more, make = ALL[name]
    f = replace(f, tuned=f.tuned[: models or usual])
    elements = min(f.n, HOT) if name == "delta_keys" else f.n
    nbytes = elements * f.dtype.size * (len(f.tuned) + more)
    return Case(name, TYPES[f.code][0], len(f.tuned), elements, nbytes, RUNS[f.n], f.out, f.base, make(kernels, f))


def replicate(kernels: Any, d: Family) -> Iterator[Case]:
    """A tensor to its experts: all clean, or all but the first with noise."""
    outs = [d.out, *(np.zeros_like(d.out) for _ in range(EXPERTS - 1))]
    first, *others = (x.ctypes.data for x in outs)
    table = np.array([[first, d.n, 0, d.n, 1, 0, 0, d.base.ctypes.data, *others]], np.int64)
    segments, numbers = Segments(table, (d.dtype,), d.dtype), np.arange(EXPERTS)
    nbytes = (EXPERTS + 1) * d.out.nbytes
    for name, noise in (("replicate", 0.0), ("replicate noise", 1e-3)):
        work = functools.partial(kernels.replicate, segments, np.where(numbers > 0, noise, 0.0)[None], numbers)
        yield Case(name, TYPES[d.code][0], EXPERTS, d.n, nbytes, RUNS[d.n], d.out, d.base, work)
