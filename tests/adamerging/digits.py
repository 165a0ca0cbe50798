"""A set-up in which AdaMerging does on a CPU, in seconds, what its paper shows: four views of scikit-learn's digits.

Each task is to read digits that were turned, inverted or flipped in its own way, and sees them in a quarter of the
input that is its alone. The head is frozen and shared: ten random directions, as a text encoder would give them. A
small network learns all tasks for ten steps on few images (the base), then each task by itself (the experts).
Where tasks share their inputs, or have heads of their own, minimising entropy collapses instead.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fastmerge.adamerging import Task

VIEWS = {
    "upright": lambda x: x,
    "turned": lambda x: np.rot90(x, axes=(1, 2)),
    "inverted": lambda x: 1 - x,
    "flipped": lambda x: x[:, ::-1],
}
PIXELS, TRAINED, SHARED, BATCH = 64, 1000, 300, 64


class Reader(nn.Module):
    """Images of all views side by side to a direction."""

    def __init__(self, width=256):
        super().__init__()
        self.first = nn.Linear(PIXELS * len(VIEWS), width)
        self.first_norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)
        self.second_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 64)

    def forward(self, x):
        x = self.first_norm(self.first(x)).relu()
        x = self.second_norm(self.second(x)).relu()
        return functional.normalize(self.out(x), dim=1)


class Split(NamedTuple):
    """Images ``[n, 256]`` and digits ``[n]`` of one task."""

    x: torch.Tensor
    y: torch.Tensor


class Setup:
    """Everything of one seed: base, experts, head, and the images of each task."""

    def __init__(self, seed, *, tuning=100):
        from sklearn.datasets import load_digits  # and scipy and pandas with it: 2 s

        random = np.random.default_rng(seed)
        digits = load_digits()
        order = random.permutation(len(digits.target))
        images = digits.images[order].astype(np.float32) / 16
        answers = torch.from_numpy(digits.target[order])
        torch.manual_seed(seed)
        self.head = 10 * functional.normalize(torch.randn(10, PIXELS), dim=1)
        self.train, self.test = [], []
        for number, view in enumerate(VIEWS.values()):
            x = torch.zeros(len(images), PIXELS * len(VIEWS))
            seen = np.ascontiguousarray(view(images)).reshape(len(images), PIXELS)
            x[:, number * PIXELS : (number + 1) * PIXELS] = torch.from_numpy(seen)
            self.train.append(Split(x[:TRAINED], answers[:TRAINED]))
            self.test.append(Split(x[TRAINED:], answers[TRAINED:]))
        self.base = Reader()
        self._learn(self.base, self.train, 10, 1e-3, slice(SHARED))
        self.experts = []
        for split in self.train:
            expert = Reader()
            expert.load_state_dict(self.base.state_dict())
            self._learn(expert, [split], tuning, 3e-4)
            self.experts.append(expert)

    def _learn(self, model, splits, steps, rate, rows=None):
        optimizer = torch.optim.Adam(model.parameters(), rate)
        for _ in range(steps):
            chosen = torch.randint(TRAINED, (128,)) if rows is None else rows
            optimizer.zero_grad()
            sum(functional.cross_entropy(self.logits(model(s.x[chosen])), s.y[chosen]) for s in splits).backward()
            optimizer.step()

    def logits(self, directions):
        return directions @ self.head.T

    def tasks(self, seed=0, batches=300):
        """Unlabelled test images, 64 to a batch."""
        g = torch.Generator().manual_seed(seed)
        return [
            Task(name, [s.x[torch.randint(len(s.x), (BATCH,), generator=g)] for _ in range(batches)], self.logits)
            for name, s in zip(VIEWS, self.test, strict=True)
        ]

    def accuracy(self, model):
        """Mean share of test images that are read rightly; ``model`` maps images to directions."""
        with torch.no_grad():
            rights = [(self.logits(model(s.x)).argmax(dim=1) == s.y).double().mean() for s in self.test]
        return float(sum(rights) / len(rights))

    def entropy(self, model):
        """Mean entropy of the predictions on test images."""
        with torch.no_grad():
            logs = [self.logits(model(s.x)).log_softmax(dim=1) for s in self.test]
        return float(sum(-(log.exp() * log).sum(dim=1).mean() for log in logs) / len(logs))

    def mixed(self, weight):
        """Task arithmetic with one weight, as plain torch adds it up."""
        model, base = Reader(), self.base.state_dict()
        model.load_state_dict(
            {n: x + weight * sum(e.state_dict()[n] - x for e in self.experts) for n, x in base.items()}
        )
        return model
