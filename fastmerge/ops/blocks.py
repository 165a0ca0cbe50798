"""Building blocks of the references, in plain torch: the frozen order of operations, once.

``W`` is the work type: fp32, or fp64 where :attr:`fastmerge.ops.spec.Spec.double` says so. Every function takes and
returns flat tensors of ``W`` unless it says otherwise. Coefficients are fp64 numbers, rounded once to ``W``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastmerge.dtypes import DType
from fastmerge.ops.segments import LANES, TILE
from fastmerge.ops.spec import Spec

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

Mask: TypeAlias = "npt.NDArray[np.bool_]"
Keys: TypeAlias = "npt.NDArray[np.unsignedinteger[Any]]"

NAN = {4: 0x7FC00000, 8: 0x7FF8000000000000}
"""The key of a NaN, by the bytes of a key."""


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch type of the same name."""
    import torch

    found: torch.dtype = getattr(torch, dtype.name)
    return found


def work(inputs: Sequence[torch.Tensor], spec: Spec) -> list[torch.Tensor]:
    """Inputs as flat tensors of the work type; exact."""
    import torch

    wide = torch.float64 if spec.double else torch.float32
    return [x.detach().reshape(-1).to(wide) for x in inputs]


def number(value: float, like: torch.Tensor) -> torch.Tensor:
    """A coefficient, rounded once, as large as ``like`` (torch may divide by a scalar through its reciprocal)."""
    import torch

    return torch.tensor(value, dtype=torch.float64).to(like.dtype).expand_as(like)


def column(values: npt.NDArray[np.float64], like: torch.Tensor) -> torch.Tensor:
    """One coefficient per row of ``like`` ``[P, n]``, rounded once."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(like.dtype).unsqueeze(1).expand_as(like)


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One rounding to nearest even; every NaN becomes the canonical one."""
    import torch

    if x.dtype == torch.float64 and dtype in (torch.bfloat16, torch.float16):
        near = x.float()  # torch rounds twice on this way; rounding to odd first makes the second one exact
        bits = near.view(torch.int32)
        above = (near.double().abs() > x.abs()).int()
        inexact = (near.double() != x) & ~x.isnan()
        x = torch.where(inexact, (bits - above) | 1, bits).view(torch.float32)
    y = x.to(dtype)
    return torch.where(y.isnan(), torch.full_like(y, float("nan")), y)


def finish(x: torch.Tensor, spec: Spec) -> torch.Tensor:
    """The result in its type and shape."""
    return round_to(x, torch_dtype(spec.out_dtype)).reshape(spec.shape)


def pieces(inputs: Sequence[torch.Tensor], spec: Spec) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Tiles of :func:`work`, each with where it lies in the flat tensor: what stays in a core's cache."""
    flat = [x.detach().reshape(-1) for x in inputs]
    for first in range(0, spec.numel, TILE):
        where = slice(first, first + TILE)
        yield where, work([x[where] for x in flat], spec)


def in_pieces(
    inputs: Sequence[torch.Tensor], spec: Spec, make: Callable[[slice, list[torch.Tensor]], torch.Tensor]
) -> torch.Tensor:
    """A result that ``make`` computes from :func:`pieces` alone; it never takes much memory beside itself."""
    import torch

    out = torch.empty(spec.numel, dtype=torch_dtype(spec.out_dtype))
    for where, some in pieces(inputs, spec):
        out[where] = round_to(make(where, some), out.dtype)
    return out.reshape(spec.shape)


def weighted_sum(values: Sequence[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    """``c0 x0 + c1 x1 + ...`` in this order."""
    total = number(coefficients[0], values[0]) * values[0]
    for c, v in zip(coefficients[1:], values[1:], strict=True):
        total = total + number(c, v) * v
    return total


def divide(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """``x / divisor``, untouched where the divisor is 1."""
    return x if divisor == 1 else x / number(divisor, x)


def combined(inputs: Sequence[torch.Tensor], spec: Spec, coefficients: Sequence[float], div: float) -> torch.Tensor:
    """``(sum c_i x_i) / div``."""
    return finish(divide(weighted_sum(work(inputs, spec), coefficients), div), spec)


def delta(
    inputs: Sequence[torch.Tensor], spec: Spec, coefficients: Sequence[float], lam: float, div: float
) -> torch.Tensor:
    """Family combine, delta: ``b + lam (sum c_i (x_i - b)) / div``."""
    base, *others = work(inputs, spec)
    mix = divide(weighted_sum([x - base for x in others], coefficients), div)
    return finish(base + number(lam, base) * mix, spec)


def ordered_sum(values: torch.Tensor, *, wide: bool = False) -> torch.Tensor:
    """Sums the last dimension in the written order (design law L2).

    Args:
        values: ``[..., n]`` of the work type.
        wide: the lanes of a tile are added in fp64.

    Returns:
        fp64 ``[...]``.
    """
    import torch

    *lead, n = values.shape
    total = torch.zeros(lead, dtype=torch.float64)
    for start in range(0, n, TILE):
        part = values[..., start : start + TILE]
        lanes = torch.zeros((*lead, LANES), dtype=values.dtype)
        for j in range(0, part.shape[-1], LANES):
            some = part[..., j : j + LANES]
            lanes[..., : some.shape[-1]] = lanes[..., : some.shape[-1]] + some
        lanes = lanes.double() if wide else lanes
        width = LANES
        while width > 1:
            width //= 2
            lanes = lanes[..., :width] + lanes[..., width : 2 * width]
        total = total + lanes[..., 0].double()
    return total


def gram(values: Sequence[torch.Tensor], *, diff: bool = False) -> npt.NDArray[np.float64]:
    """Inner products of the last dimension: pairs (0,0), (0,1), .., (1,1), ..; ``diff`` appends |x0 - x1|^2.

    Returns:
        fp64 ``[P, pairs]``; P is the product of the leading dimensions.
    """
    columns = [ordered_sum(values[i] * values[j]) for i in range(len(values)) for j in range(i, len(values))]
    if diff:
        apart = values[0] - values[1]
        columns.append(ordered_sum(apart * apart))
    return np.stack([c.reshape(-1).numpy() for c in columns], axis=1)


def dot(inputs: Sequence[torch.Tensor], gradient: torch.Tensor) -> npt.NDArray[np.float64]:
    """Family dot: ``sum g (x_i - b)``.

    Args:
        inputs: of the work type, flat, the base first.
        gradient: g, likewise.

    Returns:
        fp64 ``[N]``.
    """
    base, *others = inputs
    return np.array([ordered_sum(gradient * (x - base)).item() for x in others])


def keys(d: torch.Tensor) -> Keys:
    """Magnitudes as integers of the same order; every NaN is the same one, above infinity.

    The payload of a NaN that arithmetic made differs between processors, so it must not decide ties.
    """
    import torch

    bits = torch.int64 if d.dtype == torch.float64 else torch.int32
    canonical = torch.where(d.isnan(), torch.full_like(d, float("nan")), d.abs())
    unsigned = np.uint64 if d.dtype == torch.float64 else np.uint32
    found: Keys = canonical.view(bits).numpy().view(unsigned)
    return found


def top(magnitudes: Keys, k: int, ties: str, noise: npt.NDArray[np.uint16] | None) -> Mask:
    """Which elements the k largest magnitudes are.

    Args:
        magnitudes: keys, ``[n]``.
        k: how many; at least n keeps everything.
        ties: what happens to elements at the k-th magnitude: ``index`` keeps the first ones, exactly k in
            all; ``all`` keeps every one; ``spread`` keeps each with the probability that makes k on average.
        noise: 16-bit random numbers ``[n]``, for ``spread``.
    """
    from fastmerge.keys import threshold

    n = len(magnitudes)
    if k <= 0 or k >= n:
        return np.full(n, k > 0)
    cut = np.partition(magnitudes, n - k)[n - k]
    above, equal = magnitudes > cut, magnitudes == cut
    missing = k - int(above.sum())
    if ties == "index":
        equal[np.flatnonzero(equal)[missing:]] = False
    elif ties == "spread" and noise is not None:
        equal &= noise.astype(np.int64) < threshold(missing / int(equal.sum()))
    return np.asarray(above | equal)
