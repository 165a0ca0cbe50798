"""``fastmerge upcycle``, ``depth-upscale``, ``grow``, ``slice``, ``family``, ``experts`` and ``compare``."""

from __future__ import annotations

from typing import Any

import click

from fastmerge import dna
from fastmerge.commands import display
from fastmerge.commands.dna.options import fields, given
from fastmerge.commands.dna.running import io, run
from fastmerge.errors import RecipeError

WIDER = ("width_multiplier", "mode", "units", "initialization")
DEEPER = ("num_new_layers", "insertion_positions")

_HELP = {"help_option_names": ["-h", "--help"]}
_IO = ("memory", "shard_size", "backend", "resume", "overwrite", "dry_run", "as_json", "quiet")


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What configures the request, and what says how it is written."""
    how = {name: options.pop(name) for name in _IO if name in options}
    return given(options), how


@click.command(context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@fields(dna.UpcyclingConfig)
@io
def upcycle(model: str, out: str, **options: Any) -> None:
    """Make a mixture of experts OUT of the dense MODEL, each expert a copy of its MLP."""
    settings, how = split(options)
    run(dna.plan_upcycle(dna.Parent.open(model), dna.UpcyclingConfig(**settings)), out, **how)


@click.command("depth-upscale", context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@fields(dna.DepthUpscaleConfig, leave=("skip_embed_and_head",))
@io
def depth_upscale(model: str, out: str, **options: Any) -> None:
    """Make a deeper model OUT of MODEL by repeating layers."""
    settings, how = split(options)
    run(dna.plan_depth_upscale(dna.Parent.open(model), dna.DepthUpscaleConfig(**settings)), out, **how)


@click.command(context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@fields(dna.ModelGrowthConfig)
@io
def grow(model: str, out: str, **options: Any) -> None:
    """Make a wider or deeper model OUT that computes what MODEL computes.

    Method net2wider grows channels, units and heads; net2deeper puts in layers that change nothing at first.
    """
    settings, how = split(options)
    config = dna.ModelGrowthConfig(**settings)
    deeper = config.method == dna.GrowthMethod.NET2DEEPER.value
    others = [n for n in (WIDER if deeper else DEEPER) if n in settings]
    if others:
        why = "is for wider models: leave it out" if deeper else "is for deeper models: expected --method net2deeper"
        raise RecipeError([f"{name}: {why}" for name in others])
    parent = dna.Parent.open(model)
    if deeper:
        run(dna.plan_depth_growth(parent, config), out, **how)
    else:
        # Random units are as large as those that are there, which takes reading the weights; a dry run reads headers.
        rms = dict.fromkeys(parent.tensors, 1.0) if how["dry_run"] else dna.fresh_rms(parent, config)
        run(dna.plan_width(parent, config, rms=rms), out, **how)


_CALIBRATION = click.option(
    "--calibration", type=click.Path(exists=True, dir_okay=False),
    help="Lines of JSON to run the model on: lists of token ids, or objects with input_ids or text.",
)  # fmt: skip
_SLICED = ("calibration_data", "expert_scores")


def _slicing(model: str, calibration: str | None, settings: dict[str, Any]) -> dna.ModelSlicingConfig:
    if calibration is not None:
        from fastmerge.commands.dna.calibration import batches

        settings["calibration_data"] = batches(calibration, model)
    return dna.ModelSlicingConfig(**settings)


@click.command("slice", context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@fields(dna.ModelSlicingConfig, leave=_SLICED)
@_CALIBRATION
@io
def slice_(model: str, out: str, calibration: str | None, **options: Any) -> None:
    """Make a smaller model OUT of some layers, channels, neurons, heads or experts of MODEL."""
    settings, how = split(options)
    config = _slicing(model, calibration, settings)
    parent = dna.Parent.open(model)
    run(dna.draft_slice(dna.Study(parent, model, config), config), out, **how)


@click.command(context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option("--size", "sizes", multiple=True, required=True, metavar="LAYERSxHIDDEN",
              help="Of a member, as 24x2048; once for each.")  # fmt: skip
@click.option("--nested", is_flag=True, help="Smaller members are the beginning of larger ones: they share weights.")
@fields(dna.ModelSlicingConfig, leave=(*_SLICED, "target_layers", "target_hidden_size"))
@_CALIBRATION
@io
def family(model: str, out: str, sizes: tuple[str, ...], nested: bool, calibration: str | None, **options: Any) -> None:
    """Make models of several sizes of MODEL: a directory for each in OUT."""
    settings, how = split(options)
    config = _slicing(model, calibration, settings)
    from fastmerge.dna.family import directories

    parent = dna.Parent.open(model)
    drafts = dna.draft_family(parent, model, [_size(text) for text in sizes], config, nested=nested)
    where = directories(drafts, out, replace=how["overwrite"] or how["resume"] or how["dry_run"])
    for name, draft in drafts.items():
        run(draft, str(where[name]), **how)


def _size(text: str) -> tuple[int, int]:
    layers, _, hidden = text.lower().partition("x")
    if not (layers.isdecimal() and hidden.isdecimal()):
        raise click.BadParameter(f"expected LAYERSxHIDDEN, as 24x2048, got {text!r}", param_hint="--size")
    return int(layers), int(hidden)


@click.group(context_settings=_HELP)
def experts() -> None:
    """Make mixtures of experts larger, smaller, or one of several."""


@experts.command(context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@fields(dna.MoreExpertsConfig)
@io
def more(model: str, out: str, **options: Any) -> None:
    """Make a mixture OUT that has every expert of MODEL several times."""
    settings, how = split(options)
    run(dna.plan_more_experts(dna.Parent.open(model), dna.MoreExpertsConfig(**settings)), out, **how)


@experts.command(context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@fields(dna.FewerExpertsConfig)
@_CALIBRATION
@io
def fewer(model: str, out: str, calibration: str | None, **options: Any) -> None:
    """Make a mixture OUT that has some of the experts of MODEL, the others dropped or merged into them."""
    settings, how = split(options)
    if "num_experts" not in settings:
        raise click.UsageError("expected --num-experts")
    given_batches = None
    if calibration is not None:
        from fastmerge.commands.dna.calibration import batches

        given_batches = batches(calibration, model)
    run(dna.draft_fewer_experts(model, dna.FewerExpertsConfig(**settings), calibration=given_batches), out, **how)


@experts.command(context_settings=_HELP)
@click.argument("models", nargs=-1, required=True)
@click.argument("out", type=click.Path())
@fields(dna.JoinExpertsConfig, leave=("parameters",))
@io
def join(models: tuple[str, ...], out: str, **options: Any) -> None:
    """Make one mixture OUT of the experts of MODELS of one architecture; what they share is merged."""
    settings, how = split(options)
    parents = [dna.Parent.open(model, at=i) for i, model in enumerate(models)]
    run(dna.plan_join_experts(parents, dna.JoinExpertsConfig(**settings)), out, **how)


@click.command(context_settings=_HELP)
@click.argument("dense")
@click.argument("new")
@_CALIBRATION
@click.option("--count", default=4, show_default=True, type=click.IntRange(1), help="Random sequences.")
@click.option("--length", default=64, show_default=True, type=click.IntRange(1), help="Tokens of each.")
@click.option("--seed", default=0, show_default=True, help="Of random tokens.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16", "auto"]), default="float32",
              show_default=True, help="Type to run the models in.")  # fmt: skip
@click.option("--tolerance", default=1e-5, show_default=True, help="Largest difference, in units of the largest logit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(
    dense: str, new: str, calibration: str | None, dtype: str, tolerance: float, as_json: bool, **how: Any
) -> None:
    """Run two models on the same tokens. Exit code 0: their logits are the same, 1: they are not."""
    import dataclasses

    given_batches = None
    if calibration is not None:
        from fastmerge.commands.dna.calibration import batches

        given_batches = batches(calibration, dense)
    found = dna.compare(dense, new, given_batches, dtype=None if dtype == "auto" else dtype, **how)
    if as_json:
        display.show_json({**dataclasses.asdict(found), "same": found.same(tolerance)}, indent=2)
    else:
        display.say(found)
    if not found.same(tolerance):
        raise SystemExit(1)


ALL = {str(command.name): command for command in (upcycle, depth_upscale, grow, slice_, family, experts, compare)}
"""The commands of this module, by name."""
