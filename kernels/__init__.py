"""Triton kernels, one file per family (see :class:`fastmerge.kernels.backend.TritonKernels`).

Imported only as ``fastmerge.kernels``. The kernels need torch and triton and nothing of fastmerge; importing this
package imports neither: the names below are loaded at first use.
"""

from typing import TYPE_CHECKING, Any

if __name__ != "fastmerge.kernels":
    # A checkout on the path must neither give a second copy nor look like the package "kernels" that transformers
    # asks for: without a path nothing below it can be imported, and without a file it reads as absent.
    __path__ = []
    del __file__

if TYPE_CHECKING:
    from fastmerge.kernels.backend import TritonKernels as TritonKernels

__all__ = ["TritonKernels"]


def __getattr__(name: str) -> Any:
    if name == "TritonKernels":
        from fastmerge.kernels.backend import TritonKernels

        return TritonKernels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
