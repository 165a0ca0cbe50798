"""mergekit 0.1.5's flags and what each does here: one table, of which options, help and docs/mergekit.md are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import click

YAML, MULTI, PYTORCH, LORA = "mergekit-yaml", "mergekit-multi", "mergekit-pytorch", "mergekit-extract-lora"
MOE = "mergekit-moe"
MERGES = (YAML, MULTI, PYTORCH, MOE)
COMMANDS = (*MERGES, LORA)


class Flag(NamedTuple):
    """One flag that all of mergekit's commands share.

    Attributes:
        names: as click declares it.
        fate: what becomes of it; ``refused`` is the value that is not the default.
        text: what it does here, why it has no effect, or why it is refused and what to use instead.
        type: of its value.
        default: mergekit's own.
        commands: where it has the effect; elsewhere it has none.
    """

    names: tuple[str, ...]
    fate: Literal["works", "no effect", "refused"]
    text: str
    type: Any = bool
    default: Any = None
    commands: tuple[str, ...] = COMMANDS

    @property
    def field(self) -> str:
        """The name of its parameter."""
        said = next((n for n in self.names if not n.startswith("-")), None)
        return said or self.names[0].partition("/")[0].removeprefix("--").replace("-", "_")


def shard_size(_: click.Context, __: click.Parameter, text: str) -> str:
    """A size as mergekit writes it (``5B`` is 5 billion bytes), or as ``--shard-size`` takes it (``5GB``)."""
    unit = {"k": "kB", "m": "MB", "b": "GB"}.get(text[-1:].lower())
    return text[:-1] + unit if unit and text[:-1].isdecimal() else text


FLAGS = (
    Flag(("--allow-crimes/--no-allow-crimes",), "no effect",
         "there is no table of architectures: models merge where their tensors fit each other", default=False),
    Flag(("--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings",), "refused",
         "rows of embeddings are never cut off by number: a 'tokenizer' section in the recipe (source: union, or base) "
         "matches them by token", default=False),
    Flag(("--transformers-cache",), "works", "The directory that models of the Hub are looked for and downloaded in.",
         str),
    Flag(("--lora-merge-cache",), "no effect", "adapters are applied on the way, and no copy of a model is written",
         str),
    Flag(("--lora-merge-dtype",), "no effect",
         "adapters are applied in fp32 and rounded once, to the output's type, which 'out_dtype' in the recipe names",
         str),
    Flag(("--cuda/--no-cuda",), "works", "Compute on a GPU: --device cuda.", default=False),
    Flag(("--device",), "works", "auto (every GPU that works, else the CPU), cpu, cuda, or cuda:0,cuda:1.  "
         "[default: cpu, as in mergekit; the bytes are the same anywhere]", str),
    Flag(("--low-cpu-memory/--no-low-cpu-memory",), "no effect", "memory is bounded always; --memory sets the bound",
         default=False),
    Flag(("--out-shard-size",), "works", "Largest output file in bytes: 5B or 5GB.", str, "5B", MERGES),
    Flag(("--copy-tokenizer/--no-copy-tokenizer",), "works",
         "Copy tokenizer files where the recipe asks for no tokenizer.", default=True, commands=(YAML, MULTI, MOE)),
    Flag(("--clone-tensors/--no-clone-tensors",), "no effect", "layers may occur several times as it is",
         default=False),
    Flag(("--trust-remote-code/--no-trust-remote-code",), "no effect",
         "code of models is never run; it is carried along as data", default=False),
    Flag(("--random-seed",), "works", "Seed of the random methods.  [default: the recipe's, else 0]", int),
    Flag(("--lazy-unpickle/--no-lazy-unpickle",), "no effect", "pickles are not read", default=False),
    Flag(("--write-model-card/--no-write-model-card",), "works",
         "Write README.md and mergekit_config.yml (mergekit-moe: mergekit_moe_config.yml).",
         default=True, commands=(YAML, MULTI, LORA, MOE)),
    Flag(("--safe-serialization/--no-safe-serialization",), "refused",
         "results are safetensors, and never pickles", default=True),
    Flag(("-v", "verbosity"), "works", "Say more; twice for all.", "count", 0),
    Flag(("--quiet/--no-quiet",), "works", "Print errors only.", default=False),
    Flag(("--read-to-gpu/--no-read-to-gpu",), "no effect", "with a GPU, reading goes through pinned memory always",
         default=False),
    Flag(("--multi-gpu/--no-multi-gpu",), "works", "Compute on every GPU that works: --device auto.", default=False,
         commands=MERGES),
    Flag(("--num-threads", "-j"), "no effect",
         "every core that the process may use is used: `taskset -c 0-3` gives it 4", int),
    Flag(("--gpu-rich",), "works", "The same as --multi-gpu.", default=False,
         commands=MERGES),
    Flag(("--async-write/--no-async-write",), "no effect", "reading, computing and writing overlap always",
         default=False),
    Flag(("--write-threads",), "no effect", "any worker writes", int, 1),
)  # fmt: skip
"""In mergekit's order."""

_BY_FIELD = {flag.field: flag for flag in FLAGS}


class Settings(NamedTuple):
    """What the flags come to.

    Attributes:
        device: as ``--device`` of ``fastmerge merge``.
        shard_size: bytes, as text.
        tokenizer: whether its files are copied.
        card: whether README.md and mergekit_config.yml are written.
        seed: of the random methods; None for the recipe's own.
        quiet: print errors only.
        overwrite, resume, strict: as of ``fastmerge merge``.
        memory, max_vram: budgets as text.
    """

    device: str
    shard_size: str
    tokenizer: bool
    card: bool
    seed: int | None
    quiet: bool
    overwrite: bool
    resume: bool
    strict: bool
    memory: str | None
    max_vram: str | None


def shared(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command all flags; it is called with ``settings`` in their place."""

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @click.pass_context
        def command(ctx: click.Context, /, **values: Any) -> Any:
            mine = {field: values.pop(field) for field in (*_BY_FIELD, *_OWN)}
            return body(settings=_settings(ctx, name, mine), **values)

        command.__doc__ = body.__doc__
        command.__click_params__ = getattr(body, "__click_params__", [])  # type: ignore[attr-defined]
        decorated: Callable[..., Any] = command
        for option in reversed([*map(_option, FLAGS, [name] * len(FLAGS)), *_own()]):
            decorated = option(decorated)
        return decorated

    return decorate


def _option(flag: Flag, name: str) -> Callable[[Any], Any]:
    works = flag.fate == "works" and name in flag.commands
    says = flag.text if works else f"{'No effect' if flag.fate != 'refused' else 'Refused'}: {_why(flag, name)}."
    more: dict[str, Any] = {"count": True} if flag.type == "count" else {"type": flag.type}
    if flag.names == ("--gpu-rich",):
        more = {"is_flag": True}
    if flag.field == "out_shard_size":
        more["callback"] = shard_size
    return click.option(*flag.names, default=flag.default, help=says, **more)


def _why(flag: Flag, name: str) -> str:
    return f"{name} has no use for it" if flag.fate == "works" and name not in flag.commands else flag.text


_OWN = ("overwrite", "resume", "strict", "memory", "max_vram")


def _own() -> list[Callable[[Any], Any]]:
    return [
        click.option("--overwrite", is_flag=True, help="Replace an existing output, at the end and at once."),
        click.option("--resume", is_flag=True, help="Continue an interrupted merge of the same recipe."),
        click.option("--strict", is_flag=True, help="Refuse a recipe with keys or parameters that nothing reads."),
        click.option("--memory", help="Budget for data in flight, e.g. 8GB.  [default: 8GB or half of what is free]"),
        click.option("--max-vram", help="Budget for slots on each GPU.  [default: a third of what is free]"),
    ]


def _settings(ctx: click.Context, name: str, values: dict[str, Any]) -> Settings:
    """Carries the flags out, as far as that can be done before the command itself.

    Raises:
        click.UsageError: for a flag that is refused, or flags that contradict each other.
    """
    given = [f for f in FLAGS if ctx.get_parameter_source(f.field) == click.core.ParameterSource.COMMANDLINE]
    asked = [f for f in given if values[f.field] != f.default]
    for flag in asked:
        if flag.fate == "refused":
            raise click.UsageError(f"{_typed(flag, values[flag.field])} is refused: {flag.text}")
    gpus = values["multi_gpu"] or values["gpu_rich"]
    device = values["device"]
    if device == "cpu" and (gpus or values["cuda"]):
        raise click.UsageError("--device cpu and a flag that asks for a GPU: leave one of them out")
    _surroundings(values)
    for flag in asked:
        if not values["quiet"] and (flag.fate == "no effect" or name not in flag.commands):
            click.echo(f"fastmerge: {_typed(flag, values[flag.field])} has no effect: {_why(flag, name)}", err=True)
    if gpus and device in {None, "cuda"}:
        device = "auto"
    return Settings(
        device=device or ("cuda" if values["cuda"] else "cpu"),
        shard_size=values["out_shard_size"],
        tokenizer=values["copy_tokenizer"],
        card=values["write_model_card"],
        seed=values["random_seed"],
        **{field: values[field] for field in ("quiet", *_OWN)},
    )


def _typed(flag: Flag, value: object) -> str:
    """The flag as it was typed."""
    on, _, off = flag.names[0].partition("/")
    return off if value is False else on


def _surroundings(values: dict[str, Any]) -> None:
    """What flags say to the process: how much is logged, and where models of the Hub are."""
    import logging
    import os

    level = logging.ERROR if values["quiet"] else {0: 0, 1: logging.INFO}.get(values["verbosity"], logging.DEBUG)
    if level:
        logging.getLogger("fastmerge").setLevel(level)
    if values["transformers_cache"] is not None:
        os.environ["HF_HUB_CACHE"] = values["transformers_cache"]  # before the library reads it, at its import


def markdown() -> str:
    """docs/mergekit.md: what each flag does here."""
    head = """# mergekit's flags

`fastmerge mergekit-yaml`, `mergekit-multi`, `mergekit-pytorch`, `mergekit-moe` and `mergekit-extract-lora` take every
flag of mergekit 0.1.5. What differs is here; a flag that has no effect is accepted, and one line says why.
This page is made by `python -m fastmerge.commands.mergekit.flags`.

An output that exists is not overwritten in place: it is refused, and `--overwrite` replaces it, at the end and at
once. `--resume` continues a merge that was stopped. Without `--cuda` and `--device` the CPU computes, as in mergekit.

| flag | here | |
|---|---|---|
"""
    rows = []
    for flag in FLAGS:
        text = flag.text[0].lower() + flag.text[1:] if flag.text[1:2].islower() else flag.text
        text = text.rstrip(".")
        others = [name for name in COMMANDS if name not in flag.commands]
        text += f"; no effect for {', '.join(f'`{n}`' for n in others)}" if others else ""
        what = flag.fate if flag.fate != "refused" else f"`{_typed(flag, not flag.default)}` is refused"
        names = ", ".join(f"`{n.replace('/', '`, `')}`" for n in flag.names if n.startswith("-"))
        rows.append(f"| {names} | {what} | {text.replace('  ', ' ')} |\n")
    return head + "".join(rows)


if __name__ == "__main__":
    click.echo(markdown(), nl=False)
