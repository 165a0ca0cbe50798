"""Segment tables with their data, outputs and parameters, for running one call on two backends."""

import ctypes

import numpy as np

from fastmerge.dtypes import BY_CODE
from fastmerge.ops.kernels import Deltas, Keep, Rules, Votes
from fastmerge.ops.segments import Segments
from tests import keep_oracle as oracle

KINDS = ["normal", "special", "two", "zeros", "equal"]


class Case:
    """Some tensors, one segment each (or tiles of one), and what every kernel may ask for.

    Args of the constructor: type codes of the inputs, base first; type code of the output; elements of each tensor;
    ``shift`` elements of misalignment of every array; ``e0`` logical index of each first element; ``row`` row length;
    ``kinds`` of data, see :func:`tests.keep_oracle.make`.
    """

    def __init__(self, codes, out=3, sizes=(9, 3000), *, shift=0, e0=0, row=None, kinds=KINDS, seed=0):
        self.rng = rng = np.random.default_rng([seed, *codes, out, *sizes, shift])
        self.codes, self.n = codes, len(codes) - 1
        self.data, self.outs, parts = [], [], []
        for g, size in enumerate(sizes):
            tensors = [self.aligned(x, shift) for x in oracle.make(rng, size, codes, kinds[g % len(kinds)])]
            self.data.append(tensors)
            self.outs.append(self.aligned(np.full(size, 0x7F81, oracle.STORAGE[out]), shift))
            key = int(rng.integers(0, 2**64, dtype=np.uint64))
            parts.append({"tensors": tensors, "start": 0, "stop": size, "out": self.outs[-1], "key": key, "group": g})
        table = oracle.table(parts, len(codes))
        table[:, 2] = e0
        if row is not None:
            table[:, 3] = row
        tiles = -(-table[:, 1] // 65536) if row is None else table[:, 1] // row * -(-row // 65536)
        table[:, 6] = np.cumsum(tiles) - tiles
        self.tiles = int(tiles.sum())
        self.groups = len(sizes)
        types = tuple(BY_CODE[c] for c in codes)
        self.segments = Segments(table, types, BY_CODE[out], np.zeros(len(sizes), np.int64))
        self.work = np.float64 if 0 in codes else np.float32

    @staticmethod
    def aligned(x, shift):
        """A copy that starts ``shift`` elements after a multiple of 64 bytes."""
        room = np.zeros(len(x) + 64 + shift, x.dtype)
        at = (-room.ctypes.data % 64) // x.itemsize + shift
        room[at : at + len(x)] = x
        return room[at : at + len(x)]

    def written(self, call):
        """Runs a call that writes to the output addresses: copies of the outputs, and the non-finite counts."""
        self.segments.nonfinite[:] = 5
        for x in self.outs:
            x[:] = 0x7F81
        call(self.segments)
        return [x.copy() for x in self.outs], self.segments.nonfinite.copy()

    def delta_args(self, *, round_code=-1, drop=False):
        """How task vectors are formed."""
        self.index = self.rng.permutation(self.n).astype(np.int32) + 2
        choice = [0, 1, 20_000, 60_000, 65_536]
        bern = self.rng.choice(choice, (self.groups, self.n), p=[0.05, 0.05, 0.4, 0.4, 0.1]).astype(np.int32)
        return Deltas(round_code, drop, self.index, bern)

    def sorted_keys(self, delta_args):
        """Keys of each (tensor, model) after the drop, ascending."""
        round_code, drop, index, bern, _ = delta_args
        found = []
        for g, tensors in enumerate(self.data):
            e0, key = int(self.segments.table[g, 2]), int(self.segments.table[g, 4]) % 2**64
            _, deltas = oracle.deltas(tensors, self.codes, round_code)
            if drop:
                deltas = [oracle.dropped(d, key, int(index[i]), bern[g, i], e0) for i, d in enumerate(deltas)]
            found.append([np.sort(oracle.keys(d)).astype(np.uint64) for d in deltas])
        return found

    def keep_args(self, keep, *, round_code=-1):
        """The arguments of the keep pipeline; ``keep`` has any of drop, index, all, above, spread, never, wide."""
        args = self.delta_args(round_code=round_code, drop="drop" in keep)
        thr = np.zeros((self.groups, self.n), np.uint64)
        cut = np.full((self.groups, self.n, 3), -1, np.int64)
        for g, keys in enumerate(self.sorted_keys(args)):
            first = int(self.segments.table[g, 2]) // 65536
            for i, k in enumerate(keys):
                thr[g, i] = k[int(self.rng.choice([0.0, 0.5, 0.8, 0.999]) * len(k))]
                tile = first + int(self.rng.integers(0, -(-len(k) // 65536) + 1))
                cut[g, i] = (tile, self.rng.choice([0, 1, 5, 1000]), -1)
                if "all" in keep or "above" in keep:
                    cut[g, i] = (2**62 if "all" in keep else 0, 0, -1)
                if "spread" in keep and self.rng.random() < 0.8:
                    cut[g, i, 2] = self.rng.choice([0, 1, 30_000, 65_536])
                if "never" in keep and i == 0:
                    thr[g, i], cut[g, i] = 2**64 - 1, (0, 0, -1)
        trim = any(word in keep for word in ("index", "all", "above", "spread", "never"))
        return Keep(args, trim, thr, cut, wide_sums="wide" in keep)

    def rules(self, elect, split, zero=0, merge=0):
        """The rules of a consensus with random numbers."""
        f = self.rng.normal(0.4, 0.5, (self.groups, self.n, 3))
        f[self.rng.random(f.shape) < 0.15] = 0.0
        draw = self.rng.choice
        scale = [self.rng.normal(1, 0.3, self.groups), draw([1.0, 3.0], self.groups), draw([-1.0, 1.0], self.groups)]
        return Rules(Votes(int(elect), split, f), zero, merge, np.stack(scale, axis=1))


class Elsewhere:
    """Runs every call on copies of the data in the memory of the kernels' device, and brings the outputs back.

    Copies keep their addresses modulo 64, so the same variants run as on the originals.
    """

    def __init__(self, kernels):
        self._kernels = kernels

    def _copy(self, address, nbytes):
        import torch

        shift = address % 64
        room = torch.zeros(nbytes + 128, dtype=torch.uint8, device=self._kernels.device)
        shift += -room.data_ptr() % 64
        there = room[shift : shift + nbytes]
        if nbytes:
            raw = (ctypes.c_uint8 * nbytes).from_address(address)
            there.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        return there

    def __getattr__(self, name):
        call = getattr(self._kernels, name)

        def run(segments, *args, **kwargs):
            if name == "fold":
                return call(segments, *args, **kwargs)
            table, held, outs = segments.table.copy(), [], []
            for row in table:
                length, pieces = int(row[1]), list(enumerate(segments.dtypes, 7))
                for column, dtype in pieces + ([(0, segments.out_dtype)] if row[0] else []):
                    there = self._copy(int(row[column]), length * dtype.size)
                    held.append(there)
                    if column == 0:
                        outs.append((int(row[0]), there))
                    row[column] = there.data_ptr()
            call(Segments(table, segments.dtypes, segments.out_dtype, segments.nonfinite), *args, **kwargs)
            for address, there in outs:
                here = there.cpu().numpy()
                ctypes.memmove(address, here.ctypes.data, here.nbytes)
            return None

        return run
