"""The file of a farm: which recipes, where the store is, who merges."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from fastmerge.checkpoint.system import read_regular
from fastmerge.errors import RecipeError, hint
from fastmerge.recipe import Recipe
from fastmerge.recipe import tree as yamltree
from fastmerge.recipe.load import message
from fastmerge.recipe.problems import Problems
from fastmerge.recipe.tree import Loc, kind
from fastmerge.sizes import parse_bytes

MOST_RECIPES = 1_000_000
_PLACE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

Size = StrictInt | StrictFloat | StrictStr


class Shape(BaseModel):
    """A frozen value, strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Slurm(Shape):
    """What a job array asks Slurm for, by the names of ``submitit``; ``cluster`` is its kind of executor."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    time: Annotated[StrictInt, Field(ge=1)] = 60
    partition: StrictStr | None = None
    cpus_per_task: Annotated[StrictInt, Field(ge=1)] | None = None
    gpus_per_node: Annotated[StrictInt, Field(ge=1)] | None = None
    mem: StrictStr | None = None
    more: dict[str, Any] = Field(default_factory=dict)


class Ray(Shape):
    """What each actor takes of a Ray cluster, and where that is."""

    address: StrictStr | None = None
    num_cpus: Annotated[StrictInt | StrictFloat, Field(ge=0)] = 1
    num_gpus: Annotated[StrictInt | StrictFloat, Field(ge=0)] = 0


class File(Shape):
    """The keys of a farm's file.

    Attributes:
        store: the directory, from the file's own.
        recipes: paths, documents, or mappings of a ``template`` and its ``grid``.
        executor: ``local`` processes, ``ray`` or ``slurm``.
        workers: how many merge at a time; None for as many as there are cores, nodes or GPUs, at most four.
        memory: budget of all workers of a machine together.
        device: where they merge; several are given out in turn.
        backend: what computes.
        seed: of recipes that name none.
        shard_size: largest output file.
        score: a command, ``{model}`` in it stands for the model's directory, that prints a number last; or
            ``module:function`` of that directory. More is better.
        keep: models that stay, the best by score; the others are virtual: recipe and score only.
        lease: seconds without a sign of life after which a worker is taken for dead.
    """

    store: StrictStr
    recipes: list[Any] = Field(min_length=1)
    executor: Literal["local", "ray", "slurm"] = "local"
    workers: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = None
    memory: Size | None = None
    device: StrictStr | list[StrictStr] = "auto"
    backend: Literal["native", "triton", "reference"] | None = None
    seed: StrictInt | None = None
    shard_size: Size = "5GB"
    score: StrictStr | None = None
    keep: Annotated[StrictInt, Field(ge=0)] | None = None
    lease: Annotated[StrictInt | StrictFloat, Field(gt=0, le=1e6)] = 120
    strict: StrictBool = False
    ray: Ray = Ray()
    slurm: Slurm = Slurm()

    @property
    def settings(self) -> dict[str, Any]:
        """What workers have to know."""
        names = ("device", "backend", "score", "keep", "lease", "memory", "workers")
        return {name: getattr(self, name) for name in names} | {"home": str(Path.cwd())}


@dataclass(frozen=True)
class Wanted:
    """A recipe of a farm, and what it is called."""

    name: str
    recipe: Recipe


def load(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[File, list[Wanted]]:
    """Reads a farm's file and every recipe in it; no model is opened.

    Args:
        source: the file, or the same as a mapping: paths in it are then from the working directory.

    Raises:
        RecipeError: with every problem of all of them.
    """
    tree, name, home = _tree(source)
    problems = Problems(name, tree)
    try:
        file = File.model_validate(dict(tree))
    except ValidationError as error:
        for one in error.errors(include_url=False):
            where = _place(tree, one["loc"])
            if one["type"] == "extra_forbidden":
                problems.add(where, f"unknown key{hint(str(one['loc'][-1]), _known(one['loc']))}")
            else:
                problems.add(where, message(one))
        problems.check()
        raise
    _check(file, problems)
    found = list(_recipes(file, home, problems))
    problems.check()
    return file.model_copy(update={"store": str(home / os.path.expanduser(file.store))}), found  # noqa: PTH111


def _tree(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[yamltree.Map, str, Path]:
    if isinstance(source, Mapping):
        return yamltree.locate(source), "farm", Path.cwd()
    path = Path(source)
    try:
        text = read_regular(path, yamltree.MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the file of the farm: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8 text") from None
    documents = yamltree.parse(text, str(path), "expected a mapping with 'store' and 'recipes'")
    if len(documents) > 1:
        raise RecipeError(f"{path}: expected one document; got {len(documents)}: recipes stand in a list 'recipes'")
    return documents[0], str(path), Path(os.path.abspath(path)).parent  # noqa: PTH100


def _place(tree: Any, loc: tuple[int | str, ...]) -> Loc:
    """The place of an error in the tree: the names of branches of unions, which pydantic adds, are left out."""
    out: list[int | str] = []
    for part in loc:
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[str(part)]
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            break
        out.append(part)
    return tuple(out) or loc[:1]


def _known(loc: tuple[int | str, ...]) -> list[str]:
    kinds: dict[str, type[Shape]] = {"ray": Ray, "slurm": Slurm}
    return [*(kinds.get(str(loc[0]), File) if len(loc) > 1 else File).model_fields]


def _check(file: File, problems: Problems) -> None:
    """What no type tells."""
    for name in ("memory", "shard_size"):
        value = getattr(file, name)
        try:
            size = parse_bytes(value) if value is not None else 1
        except RecipeError as error:
            problems.add((name,), str(error))
            continue
        if size < 1:
            problems.add((name,), f"expected at least 1 byte; got {value!r}")
    if file.keep is not None and file.score is None:
        problems.add(("keep",), "keeps the best by their score: 'score' says how to get it")
    if file.device == []:
        problems.add(("device",), "expected at least one device")
    for name in ("ray", "slurm"):
        if name in file.model_fields_set and file.executor != name:
            problems.add((name,), f"is for 'executor: {name}'; got {file.executor!r}")


def _recipes(file: File, home: Path, problems: Problems) -> Iterator[Wanted]:
    names: dict[str, int] = {}
    total = 0
    for i, item in enumerate(file.recipes):
        loc: Loc = ("recipes", i)
        for name, source in _sources(item, loc, home, problems):
            total += 1
            if total > MOST_RECIPES:
                problems.add(loc, f"expected at most {MOST_RECIPES:,} recipes")
                return
            try:
                recipe = Recipe.load(source, strict=file.strict)
            except RecipeError as error:
                for text in error.problems:
                    problems.add(loc, f"{name}: {text}")
                continue
            if recipe.seed is None and file.seed is not None:
                recipe = replace(recipe, seed=file.seed)
            names[name] = names.get(name, 0) + 1
            yield Wanted(name if names[name] == 1 else f"{name} ({names[name]})", recipe)


def _sources(item: Any, loc: Loc, home: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Names and sources of the recipes of one item."""
    if isinstance(item, str):
        yield item, home / item
    elif isinstance(item, Mapping) and ("template" in item or "grid" in item):
        yield from _grid(item, loc, home, problems)
    elif isinstance(item, Mapping):
        yield f"recipe {int(loc[-1]) + 1}", item
    else:
        problems.add(loc, f"expected a path, a recipe, or a template and its grid; got {kind(item)}")


def _grid(item: Mapping[str, Any], loc: Loc, home: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """The template with every combination of the grid's values."""
    for key in item:
        if key not in {"template", "grid", "name"}:
            problems.add((*loc, key), f"unknown key{hint(key, ('template', 'grid', 'name'))}")
    template, grid, label = item.get("template"), item.get("grid"), item.get("name", "")
    if isinstance(template, str):
        try:
            documents = yamltree.parse(read_regular(home / template, yamltree.MAX_BYTES).decode("utf-8-sig"), template)
        except (OSError, UnicodeDecodeError) as error:
            problems.add((*loc, "template"), f"cannot read {template!r}: {getattr(error, 'strerror', None) or error}")
            return
        except RecipeError as error:
            for text in error.problems:
                problems.add((*loc, "template"), text)
            return
        if len(documents) > 1:
            problems.add((*loc, "template"), f"{template}: expected one document; got {len(documents)}")
            return
        template, label = documents[0], label or template
    if not isinstance(template, Mapping):
        problems.add((*loc, "template"), f"expected a recipe or its path; got {kind(template)}")
        return
    if not isinstance(grid, Mapping) or not grid:
        problems.add((*loc, "grid"), "expected a mapping of names to lists of values")
        return
    wrong = {axis: values for axis, values in grid.items() if not isinstance(values, list) or not values}
    for axis in wrong:
        problems.add((*loc, "grid", axis), f"expected a list of values; got {kind(grid[axis])}")
    used = set(_names(template))
    for axis in sorted(used - set(grid)):
        problems.add((*loc, "template"), f"${{{axis}}} has no values in 'grid'{hint(axis, grid)}")
    for axis in sorted(set(grid) - used):
        problems.add((*loc, "grid", axis), f"the template has no ${{{axis}}}{hint(axis, used)}")
    if wrong or used != set(grid):
        return
    if math.prod(map(len, grid.values())) > MOST_RECIPES:
        problems.add((*loc, "grid"), f"expected at most {MOST_RECIPES:,} recipes")
        return
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        text = ",".join(f"{axis}={value}" for axis, value in point.items())
        yield f"{label}:{text}" if label else text, _filled(template, point)


def _names(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _names(value)
    elif isinstance(node, list):
        for value in node:
            yield from _names(value)
    elif isinstance(node, str):
        yield from _PLACE.findall(node)


def _filled(node: Any, point: Mapping[str, Any]) -> Any:
    """The template with values: one that is the whole of a text keeps its type."""
    if isinstance(node, Mapping):
        return {key: _filled(value, point) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, point) for value in node]
    if not isinstance(node, str):
        return node
    alone = _PLACE.fullmatch(node)
    return point[alone[1]] if alone else _PLACE.sub(lambda m: str(point[m[1]]), node)
