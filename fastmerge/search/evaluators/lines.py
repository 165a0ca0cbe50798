"""Perplexity and accuracy of a language model on a user's file of JSON lines."""

from __future__ import annotations

import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.errors import RecipeError
from fastmerge.search.evaluators.base import Evaluator, Subset, known_items
from fastmerge.search.evaluators.data import Item, Tokens, read, tokenizer_of

if TYPE_CHECKING:
    import torch

LOGITS_BYTES = 128 << 20
"""Most bytes that the logits of a forward pass take, as fp32; their softmax takes as many again."""

NORMALISATIONS = ("characters", "tokens", "none")


class Likelihood(NamedTuple):
    """What a model gives the scored tokens of a text.

    Attributes:
        log_p: sum of the logarithms of their probabilities; terms in fp32, the sum in fp64.
        tokens: how many they are.
        greedy: whether each of them is the most probable one.
    """

    log_p: float
    tokens: int
    greedy: bool


class Lines(ABC):
    """What perplexity and accuracy share: a file of items, and the likelihoods of their texts.

    A line is an object with ``text``, or ``prompt`` and ``completion``, or ``question``, ``choices`` and ``answer``
    (the right choice or its number), and perhaps ``category`` and ``id``. A completion follows its prompt as it stands,
    a choice its question after ``separator``. Scored are the tokens of the text (but for the first, where the tokenizer
    puts none before it), of the completion, or of the choice: those from the first token on that differs from the
    prompt's own tokens. Texts longer than ``max_length`` lose their end, prompts and questions their beginning.

    Texts of a forward pass are of similar length, padded on the right and masked; the logarithm of the softmax is taken
    in fp32 whatever the model computes in. The same call on the same machine gives the same scores; other items beside
    an item may change its last digits, as other sizes of matrices do.

    Args:
        data: the file.
        tokenizer: of transformers, or the model (a directory, a hub id) whose tokenizer it is.
        batch_size: texts of a forward pass, at most.
        max_length: tokens of a text, at most.
        separator: between a question and its choices.
        logits_bytes: most bytes for logits, as fp32: batches are made smaller for it, and a text whose scored tokens
            alone need more is run once for each part of them. Where a model cannot give a part of its logits
            (``logits_to_keep``), those of whole texts are the least.

    Attributes:
        items: what was read.

    Raises:
        RecipeError: a line is none of these, with its number; or a number is out of range.
        BackendUnavailable: transformers is not installed.
        CheckpointError: the model has no tokenizer.
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        tokenizer: Any,
        *,
        batch_size: int = 16,
        max_length: int = 2048,
        separator: str = " ",
        logits_bytes: int = LOGITS_BYTES,
    ) -> None:
        sizes: dict[str, tuple[Any, int]] = {
            "batch_size": (batch_size, 1),
            "max_length": (max_length, 2),
            "logits_bytes": (logits_bytes, 1),
        }
        texts: dict[str, Any] = {"separator": separator}
        problems = [
            f"{name}: expected a whole number from {least} on, got {value!r:.80}"
            for name, (value, least) in sizes.items()
            if isinstance(value, bool) or not isinstance(value, int) or value < least
        ]
        problems += [f"{name}: expected text, got {v!r:.80}" for name, v in texts.items() if not isinstance(v, str)]
        if problems:
            raise RecipeError(problems)
        found = tokenizer_of(tokenizer)
        self.items = read(data, found, max_length=max_length, separator=separator)
        self._batch_size, self._logits_bytes = batch_size, logits_bytes
        self._last = max(max(text.ids) for item in self.items for text in item.texts)

    def __len__(self) -> int:
        return len(self.items)

    def __call__(self, model: Any, items: Sequence[int]) -> list[float]:
        """Scores of a causal language model of transformers, which is run in evaluation mode where it is.

        Raises:
            RecipeError: there is no such item, or a token is not of the model's vocabulary.
        """
        asked = [self.items[i] for i in known_items(items, len(self))]
        texts = [text for item in asked for text in item.texts]
        found = iter(self._likelihoods(model, texts))
        return [self.score(item, [next(found) for _ in item.texts]) for item in asked]

    @abstractmethod
    def score(self, item: Item, likelihoods: Sequence[Likelihood]) -> float:
        """The score of an item, from the likelihoods of its texts."""

    def by_category(self) -> dict[str, Evaluator]:
        """One evaluator for each category, in the order of their first lines.

        Raises:
            RecipeError: a line has no ``category``.
        """
        groups: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            if item.category is None:
                raise RecipeError(f"item {i}: expected a category, as every line needs one")
            groups.setdefault(item.category, []).append(i)
        return {name: Subset(self, members) for name, members in groups.items()}

    def _likelihoods(self, model: Any, texts: Sequence[Tokens]) -> list[Likelihood]:
        rows = model.get_input_embeddings().weight.shape[0]
        if self._last >= rows:
            raise RecipeError(f"tokenizer: it gives token {self._last}, and the model has {rows} embeddings")
        found: list[Likelihood | None] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: (-len(texts[i].ids), texts[i].start, i))
        with evaluating(model):
            run = _Run(model, max(1, self._logits_bytes // (4 * rows)))
            while order:
                batch = order[: run.fitting([texts[i] for i in order[: self._batch_size]])]
                del order[: len(batch)]
                for i, one in zip(batch, run([texts[i] for i in batch]), strict=True):
                    found[i] = one
        return [one for one in found if one is not None]


class Perplexity(Lines):
    r"""Mean log-probability of an item's scored tokens, in nats: the logarithm of the perplexity, negated.

    .. math:: \frac{1}{T} \sum_{t=1}^{T} \log p(x_t \mid x_{<t})

    The larger the better, and at most 0. Over several items the mean of these gives each item the same weight, however
    long it is; :math:`\exp` of its negation is a perplexity. Of a question with choices the right one is scored.
    Arguments and errors are those of :class:`Lines`.
    """

    def score(self, item: Item, likelihoods: Sequence[Likelihood]) -> float:
        """Of the text, the completion or the right choice."""
        one = likelihoods[item.answer or 0]
        return one.log_p / one.tokens


class Accuracy(Lines):
    """1 for a right answer, else 0.

    A completion is right when each of its tokens is the most probable one after those before it, which is when greedy
    decoding would write it. Of choices the most probable one is the answer, the first of several; their log-probability
    is divided by their number of characters (as lm-eval's ``acc_norm``), of tokens, or by nothing (as its ``acc``).

    Args:
        data: as of :class:`Lines`.
        tokenizer: as of :class:`Lines`.
        normalise: ``characters``, ``tokens`` or ``none``.
        options: as of :class:`Lines`.

    Raises:
        RecipeError: a line has only a ``text``; or as in :class:`Lines`.
    """

    def __init__(
        self, data: str | os.PathLike[str], tokenizer: Any, *, normalise: str = "characters", **options: Any
    ) -> None:
        if normalise not in NORMALISATIONS:
            raise RecipeError(f"normalise: expected one of {', '.join(NORMALISATIONS)}, got {normalise!r:.80}")
        super().__init__(data, tokenizer, **options)
        if wrong := [i for i, item in enumerate(self.items) if item.answer is None and not item.exact]:
            raise RecipeError(f"{os.fspath(data)}: item {wrong[0]}: a text alone has no right answer: see perplexity")
        self._normalise = normalise

    def score(self, item: Item, likelihoods: Sequence[Likelihood]) -> float:
        """1.0 or 0.0."""
        if item.answer is None:
            return float(likelihoods[0].greedy)
        values = [self._value(one, text) for one, text in zip(likelihoods, item.texts, strict=True)]
        best = max(values)
        return float(best > -math.inf and values.index(best) == item.answer)

    def _value(self, one: Likelihood, text: Tokens) -> float:
        """What choices are compared by; NaN is the worst."""
        by = {"characters": text.characters, "tokens": one.tokens, "none": 1}[self._normalise]
        return one.log_p / by if not math.isnan(one.log_p) else -math.inf


class _Run:
    """Forward passes of a model whose logits take so many positions at most."""

    def __init__(self, model: Any, positions: int) -> None:
        import torch

        self._model, self._positions = model, positions
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def fitting(self, texts: Sequence[Tokens]) -> int:
        """How many of texts, the longest first, one pass takes; at least one."""
        for count in range(len(texts), 1, -1):
            some = texts[:count]
            first = min(t.start for t in some) if self._keeps else 1
            if count * (len(some[0].ids) - first) <= self._positions:
                return count
        return 1

    def __call__(self, texts: Sequence[Tokens]) -> list[Likelihood]:
        """The likelihoods of texts, the longest first."""
        import torch

        end = len(texts[0].ids)
        first = min(t.start for t in texts)
        step = max(1, self._positions // len(texts)) if self._keeps else end
        ids = torch.tensor([[*t.ids, *[0] * (end - len(t.ids))] for t in texts], device=self._device)
        starts = torch.tensor([[t.start] for t in texts], device=self._device)
        lengths = torch.tensor([[len(t.ids)] for t in texts], device=self._device)
        log_p = torch.zeros(len(texts), dtype=torch.float64, device=self._device)
        greedy = torch.ones(len(texts), dtype=torch.bool, device=self._device)
        for begin in range(first, end, step):
            stop = min(begin + step, end)
            logits = self._logits(ids[:, :stop], lengths, begin)
            place = torch.arange(begin, stop, device=self._device)
            scored = (place >= starts) & (place < lengths)
            wanted = ids[:, begin:stop]
            greedy &= ((logits.argmax(-1) == wanted) | ~scored).all(1)
            terms = logits.float().log_softmax(-1).gather(2, wanted[..., None])[..., 0]
            # Not a product with the mask: what padding gives may be NaN.
            log_p += terms.double().masked_fill(~scored, 0.0).sum(1)
        counts = [len(t.ids) - t.start for t in texts]
        return list(map(Likelihood, log_p.tolist(), counts, greedy.tolist()))

    def _logits(self, ids: torch.Tensor, lengths: torch.Tensor, begin: int) -> torch.Tensor:
        """Of what predicts the tokens from ``begin`` on: ``[texts, tokens - begin, vocabulary]``.

        Args:
            ids: ``[texts, tokens]``, padded; nothing behind the last token that is predicted changes what predicts it.
            lengths: ``[texts, 1]``.
            begin: 1 or more.
        """
        import torch

        place = torch.arange(ids.shape[1], device=self._device)
        # A cache, which nobody would read, is asked for by default.
        given = {"input_ids": ids, "attention_mask": (place < lengths).long(), "use_cache": False}
        if self._keeps:
            given["logits_to_keep"] = place[begin - 1 : -1]
        with torch.no_grad():
            logits: torch.Tensor = self._model(**given).logits
        return logits if self._keeps else logits[:, begin - 1 : -1]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode; each module is as it was afterwards."""
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was:
            module.training = training
