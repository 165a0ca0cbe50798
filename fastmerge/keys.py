"""What decides which random numbers a merge draws: the key of a tensor, and the threshold of a density (design law L3).

The numbers themselves are made in :mod:`fastmerge.philox`; a plan needs none of them, nor numpy.
"""

from __future__ import annotations

import functools
import hashlib
import math

from fastmerge.errors import RecipeError


def tensor_key(seed: int, name: str) -> int:
    """The 64-bit key of one output tensor.

    Args:
        seed: the recipe's seed, -2**63 .. 2**63 - 1.
        name: output tensor name.

    Returns:
        The little-endian value of blake2b (8 bytes) over the seed as 8 little-endian signed bytes, then the
        name in UTF-8; 0 .. 2**64 - 1.

    Raises:
        RecipeError: where the seed does not fit 64 bits.
    """
    digest = _seeded(checked_seed(seed)).copy()
    digest.update(name.encode())
    return int.from_bytes(digest.digest(), "little")


def checked_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        RecipeError: where it does not fit 64 bits.
    """
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise RecipeError(f"seed: expected a 64-bit signed integer, got {seed!r:.80}")
    return seed


@functools.lru_cache(maxsize=8)
def _seeded(seed: int) -> hashlib.blake2b:
    """The hash of a seed, to go on from: copying it is quicker than starting anew."""
    return hashlib.blake2b(seed.to_bytes(8, "little", signed=True), digest_size=8)


def threshold(density: float) -> int:
    """How many of the 65,536 values of a 16-bit number keep their element: keep where ``u16 < threshold``.

    ``T = max(1, floor(density * 65536 + 0.5))`` for a density above 0, and 0 (none) for 0.

    Args:
        density: expected share of elements kept, 0 .. 1.

    Raises:
        RecipeError: where the density is not in 0 .. 1.
    """
    if not 0.0 <= density <= 1.0:
        raise RecipeError(f"density: expected a number in 0 .. 1, got {density}")
    return max(1, math.floor(density * 65536 + 0.5)) if density > 0 else 0


def rescale(t: int) -> float:
    """The factor that keeps a dropped tensor unbiased: ``65536 / T`` in fp64; 1 where nothing is kept."""
    return 65536 / t if t > 0 else 1.0
