"""Whether two models compute the same: their logits on the same tokens, one model in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmerge.errors import BackendUnavailable, CheckpointError, RecipeError

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5
"""Largest difference, in units of the largest logit, of models that compute the same in fp32; 1.2e-6 is usual."""


@dataclass(frozen=True)
class Comparison:
    """How two models differ on some tokens.

    Attributes:
        difference: largest difference of two logits, in units of the first model's largest one; NaN where logits are
            not finite.
        largest: the largest logit, by magnitude, of the first model.
        agreement: share of the positions at which both find the same token most likely.
        losses: mean cross-entropy of the next token, of both models; None for sequences of one token.
        tokens: positions that were compared.
        notes: what was not looked at.
    """

    difference: float
    largest: float
    agreement: float
    losses: tuple[float, float] | None
    tokens: int
    notes: tuple[str, ...] = ()

    def same(self, tolerance: float = TOLERANCE) -> bool:
        """Whether the difference is within a tolerance."""
        return self.difference <= tolerance

    def __str__(self) -> str:
        """In a few lines."""
        lines = [
            f"largest difference of logits: {self.difference:.3g} of the largest logit ({self.largest:.3g})",
            f"same most likely token: {100 * self.agreement:.2f} % of {self.tokens} positions",
        ]
        if self.losses:
            lines.append(f"loss: {self.losses[0]:.6f} and {self.losses[1]:.6f}")
        return "\n".join([*lines, *self.notes])


def compare(
    dense: Any,
    new: Any,
    batches: Any = None,
    *,
    seed: int = 0,
    count: int = 4,
    length: int = 64,
    dtype: str | None = "float32",
) -> Comparison:
    """Runs two models on the same tokens and compares their logits.

    Args:
        dense: a directory or hub id, or a transformers module, which is run as it is.
        new: the other one; with the same vocabulary.
        batches: token ids: a tensor ``[B, T]``, or several tensors (or lists of lists); random ones where absent.
        seed: of random tokens.
        count: random sequences.
        length: tokens of each; errors in sliding windows show only where it is above the window.
        dtype: to load models from disk in: ``float32``, ``bfloat16``, ``float16``, or None for that of the files.

    Returns:
        A :class:`Comparison`.

    Raises:
        BackendUnavailable: transformers is not installed.
        CheckpointError: a model on disk is not whole, or the models have vocabularies of different sizes.
        RecipeError: tokens that are none, or not of the vocabulary.
    """
    for model in (dense, new):  # before any is loaded, which takes long
        _look(model)
    import torch

    given = None if batches is None else list(_ids(batches))
    if given is None and (count < 1 or length < 1):
        raise RecipeError(f"count, length: expected numbers above 0, got {count} and {length}")
    ids: list[torch.Tensor] = given or []
    with _loaded(dense, dtype) as (model, name):
        words, notes = _vocabulary(model), _notes(model, ids, length)
        if given is None:
            generator = torch.Generator().manual_seed(seed)
            ids = [torch.randint(0, words, (1, length), generator=generator) for _ in range(count)]
        if any(int(i.min()) < 0 or int(i.max()) >= words for i in ids):
            raise RecipeError(f"batches: expected tokens from 0 to {words - 1}, the vocabulary of {name}")
        before = [_logits(model, i) for i in ids]
    apart = largest = 0.0
    agreed = 0
    losses = [0.0, 0.0]
    with _loaded(new, dtype) as (model, other):
        if _vocabulary(model) != words:
            raise CheckpointError(f"{other}: expected a vocabulary of {words}, as {name} has, got {_vocabulary(model)}")
        for i, a in zip(ids, before, strict=True):
            b = _logits(model, i)
            if a.shape != b.shape:
                raise CheckpointError(f"{other}: expected logits {list(a.shape)}, as {name} has, got {list(b.shape)}")
            apart = _most(apart, a - b)
            largest = _most(largest, a)
            agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
            losses = [had + _loss(x, i) for had, x in zip(losses, (a, b), strict=True)]
    tokens, followed = sum(i.numel() for i in ids), sum(i.numel() - len(i) for i in ids)
    mean = (losses[0] / followed, losses[1] / followed) if followed else None
    relative = apart / largest if largest else apart
    return Comparison(relative, largest, agreed / tokens, mean, tokens, tuple(notes))


def _ids(batches: Any) -> Iterator[torch.Tensor]:
    """Token ids as matrices."""
    import torch

    several: Iterable[Any] = [batches] if isinstance(batches, torch.Tensor) else batches
    found = False
    for batch in several:
        try:
            ids = torch.as_tensor(batch)
        except (TypeError, ValueError, RuntimeError):
            raise RecipeError(f"batches: expected token ids, got {batch!r:.80}") from None
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
            raise RecipeError(f"batches: expected token ids [B, T], got {list(ids.shape)} of {ids.dtype}")
        found = True
        yield ids.cpu().long()
    if not found:
        raise RecipeError("batches: expected token ids, got none")


@contextmanager
def _loaded(model: Any, dtype: str | None) -> Iterator[tuple[Any, str]]:
    """A module in evaluation mode, and what to call it; modules get their mode back."""
    if hasattr(model, "state_dict"):
        training = model.training
        model.eval()
        try:
            yield model, type(model).__name__
        finally:
            model.train(training)
        return
    yield _read(model, dtype), str(model)


def _look(model: Any) -> None:
    """Refuses what is neither a module nor a checkpoint.

    Raises:
        CheckpointError: with the path, and what is wrong with it.
    """
    from fastmerge.checkpoint import Checkpoint

    if hasattr(model, "state_dict"):
        return
    if not isinstance(model, str | os.PathLike):
        raise CheckpointError(f"expected a path or a module, got {type(model).__module__}.{type(model).__qualname__}")
    Checkpoint.open(model)


def _read(model: str | os.PathLike[str], dtype: str | None) -> Any:
    """A whole model from disk; eager attention, whose order of sums is the same for every model."""
    from fastmerge.checkpoint import Checkpoint
    from fastmerge.checkpoint.header import listing

    try:
        import transformers
    except ImportError:
        raise BackendUnavailable("models are run by transformers: pip install transformers") from None
    path = Checkpoint.open(model).path
    try:
        made, said = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", output_loading_info=True, attn_implementation="eager", local_files_only=True
        )
    except Exception as error:  # of any class, for a configuration that transformers does not take
        raise CheckpointError(f"{model}: transformers cannot load it: {error}") from error
    problems = [f"{model}: {what}: {listing(sorted(map(str, said[what])))}" for what in said if said[what]]
    if problems:
        raise CheckpointError(problems)
    return made.eval()


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    import torch

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return found.float().cpu()


def _most(before: float, values: torch.Tensor) -> float:
    """The largest magnitude so far; a NaN stays."""
    found = float(values.abs().max())
    return found if not found <= before else before


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Sum over the tokens that follow others."""
    import torch

    if ids.shape[1] < 2:
        return 0.0
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))


def _vocabulary(model: Any) -> int:
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


def _notes(model: Any, ids: Sequence[torch.Tensor], length: int) -> list[str]:
    """What so many tokens cannot show."""
    longest = max((i.shape[1] for i in ids), default=length)
    window = getattr(model.config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    if windowed and isinstance(window, int) and longest <= window:
        return [f"sequences of {longest} tokens are within the sliding window of {window}: it was not looked at"]
    return []
