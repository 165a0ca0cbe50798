"""The passes of the consensus program."""

import pytest
import torch

from fastmerge.dtypes import BF16
from fastmerge.methods import METHODS
from fastmerge.ops.consensus import program as family
from fastmerge.ops.segments import TILE
from tests import oracle


class Recording:
    """The native kernels, noting whether each merge found the bits of its drop."""

    def __init__(self):
        self._inner = oracle.KERNELS["native"]
        self.found = []

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def consensus(self, segments, keep, rules):
        self.found.append(keep.bits is not None)
        self._inner.consensus(segments, keep, rules)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("room", [0, family.MOST_DRAWN])
def test_a_drop_is_drawn_once_where_its_bits_have_room(monkeypatch, method, room):
    monkeypatch.setattr(family, "MOST_DRAWN", room)
    given = {"weight": [1.0, 0.5, 0.8], "density": [0.3, 0.5, 1.0]}
    op = oracle.make_op(METHODS[method], "w", (3, TILE + 24), [BF16] * 4, given)
    inputs, out = oracle.inputs_of(op), torch.zeros(3, TILE + 24, dtype=torch.bfloat16)
    kernels = Recording()
    program = METHODS[method].program([op], kernels)
    pieces = [oracle.segments([op], [inputs], [out], oracle.cut([op], TILE)[i : i + 1])[0] for i in range(4)]
    program.advance([program.statistics(p) for p in pieces])
    for p in reversed(pieces):
        program.apply(p)
    assert kernels.found == [room > 0] * len(pieces)
    (want,) = oracle.drive([op], [inputs], oracle.KERNELS["numpy"])
    assert torch.equal(out.view(torch.int16), want.view(torch.int16))
