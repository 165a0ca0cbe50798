"""What coefficients are learned from: losses of a merged model on batches of a task, most of them without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from fastmerge.errors import RecipeError

IGNORED = -100
"""The label of what is not asked."""


@dataclass(frozen=True)
class Task:
    """A task that the merged model shall do.

    Attributes:
        name: for errors and reports.
        data: batches, read again from the start when they end: a list, a ``DataLoader``, anything that can be
            iterated more than once. A batch is a tensor, a pair ``(inputs, labels)``, or a mapping of the module's
            arguments by name, in which ``labels`` are kept apart.
        head: from the module's output to logits ``[..., C]``; where absent, the output or its ``logits``.
        expert: number of the expert that teaches the task (``distill``); the task's own number where absent.
    """

    name: str
    data: Iterable[Any]
    head: Callable[[Any], torch.Tensor] | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Seen:
    """What an objective sees.

    Attributes:
        task: whose batch it is.
        batch: as the data gave it, on the module's device.
        outputs: of the merged model.
        logits: ``[..., C]``, after the task's head, in fp32 or fp64.
        teacher: those of the task's expert, without a gradient; None but with ``distill``.
    """

    task: Task
    batch: Any
    outputs: Any
    logits: torch.Tensor
    teacher: torch.Tensor | None = None

    @property
    def labels(self) -> torch.Tensor:
        """Of the batch.

        Raises:
            RecipeError: where it has none.
        """
        batch = self.batch
        labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1] if _paired(batch) else None
        if labels is None:
            raise RecipeError(f"task {self.task.name!r}: the objective needs labels: (inputs, labels), or 'labels'")
        return labels


Objective = Literal["entropy", "entropy_first_token", "nll", "distill"] | Callable[[Seen], torch.Tensor]
"""``entropy`` of the predictions (the paper's), of the first token that would follow a prompt, negative log-likelihood
of labels, the divergence from the task's expert; or anything that makes a loss of :class:`Seen`.
"""


def logits_of(task: Task, outputs: Any) -> torch.Tensor:
    """What a task's head makes of the module's outputs, in fp32 at least.

    Raises:
        RecipeError: where that is no tensor of floating-point numbers.
    """
    found = task.head(outputs) if task.head is not None else getattr(outputs, "logits", outputs)
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or not found.dim():
        raise RecipeError(f"task {task.name!r}: expected logits [..., C], got {type(found).__name__}: give it a head")
    return found if found.dtype == torch.float64 else found.float()


def entropy(seen: Seen) -> torch.Tensor:
    """Mean entropy of the predictions, in nats; of sequences over the positions that are not masked."""
    return _mean(seen, _entropies(seen.logits))


def entropy_first_token(seen: Seen) -> torch.Tensor:
    """Mean entropy of the first token that follows each prompt.

    ``logits`` are ``[B, T, C]``; a prompt ends at the last position that ``attention_mask`` ``[B, T]`` has, padding
    may stand on either side; without a mask at the last one.
    """
    logits = seen.logits
    if logits.dim() != 3:
        raise RecipeError(f"task {seen.task.name!r}: expected logits [B, T, C], got {tuple(logits.shape)}")
    mask = _mask(seen)
    last = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
    if mask is not None:
        last = logits.shape[1] - 1 - mask.bool().int().flip(1).argmax(dim=1)
    return _entropies(logits[torch.arange(len(logits), device=logits.device), last]).mean()


def nll(seen: Seen) -> torch.Tensor:
    """Mean negative log-likelihood of the labels; labels of -100 are not asked.

    Labels ``[...]`` of logits ``[..., C]``. Of a batch that has ``input_ids`` of the labels' shape they are the same
    text, as for causal models of transformers: logits at a position are those of the next label.
    """
    logits, labels = seen.logits, seen.labels
    if isinstance(seen.batch, Mapping) and "input_ids" in seen.batch and logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.shape[:-1] != labels.shape:
        expected, got = tuple(logits.shape[:-1]), tuple(labels.shape)
        raise RecipeError(f"task {seen.task.name!r}: expected labels of shape {expected}, got {got}")
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def distill(seen: Seen) -> torch.Tensor:
    """Mean divergence ``KL(expert || merged)`` of the predictions, in nats."""
    assert seen.teacher is not None
    wanted, found = _log(seen.teacher), _log(seen.logits)
    return _mean(seen, (wanted.exp() * (wanted - found)).sum(dim=-1))


OBJECTIVES: dict[str, Callable[[Seen], torch.Tensor]] = {
    "entropy": entropy,
    "entropy_first_token": entropy_first_token,
    "nll": nll,
    "distill": distill,
}


def _paired(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2


def _entropies(logits: torch.Tensor) -> torch.Tensor:
    log = _log(logits)
    return -(log.exp() * log).sum(dim=-1)


def _log(logits: torch.Tensor) -> torch.Tensor:
    """Logarithms of the predictions; finite where a logit is -inf, so that 0 log 0 is 0."""
    return logits.log_softmax(dim=-1).clamp(min=torch.finfo(logits.dtype).min)


def _mask(seen: Seen) -> torch.Tensor | None:
    return seen.batch.get("attention_mask") if isinstance(seen.batch, Mapping) else None


def _mean(seen: Seen, each: torch.Tensor) -> torch.Tensor:
    """Over all predictions, or over those whose position the batch does not mask."""
    mask = _mask(seen)
    return each.mean() if mask is None or mask.shape != each.shape else each[mask.bool()].mean()
