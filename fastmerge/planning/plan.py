"""What a plan is made of: plain values, no data and no open files."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastmerge.ops.sources import FileRange, Result, inputs_of, spared
from fastmerge.planning.account import Account, Dropped
from fastmerge.planning.tied import Ties

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastmerge.checkpoint import Checkpoint, Layout
    from fastmerge.ops.spec import Op, Spec
    from fastmerge.planning.rows import Row


class Wanted(Protocol):
    """What a plan is of: a recipe, or a request for a model of another shape."""

    @property
    def merge_method(self) -> str: ...  # noqa: D102  what is done, for people

    @property
    def refs(self) -> tuple[Any, ...]: ...  # noqa: D102  the models that it names

    def to_yaml(self) -> str: ...  # noqa: D102  a document that says it again


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
        ties: what became of tied tensors.
        dropped: for each model and rule the tensors that are left out; see :attr:`account`.
        card: whether the output has a README.md and a mergekit_config.yml.
        documents: of a recipe with stages, the plan of each document by itself: stages are among its models, by their
            names. Each comes behind those that it uses; the last, which has no name, is that of the result. In this
            plan ``checkpoints`` are the models of all of them, and stages are sources of ``ops``.
        rows: for each spec whose method the recipe's parameters decide, a row of the recipe that it was made for, and
            which of its part's sources go in: what :func:`fastmerge.planning.numbers.renumbered` goes by.
    """

    recipe: Wanted
    seed: int
    checkpoints: tuple[Checkpoint, ...]
    ops: tuple[Op, ...]
    layout: Layout
    config: dict[str, Any] | None
    carry: tuple[tuple[str, Path | bytes], ...]
    warnings: tuple[str, ...]
    fingerprint: str
    ties: Ties = field(default_factory=Ties)
    dropped: Dropped = field(default_factory=dict)
    card: bool = True
    documents: tuple[tuple[str, Plan], ...] = ()
    rows: Mapping[Spec, tuple[Row, tuple[int, ...]]] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def account(self) -> Account:
        """Every tensor of every model, of every document: merged, copied, or dropped by which rule."""
        if self.documents:
            documents = [(f"{name}: " if name else "", plan.account.models) for name, plan in self.documents]
            return Account({f"{name}{ref}": tensors for name, models in documents for ref, tensors in models.items()})
        refs = [str(ref) for ref in self.recipe.refs]
        refs += [c.ref for c in self.checkpoints[len(refs) :]]
        used: list[dict[str, str]] = [{} for _ in refs]
        copied = [op.inputs for op in self.ops if op.spec.grain == "copy"]
        merged = [op.inputs for op in self.ops if op.spec.grain != "copy"]
        for what, every in (("copied", copied), ("merged", merged)):
            for source in itertools.chain.from_iterable(every):
                if type(source) is FileRange:
                    info, model = source
                    used[model][info.name] = what
                    continue
                for part in inputs_of(source):
                    if isinstance(part, FileRange):
                        used[part.model][part.info.name] = what
        return Account.of(list(zip(refs, self.checkpoints, strict=True)), used, self.dropped)

    def summary(self) -> dict[str, Any]:
        """Counts and bytes, as plain values for people and JSON.

        Returns:
            ``method``, ``models``, ``stages`` (where there are any), ``tensors`` (``merged``, ``converted``,
            ``copied``, ``compared``: numbers of outputs by what happens to them), ``elements``, ``bytes_in``
            (read once, for each use of a stage), ``bytes_out``, ``bytes_copied`` (of both, without computing),
            ``shards``, ``dtypes`` (bytes of the output by type), ``account`` (for each model how many of its
            tensors became what), ``seed``, ``fingerprint``, ``warnings``.
        """
        actions: Counter[str] = Counter(merged=0, converted=0, copied=0, compared=0)
        dtypes: Counter[str] = Counter()
        read = copied = written = elements = 0
        alike = Counter((o.spec, len(o.inputs), len(o.targets)) for o in self.ops)
        for (spec, inputs, targets), count in alike.items():
            nbytes = spec.stored * targets * count
            if spec.grain == "copy":
                action = "compared" if inputs > 1 else "copied"
                copied += nbytes
            else:
                action = "converted" if spec.method.name == "passthrough" else "merged"
            actions[action] += count
            elements += spec.numel * count
            written += nbytes
            packing = spec.packing
            kind = spec.out_dtype.name if packing is None else f"{packing.coding.code} and scales"
            dtypes[kind] += nbytes
            read += sum([d.nbytes(spec.numel) for d in spec.dtypes]) * count
        kinds = {kind for op in self.ops for kind in map(type, op.inputs)}
        if any(hasattr(kind, "stored") for kind in kinds):
            read -= sum([spared(op)[0] for op in self.ops])
        models = [str(ref) for ref in self.recipe.refs]
        stages = [name for name, _ in self.documents if name]
        if stages:
            read = sum(map(_brought, self.ops))
            every = [ref for _, plan in self.documents for ref in plan.recipe.refs if ref.path not in stages]
            models = list(dict.fromkeys(map(str, every)))
        return {
            "method": self.recipe.merge_method,
            "models": models,
            **({"stages": stages} if stages else {}),
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


def _brought(op: Op) -> int:
    """Bytes that are read for an op, and for what it takes of earlier stages, each time that it does."""
    return sum([_brought(s.op) if isinstance(s, Result) else s.dtype.nbytes(op.spec.numel) for s in op.inputs])
