"""What differs between results and what they should be, in words.

Helpers of the tests find out and tell; what a test is about it asserts itself: ``assert differences(got, want) == []``.
"""

import numpy as np


def bits(x):
    """The elements of an array or a tensor as unsigned integers, in one row."""
    if not isinstance(x, np.ndarray):
        import torch

        x = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().view(f"u{x.element_size()}")
    return np.ascontiguousarray(x).reshape(-1).view(f"u{x.itemsize}")


def differences(got, want):
    """A line for each pair of arrays or tensors whose types, shapes or bits differ; none if all are the same."""
    if len(got) != len(want):
        return [f"got {len(got)} results, want {len(want)}"]
    found = []
    for i, (g, w) in enumerate(zip(got, want)):
        if (g.dtype, g.shape) != (w.dtype, w.shape):
            found.append(f"{i}: got {g.dtype} {tuple(g.shape)}, want {w.dtype} {tuple(w.shape)}")
            continue
        a, b = bits(g), bits(w)
        bad = np.flatnonzero(a != b)
        if len(bad):
            at = bad[0]
            found.append(
                f"{i} ({g.dtype} {tuple(g.shape)}): {len(bad)} of {len(a)} differ, first at {at}: "
                f"got {a[at]:#x}, want {b[at]:#x}"
            )
    return found
