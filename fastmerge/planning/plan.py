"""What a plan is made of: plain values, no data and no open files."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.dtypes import DType
from fastmerge.methods.base import Group, Method
from fastmerge.planning.account import Account, Dropped
from fastmerge.planning.tied import Ties

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint, Layout, TensorInfo
    from fastmerge.recipe import Recipe


class Output(NamedTuple):
    """One tensor of the result.

    Attributes:
        name: in the output.
        dtype: of the output.
        shape: of the output and of every input.
        models: position in :attr:`Plan.checkpoints` of the model of each input.
        inputs: what is read, base first; of a copy the first is copied, and any others must hold the same bytes.
        method: what is computed; None for a copy.
        group: the tensor as the method sees it; None for a copy.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    models: tuple[int, ...]
    inputs: tuple[TensorInfo, ...]
    method: type[Method] | None
    group: Group | None


@dataclass(frozen=True)
class Plan:
    """Everything that a merge will do, decided from the recipe and the headers alone.

    Attributes:
        recipe: what was asked for.
        seed: the seed in effect.
        checkpoints: the models, in the order of ``recipe.refs``.
        outputs: in the order of the output's bytes.
        layout: where each output lies in which shard.
        config: the output's ``config.json``; None where the models have none.
        carry: further files of the output: name, and the file to copy or the bytes.
        warnings: what deserves a look, each once.
        fingerprint: equal exactly where the same merge of the same files would give the same directory.
        ties: what became of tied tensors.
        dropped: for each model and rule the tensors that are left out; see :attr:`account`.
    """

    recipe: Recipe
    seed: int
    checkpoints: tuple[Checkpoint, ...]
    outputs: tuple[Output, ...]
    layout: Layout
    config: dict[str, Any] | None
    carry: tuple[tuple[str, Path | bytes], ...]
    warnings: tuple[str, ...]
    fingerprint: str
    ties: Ties = field(default_factory=Ties)
    dropped: Dropped = field(default_factory=dict)

    @functools.cached_property
    def account(self) -> Account:
        """Every tensor of every model: merged, copied, or dropped by which rule."""
        models = [(str(ref), model) for ref, model in zip(self.recipe.refs, self.checkpoints, strict=True)]
        uses = (
            (model, info.name, out.method is not None)
            for out in self.outputs
            for model, info in zip(out.models, out.inputs, strict=True)
        )
        return Account.of(models, uses, self.dropped)

    def summary(self) -> dict[str, Any]:
        """Counts and bytes, as plain values for people and JSON.

        Returns:
            ``method``, ``models``, ``tensors`` (``merged``, ``converted``, ``copied``, ``compared``: numbers
            of outputs by what happens to them), ``elements``, ``bytes_in`` (read once), ``bytes_out``,
            ``bytes_copied`` (of both, without computing), ``shards``, ``dtypes`` (bytes of the output by
            type), ``account`` (for each model how many of its tensors became what), ``seed``, ``fingerprint``,
            ``warnings``.
        """
        actions: Counter[str] = Counter(merged=0, converted=0, copied=0, compared=0)
        dtypes: Counter[str] = Counter()
        read = copied = written = elements = 0
        for out in self.outputs:
            action = "merged" if out.method is self.recipe.method else "converted"
            if out.method is None:
                action = "compared" if len(out.inputs) > 1 else "copied"
            elif action == "merged" and len(out.inputs) == 1 and self.recipe.merge_method == "passthrough":
                action = "converted"
            actions[action] += 1
            numel = out.inputs[0].nbytes // out.inputs[0].dtype.size
            nbytes = numel * out.dtype.size
            elements += numel
            written += nbytes
            dtypes[out.dtype.name] += nbytes
            read += sum(info.nbytes for info in out.inputs)
            copied += nbytes if out.method is None else 0
        return {
            "method": self.recipe.merge_method,
            "models": [str(ref) for ref in self.recipe.refs],
            "tensors": dict(actions),
            "elements": elements,
            "bytes_in": read,
            "bytes_out": written,
            "bytes_copied": copied,
            "shards": len(self.layout.shards),
            "dtypes": dict(dtypes),
            "account": self.account.counts(),
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "warnings": list(self.warnings),
        }
