"""From recipes to jobs: what makes two of them the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmerge import planning
from fastmerge.checkpoint import Checkpoint, content
from fastmerge.checkpoint.seal import mark
from fastmerge.errors import CheckpointError
from fastmerge.farm.store import Job
from fastmerge.planning import ENGINE, Plan
from fastmerge.planning.config_json import canonical
from fastmerge.recipe import ModelRef, Recipe
from fastmerge.recipe.refs import exists


class Planner:
    """Plans many recipes over few models: each is opened once, and its content told once."""

    def __init__(self) -> None:
        self._models: dict[str, Checkpoint] = {}
        self._contents: dict[str, str] = {}

    def plan(self, recipe: Recipe, *, seed: int | None, shard_size: int) -> Plan:
        """The plan of a recipe.

        Raises:
            RecipeError, CheckpointError: it cannot be merged.
        """
        planned = planning.plan(recipe, seed=seed, shard_size=shard_size, models=self._models)
        plans = [plan for _, plan in planned.documents] or [planned]
        stages = {name for name, _ in planned.documents}
        for plan in plans:
            for ref, checkpoint in zip(plan.recipe.refs, plan.checkpoints, strict=False):
                if ref.path not in stages:
                    self._models[str(ref.bare)] = checkpoint
        return planned

    def job(self, name: str, recipe: Recipe, *, seed: int | None, shard_size: int) -> tuple[Job, Plan]:
        """A recipe as a job, and its plan.

        The id is a hash over the engine's version, the output's headers (which hold the recipe without paths, the seed,
        names, types and shards), its configuration, and the content of everything that is read.

        Raises:
            RecipeError, CheckpointError: it cannot be merged.
        """
        text = recipe.to_yaml(absolute(recipe))
        planned = self.plan(recipe, seed=seed, shard_size=shard_size)
        models = [self._content(checkpoint) for checkpoint in planned.checkpoints]
        facts: dict[str, Any] = {
            "engine": ENGINE,
            "layout": planned.layout.digest,
            "config": canonical(planned.config),
            "models": models,
            "files": [[n, self._file(f)] for n, f in planned.carry],
        }
        identity = hashlib.sha256(_line(facts)).hexdigest()
        inputs = hashlib.sha256(_line(sorted(set(models)))).hexdigest()[:16]
        return Job(identity, name, text, planned.seed, shard_size, inputs), planned

    def again(self, job: Job) -> Plan:
        """The plan of a job, which is still that of the same inputs.

        Raises:
            CheckpointError: they have changed since the job was made.
        """
        found, planned = self.job(job.name, Recipe.load(job.recipe), seed=job.seed, shard_size=job.shard_size)
        if found.id != job.id:
            raise CheckpointError(f"{job.name}: the models changed since the job was made; expected {job.id}")
        return planned

    def _content(self, checkpoint: Checkpoint) -> str:
        key = f"{checkpoint.path}\n{[f.identity for f in checkpoint.files]}"
        if key not in self._contents:
            said = [checkpoint.content_id()]
            for name in ("config.json", "adapter_config.json"):
                path = checkpoint.path / name
                said.append(str(mark(path)) if path.exists() else "")
            self._contents[key] = hashlib.sha256(_line(said)).hexdigest()
        return self._contents[key]

    def _file(self, data: Path | bytes) -> str:
        if isinstance(data, bytes):
            return hashlib.sha256(data).hexdigest()
        key = str(data)
        if key not in self._contents:
            self._contents[key] = content.of([data])
        return self._contents[key]


def absolute(recipe: Recipe) -> Callable[[ModelRef], Any]:
    """How a recipe's references are written so that a process anywhere on the same filesystem understands them."""
    stages = {name for name, _ in recipe.stages}

    def plain(ref: ModelRef) -> Any:
        if ref.path in stages:
            return ref.plain()
        adapters = [dataclasses.replace(a, path=_path(a.path)) for a in ref.adapters]
        first = adapters[0] if adapters else None
        return dataclasses.replace(ref, path=_path(ref.path), lora=first, more=tuple(adapters[1:])).plain()

    return plain


def _path(text: str) -> str:
    return os.path.abspath(os.path.expanduser(text)) if exists(text) else text  # noqa: PTH100, PTH111  not resolved


def _line(facts: Any) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
