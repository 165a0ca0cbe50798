"""mergekit as a library, imported so that transformers does not take this repository's kernels/ for a package."""

import sys
import warnings
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_kept = list(sys.path)
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT]
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit import config
        from mergekit.common import ModelReference
        from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope, ParameterSpec
        from mergekit.parameter_resolver import resolve_parameters
finally:
    sys.path[:] = _kept

__all__ = ["MergeMethodSpec", "ModelReference", "ParameterScope", "ParameterSpec", "config", "resolve_parameters"]
