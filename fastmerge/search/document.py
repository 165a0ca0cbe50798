"""A search as a YAML file: the recipe with its genes, what scores, and how candidates are found."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
)

from fastmerge.checkpoint.system import read_regular
from fastmerge.errors import RecipeError
from fastmerge.recipe import tree as yamltree
from fastmerge.recipe.problems import Problems, hint
from fastmerge.recipe.schema import integer
from fastmerge.recipe.tree import Loc, Map, Odd, kind
from fastmerge.search.running import HELD_OUT


def _one(value: dict[str, Any]) -> dict[str, Any]:
    if len(value) != 1:
        raise ValueError(f"expected one name with what it takes; got {', '.join(map(str, value)) or 'none'}")
    return value


def _sampler(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"expected a name, or one name with its options; got {kind(value)}")  # noqa: TRY004
    return _one(value)


_EXPECTED = "expected a mapping with 'recipe' and 'evaluator'"


Integer = Annotated[StrictInt, BeforeValidator(integer)]
Positive = Annotated[Integer, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Document(BaseModel):
    """All keys of the file of a search.

    Attributes:
        recipe: with genes in the place of values.
        evaluator: one name, and what that evaluator takes.
        sampler: a name, or one name with its options.
        budget: candidates that are evaluated on all items.
        seed: of everything.
        held_out: share of the items that the search does not see.
        racing: rounds of a race; 1 for none.
        objectives: names of the scores where there are several.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: dict[str, Any]
    evaluator: Annotated[dict[str, Any], AfterValidator(_one)]
    sampler: Annotated[Any, AfterValidator(_sampler)] = "genetic"
    budget: Positive = 100
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    held_out: Share = HELD_OUT
    racing: Positive = 1
    objectives: tuple[StrictStr, ...] | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Document:
        """Reads and checks a file; no model is opened, and the recipe is not looked at.

        Raises:
            RecipeError: with every problem, each as ``file:line: place: what is wrong``.
        """
        name = str(os.fspath(path))
        try:
            text = read_regular(path, yamltree.MAX_BYTES + 1).decode("utf-8-sig")
        except OSError as error:
            raise RecipeError(f"{name}: cannot read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name}: not UTF-8 text (byte {error.start})") from None
        trees = yamltree.parse(text, name, _EXPECTED)
        if len(trees) != 1:
            raise RecipeError(f"{name}: expected one document with 'recipe' and 'evaluator', got {len(trees)}")
        problems = Problems(name, trees[0])
        if "merge_method" in trees[0] and "recipe" not in trees[0]:
            problems.add(("merge_method",), f"this is a recipe, which 'fastmerge merge' merges: {_EXPECTED}")
            problems.check()
        try:
            return cls.model_validate(trees[0])
        except ValidationError as error:
            for one in error.errors(include_url=False):
                loc: Loc = tuple(p for p in one["loc"] if isinstance(p, int | str))
                problems.add(loc, _message(one, loc))
        problems.check()
        raise RecipeError(f"{name}: not a search")


def _message(error: Any, loc: Loc) -> str:
    given = error["input"]
    shown = repr(given)[:60] if isinstance(given, str | int | float) else kind(given)
    match error["type"]:
        case "missing":
            return "this key is required"
        case "extra_forbidden":
            known = tuple(Document.model_fields)
            return f"unknown key{hint(str(loc[-1]), known)}; known: {', '.join(known)}"
        case "value_error":
            return str(error["ctx"]["error"])
        case "dict_type" | "model_type":
            return f"expected a mapping; got {shown}"
        case "tuple_type":
            return f"expected a list; got {shown}"
    text = str(error["msg"]).replace("Input should be", "expected")
    return f"{text[0].lower()}{text[1:]}; got {shown}"


def plain(tree: Any) -> Any:
    """The same as plain dictionaries and lists.

    Raises:
        RecipeError: a value is not what its text says.
    """
    if isinstance(tree, Odd):
        raise RecipeError(f"{tree!r}: quote it")
    if isinstance(tree, Map | dict):
        return {key: plain(item) for key, item in tree.items()}
    return [plain(item) for item in tree] if isinstance(tree, list | tuple) else tree
