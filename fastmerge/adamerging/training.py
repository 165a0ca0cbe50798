"""AdaMerging: coefficients of task vectors, learned by gradient from data without labels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmerge.adamerging.coefficients import Granularity, Parametrisation, settings, word
from fastmerge.adamerging.data import Feed, arguments, moved, read_once
from fastmerge.adamerging.module import MergedModule
from fastmerge.adamerging.objectives import OBJECTIVES, Objective, Seen, Task, logits_of
from fastmerge.adamerging.results import AdaMerged, out_dtype
from fastmerge.adamerging.states import States, states
from fastmerge.adamerging.trim import trimmed
from fastmerge.errors import CheckpointError, OutputError, RecipeError


@dataclass(frozen=True, kw_only=True)
class AdaMergingConfig:
    """How coefficients are learned; the defaults are those of the paper's layer-wise AdaMerging.

    Attributes:
        granularity: ``task`` (one coefficient per expert), ``layer`` (one per expert and parameter tensor) or
            ``module`` (one per expert and kind of tensor: names that differ in numbers alone).
        parametrisation: ``clamp`` to 0 .. 1, ``softmax`` over the experts, or ``free``.
        prior: the coefficients to start with; 0.3 where absent. With ``softmax`` they start with equal shares.
        trimmed: AdaMerging++: task vectors are trimmed and elected by TIES first.
        density: share of each task vector that this keeps before the election.
        objective: ``entropy``, ``entropy_first_token``, ``nll``, ``distill`` or a function of
            :class:`~fastmerge.adamerging.objectives.Seen`.
        steps: of Adam, each on one batch of every task.
        learning_rate: of Adam.
        together: one backward kernel per step for all tasks, which holds one gradient of the model; without it one
            per tensor and task, which holds the gradient of one tensor.
        seed: of torch's random numbers, for data that is shuffled.
        backend: ``native``, ``reference``, ``triton`` or None for the best one.
    """

    granularity: Granularity = "layer"
    parametrisation: Parametrisation = "clamp"
    prior: float | None = None
    trimmed: bool = False
    density: float = 0.2
    objective: Objective = "entropy"
    steps: int = 500
    learning_rate: float = 1e-3
    together: bool = True
    seed: int = 0
    backend: str | None = None

    def problems(self) -> list[str]:
        """Everything that is wrong with it."""
        found = settings(self.granularity, self.parametrisation, self.prior)
        if not callable(self.objective):
            found += word("objective", self.objective, list(OBJECTIVES))
        if self.trimmed and self.parametrisation == "free":
            found.append("trimmed: expected clamp or softmax, as a negative weight turns the election; got free")
        if not 0 < self.density <= 1:
            found.append(f"density: expected a number in 0 .. 1 and above 0; got {self.density!r}")
        if not isinstance(self.steps, int) or self.steps < 0:
            found.append(f"steps: expected an integer of at least 0; got {self.steps!r}")
        if not self.learning_rate > 0:
            found.append(f"learning_rate: expected a number above 0; got {self.learning_rate!r}")
        return found


class AdaMerging:
    """Learns coefficients of task vectors on batches of several tasks.

    ``theta = x_0 + sum_i lambda_i (x_i - x_0)``; each step takes a batch of every task, adds up their losses, and moves
    the coefficients by Adam. Deterministic: equal arguments give equal coefficients, however often a run is saved and
    taken up again.

    Paper: Yang et al. 2024, "AdaMerging: Adaptive Model Merging for Multi-Task Learning", arXiv 2310.02575.

    Attributes:
        merged: the module with the present coefficients, in evaluation mode while it learns.
        losses: of each task, by step.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        experts: Sequence[Any],
        tasks: Sequence[Task],
        config: AdaMergingConfig | None = None,
        *,
        base: Any = None,
    ) -> None:
        """Checks everything, and trims the task vectors where that is asked for; no batch is read yet.

        Args:
            module: whose code runs; its weights are the base where ``base`` is absent. Nothing of it is changed.
            experts: fine-tunes of the base: modules or state dictionaries.
            tasks: at least one.
            config: how; None is the paper's layer-wise AdaMerging.
            base: another module or state dictionary in place of the module's own weights.

        Raises:
            RecipeError: with every setting that is wrong.
            ShapeError: where models do not fit together.
            BackendUnavailable: if the backend cannot work on the module's device.
        """
        self.config = config or AdaMergingConfig()
        self._tasks = list(tasks)
        self._states = states(module if base is None else base, experts, module.state_dict())
        problems = self.config.problems() + self._wrong_tasks(self._states.models)
        if problems:
            raise RecipeError(problems)
        out_dtype(self._states)
        if self.config.trimmed:
            experts = trimmed(self._states, self.config.density, self.config.backend)
        self._module = module
        self.merged = MergedModule(
            module,
            experts,
            base=self._states.dicts[0] | self._states.others,
            granularity=self.config.granularity,
            parametrisation=self.config.parametrisation,
            prior=self.config.prior,
            backend=self.config.backend,
        )
        self._optimizer = torch.optim.Adam([self.merged.raw], lr=self.config.learning_rate)
        self.losses: list[list[float]] = []
        self._start()

    def _wrong_tasks(self, models: int) -> list[str]:
        names = [task.name for task in self._tasks]
        found = [] if names else ["tasks: expected at least one, got none"]
        found += [f"tasks: {name!r} is there more than once" for name in dict.fromkeys(names) if names.count(name) > 1]
        for i, task in enumerate(self._tasks):
            found += read_once(f"task {task.name!r}", task.data)
            teacher = i if task.expert is None else task.expert
            if self.config.objective == "distill" and not 0 <= teacher < models:
                found.append(f"task {task.name!r}: expert: expected a number in 0 .. {models - 1}; got {teacher}")
        return found

    def _start(self) -> None:
        """Data from their beginning, and the random numbers of the seed."""
        self._feeds = [Feed(f"task {task.name!r}", task.data) for task in self._tasks]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self._random = torch.get_rng_state()

    # ---- learning -------------------------------------------------------------------------------------------

    def run(self, steps: int | None = None, on_step: Callable[[AdaMerging], None] | None = None) -> AdaMerged:
        """Learns until so many steps are done, those before included.

        Args:
            steps: all in all; the configuration's where absent.
            on_step: called after each.

        Raises:
            OutputError: where a loss is not finite; the coefficients are those before.
        """
        steps = self.config.steps if steps is None else steps
        while len(self.losses) < steps:
            self.step()
            if on_step is not None:
                on_step(self)
        return self.result()

    def step(self) -> list[float]:
        """One step on a batch of every task; gives their losses before it.

        Raises:
            OutputError: where a loss or a gradient is not finite; the coefficients stay as they are.
        """
        training = self._module.training
        self.merged.eval()
        self._optimizer.zero_grad()
        losses = []
        try:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._random)
                with self.merged.together() if self.config.together else contextlib.nullcontext():
                    for number, (task, feed) in enumerate(zip(self._tasks, self._feeds, strict=True)):
                        loss = self._loss(number, task, feed.next())
                        losses.append(float(loss.detach()))
                        loss.backward()
                self._random = torch.get_rng_state()
        finally:
            self.merged.train(training)
        gradient = self.merged.raw.grad
        if gradient is not None and not gradient.isfinite().all():
            raise OutputError(f"step {len(self.losses) + 1}: expected finite gradients, got NaN or Inf")
        self._optimizer.step()
        self.losses.append(losses)
        return losses

    def _loss(self, number: int, task: Task, batch: Any) -> torch.Tensor:
        objective, home = self.config.objective, self._states.inputs[0][0].device
        batch = moved(batch, home)
        args, kwargs = arguments(batch)
        outputs = self.merged(*args, **kwargs)
        teacher = None
        if objective == "distill":
            weights = _expert(self._states, number if task.expert is None else task.expert)
            with torch.no_grad():
                teacher = logits_of(task, torch.func.functional_call(self._module, weights, args, kwargs))
        seen = Seen(task, batch, outputs, logits_of(task, outputs), teacher)
        loss = objective(seen) if callable(objective) else OBJECTIVES[objective](seen)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise RecipeError(f"task {task.name!r}: expected a loss of one number that depends on the merged model")
        if not loss.isfinite().all():
            step = len(self.losses) + 1
            raise OutputError(f"step {step}, task {task.name!r}: expected a finite loss, got {float(loss.detach())}")
        return loss.reshape(())

    # ---- results --------------------------------------------------------------------------------------------

    def result(self) -> AdaMerged:
        """What has been learned so far."""
        return AdaMerged(
            states=self._states,
            coefficients=self.merged.coefficients,
            losses=[list(losses) for losses in self.losses],
            density=self.config.density if self.config.trimmed else None,
            backend=self.config.backend,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, beside models, tasks and configuration."""
        return {
            "raw": self.merged.raw.detach().clone(),
            "optimizer": self._optimizer.state_dict(),
            "random": self._random.clone(),
            "losses": [list(losses) for losses in self.losses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a run up where :meth:`state_dict` left it; the data are read again up to there.

        Raises:
            CheckpointError: for the state of another run.
        """
        missing = {"raw", "optimizer", "random", "losses"} - set(state)
        if missing or state["raw"].shape != self.merged.raw.shape:
            what = f"without {sorted(missing)}" if missing else f"of coefficients {tuple(state['raw'].shape)}"
            raise CheckpointError(f"a state {what}; expected coefficients {tuple(self.merged.raw.shape)}")
        if any(len(losses) != len(self._tasks) for losses in state["losses"]):
            raise CheckpointError(f"a state of other tasks; expected losses of {len(self._tasks)}")
        self._start()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            for _ in state["losses"]:
                for feed in self._feeds:
                    feed.next()
        with torch.no_grad():
            self.merged.raw.copy_(state["raw"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._random = state["random"].clone()
        self.losses = [list(losses) for losses in state["losses"]]


def _expert(found: States, number: int) -> dict[str, torch.Tensor]:
    """The weights of an expert by every name of the base."""
    own = {name: group[number + 1] for name, group in zip(found.names, found.inputs, strict=True)}
    return own | {name: own[owner] for name, owner in found.tied.items()} | found.others
