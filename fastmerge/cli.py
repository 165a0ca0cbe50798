"""The command line. Every command imports what it needs when it runs, so ``--help`` answers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fastmerge import start
from fastmerge.commands import display
from fastmerge.errors import FastMergeError, printable
from fastmerge.version import __version__

if TYPE_CHECKING:
    from fastmerge.planning import Plan

EXIT_CODES = """Exit codes: 0 done, 1 other error, 2 recipe or usage, 3 checkpoint, 4 output, 5 memory budget,
6 backend or device unavailable; 129, 130 and 143 stopped by SIGHUP, Ctrl-C and SIGTERM."""


def _log() -> None:
    """Shows log lines, escaped likewise."""
    import logging

    class Lines(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record), lines=True)

    handler = logging.StreamHandler()
    handler.setFormatter(Lines("fastmerge: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class _Commands(click.Group):
    """Prints deliberate errors without a traceback, and exits with their code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FastMergeError as error:
            display.say(f"fastmerge: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("fastmerge: stopped; nothing that was written is lost, continue with --resume", err=True)
            ctx.exit(130)
        except OSError as error:
            display.say(f"fastmerge: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Merge LLM weights at the speed of the bytes."""
    start.quickly()
    _log()


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that plans a recipe."""
    for option in (
        click.option("--shard-size", default="5GB", show_default=True, help="Largest output file, in bytes."),
        click.option("--seed", type=int, help="Seed of the random methods.  [default: the recipe's, else 0]"),
        click.option("--strict", is_flag=True, help="Refuse a recipe with keys or parameters that nothing reads."),
        click.option("--allow-missing", is_flag=True, help="Merge tensors that some models lack from the others."),
        click.option("--memory", help="Budget for data in flight, e.g. 8GB.  [default: 8GB or half of what is free]"),
        click.option("--max-vram", help="Budget for slots on each GPU, e.g. 16GB.  [default: a third of what is free]"),
        click.option("--backend", type=click.Choice(["auto", "native", "triton", "reference"]), help="What computes."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, or cuda:0,cuda:1."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path())
@_shared
@click.option("--resume", is_flag=True, help="Continue an interrupted merge of the same recipe.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output, atomically.")
@click.option("--nan", type=click.Choice(["warn", "error", "zero"]), default="warn", show_default=True,
              help="NaN and Inf that come from the inputs.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Plan only; write nothing.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
def merge(
    recipe: str,
    out: str,
    shard_size: str,
    seed: int | None,
    strict: bool,
    allow_missing: bool,
    memory: str | None,
    max_vram: str | None,
    backend: str | None,
    device: str,
    resume: bool,
    overwrite: bool,
    nan: Any,
    dry_run: bool,
    quiet: bool,
    log_format: str,
) -> None:
    """Merge the models of RECIPE into the new directory OUT."""
    import gc
    import json

    if quiet:
        import logging

        logging.getLogger("fastmerge").setLevel(logging.ERROR)
    from fastmerge.api import merge as engine
    from fastmerge.checkpoint import without_gc

    with without_gc():
        planned = engine.plan(recipe, seed=seed, shard_size=shard_size, strict=strict, allow_missing=allow_missing)
        gc.freeze()  # a plan of 50,000 tensors is 500,000 objects, none of them garbage before the end
    if dry_run:
        _show_plan(
            planned, as_json=log_format == "json", memory=memory, max_vram=max_vram, device=device, backend=backend
        )
        return
    show = None if quiet else (display.json_lines if log_format == "json" else display.progress)
    report = engine.merge(
        planned,
        out,
        device=device,
        memory=memory,
        max_vram=max_vram,
        backend=backend,
        resume=resume,
        overwrite=overwrite,
        nan=nan,
        progress=show,
    )
    if log_format == "json":
        display.show_json({"event": "done", **json.loads(report.to_json())})
    elif not quiet:
        display.say(report)


@main.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False))
@_shared
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    recipe: str,
    shard_size: str,
    seed: int | None,
    strict: bool,
    allow_missing: bool,
    as_json: bool,
    **where: str | None,
) -> None:
    """Show what merging RECIPE would do: bytes, memory, bottleneck, time. Reads headers only."""
    from fastmerge.api import merge as engine

    planned = engine.plan(recipe, seed=seed, shard_size=shard_size, strict=strict, allow_missing=allow_missing)
    _show_plan(planned, as_json=as_json, **where)


def _show_plan(planned: Plan, *, as_json: bool, **where: Any) -> None:
    """Prints the plan and its estimate; ``where`` is --device, --backend, --memory and --max-vram."""
    from fastmerge.commands.estimate import estimate, table

    facts = {**planned.summary(), **estimate(planned, **where)}
    if as_json:
        display.show_json(facts, indent=2)
        return
    display.say(table(facts))
    for text in facts.get("warnings", ()):
        display.say(f"warning: {text}", err=True)


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(directory: str, as_json: bool) -> None:
    """Check DIRECTORY: headers, checksums, NaN counts, the recipe it came from."""
    from fastmerge.commands.verify import verify as check

    found = check(directory)
    if as_json:
        display.show_json(found.facts(), indent=2)
    else:
        display.say(found)
    if not found.ok:
        raise SystemExit(3)


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--weights", is_flag=True, help="Read the tensors, and say how far they are apart.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diff(a: str, b: str, weights: bool, as_json: bool) -> None:
    """Show where two models differ. Exit code 0: they are equal, 1: they differ."""
    from fastmerge.commands.diff import diff as compare

    found = compare(a, b, weights=weights)
    if as_json:
        display.show_json(found.facts(), indent=2)
    else:
        display.say(found)
    if not found.equal:
        raise SystemExit(1)


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option("--out", default="page.html", show_default=True, type=click.Path(dir_okay=False), help="The file.")
@click.option("--png", type=click.Path(file_okay=False), help="Write each figure as PNG into this directory, too.")
def page(directory: str, out: str, png: str | None) -> None:
    """Make an HTML page of a search, or of a merged model. Needs the extra "report"."""
    from fastmerge.pages.command import page as made

    found = made(directory)
    found.write(out, png)
    display.say(f"wrote {out}" + (f" and {len(found.figures)} figures in {png}" if png else ""))


@main.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the merge methods, or describe the method NAME."""
    from fastmerge.commands.methods import describe, overview

    click.echo(describe(name) if name else overview())


@main.command()
@click.argument("recipe", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--memory", help="Budget of the merge.")
@click.option("--runs", default=5, type=click.IntRange(1), show_default=True, help="Counted runs; the median is shown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(recipe: str | None, memory: str | None, runs: int, as_json: bool) -> None:
    """Measure this machine: the kernels beside memcpy, or merging RECIPE beside its floor."""
    from fastmerge.commands.bench import bench_kernels, bench_recipe, table

    rows = bench_recipe(recipe, memory=memory, runs=runs) if recipe else bench_kernels(runs=runs)
    if as_json:
        display.show_json(rows, indent=2)
    else:
        click.echo(table(rows))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--directory", default=".", type=click.Path(exists=True), help="Where to probe the disk.")
def doctor(as_json: bool, directory: str) -> None:
    """Say which devices and backends are used here, why, and how fast disk and memory are."""
    from fastmerge.commands.doctor import examine

    facts = examine(directory)
    if as_json:
        display.show_json(facts, indent=2)
        return
    for key, value in facts.items():
        click.echo(f"{key:<22} {value}")


class _Later(click.Command):
    """A command that is loaded when it is called: the options of all would make ``--help`` a quarter slower."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        import importlib

        found = importlib.import_module(f"fastmerge.commands.{_PLACES[str(self.name)]}").ALL[self.name]
        context: click.Context = found.make_context(info_name, args, *rest, **extra)
        return context


_PLACES: dict[str, str] = {}
for _place, _commands in {
    "lora": {"lora": "Merge LoRA adapters with each other, or bake them into their base."},
    "search": {"search": "Look for the best merge: by evolution, CMA-ES or grids."},
    "soup": {"soup": "Average models: all, those that do the average good, or the best of each category."},
    "mergekit.commands": {
        "mergekit-yaml": "Merge a recipe, with mergekit's flags.",
        "mergekit-multi": "Merge recipes that use each other's results.",
        "mergekit-moe": "Merge dense models into a mixture of experts.",
        "mergekit-pytorch": "Merge files of tensors, name by name.",
        "mergekit-extract-lora": "Extract a LoRA adapter from a fine-tune.",
    },
    "dna.commands": {
        "upcycle": "Make a mixture of experts of a dense model.",
        "depth-upscale": "Make a deeper model by repeating layers.",
        "grow": "Make a wider or deeper model that computes the same.",
        "slice": "Make a smaller model of parts of one.",
        "family": "Make models of several sizes of one.",
        "experts": "Make mixtures larger, smaller, or one of several.",
        "compare": "Run two models, and say whether they compute the same.",
    },
}.items():
    for _name, _text in _commands.items():
        _PLACES[_name] = _place
        main.add_command(_Later(_name, help=_text))

if __name__ == "__main__":
    main()
