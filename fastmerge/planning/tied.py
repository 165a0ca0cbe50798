"""Tensors that a model stores under several names: an embedding, the head tied to it, and other copies.

Programs write such copies or leave them out. A model that lacks a copy uses the original in its place. Whether a
copy that is stored still equals its original is read from the files: samples first, which tell nearly all heads of
their own apart, and everything where the samples agree. This is all that a plan reads besides headers, and only
where a model stores a copy that matters: where another model lacks it, or where tensors get random masks of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.planning.structure import TEXT_CONFIGS

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint, TensorInfo

SAMPLES, SAMPLE, BLOCK = 64, 4096, 1 << 16
"""How many blocks of how many bytes are compared first, and how many bytes at a time after that."""

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
_HEADS = ("lm_head", "embed_out", "proj_out", "decoder", "vocab_projector", "generator_lm_head", "output",
          "output_layer", "head")  # fmt: skip
_TAILS = (
    *(f"{n}.weight" for n in (*_EMBEDDINGS, *_HEADS, "shared")),
    "decoder.bias",
    "predictions.bias",
    "lm_head.bias",
)
HEADED = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
"""Ends of the names of model classes that have a head, tied or not."""

_BELOW = re.compile(r"(^|\.)(\d+|mtp)\.")


class Family(NamedTuple):
    """Names that one value goes by where a model is tied.

    Attributes:
        names: all of them, the original first.
        heads: those that a configuration may untie.
    """

    names: tuple[str, ...]
    heads: frozenset[str] = frozenset()


class Ties(NamedTuple):
    """What became of the tied tensors of the output.

    Attributes:
        untied: the output has a head of its own, although a model ties its head: its configuration must say so.
        copies: (name, original) of output tensors that are written with the values of another one.
        dropped: (name, original) of copies that some models store and the output leaves out: it stays tied.
    """

    untied: bool = False
    copies: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()


def candidates(names: Iterable[str]) -> list[str]:
    """Names outside all layers that may belong to a family, in their order."""
    return [n for n in names if n.endswith(_TAILS) and not _BELOW.search(n)]


def families(names: Iterable[str]) -> list[Family]:
    """The families among :func:`candidates`."""
    known = dict.fromkeys(names)

    def ending(modules: Iterable[str]) -> list[str]:
        tails = tuple(f".{m}.weight" for m in modules)
        return [n for n in known if f".{n}".endswith(tails)]

    shared, embeddings, heads = ending(("shared",)), ending(_EMBEDDINGS), ending(_HEADS)
    out = []
    sides = {n for n in embeddings if n.endswith(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"))}
    if len(shared) == 1:
        prefix = shared[0].removesuffix("shared.weight")
        own = [n for n in embeddings if n.removeprefix(prefix).startswith(("encoder.embed_", "decoder.embed_"))]
        originals = [shared[0], *sorted(own)]  # the decoder's before the encoder's
    elif len(embeddings) == 2 and len(sides) == 2:
        originals = [n for n in embeddings if n.endswith("decoder.embed_tokens.weight")]
    else:
        originals = embeddings if len(embeddings) == 1 else []
    if originals and (heads or len(originals) > 1):
        out.append(Family((*originals, *heads), frozenset(heads)))
    for name in known:
        original = name.removesuffix("decoder.bias") + "bias"
        if name.endswith(".decoder.bias") and original in known:
            out.append(Family((original, name)))
    return out


def tied(config: Mapping[str, Any]) -> bool | None:
    """What a configuration says of ties; None where it says nothing (the model type decides, and mostly ties)."""
    for block in (config, *(config.get(name) for name in TEXT_CONFIGS)):
        found = block.get("tie_word_embeddings") if isinstance(block, Mapping) else None
        if isinstance(found, bool):
            return found
    return None


def original(family: Family, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str | None:
    """The name of what a model uses where it stores no tensor ``name`` of a family; None where it uses nothing.

    A head whose configuration says that it is not tied has no other place to come from: it is lost.
    """
    says = tied(config)
    there = [n for n in family.names if n in tensors and n != name]
    if name in family.heads and says is False:
        return None
    if name not in family.heads and says is not True:  # an embedding may be stored as a head alone where it is tied
        there = [n for n in there if n not in family.heads]
    return there[0] if there else None


def same(model: Checkpoint, a: TensorInfo, b: TensorInfo, other: Checkpoint | None = None) -> bool:
    """Whether two tensors of a model, or one of another, hold the same bytes; False where that cannot be read."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if model.alike is not None:
        return model.alike.get(a.name, a.name) == model.alike.get(b.name, b.name)
    try:
        paths = [m.files[i.file].path for m, i in ((model, a), (other or model, b))]
        fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) for path in paths]
    except OSError:
        return False
    try:
        return _same(fds, (a.offset, b.offset), a.nbytes)
    except OSError:
        return False
    finally:
        for fd in fds:
            os.close(fd)


def _same(fds: list[int], starts: tuple[int, int], nbytes: int) -> bool:
    last = max(nbytes - SAMPLE, 0)
    samples = [(last * i // (SAMPLES - 1), SAMPLE) for i in range(SAMPLES)]
    for at, most in (*samples, *((at, BLOCK) for at in range(0, nbytes, BLOCK))):
        x, y = (os.pread(fd, min(most, nbytes - at), start + at) for fd, start in zip(fds, starts, strict=True))
        if x != y or not x:
            return nbytes == 0
    return True


def value(model: Checkpoint, info: TensorInfo) -> bytes | None:
    """The bytes of a small tensor; None where they cannot be read, or are yet to be made."""
    if model.alike is not None:
        return None
    try:
        fd = os.open(model.files[info.file].path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.pread(fd, info.nbytes, info.offset)
        finally:
            os.close(fd)
    except OSError:
        return None
