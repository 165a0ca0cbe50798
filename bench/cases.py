"""What ``kernels.py`` measures: every kernel of the extension on a base and fine-tunes with realistic deltas.

A case is one call on one segment, and the bytes that it cannot do without: every input once, and every output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from generate import pools, to_bf16

from fastmerge.ops.replicate import rows as replicate_rows
from fastmerge.philox import normal_lines

MODELS = 3
BF16 = 3
TYPES = {BF16: ("bf16", np.uint16), 2: ("fp16", np.uint16), 1: ("fp32", np.uint32)}
"""Type code to its name and the integers of its bits."""

HOT, COLD = 1 << 19, 1 << 27
"""Elements: 1 MiB of bf16, and 256 MiB: at less, memcpy may still read what it overwrites, and is no bound then."""

KEEP_ALL = -1
TILE = 1 << 16
DENSITY = 0.2
POOL = 1 << 20
RUNS = {HOT: 60, COLD: 7}
EXPERTS = 4

Array = npt.NDArray[Any]
Work = Callable[[], object]


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
    out: Array
    source: Array
    work: Work


@dataclass(frozen=True, slots=True)
class Data:
    """One segment.

    Attributes:
        code: type code of all.
        n: elements.
        out, base, tuned: owners of the memory.
    """

    code: int
    n: int
    out: Array
    base: Array
    tuned: Sequence[Array]

    @property
    def tiles(self) -> int:
        """Tiles of the segment."""
        return -(-self.n // TILE)

    def table(self, *, base: bool) -> tuple[Array, Array]:
        """The segment table and the type codes of its inputs."""
        inputs = [self.base, *self.tuned] if base else self.tuned
        head = [self.out.ctypes.data, self.n, 0, self.n, 12_345, 0, 0]
        row = np.array([[*head, *(x.ctypes.data for x in inputs)]], np.int64)
        return row, np.full(len(inputs), self.code, np.int32)


@functools.cache
def weights(model: int) -> npt.NDArray[np.float32]:
    """A million weights of the base (0) or a fine-tune, as bf16 holds them."""
    return (pools(0, model, POOL)[2][:POOL].astype(np.uint32) << 16).view(np.float32)


def stored(model: int, code: int, n: int) -> Array:
    """Those weights in a type, repeated."""
    x = weights(model)
    bits = to_bf16(x) if code == BF16 else x.astype(np.float16 if code == 2 else np.float32)
    return np.resize(bits.view(TYPES[code][1]), n)


def data(n: int, code: int = BF16, models: int = MODELS) -> Data:
    """A base and fine-tunes of one type and size."""
    base, *tuned = (stored(i, code, n) for i in range(models + 1))
    return Data(code, n, np.zeros(n, base.dtype), base, tuned)


@functools.cache
def thresholds() -> npt.NDArray[np.uint64]:
    """Key of the last kept delta of each fine-tune at a density of 0.2."""
    keys = [np.abs(weights(i + 1) - weights(0)).view(np.uint32) for i in range(MODELS)]
    at = int((1 - DENSITY) * POOL)
    return np.array([[np.partition(k, at)[at] for k in keys]], np.uint64)


def keep(*, drop: bool, trim: bool) -> tuple[Any, ...]:
    """The keep arguments: Bernoulli with probability one half, and the threshold with every tie kept."""
    cut = np.full((1, MODELS, 3), KEEP_ALL, np.int64)
    cut[:, :, 0] = 1 << 62
    half = np.full((1, MODELS), 1 << 15, np.int32)
    return KEEP_ALL, drop, trim, np.arange(MODELS, dtype=np.int32), half, thresholds(), cut


def combine(native: Any, d: Data, *, delta: bool) -> Work:
    rows, types = d.table(base=delta)
    coef, scale, bad = np.full((1, len(types)), 1 / len(d.tuned)), np.ones((1, 2)), np.zeros(1, np.int64)
    return lambda: native.combine(rows, types, d.code, coef, scale, delta, False, bad)


def gram(native: Any, d: Data, *, delta: bool, diff: bool = False) -> Work:
    rows, types = d.table(base=delta)
    models = len(d.tuned)
    partials = np.zeros((d.tiles, models * (models + 1) // 2 + diff))
    return lambda: native.gram(rows, types, partials, delta, diff, False)


def delta_keys(native: Any, d: Data) -> Work:
    rows, types = d.table(base=True)
    rows[:, 1] = sampled(d)
    out = np.zeros((sampled(d), MODELS), np.uint32)
    args = keep(drop=False, trim=False)
    return lambda: native.delta_keys(rows, types, KEEP_ALL, False, args[3], args[4], out)


def sampled(d: Data) -> int:
    """Elements whose keys are made: every key of a large tensor is never written out."""
    return min(d.n, HOT)


def count(native: Any, d: Data, *, drop: bool) -> Work:
    """A bracket around the threshold, as the sample of a selection leaves it."""
    rows, types = d.table(base=True)
    args, thr = keep(drop=drop, trim=False), thresholds()
    low = (thr * np.uint64(999) // np.uint64(1000)).astype(np.uint64)
    high = thr + (thr - low)
    counts, used = np.zeros((d.tiles, MODELS, 4), np.int64), np.zeros(MODELS, np.int64)
    capacity = d.n // 8
    keys, where = np.zeros((MODELS, capacity), np.uint32), np.zeros((MODELS, capacity, 2), np.int64)

    def work() -> None:
        used[:] = 0
        native.count(rows, types, KEEP_ALL, drop, args[3], args[4], low, high, counts, keys, where, used)

    return work


def l1(native: Any, d: Data, *, drop: bool, trim: bool) -> Work:
    sums = np.zeros((d.tiles, MODELS, 2))
    table = d.table(base=True)
    return lambda: native.l1(*table, *keep(drop=drop, trim=trim), sums)


def votes(native: Any, d: Data) -> Work:
    tally, factors = np.zeros((d.tiles, 2), np.int64), np.ones((1, MODELS, 3))
    table = d.table(base=True)
    return lambda: native.votes(*table, *keep(drop=False, trim=True), 1, False, factors, tally)


def consensus(native: Any, d: Data, *, drop: bool, trim: bool, elect: int) -> Work:
    factors, scale, bad = np.ones((1, MODELS, 3)), np.ones((1, 3)), np.zeros(1, np.int64)
    rules = (elect, False, 0, 0, factors, scale, bad)
    table = d.table(base=True)
    return lambda: native.consensus(*table, BF16, *keep(drop=drop, trim=trim), *rules)


ALL: dict[str, tuple[int, int, Callable[[Any, Data], Work]]] = {
    "combine": (3, 1, lambda k, d: combine(k, d, delta=False)),
    "combine delta": (3, 2, lambda k, d: combine(k, d, delta=True)),
    "gram": (3, 0, lambda k, d: gram(k, d, delta=False)),
    "gram delta": (3, 1, lambda k, d: gram(k, d, delta=True)),
    "gram diff": (2, 0, lambda k, d: gram(k, d, delta=False, diff=True)),
    "delta_keys": (3, 1, delta_keys),
    "count": (3, 1, lambda k, d: count(k, d, drop=False)),
    "count dropped": (3, 1, lambda k, d: count(k, d, drop=True)),
    "l1 dropped": (3, 1, lambda k, d: l1(k, d, drop=True, trim=False)),
    "l1 trimmed": (3, 1, lambda k, d: l1(k, d, drop=False, trim=True)),
    "votes": (3, 1, votes),
    "consensus ties": (3, 2, lambda k, d: consensus(k, d, drop=False, trim=True, elect=1)),
    "consensus dare": (3, 2, lambda k, d: consensus(k, d, drop=True, trim=False, elect=0)),
    "consensus dare_ties": (3, 2, lambda k, d: consensus(k, d, drop=True, trim=False, elect=1)),
}
"""Case to its fine-tunes, the tensors that it moves beside them (base, output), and how it is called."""

BY_TYPE: dict[str, Sequence[int]] = {
    "combine": (1, 2, 3, 4, 8),
    "combine delta": (1, 2, 3, 4, 8),
    "gram": (4, 8),
    "gram delta": (2,),
    "gram diff": (2,),
}
"""Cases that are measured for every type, with these numbers of fine-tunes."""


def case(native: Any, name: str, d: Data) -> Case:
    """A case of :data:`ALL` on all fine-tunes of ``d``."""
    _, more, make = ALL[name]
    models = len(d.tuned)
    elements = sampled(d) if name == "delta_keys" else d.n
    nbytes = elements * d.base.itemsize * (models + more)
    return Case(name, TYPES[d.code][0], models, elements, nbytes, RUNS[d.n], d.out, d.base, make(native, d))


def every(native: Any, n: int) -> Iterator[Case]:
    """Every kernel, in bf16."""
    d = data(n)
    for name, (models, _, _) in ALL.items():
        yield case(native, name, replace(d, tuned=d.tuned[:models]))
    yield from replicate(native, replace(d, tuned=()))


def by_type(native: Any, n: int) -> Iterator[Case]:
    """The kernels that have a code path for each type, or for each number of models."""
    for code in TYPES:
        d = data(n, code, max(max(counts) for counts in BY_TYPE.values()))
        for name, counts in BY_TYPE.items():
            for models in counts:
                yield case(native, name, replace(d, tuned=d.tuned[:models]))
        yield from replicate(native, replace(d, tuned=()))


def replicate(native: Any, d: Data) -> Iterator[Case]:
    """A tensor to its experts: all clean, or all but the first with noise."""
    outs = [d.out, *(np.zeros_like(d.out) for _ in range(EXPERTS - 1))]
    source = np.array([[d.base.ctypes.data, d.n, 0, 1]], np.int64)
    places, numbers, lines = np.array([[x.ctypes.data for x in outs]], np.int64), np.arange(EXPERTS), normal_lines()
    nbytes = (EXPERTS + 1) * d.out.nbytes
    for name, noise in (("replicate", 0.0), ("replicate noise", 1e-3)):
        table = replicate_rows(source, places, np.where(numbers > 0, noise, 0.0), numbers)
        work = functools.partial(native.replicate, table, d.code, d.code, lines)
        yield Case(name, TYPES[d.code][0], EXPERTS, d.n, nbytes, RUNS[d.n], d.out, d.base, work)
