"""The commands themselves; what they do is loaded when they run."""

from __future__ import annotations

import click

from fastmerge.commands.mergekit.flags import LORA, MOE, MULTI, PYTORCH, YAML, Settings, shared

_CONFIG = click.argument("config", type=click.Path(exists=True, dir_okay=False))
_OUT = click.argument("out", type=click.Path())


@click.command(YAML)
@_CONFIG
@_OUT
@shared(YAML)
def yaml(config: str, out: str, settings: Settings) -> None:
    """Merge the models of CONFIG into the new directory OUT, as mergekit's command does."""
    from fastmerge.commands.mergekit import merging

    merging.yaml(config, out, settings)


@click.command(MULTI)
@_CONFIG
@click.option("--out-path", type=click.Path(), help="Where the result goes: the merge without a name.")
@click.option("--intermediate-dir", "-I", type=click.Path(), required=True, help="Where merges with a name go.")
@click.option("--lazy/--no-lazy", default=True,
              help="Keep outputs that this very merge finished, continue stopped ones; or do all anew.")  # fmt: skip
@click.option("--keep-stages", is_flag=True, help="Also write the merges that only other merges of CONFIG use.")
@shared(MULTI)
def multi(
    config: str, out_path: str | None, intermediate_dir: str, lazy: bool, keep_stages: bool, settings: Settings
) -> None:
    """Merge the recipes of CONFIG, YAML documents that name each other as models.

    A merge that another one uses is a stage: it is computed on the way and not written, unless --keep-stages asks
    for it. The merge without a name goes to --out-path; others that none uses go to the intermediate directory.
    """
    from fastmerge.commands.mergekit import merging

    merging.multi(config, out_path, intermediate_dir, settings, lazy=lazy, keep=keep_stages)


@click.command(PYTORCH)
@_CONFIG
@_OUT
@click.option("--tensor-intersection", "-i", is_flag=True, help="Leave out tensors that some model lacks.")
@click.option("--tensor-union", "-u", is_flag=True, help="Merge tensors that some models lack from the others.")
@click.option("--allow-pickle", is_flag=True, help="Read .pt, .pth, .bin and .ckpt too, with torch's weights_only.")
@shared(PYTORCH)
def pytorch(
    config: str, out: str, tensor_intersection: bool, tensor_union: bool, allow_pickle: bool, settings: Settings
) -> None:
    """Merge the safetensors files (or directories) that CONFIG names as models; OUT holds weights only.

    CONFIG is a recipe without slices, modules, tokenizer and chat template.
    """
    from fastmerge.commands.mergekit import raw

    raw.merge(config, out, settings, intersection=tensor_intersection, union=tensor_union, allow_pickle=allow_pickle)


@click.command(MOE)
@_CONFIG
@_OUT
@click.option("--load-in-4bit", is_flag=True,
              help="No effect: prompts are run in the base's own type; gate_mode: cheap_embed runs none.")  # fmt: skip
@click.option("--load-in-8bit", is_flag=True, help="No effect: see --load-in-4bit.")
@click.option("--i-understand-this-is-not-useful-without-training", "untrained", is_flag=True,
              help="Take models or prompts that are the same for all experts.")  # fmt: skip
@click.option("--router", type=click.Choice(["centred", "mergekit"]),
              help="Whose rows the routers get.  [default: what CONFIG says, else centred]")  # fmt: skip
@shared(MOE)
def moe(
    config: str,
    out: str,
    load_in_4bit: bool,
    load_in_8bit: bool,
    untrained: bool,
    router: str | None,
    settings: Settings,
) -> None:
    """Merge the dense models of CONFIG into one mixture of experts, as mergekit's command does.

    Hidden states of prompts take torch and transformers; gate_mode: cheap_embed and random ones do not.
    """
    from fastmerge.commands.mergekit import moe as command

    command.merge(config, out, settings, router=router, allow_same=untrained, quantised=load_in_4bit or load_in_8bit)


@click.command(LORA)
@click.option("--model", required=True, help="The fine-tune.")
@click.option("--base-model", required=True, help="What it was tuned from.")
@click.option("--out-path", required=True, type=click.Path(), help="The new directory of the adapter.")
@click.option("--max-rank", type=click.IntRange(1), default=128, show_default=True, help="Largest rank of a module.")
@click.option("--distribute-scale/--no-distribute-scale", default=True, show_default=True,
              help="Give the roots of the singular values to A and B, or all to A.")  # fmt: skip
@click.option("--embed-lora/--no-embed-lora", default=False, show_default=True,
              help="Decompose embeddings and the head too, in place of keeping them whole.")  # fmt: skip
@click.option("--save-module", "modules_to_save", multiple=True, help="Keep modules of this name whole.")
@click.option("--exclude-regex", "-e", multiple=True, help="Leave out modules whose names match.")
@click.option("--include-regex", "-i", multiple=True, help="Decompose only modules whose names match.")
@click.option("--sv-epsilon", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Leave out singular values that are not larger.")  # fmt: skip
@click.option("--skip-undecomposable", is_flag=True, help="Leave out what is no matrix, in place of keeping it whole.")
@click.option("--exact", is_flag=True, help="A full SVD of every matrix, in place of a randomised one.")
@shared(LORA)
def extract_lora(settings: Settings, **options: object) -> None:
    """Write the difference of two models as a LoRA adapter that peft loads."""
    from fastmerge.commands.mergekit import extract

    extract.command(extract.Options(**options), settings)  # type: ignore[arg-type]


ALL = {command.name: command for command in (yaml, multi, pytorch, moe, extract_lora)}
