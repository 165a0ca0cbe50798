"""Learned soups: weighted means of models whose weights are learned from labelled data that were held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastmerge.adamerging.coefficients import word
from fastmerge.adamerging.data import Feed, arguments, moved, read_once
from fastmerge.adamerging.module import MergedModule
from fastmerge.adamerging.objectives import Seen, Task, logits_of, nll
from fastmerge.adamerging.recipe import Path
from fastmerge.adamerging.results import AdaMerged, out_dtype
from fastmerge.adamerging.states import states
from fastmerge.errors import OutputError, RecipeError
from fastmerge.recipe import Recipe


@dataclass(frozen=True)
class LearnedSoup:
    """A weighted mean of models.

    Attributes:
        weights: one per model, by the name of the tensor; they add up to one.
        temperature: what the logits were multiplied by to fit the labels; it changes no prediction.
        losses: by step.
    """

    weights: dict[str, list[float]]
    temperature: float
    losses: list[float] = field(repr=False)
    _merged: AdaMerged = field(repr=False)

    def recipe(self, models: Sequence[Path]) -> Recipe:
        """The recipe of the same mean of models on disk: what the others have learned, added to the first.

        Args:
            models: directories, or ``org/name`` on the hub, in their order.

        Raises:
            RecipeError: for another number of models.
        """
        if len(models) != len(next(iter(self.weights.values()))):
            raise RecipeError(f"models: expected {len(next(iter(self.weights.values())))}, got {len(models)}")
        return self._merged.recipe(models[0], models[1:])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The mean's weights, of the first model's types."""
        return self._merged.state_dict()


def learned_soup(
    module: torch.nn.Module,
    models: Sequence[Any],
    data: Iterable[Any],
    *,
    granularity: Literal["model", "tensor"] = "tensor",
    head: Any = None,
    steps: int = 100,
    learning_rate: float = 0.05,
    seed: int = 0,
    backend: str | None = None,
) -> LearnedSoup:
    r"""Learns the weights of a soup by gradient: ``theta = sum_i softmax(alpha)_i x_i``, and a temperature.

    .. math:: \min_{\alpha, \beta}\ \mathrm{NLL}\bigl(\beta f_\theta(x), y\bigr), \qquad
              \theta = x_0 + \sum_{i>0} \operatorname{softmax}(\alpha)_i\, (x_i - x_0)

    Weights start equal, the temperature at 1; Adam moves both. Paper: Wortsman et al. 2022, "Model soups", arXiv
    2203.05482, appendix on learned soups.

    Args:
        module: whose code runs, in evaluation mode; its own weights are not read.
        models: at least two: modules or state dictionaries of the module's names.
        data: labelled batches that no model was trained on, as for :class:`~fastmerge.adamerging.Task`.
        granularity: ``tensor``: weights for every parameter tensor; ``model``: one per model.
        head: from the module's output to logits; where absent, the output or its ``logits``.
        steps: of Adam, one batch each.
        learning_rate: of Adam.
        seed: of torch's random numbers, for data that is shuffled.
        backend: ``native``, ``reference``, ``triton`` or None for the best one.

    Raises:
        RecipeError: with every argument that is wrong.
        ShapeError: where models do not fit together.
        OutputError: where a loss is not finite.
        BackendUnavailable: if the backend cannot work on the models' device.
    """
    problems = word("granularity", granularity, ("model", "tensor")) + read_once("data", data)
    if isinstance(models, torch.nn.Module | dict) or len(models) < 2:
        problems.append("models: expected a sequence of at least two")
    if not isinstance(steps, int) or steps < 0 or not learning_rate > 0:
        problems.append(f"steps, learning_rate: expected at least 0 and above 0; got {steps!r}, {learning_rate!r}")
    if problems:
        raise RecipeError(problems)
    found = states(models[0], models[1:], module.state_dict())
    out_dtype(found)
    merged = MergedModule(
        module,
        models[1:],
        base=models[0],
        granularity=granularity,
        parametrisation="softmax",
        soup=True,
        backend=backend,
    )
    temperature = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.Adam([merged.raw, temperature], lr=learning_rate)
    task, feed, losses = Task("soup", data, head), Feed("data", data), []
    training = module.training
    merged.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step in range(1, steps + 1):
                batch = moved(feed.next(), found.inputs[0][0].device)
                args, kwargs = arguments(batch)
                optimizer.zero_grad()
                outputs = merged(*args, **kwargs)
                logits = logits_of(task, outputs)
                loss = nll(Seen(task, batch, outputs, logits * temperature.to(logits)))
                if not loss.isfinite():
                    raise OutputError(f"step {step}: expected a finite loss, got {float(loss.detach())}")
                losses.append(float(loss.detach()))
                loss.backward()
                optimizer.step()
    finally:
        merged.train(training)
    return LearnedSoup(
        weights={name: [1.0 - sum(row), *row] for name, row in merged.coefficients.items()},
        temperature=float(temperature.detach()),
        losses=losses,
        _merged=AdaMerged(found, merged.coefficients, [[loss] for loss in losses], backend=backend),
    )
