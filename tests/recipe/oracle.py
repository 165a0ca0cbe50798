"""mergekit as a library, without its warnings."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit import config
    from mergekit.architecture.json_definitions import JSON_ARCHITECTURES
    from mergekit.common import ModelReference
    from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope, ParameterSpec
    from mergekit.parameter_resolver import resolve_parameters

__all__ = [
    "JSON_ARCHITECTURES",
    "MergeMethodSpec",
    "ModelReference",
    "ParameterScope",
    "ParameterSpec",
    "config",
    "resolve_parameters",
]
