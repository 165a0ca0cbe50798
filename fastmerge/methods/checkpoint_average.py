"""Averages of the checkpoints of one training run: equal, exponential, or in place of a decaying learning rate."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastmerge.methods.base import Contract, shared
from fastmerge.methods.linear import Average

if TYPE_CHECKING:
    from fastmerge.ops.spec import Spec


@functools.lru_cache(256)
def left(schedule: str, t: float) -> float:
    """The learning rate at share t of a decay, 1 at its start and 0 at its end."""
    import numpy as np

    from fastmerge.methods import angles

    if schedule == "cosine":
        return 0.5 + 0.5 * float(angles.cos(np.array(math.pi * t))) if 0 < t < 1 else 1.0 - t
    return 1.0 - (math.sqrt(t) if schedule == "inverse_sqrt" else t)


@dataclass(frozen=True, kw_only=True)
class CheckpointAverage(Average):
    r"""Weighted average of N checkpoints of one run, given in the order of training.

    .. math:: \sum_{j=0}^{N-1} c_j x_j, \quad c_j = D\Bigl(\frac{j}{N}\Bigr) - D\Bigl(\frac{j+1}{N}\Bigr)

    D is the course of a learning rate, from 1 to 0: the average is where a run that took the same steps with that decay
    would be (WSM: warm up, keep the rate, merge). ``linear`` D(t) = 1 - t, which is the uniform average; ``cosine``
    (1 + cos(pi t)) / 2; ``inverse_sqrt`` 1 - sqrt(t). ``ema``: c_0 = d^(N-1), c_j = (1 - d) d^(N-1-j) with the decay d.

    Shapes: ``x_j: [*S]`` -> ``[*S]``; each checkpoint is read once.
    Numerics: coefficients in fp64 from +, -, *, / and square roots, the sum in fp32 (fp64 where an input is fp64 or the
    result fp32) in input order, one rounding; ``uniform`` and ``linear`` sum first and divide by N.
    Paper: Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging", arXiv 2507.17634;
    uniform: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima", arXiv 1803.05407.
    """

    name = "checkpoint_average"
    summary = "Average of a run's checkpoints: uniform, EMA, or in place of a decay of the learning rate."
    formula = "out = sum_j c_j x_j, c_j = D(j / N) - D((j + 1) / N), D: the decay from 1 to 0 that is stood in for"
    paper = "https://arxiv.org/abs/2507.17634"
    contract = Contract("ignored", least=1)
    cases = (
        {},
        {"schedule": "ema", "decay": 0.8, "models": 5},
        {"schedule": "cosine", "models": 4},
        {"schedule": "inverse_sqrt", "models": 9},
        {"schedule": "linear", "models": 2},
    )

    schedule: Literal["uniform", "ema", "linear", "cosine", "inverse_sqrt"] = shared(
        "what the weights stand in for; linear is the uniform average", "uniform"
    )
    decay: float | None = shared("of ema: what a checkpoint leaves of the average before it", None, low=0.0, high=1.0)

    def coefficients(self, count: int) -> list[float]:
        """Of ``count`` checkpoints, the first one the oldest; they sum to 1."""
        if self.schedule == "ema":
            decay, ages = self.decay or 0.0, [1.0]
            for _ in range(count - 1):
                ages.append(ages[-1] * decay)
            return [ages[-1], *((1.0 - decay) * age for age in ages[-2::-1])]
        rate = [left(self.schedule, j / count) for j in range(count + 1)]
        return [a - b for a, b in itertools.pairwise(rate)]

    def table(self, spec: Spec) -> tuple[Sequence[float], float]:
        """Ones and N, or what the schedule makes."""
        count = len(spec.dtypes)
        if self.schedule in ("uniform", "linear"):
            return [1.0] * count, float(count)
        return self.coefficients(count), 1.0

    def check(self, spec: Spec) -> list[str]:
        """Refuses ema without a decay."""
        lost = self.schedule == "ema" and self.decay is None
        return ["checkpoint_average: schedule: ema needs 'decay', between 0 (the last one) and 1"] if lost else []

    def warn(self, spec: Spec) -> list[str]:
        """Names a decay that nothing reads, and those that leave one checkpoint."""
        if self.decay is not None and self.schedule != "ema":
            return [f"checkpoint_average: decay has no effect with schedule: {self.schedule}"]
        if self.decay in (0.0, 1.0):
            return [
                f"checkpoint_average: decay {self.decay:g} leaves the {'first' if self.decay else 'last'} one alone"
            ]
        return []
