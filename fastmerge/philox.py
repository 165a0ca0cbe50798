"""Random numbers as a function of the element, never a stream (design law L3).

Philox4x32-10 of Random123, written in numpy: the reference that the C++ and the Triton versions are held to.
Element ``e`` of a tensor takes 16 of the 128 bits of one block::

    counter = (lo32(e >> 3), hi32(e >> 3), model_index, op_tag)      key = (lo32(k), hi32(k))
    word    = (e >> 1) & 3                                            half = e & 1, low half first

so any piece of a tensor, in any order and on any device, sees the same numbers.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

DROP = 0
"""Op tag of the Bernoulli drop of DARE."""

TIES = 1
"""Op tag of the thinning of a tie group (rule ``spread``)."""

NOISE = 2
"""Op tag of additive noise."""

UNITS = 3
"""Op tag of the choice of units that are drawn anew."""

SPLIT = 4
"""Op tag of the shares of replicas."""

_MUL0 = np.uint64(0xD2511F53)
_MUL1 = np.uint64(0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: npt.ArrayLike, key: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Ten rounds of Philox4x32.

    Args:
        counter: uint32 ``[..., 4]``, one block per leading index.
        key: uint32 ``[..., 2]``, broadcast against the leading indices of ``counter``.

    Returns:
        uint32 ``[..., 4]``: 128 random bits per block, word 0 first.

    Raises:
        ValueError: where the last dimensions are not 4 and 2.
    """
    c = np.asarray(counter).astype(np.uint64)
    k = np.asarray(key).astype(np.uint64)
    if c.ndim < 1 or c.shape[-1] != 4 or k.ndim < 1 or k.shape[-1] != 2:
        raise ValueError(f"expected a counter [..., 4] and a key [..., 2], got {c.shape} and {k.shape}")
    x0, x1, x2, x3 = (c[..., i] for i in range(4))
    k0, k1 = k[..., 0], k[..., 1]
    for r in range(10):
        p0, p1 = x0 * _MUL0, x2 * _MUL1
        w0 = (k0 + np.uint64(r * _WEYL[0])) & _LOW
        w1 = (k1 + np.uint64(r * _WEYL[1])) & _LOW
        x0, x1, x2, x3 = (p1 >> _HALF) ^ x1 ^ w0, p1 & _LOW, (p0 >> _HALF) ^ x3 ^ w1, p0 & _LOW
    return np.stack(np.broadcast_arrays(x0, x1, x2, x3), axis=-1).astype(np.uint32)


def u16(key: int, model: int, op: int, e0: int, n: int) -> npt.NDArray[np.uint16]:
    """The 16-bit numbers of elements ``e0 .. e0 + n - 1``.

    Args:
        key: 64-bit key of the tensor (:func:`fastmerge.keys.tensor_key`); of a signed one only the low 64 bits count.
        model: position among the recipe's non-base models.
        op: :data:`DROP`, :data:`TIES`, :data:`NOISE` or :data:`SPLIT`.
        e0: logical index, in the whole tensor, of the first element.
        n: how many elements.

    Returns:
        uint16 ``[n]``, uniform on 0 .. 65535.
    """
    if n <= 0:
        return np.zeros(0, np.uint16)
    first, last = e0 >> 3, (e0 + n - 1) >> 3
    block = np.arange(first, last + 1, dtype=np.uint64)
    counter = np.empty((len(block), 4), np.uint32)
    counter[:, 0] = block & _LOW
    counter[:, 1] = block >> _HALF
    counter[:, 2] = model
    counter[:, 3] = op
    words = philox4x32(counter, np.array([key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF], np.uint32))
    return words.astype("<u4").view("<u2").reshape(-1)[e0 - 8 * first :][:n].astype(np.uint16)


SLOTS = 16
"""Lines per octave of the table of normals: the widest slots hold 1,024 of the 32,768 magnitudes."""


@functools.cache
def normal_lines() -> npt.NDArray[np.float32]:
    """The table of :func:`normal`: straight lines through the inverse of the normal distribution.

    ``t + 16`` for the rank ``t`` in 0 .. 32767 of a magnitude runs through eleven octaves and a little, of 16 slots
    each: narrow in the tail (one ``t`` per slot up to 15), wide at the centre. Each slot has the line
    ``a + b (t + 16)`` of least squares; all are scaled so that the variance over the 65,536 numbers is 1.

    Returns:
        fp32 ``[177, 2]`` (a, b), computed in fp64 and rounded once. No value lies so near to the middle between two
        fp32 numbers that another machine's logarithm could change a bit (``tests/test_philox.py``).
    """
    return _lines().astype(np.float32)


def _lines() -> npt.NDArray[np.float64]:
    from statistics import NormalDist

    inverse = NormalDist().inv_cdf
    exact = np.array([-inverse((t + 0.5) / 65536) for t in range(32768)])
    x = np.arange(SLOTS, 32768 + SLOTS, dtype=np.float64)
    first = np.flatnonzero(np.diff(_slots(x.astype(np.float32)), prepend=-1))
    lines = np.zeros((len(first), 2))
    fitted = np.empty_like(exact)
    for i, (low, high) in enumerate(zip(first, [*first[1:], len(x)], strict=True)):
        u, v = x[low:high] - x[low:high].mean(), exact[low:high]
        b = (u * v).sum() / (u * u).sum() if high - low > 1 else 0.0
        lines[i] = v.mean() - b * x[low:high].mean(), b
        fitted[low:high] = lines[i, 0] + b * x[low:high]
    return lines / math.sqrt(math.fsum(fitted * fitted) / len(fitted))


def _slots(x: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Exponent and four leading bits of the fraction, counted from those of 16."""
    return (x.view(np.uint32) >> np.uint32(19)).astype(np.int64) - 0x830


def normal(key: int, model: int, op: int, e0: int, n: int) -> npt.NDArray[np.float32]:
    """Standard normal numbers of elements ``e0 .. e0 + n - 1``, from one multiplication, one addition and a table.

    With ``u`` the element's 16 bits (:func:`u16`), ``t = u & 0x7fff`` and (a, b) the line of the slot of ``t + 16``::

        |n| = a + b (t + 16)        negative where the top bit of u is set

    in fp32, each operation rounded, so every backend has the same bits. It follows the inverse normal distribution at
    ``(t + 0.5) / 65536`` in the upper tail within 1.3e-4 (3.3e-5 RMS); over the 65,536 values of ``u``, which are
    symmetric, the mean is 0, the variance 1 within 1e-8, the kurtosis 2.9992 and the largest magnitude 4.325.

    Args:
        key: 64-bit key of the tensor (:func:`fastmerge.keys.tensor_key`).
        model: the expert's number.
        op: :data:`NOISE`.
        e0: logical index, in the whole tensor, of the first element.
        n: how many elements.

    Returns:
        fp32 ``[n]``.
    """
    return normal_of(u16(key, model, op, e0, n))


def normal_of(u: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """:func:`normal` as a function of the 16 bits: fp32 in the shape of ``u``."""
    x = (u & np.uint16(0x7FFF)).astype(np.float32) + np.float32(SLOTS)
    line = normal_lines()[_slots(x)]
    size = line[..., 0] + line[..., 1] * x
    return np.where(u & np.uint16(0x8000), -size, size)
