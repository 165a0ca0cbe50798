"""Triton kernels, one file per family (see :class:`fastmerge.kernels.backend.TritonKernels`).

Imported only as ``fastmerge.kernels``. The kernels need torch and triton and nothing of fastmerge; importing this
package imports neither: the names below are loaded at first use.
"""

from typing import TYPE_CHECKING, Any

if __name__ != "fastmerge.kernels":
    raise ImportError(f"import these kernels as fastmerge.kernels, not as {__name__}")

if TYPE_CHECKING:
    from fastmerge.kernels.backend import TritonKernels as TritonKernels

__all__ = ["TritonKernels"]


def __getattr__(name: str) -> Any:
    if name == "TritonKernels":
        from fastmerge.kernels.backend import TritonKernels

        return TritonKernels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
