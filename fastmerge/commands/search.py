"""``fastmerge search``: the best merge of a space, as a file says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fastmerge.commands import display

if TYPE_CHECKING:
    from fastmerge.search.journal import Evaluation
    from fastmerge.search.space import Space


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--resume", is_flag=True, help="Continue the search in OUT; with a larger budget, go further.")
@click.option("--dry-run", is_flag=True, help="Show the genes and the middle recipe; evaluate and write nothing.")
@click.option("--budget", type=click.IntRange(1), help="Candidates to evaluate.  [default: that of FILE, else 100]")
@click.option("--device", default="cpu", show_default=True, help="Of models: cpu, auto, cuda, or cuda:0,cuda:1.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
def search(file: str, out: str, resume: bool, dry_run: bool, budget: int | None, device: str, quiet: bool) -> None:
    """Look for the best merge of the space in FILE; OUT takes every evaluation, and the best recipe."""
    from fastmerge.search.document import Document, plain
    from fastmerge.search.space import Space

    document = Document.load(file)
    space = Space(plain(document.recipe))
    wanted = budget or document.budget
    if dry_run:
        _show(space, wanted)
        return
    from fastmerge.search.running import search as run

    found = run(
        space,
        plain(document.evaluator),
        device=device,
        sampler=plain(document.sampler),
        budget=wanted,
        directory=out,
        resume=resume,
        held_out=document.held_out,
        racing=document.racing,
        objectives=document.objectives,
        seed=document.seed,
        progress=None if quiet else _Progress(),
    )
    if not quiet:
        display.say(found)
        display.say(f"{out}/best.yml is the recipe: fastmerge merge {out}/best.yml MODEL")


def _show(space: Space, budget: int) -> None:
    for gene in space.genes:
        facts: dict[str, Any] = gene.plain()
        what = f"one of {', '.join(map(str, facts['choices']))}" if gene.choices else f"{gene.low:g} to {gene.high:g}"
        display.say(f"{gene.name}: {what}")
    display.say(f"{len(space.genes)} genes, {budget} candidates; the middle one:\n")
    display.say(space.yaml(space.middle()))


class _Progress:
    """A line for each evaluation that is the best so far on as many items."""

    def __init__(self) -> None:
        self._best: dict[int, float] = {}

    def __call__(self, evaluation: Evaluation) -> None:
        scores, items = evaluation.scores, evaluation.items
        if items not in self._best or scores[0] > self._best[items]:
            self._best[items] = scores[0]
            on = f"{items} item" + "s" * (items != 1)
            score = ", ".join([f"{s:.6g}" for s in scores])
            display.say(
                f"evaluation {evaluation.number}, generation {evaluation.generation}: {score} on {on}", err=True
            )


ALL = {"search": search}
"""The command, by its name."""
