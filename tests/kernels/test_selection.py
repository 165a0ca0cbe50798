"""Selection in device memory against sorting: every kind of data, every way that a bracket can miss.

With ``TRITON_INTERPRET=0`` the same tests run compiled kernels on ``cuda`` and carry the mark ``gpu``.
"""

import ctypes

import numpy as np
import pytest

from fastmerge.keys import threshold
from tests import keep_oracle as oracle
from tests.kernels.cases import Case

pytest.importorskip("triton", reason="the Triton kernels need triton")
torch = pytest.importorskip("torch", reason="the Triton kernels need torch")
import triton.language as tl

from fastmerge.kernels import TritonKernels, _call, decide, kth, sample, selection
from fastmerge.kernels.ties import cut_kernel

if _call.INTERPRETED:
    DEVICE = "cpu"
else:
    pytestmark = pytest.mark.gpu
    DEVICE = "cuda"
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 needs a CUDA device", allow_module_level=True)

NAN = {False: 0x7FC00000, True: 0x7FF8000000000000}


def deltas(kind, n, rng):
    """Task vectors that are hard in their own way."""
    x = rng.normal(size=n)
    return {
        "normal": lambda: x,
        "equal": lambda: np.full(n, 0.5),
        "zeros": lambda: np.where(rng.random(n) < 0.88, 0, x),
        "rows": lambda: np.exp(rng.normal(size=(n + 255) // 256)).repeat(256)[:n] * x,
        "lattice": lambda: np.round(x * 20) / 20,
        "few": lambda: rng.choice([0.0, 0.5, 1.0], n),
        "sorted": lambda: np.sort(x),
        "nans": lambda: np.where(rng.random(n) < 0.4, np.nan, x),
        "infinite": lambda: np.where(rng.random(n) < 0.4, np.inf, x),
    }[kind]()


class Selected:
    """What a selection found, in the order of the tensors, beside what sorting finds."""

    def __init__(self, kinds, sizes, codes=(1, 1, 1), *, ties="index", together=False, drop=False, shares=(0.2, 0.5)):
        case = Case(codes, out=codes[0], sizes=sizes, kinds=["normal"])
        for g, tensors in enumerate(case.data):
            tensors[0][:] = oracle.stored(np.zeros(sizes[g]), codes[0])
            for x, code in zip(tensors[1:], codes[1:], strict=True):
                x[:] = oracle.stored(deltas(kinds[g % len(kinds)], sizes[g], case.rng), code)
        self.ties, self.together, self.sizes, self.models = ties, together, sizes, case.n
        total = sum(sizes)
        self.ranks = np.array([[int(s * (total if together else n)) for s in shares] for n in sizes])
        args = case.delta_args(drop=drop)
        wide = 0 in codes
        self.keys = [[np.minimum(self._keys(case, args, g, i), np.uint64(NAN[wide])) for i in range(case.n)]
                     for g in range(len(sizes))]  # fmt: skip
        kernels = TritonKernels(DEVICE)
        segments, self._held = self._there(case.segments)
        order = None if together else np.argsort(kernels.ways(segments), kind="stable")
        s = kernels.sequence(segments, order)
        keep = s.select(s.deltas(args), self.ranks, ties=ties, together=together)
        s.run()
        back = np.arange(len(sizes)) if order is None else np.argsort(order)
        self.thr, self.cut, self.tie = (s.call.tensor(p).cpu().numpy()[back] for p in keep.tables[2:])
        (state,) = (x.args[1] for x in s.call._launches if x.kernel is cut_kernel)
        self.where = s.call.tensor(state).cpu().numpy()[:, :, 3]

    @staticmethod
    def _keys(case, args, g, i):
        _, found = oracle.deltas(case.data[g], case.codes, -1)
        d = found[i]
        if args.drop:
            key = int(case.segments.table[g, 4]) % 2**64
            d = oracle.dropped(d, key, int(args.models[i]), args.bernoulli[g, i], 0)
        return oracle.keys(d).astype(np.uint64)

    @staticmethod
    def _there(segments):
        """The same table over copies on the device."""
        if DEVICE == "cpu":
            return segments, []
        held = []
        for row in segments.table:
            for column, dtype in enumerate(segments.dtypes, 7):
                raw = (ctypes.c_uint8 * (int(row[1]) * dtype.size)).from_address(int(row[column]))
                held.append(torch.frombuffer(bytearray(raw) or bytearray(1), dtype=torch.uint8).to(DEVICE))
                row[column] = held[-1].data_ptr()
        return segments, held

    def wrong(self):
        """What differs from sorting."""
        tensors = range(len(self.sizes))
        out = []
        for i in range(self.models):
            for members in [list(tensors)] if self.together else [[g] for g in tensors]:
                keys = np.concatenate([self.keys[g][i] for g in members])
                k = int(self.ranks[members[0], i])
                if not 0 < k < len(keys):
                    continue
                at = np.sort(keys)[len(keys) - k]
                tied = np.flatnonzero(keys == at)
                keep = k - int((keys > at).sum())
                if self.ties == "all" or at == 0:
                    keep = len(tied)
                kept = keys > at
                kept[tied[:keep]] = True
                wanted = threshold(keep / len(tied)) if self.ties == "spread" and keep < len(tied) else -1
                start = 0
                for g in members:
                    mine = self.keys[g][i]
                    here = np.arange(len(mine)) < self.cut[g, i]
                    got = (mine > at) | ((mine == at) & here)
                    if len(mine) and (self.thr[g, i] != at or self.tie[g, i] != wanted):
                        out.append((g, i, "threshold", int(self.thr[g, i]), int(at), int(self.tie[g, i]), wanted))
                    elif wanted < 0 and not np.array_equal(got, kept[start : start + len(mine)]):
                        out.append((g, i, "cut", int(self.cut[g, i]), keep, len(tied)))
                    start += len(mine)
        return out


@pytest.fixture(autouse=True)
def few_are_small(monkeypatch):
    """Nearly every tensor is too large for one program, and programs are small, so that tests can be short."""
    monkeypatch.setattr(kth, "MOST", 1000)
    monkeypatch.setattr(selection, "MIDDLE", 1000)
    monkeypatch.setattr(selection, "RANKED", tl.constexpr(1024))


KINDS = ["normal", "equal", "zeros", "rows", "lattice", "few", "sorted", "nans", "infinite"]


def test_every_kind_of_data_is_selected_by_brackets():
    found = Selected(KINDS, (3100,) * len(KINDS))
    assert found.wrong() == []
    assert decide.TALLIED not in found.where, "nothing was left for the slow way"


@pytest.mark.parametrize("ties", ["index", "all", "spread"])
def test_ties(ties):
    found = Selected(["few", "lattice"], (4200, 900, 3, 0, 5000), ties=ties)
    assert found.wrong() == []


@pytest.mark.parametrize(
    ("kinds", "ties"), [(["normal"], "index"), (["lattice", "few"], "index"), (["rows"], "spread")]
)
def test_all_tensors_together(kinds, ties):
    """One threshold for all; among them an empty tensor, and some shorter than a run of the sample."""
    assert Selected(kinds, (2100, 5, 0, 900, 66_000, 12), ties=ties, together=True).wrong() == []


@pytest.mark.parametrize(("codes", "drop"), [((3, 3, 3), True), ((0, 3, 0), False), ((2, 1, 3, 3), False)], ids=str)
def test_types_and_drops(codes, drop):
    shares = (0.2, 0.5, 0.01)[: len(codes) - 1]
    assert Selected(["normal", "lattice"], (4200, 8192), codes, drop=drop, shares=shares).wrong() == []


def test_ranks_of_nothing_and_of_everything():
    found = Selected(["normal"], (3000, 3000, 800), shares=(0.0, 1.0))
    assert (found.thr[:, 0] == 2**31 - 1).all()
    assert (found.thr[:, 1] == 0).all()
    assert (found.cut[:, 0] <= 0).all()
    assert (found.cut[:, 1] >= found.sizes).all()


MISSES = {
    "every bracket": ({"slots": 8}, {}),
    "the first bracket": ({"SIGMAS": ((4.0, 0.0), (6.0, 8.0))}, {}),
    "long lists": ({"RANKED": tl.constexpr(128)}, {"INNER": 512, "SWEEP": 512}),
    "lists that are longer than there is room": ({"RANKED": tl.constexpr(64)}, {"INNER": 64, "SWEEP": 512}),
    "lists that are full": ({"SIGMAS": ((9.0, 30.0), (6.0, 8.0)), "slots": 500}, {}),
}


@pytest.mark.parametrize(
    ("miss", "together"), [*((m, False) for m in MISSES), ("every bracket", True), ("the first bracket", True)]
)
def test_brackets_that_miss(miss, together, monkeypatch):
    """A query goes on to the next bracket, and at last to its digits, with the same result."""
    for module, values in zip((selection, decide), MISSES[miss], strict=True):
        for name, value in values.items():
            if name == "slots":
                monkeypatch.setattr(selection._Sets, name, lambda self, n=value: np.full(self.share.shape, n))
            else:
                monkeypatch.setattr(module, name, value)
    found = Selected(["rows", "lattice"], (2100, 1100), together=together)
    assert found.wrong() == []
    if miss == "every bracket":
        assert decide.TALLIED in found.where, "some query took the slow way"
    if miss == "the first bracket":
        assert decide.TALLIED not in found.where


@pytest.mark.parametrize(
    ("k", "thr", "keep", "tied", "where", "span", "bracket"),
    [
        (12, 900, 2, 5, decide.UPPER, None, None),
        (20, 100, 2, 8, decide.LOWER, None, None),
        (10, 0, 0, 0, 0, {"end": 10, "low": 901}, (900, 2001)),
        (16, 0, 0, 0, 0, {"end": 18, "above": 15, "high": 899, "low": 101}, (100, 900)),
        (27, 0, 0, 0, 0, {"above": 26, "high": 99}, (49, 100)),
    ],
)
def test_counts_end_a_query_or_narrow_its_span(k, thr, keep, tied, where, span, bracket):
    """Ten keys are above 900, five at it, three between, which are not listed, eight at 100."""
    never = 0x7FFFFFFF
    fields = dict(zip(sample.FIELDS, (0, 0, 0, 0, k, 0, 0, 2000, 50), strict=True))
    state = torch.tensor([[*fields.values(), *[0] * (sample.WIDTH - len(fields))]], device=DEVICE)
    brackets = torch.tensor([[100, 900]], device=DEVICE)
    counts = torch.tensor([[[4, 5, 0, 0]], [[6, 0, 8, 0]]], device=DEVICE)
    pair, one = torch.tensor([0, 2], device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    listed, none = torch.full((1, 1), 3, device=DEVICE), torch.zeros((1, 2), dtype=torch.int64, device=DEVICE)
    room = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    segments = torch.tensor([0, 1], device=DEVICE)
    sizes = {"N": 1, "WIDE": False, "COLUMNS": sample.WIDTH, "BLOCK": 64, "SWEEP": 64, "INNER": 64, "RANKED": 64}
    decide.decide_kernel[(1, 1)](state, brackets, counts, pair, segments, listed, room, none, room, one, **sizes)
    wanted = fields | {"thr": thr, "keep": keep, "tied": tied, "where": where} | (span or {})
    assert dict(zip(sample.FIELDS, state[0].tolist(), strict=False)) == wanted
    assert tuple(brackets[0].tolist()) == (bracket or (never, never))
