"""Ops that have a grain and sizes, and no mathematics."""

from fastmerge.dtypes import BF16
from fastmerge.methods.passthrough import COPY
from fastmerge.ops.sources import FileRange
from fastmerge.ops.spec import Op, Spec


class Toy:
    """Stands for a method: only what the schedule asks for."""

    name = "toy"
    words = ()
    wide = False

    def __init__(self, grain, workspace=0):
        self._grain, self._workspace = grain, workspace

    def gap(self):
        return None

    def grain(self, spec):
        return self._grain

    def wants(self):
        return ()

    def workspace(self, spec):
        return 300 * spec.rows if self._grain == "row" else self._workspace


TOYS = {grain: Toy(grain) for grain in ("element", "row", "tensor", "matrix", "model")}


def op(i, shape, grain, dtype=BF16, models=2, targets=1, spec=None):
    """One op whose inputs lie in files and whose results go to shards."""
    made = spec or Spec(TOYS[grain], shape, (dtype,) * models, dtype)
    return Op(f"t{i}", made, 0, (FileRange(None, 0),) * models, (None,) * targets)


def copied(i, nbytes):
    """One copy."""
    spec = Spec(COPY, (nbytes // 2,), (BF16,), BF16)
    return Op(f"c{i}", spec, 0, (FileRange(None, 0),), (None,))
