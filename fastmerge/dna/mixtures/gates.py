"""Rows of routers, from prompts or random numbers. Only states of prompts need torch, and transformers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from fastmerge.dna.anatomy import Anatomy, anatomy
from fastmerge.dna.mixtures.document import MoEMergeConfig
from fastmerge.dna.parent import Parent
from fastmerge.dna.reading import Reader
from fastmerge.dtypes import F32, DType
from fastmerge.errors import BackendUnavailable, CheckpointError, RecipeError
from fastmerge.keys import tensor_key
from fastmerge.ops.made import Rows, array
from fastmerge.ops.sources import Bring
from fastmerge.ops.spec import Source
from fastmerge.philox import NOISE, normal, u16

if TYPE_CHECKING:
    import numpy.typing as npt

F64: TypeAlias = "npt.NDArray[np.float64]"
Gates: TypeAlias = "npt.NDArray[np.float32]"

NEAR = 0.95
"""Cosine of two experts' rows from which they are called alike."""


@dataclass(frozen=True, eq=False)
class Values:
    """Numbers that are there, as a source."""

    array: npt.NDArray[np.float32]

    dtype: ClassVar[DType] = F32
    inputs: ClassVar[tuple[Source, ...]] = ()
    workspace: ClassVar[int] = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Copies a run."""
        array(address, n, np.float32)[:] = self.array.reshape(-1)[e0 : e0 + n]


def router_rows(
    config: MoEMergeConfig, base: Parent, model: Any = None, *, tokenizer: Any = None, device: str = "cpu"
) -> Gates:
    """The rows of every layer's router, and below them that of the shared expert's switch, if there is a shared one.

    Args:
        config: what is wanted.
        base: the base model.
        model: it as it was given: a transformers module, or a path, which is loaded for states of prompts.
        tokenizer: of transformers; that beside the base model where absent.
        device: on which the model runs.

    Returns:
        fp32 ``[layers, experts + shared, hidden]``. States of prompts depend on the machine in their last bits, all
        else does not.

    Raises:
        CheckpointError: prompts that the router cannot tell apart from all others, or no tokenizer.
        BackendUnavailable: transformers or tokenizers is needed, and not installed.
    """
    found = anatomy(base)
    if not config.prompted:
        return _random(config, found)
    theirs = config.router == "mergekit"
    states: Callable[[tuple[str, ...]], F64]
    if config.gate_mode == "cheap_embed":
        numbers = _numbers(base, tokenizer)
        states = _Embeddings(base, found, numbers, theirs=theirs)
    else:
        try:
            from fastmerge.dna.mixtures.states import States
        except ImportError:
            raise BackendUnavailable(f"gate_mode {config.gate_mode} needs torch; cheap_embed does not") from None
        states = States(base, found, model, tokenizer, device, mode=config.gate_mode, theirs=theirs)
    known = functools.cache(states)
    every, nothing = [*config.experts, *config.shared_experts], np.zeros((found.layers, found.sizes["hidden"]))
    towards = np.stack([known(one.positive_prompts) if one.positive_prompts else nothing for one in every], axis=1)
    against = np.stack([known(one.negative_prompts) if one.negative_prompts else nothing for one in every], axis=1)
    out, e = towards - against, len(config.experts)
    if not theirs and e > 1:
        out = _apart(out, e, towards[:, :e].mean(axis=1, keepdims=True))
        out[:, [i for i, one in enumerate(every) if not one.positive_prompts]] = 0.0
    length = np.linalg.norm(out, axis=2, keepdims=True)
    small = 1e-7 * np.linalg.norm(towards, axis=2, keepdims=True)
    lost = [i for i in range(e) if (length[:, i] <= small[:, i]).any()]
    if lost and not config.allow_same:
        raise CheckpointError(
            f"experts {lost}: their prompts give the mean of all experts' states, so that nothing would be sent to "
            "them; expected prompts that differ"
        )
    out = out / np.maximum(length, 1e-8) * (1.0 if theirs else config.router_scale)
    return np.asarray(out, np.float32)


def alike(gates: Gates, experts: int) -> list[tuple[int, int, list[int]]]:
    """Pairs of experts whose rows are nearly the same, and the layers."""
    rows = gates[:, :experts].astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=2, keepdims=True), 1e-30)
    cosines = rows @ rows.transpose(0, 2, 1)
    pairs = [(i, j) for i in range(experts) for j in range(i)]
    found = [(j, i, np.flatnonzero(cosines[:, i, j] > NEAR).tolist()) for i, j in pairs]
    return [one for one in found if one[2]]


def _apart(rows: F64, experts: int, common: F64) -> F64:
    """What tells rows apart: less their mean, and less what lies along the state that all prompts have in common.

    A state is ``x_e = c + d_e`` with a large ``c``. Along ``c`` a row would add the same to every token's logit, and so
    send all of them to one expert. Across it, and of one length, row ``e`` has the largest product with ``x_e``.
    """
    rows = rows - rows[:, :experts].mean(axis=1, keepdims=True)
    along = (rows * common).sum(axis=2, keepdims=True) / np.maximum(np.square(common).sum(axis=2, keepdims=True), 1e-30)
    return np.asarray(rows - along * common, np.float64)


def _random(config: MoEMergeConfig, model: Anatomy) -> Gates:
    """Philox numbers, by (seed, name of the router, expert, element)."""
    hidden, e = model.sizes["hidden"], len(config.experts)
    out = np.empty((model.layers, e + len(config.shared_experts), hidden), np.float32)
    scale = config.router_scale / np.sqrt(hidden)
    for layer in range(model.layers):
        key = tensor_key(config.seed, f"{model.arch.layers}.{layer}.router")
        for i in range(out.shape[1]):
            if config.gate_mode == "random":
                std = 1.0 if config.router == "mergekit" else scale
                out[layer, i] = normal(key, i, NOISE, 0, hidden) * np.float32(std)
            else:
                bits = u16(key, i, NOISE, 0, hidden).astype(np.float64)
                out[layer, i] = (bits - 32767.5) / 32768 * scale
    return out


def tokenizer_of(base: Parent) -> Any:
    """The tokenizer of a model on disk, as transformers has it.

    Raises:
        CheckpointError: there is none.
    """
    if base.checkpoint is None:
        raise RecipeError(f"{base.ref} is in memory: expected tokenizer=, for prompts")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise BackendUnavailable("prompts need transformers: pip install transformers") from None
    try:
        return AutoTokenizer.from_pretrained(str(base.checkpoint.path))
    except (OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{base.ref}: no tokenizer, which prompts need: {first}") from None


def _numbers(base: Parent, tokenizer: Any) -> Callable[[str], list[int]]:
    """Numbers of the tokens of a prompt, with the token that texts begin with in front."""
    path = base.checkpoint.path / "tokenizer.json" if base.checkpoint is not None else None
    if tokenizer is None and path is not None and os.path.isfile(path):  # noqa: PTH113  without transformers
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise BackendUnavailable("cheap_embed needs tokenizers: pip install tokenizers") from None
        from fastmerge.planning import tokens

        assert base.checkpoint is not None
        first = tokens.special(base.checkpoint).get("bos_token_id", ("", 0))[0]
        found = Tokenizer.from_file(str(path))
        return lambda text: list(found.encode(first + text, add_special_tokens=False).ids)
    given = tokenizer_of(base) if tokenizer is None else tokenizer
    return lambda text: list(given((given.bos_token or "") + text, add_special_tokens=False)["input_ids"])


class _Embeddings:
    """States of prompts, as far as the embedding tells them: as a layer's norm would have them."""

    def __init__(self, base: Parent, model: Anatomy, numbers: Callable[[str], list[int]], *, theirs: bool) -> None:
        self._base, self._model, self._numbers, self._theirs = base, model, numbers, theirs

    def __call__(self, prompts: Sequence[str]) -> F64:
        ids = [self._numbers(p) for p in prompts]
        name = self._model.find("embed")
        assert name is not None
        embed, layers = self._base.tensors[name], self._model.layers
        used = sorted({i for one in ids for i in one})
        if not used or used[-1] >= embed.shape[0]:
            raise CheckpointError(
                f"{self._base.ref}: the tokenizer gives tokens {used[-3:]}, and {name} has {embed.shape[0]} rows"
            )
        with Reader([self._base]) as reader:
            rows = reader.read(Rows((embed,), np.array(used))).astype(np.float64)
            norms = [self._model.find("mlp_norm", i) for i in range(layers)]
            gains = [np.ones(1) if n is None else reader.read(self._base.tensors[n]).astype(np.float64) for n in norms]
        if self._theirs:
            total = sum(rows[np.searchsorted(used, one)].sum(axis=0) for one in ids)
            return np.repeat((total / max(np.linalg.norm(total), 1e-8))[None], layers, axis=0)
        if norms[0] is not None:
            eps = float(self._base.config.get("rms_norm_eps", 1e-6))
            rows /= np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + eps)
        mean = np.mean([rows[np.searchsorted(used, one)].mean(axis=0) for one in ids], axis=0)
        plus = 1.0 if self._model.arch.plus_one else 0.0
        return np.stack([mean * (gain + plus) for gain in gains])
