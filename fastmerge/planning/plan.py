"""What a plan is made of: plain values, no data and no open files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint, Layout
    from fastmerge.ops.spec import Op
    from fastmerge.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """Everything that a merge will do, decided from the recipe and the headers alone.

    Attributes:
        recipe: what was asked for.
        seed: the seed in effect.
        checkpoints: the models, in the order of ``recipe.refs``, then their adapters.
        ops: in the order of the output's bytes.
        layout: where each tensor lies in which shard.
        config: the output's ``config.json``; None where the models have none.
        carry: further files of the output: name, and the file to copy or the bytes.
        warnings: what deserves a look, each once.
        fingerprint: equal exactly where the same merge of the same files would give the same directory.
    """

    recipe: Recipe
    seed: int
    checkpoints: tuple[Checkpoint, ...]
    ops: tuple[Op, ...]
    layout: Layout
    config: dict[str, Any] | None
    carry: tuple[tuple[str, Path | bytes], ...]
    warnings: tuple[str, ...]
    fingerprint: str

    def summary(self) -> dict[str, Any]:
        """Counts and bytes, as plain values for people and JSON.

        Returns:
            ``method``, ``models``, ``tensors`` (``merged``, ``converted``, ``copied``, ``compared``: numbers
            of outputs by what happens to them), ``elements``, ``bytes_in`` (read once), ``bytes_out``,
            ``bytes_copied`` (of both, without computing), ``shards``, ``dtypes`` (bytes of the output by
            type), ``seed``, ``fingerprint``, ``warnings``.
        """
        actions: Counter[str] = Counter(merged=0, converted=0, copied=0, compared=0)
        dtypes: Counter[str] = Counter()
        read = copied = written = elements = 0
        for op in self.ops:
            spec = op.spec
            nbytes = spec.numel * spec.out_dtype.size * len(op.targets)
            if spec.grain == "copy":
                action = "compared" if len(op.inputs) > 1 else "copied"
                copied += nbytes
            else:
                action = "converted" if spec.method.name == "passthrough" else "merged"
            actions[action] += 1
            elements += spec.numel
            written += nbytes
            dtypes[spec.out_dtype.name] += nbytes
            read += spec.numel * sum([d.size for d in spec.dtypes])
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
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "warnings": list(self.warnings),
        }
