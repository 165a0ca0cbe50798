"""``fastmerge soup``: averages of models, of all of them or of those that do the average good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from fastmerge.commands import display
from fastmerge.errors import OutputError, RecipeError

if TYPE_CHECKING:
    from fastmerge.search.soups import Soup, Step


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def soup() -> None:
    """Average models: all of them, those that do the average good, or the strongest of each category."""


def _results(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the soup goes."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace what is at --recipe and --out."),
        click.option("--out", type=click.Path(), help="Merge the soup into this new directory."),
        click.option("--recipe", type=click.Path(dir_okay=False), help="Write the recipe here.  [default: print it]"),
    ):
        command = option(command)
    return click.argument("models", nargs=-1, required=True, metavar="MODEL...")(command)


def _evaluators(command: Callable[..., Any]) -> Callable[..., Any]:
    """What scores."""
    for option in (
        click.option("--evaluator", type=click.Path(exists=True, dir_okay=False),
                     help="A YAML file with perplexity, accuracy, lm_eval or function, and what that takes."),
        click.option("--function", metavar="MODULE:NAME", help="A function of the model, or an evaluator; it is run."),
        click.option("--perplexity", type=click.Path(exists=True, dir_okay=False),
                     help="JSON lines: text; or prompt and completion; or question, choices and answer."),
        click.option("--accuracy", type=click.Path(exists=True, dir_okay=False),
                     help="JSON lines: prompt and completion; or question, choices and answer."),
    ):  # fmt: skip
        command = option(command)
    return command


@soup.command()
@_results
def uniform(models: tuple[str, ...], **where: Any) -> None:
    """Average all of the MODELS, with equal weights."""
    from fastmerge.search.soups import uniform_soup

    _free(**where)
    _write(uniform_soup(models), **where)


@soup.command()
@_results
@_evaluators
@click.option("--accept", type=click.Choice(["gt", "ge"]), default="gt", show_default=True,
              help="A model stays where the soup with it scores more, or at least as much.")  # fmt: skip
def greedy(
    models: tuple[str, ...],
    accept: Any,
    accuracy: str | None,
    perplexity: str | None,
    function: str | None,
    evaluator: str | None,
    **where: Any,
) -> None:
    """Average those of the MODELS that do the average good, tried from the best one on."""
    from fastmerge.search.soups import greedy_soup

    _free(**where)
    scored = _scored(models[0], accuracy=accuracy, perplexity=perplexity, function=function, evaluator=evaluator)

    def show(step: Step) -> None:
        what = "stays" if step.accepted else "is left out"
        display.say(f"{step.model} {what}: the soup with it scores {step.score:.6g}", err=True)

    made = greedy_soup(models, scored, accept, progress=show)
    for name, score in (made.scores or {}).items():
        display.say(f"{name} by itself scores {score:.6g}", err=True)
    _write(made, **where)


@soup.command()
@_results
@_evaluators
def category(
    models: tuple[str, ...],
    accuracy: str | None,
    perplexity: str | None,
    function: str | None,
    evaluator: str | None,
    **where: Any,
) -> None:
    """Average the strongest of the MODELS in each category: a key of the lines, or an objective."""
    from fastmerge.search.evaluators.lines import Lines
    from fastmerge.search.soups import category_soup

    _free(**where)
    scored = _scored(models[0], accuracy=accuracy, perplexity=perplexity, function=function, evaluator=evaluator)
    made = category_soup(models, scored.by_category() if isinstance(scored, Lines) else scored)
    for name, scores in (made.scores or {}).items():
        display.say(f"{name}: " + ", ".join(f"{model} {score:.6g}" for model, score in scores.items()), err=True)
    _write(made, **where)


def _scored(first: str, *, evaluator: str | None, **short: str | None) -> Any:
    """The one evaluator that was asked for; the first model's tokenizer is the one where it names none."""
    from fastmerge.search.evaluators import named

    asked: list[Mapping[str, Any]] = [{name: value} for name, value in short.items() if value is not None]
    if evaluator is not None:
        asked.append(_mapping(evaluator))
    if len(asked) != 1:
        raise RecipeError(f"expected one of --accuracy, --perplexity, --function and --evaluator, got {len(asked)}")
    return named(asked[0], tokenizer=first)


def _mapping(file: str) -> Mapping[str, Any]:
    """A YAML file, with the limits of recipes."""
    from fastmerge.checkpoint.system import read_regular
    from fastmerge.recipe import tree
    from fastmerge.search.document import plain

    try:
        text = read_regular(file, tree.MAX_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text (byte {error.start})") from None
    trees = tree.parse(text, file, "expected a mapping with one evaluator")
    if len(trees) != 1:
        raise RecipeError(f"{file}: expected one document with one evaluator, got {len(trees)}")
    found: Mapping[str, Any] = plain(trees[0])
    return found


def _free(*, recipe: str | None, out: str | None, overwrite: bool) -> None:
    """Refuses what exists before anything is evaluated."""
    import os

    there: Sequence[str] = [p for p in (recipe, out) if p is not None and os.path.lexists(p) and not overwrite]
    if there:
        raise OutputError(f"{' and '.join(there)}: exists; --overwrite replaces it")


def _write(made: Soup, *, recipe: str | None, out: str | None, overwrite: bool) -> None:
    """The recipe as YAML, and what it merges."""
    from pathlib import Path

    from fastmerge.recipe import Recipe

    loaded = Recipe.load(made.recipe)
    if recipe is not None:
        Path(recipe).write_text(loaded.to_yaml(), "utf-8")
    elif out is None:
        display.say(loaded.to_yaml().rstrip())
    if out is not None:
        from fastmerge.api.merge import merge

        display.say(merge(loaded, out, overwrite=overwrite, progress=display.progress))


ALL = {"soup": soup}
"""The commands of this module, by name."""
