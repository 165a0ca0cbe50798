"""Every launcher of interest, called for real on small tables: what ``aot.py`` compiles."""

from __future__ import annotations

import numpy as np

from fastmerge.ops.kernels import Brackets, Found
from tests.kernels.cases import Case

MAX = 2
"""MERGE, where the sign of a zero is that of the first of equals."""


def launches(only: str):
    """What calls them on the kernels of one (fake) device."""

    def run(kernels, name, codes, call, sizes=(65_536,), out=None):
        if only in name:
            call(kernels, Case(codes, out=codes[0] if out is None else out, sizes=sizes, kinds=["normal"]))

    def combine(delta, div=1.0, wide=False):
        return lambda k, c: k.combine(
            c.segments,
            np.ones((c.groups, c.n + 1)),
            np.full((c.groups, 2), div),
            delta=delta,
            per_row=False,
            wide=wide,
        )

    def gram(delta, diff=False):
        def call(k, c):
            v = c.n + 1 - delta
            k.gram(c.segments, np.zeros((9, v * (v + 1) // 2 + diff)), delta=delta, diff=diff, per_row=False)

        return call

    def dot(k, c):
        k.dot(c.segments, np.zeros((9, c.n - 1)))

    def keep(c, words):
        args = c.keep_args(words)
        if "spread" not in words:
            args.cut[:] = (0, 5, -1) if "cut" in words else (2**62, 0, -1)
        return args

    def consensus(words, mode):
        return lambda k, c: k.consensus(c.segments, keep(c, words), c.rules(*mode))

    def l1(words):
        return lambda k, c: k.l1(c.segments, keep(c, words), np.zeros((9, c.n, 2)))

    def votes(words="all"):
        return lambda k, c: k.votes(c.segments, keep(c, words), c.rules(1, False).votes, np.zeros((9, 2), np.int64))

    def count(drop=False):
        def call(k, c):
            lo = np.zeros((c.groups, c.n), np.uint64)
            lists = np.zeros((c.n, 64), np.uint32), np.zeros((c.n, 64, 2), np.int64), np.zeros(c.n, np.int64)
            found = Found(np.zeros((9, c.n, 4), np.int64), *lists)
            k.count(c.segments, c.delta_args(drop=drop), Brackets(lo, lo + 9), found)

        return call

    def kth(drop=False):
        def call(k, c):
            ranks = np.full((c.groups, c.n), 1000, np.int64)
            found = np.zeros((c.groups, c.n, 4), np.int64)
            k.kth(c.segments, c.delta_args(drop=drop), ranks, np.zeros((c.groups, c.n), np.uint64), found)

        return call

    def delta_keys(k, c):
        k.delta_keys(c.segments, c.delta_args(), np.zeros((int(c.segments.table[:, 1].sum()), c.n), np.uint32))

    ties, dare, odd = (1, False, 0, 0), (0, False, 0, 0), (2048 + 5,)
    plan = []
    for code in (3, 2, 1):
        for n in (2, 4):
            x, d = (code,) * n, (code,) * (n + 1)
            plan += [("combine", x, combine(False)), ("combine", d, combine(True)), ("gram", x, gram(False))]
            plan += [("consensus", d, consensus("all", ties)), ("count", d, count()), ("gram", d, gram(True))]
    for n in (2, 4):
        d = (3,) * (n + 1)
        plan += [("consensus", d, consensus("index cut", ties)), ("consensus", d, consensus("drop", dare))]
        plan += [("consensus", d, consensus("drop", ties)), ("l1", d, l1("drop")), ("l1", d, l1("all"))]
        plan += [("votes", d, votes()), ("delta_keys", d, delta_keys)]
    plan += [("dot", (code,) * (n + 2), dot) for code in (3, 2, 1) for n in (2, 4)]
    plan += [("dot", codes, dot) for codes in ((3,) * 10, (1, 3, 3, 1), (1,) * 10, (1, 0, 1))]
    plan += [("consensus", (3,) * 9, consensus(*c)) for c in (("all", ties), ("drop", dare))]
    d = (3, 3, 3)
    plan += [("gram", (3, 3), gram(False, True)), ("consensus", d, consensus("spread", ties))]
    plan += [("consensus", d, consensus("all", m)) for m in ((1, True, 2, 0), (2, False, 1, 1), (1, False, 0, 2))]
    plan += [("combine", d, combine(True, 3.0)), ("count", d, count(True)), ("combine", (0, 3), combine(True))]
    plan += [("combine", c, combine(False, wide=True)) for c in ((1, 1), (1, 1, 1), (1, 1, 1, 1))]
    plan += [("gram", (3, 0), gram(False)), ("consensus", (0, 3, 3), consensus("all", ties))]
    w, sums = (1, 1, 1), "with wide sums"
    plan += [(f"consensus {sums}", (1,) * n, consensus("all wide", ties)) for n in (3, 5, 9)]
    plan += [(f"consensus {sums}", w, consensus("drop wide", m)) for m in (ties, dare)]
    plan += [(f"consensus {sums}", w, consensus("all wide", (1, False, 0, MAX)))]
    plan += [(f"l1 {sums}", w, l1("drop wide")), (f"votes {sums}", w, votes("all wide"))]
    tails = [("combine", d, combine(True)), ("gram", d, gram(True)), ("consensus", d, consensus("index", ties))]
    tails += [("count", d, count()), ("l1", d, l1("drop index")), ("votes", d, votes()), ("delta_keys", d, delta_keys)]
    tails += [("consensus", d, consensus("drop spread", ties)), ("dot", (3,) * 4, dot)]

    def everything(kernels):
        for name, codes, call in plan:
            run(kernels, name, codes, call)
        run(kernels, "kth", d, kth(), (16_384,))
        run(kernels, "kth", d, kth(drop=True), (16_384,))
        run(kernels, "kth", (0, 3), kth(), (8192,))
        for name, codes, call in tails:
            run(kernels, name, codes, call, odd)
        for out in (1, 2, 3):  # every conversion, alone and in pairs
            for codes in ((0, 0), (1, 1), (2, 2), (3, 3), (3, 3, 3)):
                for sizes in (odd, (65_536,)):
                    run(kernels, "combine", codes, combine(len(codes) > 2), sizes, out)
        for codes in ((3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)):
            for sizes in (odd, (65_536,)):
                run(kernels, "consensus", codes, consensus("all", (1, False, 0, MAX)), sizes)
        for name, codes, sizes, call in sequences():
            run(kernels, f"sequence {name}", codes, call, sizes)

    return everything


def sequences():
    """Whole merges of resident tensors, one or more of each method: (name, types, lengths, call)."""

    def weighted(solve, *, delta, diff=False, per_row=False):
        def call(kernels, c):
            s = kernels.sequence(c.segments, per_row=per_row)
            vectors = s.gram(delta=delta, diff=diff)
            s.combine(*solve(s, vectors, c.groups), delta=delta, div=delta, first=vectors.here[:-1])
            s.run()

        return call

    def slerp(every=False):
        return lambda s, v, n: s.slerp(v, np.ones((n, 2)), every=every)

    def stock(angle=False, clamp=False):
        return lambda s, v, n: s.model_stock(v, np.ones((n, 1)), angle=angle, clamp=clamp)

    def linear(kernels, c):
        s = kernels.sequence(c.segments)
        s.combine(np.ones((c.groups, c.n + 1)), np.ones((c.groups, 2)), delta=False, div=False)
        s.run()

    def tasks(mode, ties="", *, together=False, drop=False, rescale=False, majority=False):
        def call(kernels, c):
            s = kernels.sequence(c.segments, None if together else np.argsort(kernels.ways(c.segments), kind="stable"))
            deltas, rules = s.deltas(c.delta_args(drop=drop)), c.rules(*mode)
            size = c.segments.table[:, 1].sum() if together else c.segments.table[:, 1]
            ranks = np.zeros((c.groups, c.n), np.int64) + np.reshape(size // 5, (-1, 1))
            keep = s.select(deltas, ranks, ties=ties, together=together) if ties else s.untrimmed(deltas)
            factors, scale = s.tables(rules)
            if rescale:
                s.rescale(keep, factors, np.ones((c.groups, c.n)))
            if majority:
                s.majority(keep, factors, scale, rules, together=together)
            s.consensus(keep, factors, scale, rules)
            s.run()

        return call

    mean, dare = (1, False, 0, 0), (0, False, 0, 0)
    sizes, rows = (262_144, 4096), (65_536,)  # unmasked; one for the samples, one for kth.py
    for x in ((3, 3), (1, 1), (0, 3)):
        yield "linear", x, sizes, linear
        yield "slerp", x, sizes, weighted(slerp(), delta=False, diff=True)
    for d in ((3, 3, 3), (3,) * 5, (1, 1, 1), (0, 3, 3)):
        yield "stock", d, sizes, weighted(stock(), delta=True)
        yield "ties", d, sizes, tasks(mean, "index")
    for d in ((3, 3, 3), (0, 3, 3)):
        yield "dare", d, sizes, tasks(dare, drop=True, rescale=True)
    yield "slerp", (3, 3), rows, weighted(slerp(every=True), delta=False, diff=True, per_row=True)
    d = (3, 3, 3)
    yield "slerp", (3, 3), rows, weighted(slerp(), delta=False, diff=True, per_row=True)
    yield "stock", d, sizes, weighted(stock(True, True), delta=True)
    yield "ties", d, sizes, tasks(mean, "all")
    yield "ties", d, sizes, tasks(mean, "spread", rescale=True)
    yield "ties", d, sizes, tasks((1, False, 1, 0), "index", drop=True, majority=True)
    yield "ties", (0, 3, 3), sizes, tasks((1, False, 1, 0), "index", majority=True)
    yield "ties", d, sizes, tasks((1, False, 1, 0), "index", together=True, majority=True)
