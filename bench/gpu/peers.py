"""What else would merge tensors that lie on the GPU: torch eager, torch.compile and mergekit.

Each is a function of the inputs: the tensors of one merge, base first where there is one, or state dictionaries.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.gpu.eager import MERGES, Merge
from bench.gpu.plan import Absent

if TYPE_CHECKING:
    import torch

Peer = Callable[[Sequence[Any]], Any]


def over(merge: Merge, *, many: bool) -> Peer:
    """A merge of one tensor, or of every tensor of state dictionaries, each as one row: few shapes to compile for."""
    if not many:
        return merge

    def states(models: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        first = models[0]
        return {k: merge([m[k].view(-1) for m in models]).view(first[k].shape) for k in first}

    return states


def eager(formula: str, *, many: bool) -> Peer:
    """Torch as it is."""
    return over(MERGES[formula], many=many)


def compiled(formula: str, *, many: bool) -> Peer:
    """torch.compile of the same function; its first call compiles."""
    import torch

    return over(torch.compile(MERGES[formula], dynamic=False), many=many)


def mergekit(method: str, parameters: Mapping[str, Any], base: int | None, *, many: bool) -> Peer:
    """Mergekit's own functions on the same tensors.

    Raises:
        Absent: it cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("mergekit.merge_methods")
            version = importlib.metadata.version("mergekit")
    except Exception as error:
        raise Absent(f"mergekit cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, "merge_state_dicts"):
        raise Absent(f"mergekit {version} has no merge_state_dicts; 0.1.5 has")

    def run(inputs: Sequence[Any]) -> Any:
        given = dict(parameters)
        if many:
            return module.merge_state_dicts(list(inputs), method, parameters=given, base=base)
        return module.merge_tensors(list(inputs), method, parameters=given, base_index=base)

    return run
