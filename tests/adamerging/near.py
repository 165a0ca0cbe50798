"""What differs between two tensors by more than it may."""

import torch


def unlike(got, want, *, rtol=1e-6, atol=1e-9):
    """Nothing where types and shapes agree and values are near; else what is wrong."""
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return [f"{got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"]
    far = ~torch.isclose(got, want, rtol=rtol, atol=atol)
    return [f"{g}, expected {w}" for g, w in zip(got[far].tolist(), want[far].tolist(), strict=True)]
