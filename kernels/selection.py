"""Exact k-th magnitudes of whole tensors in device memory: a fixed sequence of launches.

Tensors that one program's registers hold take one launch of kth.py. For the others, twice: sample, bracket, a larger
sample, a narrower bracket, one counting read of everything, a decision; the second time hardly ever finds anything to
do, and then leaves at once. What is still open is settled digit by digit. (sample.py, count.py, decide.py)

Sizes. A sample of m of n elements knows the rank k within ``sqrt(m p (1 - p))``, p = k / n; of 16,384 elements the coarse
bracket holds 2.5 % of all at p = 0.2, of a million the next one 0.31 %, so that its list takes 2.5 % of what a bf16
model takes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import count, decide, sample
from . import kth as whole
from ._call import Call, Place
from ._launch import I64
from ._types import Types
from .sample import CHUNK, RANKED, RUN, WIDTH

SIGMAS = ((4.0, 4.0), (6.0, 8.0))
"""Half widths of the brackets of either round, in standard deviations of independent draws."""

MOST_CHUNKS = 8192
"""Programs of a sample at most: 16 Mi elements."""

MARGIN = 1.3
"""Slots of a list, for one key that is expected."""

TIES = {"index": 0, "all": 1, "spread": 2}
"""Values of cut_kernel's TIES."""

ALL_TILES = 1 << 62
"""A tile beyond every tile: all ties stay."""

PARTS = 16
"""Programs that tally a list."""


class Deltas(NamedTuple):
    """How task vectors are formed: numbers of the models int32 ``[N]``, Bernoulli thresholds int32 ``[S, N]``."""

    models: Place
    bernoulli: Place
    round_code: int
    drop: bool


def small(types: Types, lengths: I64) -> I64:
    """Which tensors are decided by one program."""
    out: I64 = lengths <= whole.MOST >> types.wide
    return out


class _Sets(NamedTuple):
    """The sets of tensors with one threshold per model that samples and counts work on.

    Attributes:
        first: int64 ``[G + 1]`` first tensor of each.
        size: int64 ``[G]`` elements.
        share: f64 ``[G, N]`` of them that are kept.
    """

    first: I64
    size: I64
    share: np.ndarray[tuple[int, int], np.dtype[np.float64]]

    def chunks(self) -> tuple[I64, I64]:
        """Programs of the small sample and of the large one."""
        runs = np.maximum(self.size // RUN // (CHUNK // RUN), 1)
        few = np.clip(self.size // 64 // CHUNK, 1, max(1, RANKED.value // CHUNK))
        many = np.minimum(np.clip(self.size // 256 // CHUNK, 64 * few, MOST_CHUNKS), runs)
        return np.minimum(few, runs), many

    def slots(self) -> I64:
        """Length of each list ``[G, N]``: what its longest stage probably lists, and some to spare."""
        few, many = (c[:, None] * float(CHUNK) for c in self.chunks())
        spread = np.sqrt(np.clip(self.share * (1 - self.share), 0.01, 0.25))
        coarse = 2 * SIGMAS[0][0] * spread / np.sqrt(few) * many
        fine = 2 * SIGMAS[0][1] * spread / np.sqrt(many) * self.size[:, None]
        wanted = np.maximum(np.maximum(coarse, fine) * MARGIN + 1024, few)
        out: I64 = np.minimum(wanted, self.size[:, None]).astype(np.int64)
        return out


def select(
    call: Call,
    types: Types,
    here: I64,
    table: Place,
    tiles: Place,
    deltas: Deltas,
    ranks: I64,
    *,
    ties: str,
    together: bool,
) -> tuple[Place, Place, Place]:
    """Adds the launches that find every threshold and tie cut.

    Args:
        call: that they belong to.
        types: of the batch.
        here: the segments, whole tensors: ``together`` in tie order, else those of :func:`small` last.
        table: the same on the device.
        tiles: int64 ``[S + 1]`` tiles before each.
        deltas: how task vectors are formed.
        ranks: ``[S, N]`` how many elements to keep; ``together``, of all tensors.
        ties: ``index``, ``all`` or ``spread``.
        together: one threshold per model for all tensors.

    Returns:
        owner int64 ``[S]``, before int64 ``[S]`` and found int64 ``[Q, 4]``, as ``cuts_kernel`` takes them.
    """
    length, tensors, models = here[:, 1], len(here), ranks.shape[1]
    rows = 1 if together else tensors  # of queries
    large = rows if together else int((~small(types, length)).sum())
    size = np.array([length.sum()]) if together else length
    k = ranks[:rows]
    never = (1 << 63) - 1 if types.wide else (1 << 31) - 1
    largest = 0x7FF8000000000000 if types.wide else 0x7FC00000
    asked = (k > 0) & (k < size[:, None])

    found = np.zeros((rows, models, 4), np.int64)
    found[:, :, 1], found[:, :, 3] = ALL_TILES, -1
    found[(k <= 0) & (size > 0)[:, None]] = (never, 0, 0, -1)
    state = np.zeros((rows, models, WIDTH), np.int64)
    state[:, :, 3] = decide.WHOLE
    state[:, :, 4], state[:, :, 5], state[:, :, 7] = k, size[:, None], largest
    there = call.put(found), call.put(state)
    about = {"round_code": deltas.round_code, "drop": deltas.drop, **types.about}
    first = np.array([0, tensors]) if together else np.arange(tensors + 1)
    sets = call.put(first)
    owner = call.put(np.zeros(tensors, np.int64) if together else np.arange(tensors))

    if large < rows and asked[large:].any():
        args = (there[1], call.put(here[large:]), deltas.models, deltas.bernoulli, call.put(ranks))
        whole.kth(call, *args, most=int(length[large:].max()), **about)
    counts = call.room((1, models, 4), np.int64)
    if asked[:large].any():
        share = k[:large] / np.maximum(size[:large], 1)[:, None]
        work = _Sets(first[: large + 1], size[:large], share)
        counts = _rounds(call, types, here, table, tiles, deltas, work, asked, (owner, there[1], sets), never, largest)
    flags = (models, TIES[ties], WIDTH, 1024)
    call.launch(decide.cut_kernel, (rows, models), (*there, counts, tiles, sets), *flags, num_warps=4)
    before = call.zeros((tensors,), np.int64)
    if together:
        before = call.put((np.cumsum(-(-length // 65_536)) - -(-length // 65_536)))
    return owner, before, there[0]


def _rounds(
    call: Call,
    types: Types,
    here: I64,
    table: Place,
    tiles: Place,
    deltas: Deltas,
    work: _Sets,
    asked: I64,
    places: tuple[Place, Place, Place],
    never: int,
    largest: int,
) -> Place:
    """Samples, brackets, counts and decisions of the large sets; the counts per tile."""
    owner, state, first = places
    sets, models = len(work.size), asked.shape[1]
    tensors = int(work.first[-1])
    brackets = np.full((sets, models, 2), never, np.int64)
    brackets[asked[:sets]] = (-1, largest + 1)
    slots = work.slots()
    regions = np.stack([np.cumsum(slots).reshape(slots.shape) - slots, slots], axis=2)
    inners = np.where(slots > RANKED.value, decide.INNER, 0)
    inner_at = np.cumsum(inners).reshape(slots.shape) - inners
    room = int(slots.sum())
    keys, listed = call.room((room,), types.key), call.room((room,), np.int32)
    inner = call.room((int(inners.sum()),), types.key)
    each = -(-here[:tensors, 1] // 65_536)
    counts = call.room((int(each.sum()), models, 4), np.int64)
    runs = np.zeros(tensors + 1, np.int64)
    np.cumsum(here[:tensors, 1] // RUN, out=runs[1:])
    prefixes = []
    for chunks in work.chunks():
        prefix = np.zeros(sets + 1, np.int64)
        np.cumsum(chunks, out=prefix[1:])
        prefixes.append((call.put(prefix), int(prefix[-1])))
    ends, region, run = call.put(brackets), call.put(regions), call.put(runs)
    inner_first = call.put(inner_at)
    about = {"round_code": deltas.round_code, "drop": deltas.drop, **types.about}
    ins = (deltas.models, deltas.bernoulli)
    codes = (types.about["inputs"], types.about["codes"], deltas.round_code, deltas.drop, types.wide, WIDTH)
    walks = list(types.tiles(here[:tensors], "count", lanes=True))
    grid = (sets, models)
    tally = call.zeros((sets, models), np.int64)
    for number, sigmas in enumerate(SIGMAS):
        for stage, ((prefix_at, programs), sigma) in enumerate(zip(prefixes, sigmas, strict=True)):
            seen = call.zeros((sets, models, 3), np.int64)
            args = (keys, seen, table, prefix_at, sets, first, run, *ins, state, ends, region, 2 * number + stage)
            call.launch(sample.sample_kernel, (programs,), args, *codes, CHUNK, num_warps=8)
            flags = (models, sigma, stage == 1, types.wide, WIDTH, RANKED.value)
            call.launch(sample.bracket_kernel, grid, (ends, state, seen, keys, region), *flags, num_warps=16)
        tally = call.zeros((sets, models), np.int64)
        for walk in walks:
            outs, queries = (counts, keys, listed, tally), (owner, owner, ends, region)
            count.count(call, outs, table, walk, *ins, queries, **about)
        args = (state, ends, counts, tiles, first, tally, keys, region, inner, inner_first)
        flags = (models, types.wide, WIDTH, 1024, decide.SWEEP, decide.INNER, RANKED.value)
        call.launch(decide.decide_kernel, grid, args, *flags, num_warps=16)
        args = (state, counts, tally, keys, listed, region)
        flags = (models, PARTS, WIDTH, decide.SWEEP)
        call.launch(decide.tally_kernel, (sets * models, PARTS), args, *flags, num_warps=8)
    args = (state, ends, counts, tiles, first, table, *ins)
    call.launch(decide.settle_kernel, grid, args, *codes, 2048, num_warps=16, maxnreg=128)  # else it spills with 64
    return counts
