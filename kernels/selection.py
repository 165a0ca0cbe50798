"""Exact k-th magnitudes of whole tensors in device memory: a fixed sequence of launches.

Tensors that one program's registers hold take one launch of kth.py. For those of more than a tile, twice: sample,
bracket, a larger sample, a narrower bracket, one counting read of everything, a decision; the second time hardly ever
finds anything to do, and then leaves at once (sample.py, count.py, decide.py). What is still open, and tensors between
the two, are settled digit by digit: a program reads a tile five times in some 100 microseconds, which brackets of its
own, and lists as large as the tile, would take as well.

Sizes. A sample of m of n elements knows the rank k within ``sqrt(m p (1 - p))``, p = k / n: from 16,384 elements the
coarse bracket holds 2.5 % of all at p = 0.2, from a million the next one 0.31 %. Its list then takes 1.6 % of what the
bf16 model takes, keys and tiles together (of a tensor of a million elements some 5 %).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import count, decide, sample, settle
from . import kth as whole
from . import ties as which
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

MIDDLE = 65_536
"""Elements of the largest tensor that is settled without brackets."""


class Deltas(NamedTuple):
    """How task vectors are formed: numbers of the models int32 ``[N]``, Bernoulli thresholds int32 ``[S, N]``."""

    models: Place
    bernoulli: Place
    round_code: int
    drop: bool


def ways(types: Types, lengths: I64) -> I64:
    """How thresholds of tensors are found: 0 by brackets, 1 digit by digit, 2 by kth.py. They are laid out so."""
    out: I64 = (lengths <= MIDDLE).astype(np.int64) + (lengths <= whole.MOST >> types.wide)
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
        few = np.clip(self.size // 16 // CHUNK, 1, max(1, RANKED.value // CHUNK))
        many = np.minimum(64 * few, np.maximum(self.size // 4 // CHUNK, 1))
        many = np.minimum(np.clip(self.size // 256 // CHUNK, many, MOST_CHUNKS), runs)
        return np.minimum(few, runs), many

    def slots(self) -> I64:
        """Length of each list ``[G, N]``: what its longest stage probably lists, and some to spare."""
        few, many = (c[:, None] * float(CHUNK) for c in self.chunks())
        spread = np.sqrt(np.clip(self.share * (1 - self.share), 0.01, 0.25))
        coarse = 2 * SIGMAS[0][0] * spread / np.sqrt(few) * many
        fine = 2 * SIGMAS[0][1] * spread / np.sqrt(many) * self.size[:, None]
        wanted = np.maximum(np.maximum(coarse, fine) * MARGIN + 256, few)
        out: I64 = np.minimum(wanted, self.size[:, None]).astype(np.int64)
        return out


def select(
    call: Call,
    types: Types,
    here: I64,
    table: Place,
    some: Callable[[I64, int], Place],
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
        here: the segments, whole tensors: ``together`` in tie order, else by their :func:`ways`.
        table: the same on the device.
        some: puts some of its rows there, from the given one on.
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
    way = np.zeros(rows, np.int64) if together else ways(types, length)
    large, registers = int((way == 0).sum()), int((way < 2).sum())
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

    if registers < rows and asked[registers:].any():
        args = (there[1], some(here[registers:], registers), deltas.models, deltas.bernoulli, call.put(ranks))
        whole.kth(call, *args, most=int(length[registers:].max()), **about)
    read = int(first[registers])  # tensors
    counts = call.room((int((-(-length[:read] // 65_536)).sum()), models, 4), np.int64)
    if asked[:registers].any():
        brackets = np.full((registers, models, 2), never, np.int64)
        brackets[asked[:registers]] = (-1, largest + 1)
        ends = call.put(brackets)
        places = owner, there[1], sets, ends, counts
        if asked[:large].any():
            share = k[:large] / np.maximum(size[:large], 1)[:, None]
            _rounds(call, types, here, table, tiles, deltas, _Sets(first[: large + 1], size[:large], share), places)
        args = (there[1], ends, counts, tiles, sets, table, deltas.models, deltas.bernoulli)
        codes = (types.about["inputs"], types.about["codes"], deltas.round_code, deltas.drop, types.wide, WIDTH)
        grid = (registers, models)
        call.launch(settle.settle_kernel, grid, args, *codes, 2048, num_warps=16, maxnreg=128)  # spills with 64
    flags = (models, TIES[ties], WIDTH, 1024)
    call.launch(which.cut_kernel, (rows, models), (*there, counts, tiles, sets), *flags, num_warps=4)
    before = call.zeros((tensors,), np.int64)
    if together:
        before = call.put(np.cumsum(-(-length // 65_536)) - -(-length // 65_536))
    return owner, before, there[0]


def _rounds(
    call: Call,
    types: Types,
    here: I64,
    table: Place,
    tiles: Place,
    deltas: Deltas,
    work: _Sets,
    places: tuple[Place, Place, Place, Place, Place],
) -> None:
    """Samples, brackets, counts and decisions of the large sets."""
    owner, state, first, ends, counts = places
    sets, models = work.share.shape
    tensors = int(work.first[-1])
    slots = work.slots()
    regions = np.stack([np.cumsum(slots).reshape(slots.shape) - slots, slots], axis=2)
    inners = np.where(slots > RANKED.value, decide.INNER, 0)
    inner_at = np.cumsum(inners).reshape(slots.shape) - inners
    room = int(slots.sum())
    keys, listed = call.room((room,), types.key), call.room((room,), np.int32)
    inner = call.room((int(inners.sum()),), types.key)
    runs = np.zeros(tensors + 1, np.int64)
    np.cumsum(here[:tensors, 1] // RUN, out=runs[1:])
    prefixes = []
    for chunks in work.chunks():
        prefix = np.zeros(sets + 1, np.int64)
        np.cumsum(chunks, out=prefix[1:])
        prefixes.append((call.put(prefix), int(prefix[-1])))
    region, run = call.put(regions), call.put(runs)
    inner_first = call.put(inner_at)
    about = {"round_code": deltas.round_code, "drop": deltas.drop, **types.about}
    ins = (deltas.models, deltas.bernoulli)
    codes = (types.about["inputs"], types.about["codes"], deltas.round_code, deltas.drop, types.wide, WIDTH)
    walks = list(types.tiles(here[:tensors], "count", lanes=True))
    grid = (sets, models)
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
        call.launch(which.tally_kernel, (sets * models, PARTS), args, *flags, num_warps=8)
