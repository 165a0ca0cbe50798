"""What differs between results and what they should be, in words.

Helpers of the tests find out and tell; what a test is about it asserts itself: ``assert differences(got, want) == []``.
"""

from collections.abc import Mapping

import numpy as np


def bits(x):
    """The elements of an array or a tensor as unsigned integers, in one row."""
    if not isinstance(x, np.ndarray):
        import torch

        x = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().view(f"u{x.element_size()}")
    return np.ascontiguousarray(x).reshape(-1).view(f"u{x.itemsize}")


def differences(got, want):
    """A line for each pair of arrays or tensors whose types, shapes or bits differ; none if all are the same.

    Both are sequences, or both mappings, whose order does not matter.
    """
    got, want = (dict(x) if isinstance(x, Mapping) else dict(enumerate(x)) for x in (got, want))
    found = [f"{i}: only one side has it" for i in got.keys() ^ want.keys()]
    for i in got.keys() & want.keys():
        g, w = got[i], want[i]
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
    return sorted(found)
